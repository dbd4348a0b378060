import pytest

from gengram.evaluation.suite import BUILT_IN, METRICS, ClassificationTask, read_suite


def test_suites_of_the_package_are_valid():
    names = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    assert names == ["likelihood", "regulatory", "variants"]
    for name in names:
        suite = read_suite(name)
        assert suite.name == name and suite.description and suite.tasks


def test_metrics_are_the_ones_that_are_computed():
    from gengram.evaluation import metrics

    assert tuple(metrics.METRICS) == METRICS


def test_a_suite_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntasks:\n- {name: a, train: x.csv, fold: fold, protocols: [linear], metric: auc}\n")
    (task,) = read_suite(path).tasks
    assert task == ClassificationTask("a", "x.csv", fold="fold", protocols=("linear",), metric="auc")


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x\n", "expected name, description and a list of tasks"),
        ("tasks: [{name: a, train: x}]\n", "exactly one of test and fold"),
        ("tasks: [{name: a, test: x}]\n", "'a' lacks train"),
        ("tasks: [{name: a, train: x, test: y, protocol: [z]}]\n", "did you mean 'protocols'"),
        ("tasks: [{name: a, train: x, test: y, metric: f1}]\n", "expected a metric of"),
        ("tasks: [{name: a, train: x, test: y, fine_tuning: {learning_rate: 3e-4}}]\n", "YAML reads 3e-4 as a word"),
        (
            "tasks: [{name: a, train: x, test: y, fine_tuning: {batch_size: 8.0}}]\n",
            "batch_size must be of type int",
        ),
        ("tasks: [{name: a, train: x, test: y, fine_tuning: {bf16: 1}}]\n", "bf16 must be of type bool, got 1"),
        ("tasks: [{name: a, kind: other}]\n", "expected a task with a kind of"),
        ("tasks: [{name: a, train: x, test: y}, {name: a, train: x, test: y}]\n", "same name"),
    ],
)
def test_bad_suites_are_clear_errors(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_suite(path)


def test_an_unknown_suite_names_those_that_there_are():
    with pytest.raises(FileNotFoundError, match="one of likelihood, regulatory, variants"):
        read_suite("regulatry")
