"""Suite files: every value means what is written, and what is wrong is said with the file, the task and the field."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram.evaluation.classifiers import candidates
from gengram.evaluation.suite import (
    CLASSIFIERS,
    METRICS,
    ClassificationTask,
    FineTuningOptions,
    LikelihoodTask,
    Suite,
    VariantTask,
)
from gengram.evaluation.suite_files import BUILT_IN, read_suite
from gengram.support.errors import InputError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def suite_of(tmp_path: Path, text: str) -> Suite:
    (tmp_path / "mine.yaml").write_text(text)
    return read_suite(tmp_path / "mine.yaml")


def task_of(tmp_path: Path, fields: str):
    (task,) = suite_of(tmp_path, f"tasks: [{{{fields}}}]\n").tasks
    return task


def test_suites_of_the_package_are_valid():
    names = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    assert names == ["likelihood", "regulatory", "variants"]
    for name in names:
        suite = read_suite(name)
        assert suite.name == name and suite.description and suite.tasks


def test_metrics_and_classifiers_are_the_ones_that_there_are():
    from gengram.evaluation import metrics

    assert tuple(metrics.METRICS) == METRICS
    assert all(candidates(kind, 0, is_sparse=False) for kind in CLASSIFIERS)


def test_a_suite_of_a_file(tmp_path):
    suite = suite_of(
        tmp_path,
        "name: mine\ndescription: >-\n  two\n  lines\n\n  and one\n"
        "tasks:\n- {name: a, train: x.csv, fold: fold, protocols: [linear, linear], metric: auc}\n",
    )
    assert (suite.name, suite.description) == ("mine", "two lines\nand one")
    assert suite.tasks == (ClassificationTask("a", "x.csv", fold="fold", protocols=("linear",), metric="auc"),)


def test_values_are_what_is_written(tmp_path):
    """YAML 1.1 would read these as false, 8, 1.0, a date, true, 12 * 60 + 30, and a word."""
    task = task_of(tmp_path, "name: 2020-01-01, kind: variants, variants: 010, fasta: on, label: 12:30, positive: no")
    assert task == VariantTask("2020-01-01", "010", "on", label="12:30", positive="no")
    task = task_of(tmp_path, "name: 1, train: {no: no.fa, 010: 010.fa}, test: x, fine_tuning: {learning_rate: 3e-4}")
    assert task.train == {"no": "no.fa", "010": "010.fa"} and task.fine_tuning == {"learning_rate": 0.0003}
    task = task_of(tmp_path, "name: a, train: x, fold: f, test: null, most_train: ~, both_strands: false")
    assert (task.test, task.most_train, task.both_strands) == (None, None, False)
    task = task_of(tmp_path, "name: a, kind: likelihood, dataset: d, examples: 10, test: '~'")
    assert task == LikelihoodTask("a", "d", examples=10, test="~")
    task = task_of(tmp_path, "name: a, kind: variants, variants: v, fasta: f, positive: 1.0, negative: 0")
    assert (task.positive, task.negative) == ("1", "0")


def test_tasks_may_share_fields(tmp_path):
    suite = suite_of(
        tmp_path,
        "tasks:\n- &first {name: a, train: x, test: y, fine_tuning: &few {epochs: 1}}\n"
        "- {<<: *first, name: b, fine_tuning: {<<: *few, batch_size: 4}}\n",
    )
    assert [task.fine_tuning for task in suite.tasks] == [{"epochs": 1.0}, {"epochs": 1.0, "batch_size": 4}]
    assert suite.tasks[1].train == "x"


BAD_TASKS = [
    ("name: a, train: x", "'a': expected exactly one of test and fold"),
    ("name: a, train: x, test: y, fold: z", "'a': expected exactly one of test and fold"),
    ("name: a, test: x", "'a': lacks train"),
    ("train: x, test: y", "task 1: lacks name"),
    ("name: a, train: x, test: y, protocol: [z]", "unknown fields: 'protocol' (nearest: 'protocols'); known are name"),
    ("name: a, train: x, test: y, !!int 1: z", "unknown fields: '1'"),
    ("name: a, train: x, test: y, metric: f1", "expected a metric of"),
    (
        "name: a, train: x, test: y, metric: [auc]",
        "task 'a': metric: expected text without control characters, got ['auc']",
    ),
    ("name: a, train: x, test: y, protocols: linear", "protocols: expected a list, as [A, B], got 'linear'"),
    ("name: a, train: x, test: y, protocols: []", "protocols: expected a list"),
    ("name: a, train: x, test: y, protocols: [[a]]", "protocols: expected text"),
    (
        "name: a, train: x, test: y, classifiers: [forest]",
        "expected classifiers of ('logistic', 'mlp', 'xgboost'), got",
    ),
    ("name: a, train: x, test: y, most_train: 1", "most_train must be 2 or more, got 1"),
    ("name: a, train: x, test: y, most_train: 1.5", "most_train: expected a whole number, got '1.5'"),
    ("name: a, train: x, test: y, most_train: " + "9" * 6000, "most_train: expected a whole number"),
    ("name: a, train: x, test: y, both_strands: 1", "both_strands: expected true or false, got '1'"),
    ("name: a, train: x, test: y, label: sequence", "expected two columns, got 'sequence' as sequence and label"),
    ("name: a, train: {}, test: y", "train: expected a file, {CLASS: FASTA, ...} or {repo: ..., split: ...}, got {}"),
    ("name: a, train: {a: [x]}, test: y", "train: expected a file"),
    ("name: a, train: [x], test: y", "train: expected text"),
    ("name: a, train: '', test: y", "train: expected text"),
    ("name: a, train: x, test: y, fine_tuning: 3", "fine_tuning: expected options, as {epochs: 3}, got '3'"),
    (
        "name: a, train: x, test: y, fine_tuning: {epoch: 3}",
        "unknown options of fine_tuning: 'epoch' (nearest: 'epochs')",
    ),
    ("name: a, train: x, test: y, fine_tuning: {batch_size: 8.0}", "batch_size: expected a whole number, got '8.0'"),
    ("name: a, train: x, test: y, fine_tuning: {bf16: 1}", "fine_tuning: bf16: expected true or false, got '1'"),
    ("name: a, train: x, test: y, fine_tuning: {epochs: .nan}", "epochs: expected a number, got '.nan'"),
    ("name: a, train: x, test: y, fine_tuning: {epochs: nan}", "epochs must be above 0, got nan"),
    ("name: a, train: x, test: y, fine_tuning: {learning_rate: -1}", "learning_rate must be above 0, got -1.0"),
    ("name: a, train: x, test: y, fine_tuning: {learning_rate: 1e400}", "learning_rate must be above 0, got inf"),
    ("name: a, train: x, test: y, fine_tuning: {pooling: middle}", "expected a pooling of"),
    ("name: a, kind: other", "expected a kind of ['classification', 'variants', 'likelihood'], got 'other'"),
    ("name: a, kind: [variants]", "expected a kind of"),
    ('name: "a\\e[2J", train: x, test: y', "name: expected text without control characters, got 'a\\x1b[2J'"),
    ('name: "\\ud800", train: x, test: y', "name: expected text without control characters"),
    (
        "name: a, kind: variants, variants: v, fasta: f, metric: mcc",
        "expected a metric of ('auc', 'auprc'), got 'mcc'",
    ),
    ("name: a, kind: variants, variants: v, fasta: f, flank: 0", "flank must be 1 or more, got 0"),
    (
        "name: a, kind: variants, variants: v, fasta: f, negative: 1.0",
        "expected positive and negative to differ, got '1'",
    ),
    ("name: a, kind: variants, variants: v, fasta: {a: f}", "fasta: expected text"),
    ("name: a, kind: likelihood, dataset: d, metric: auc", "expected a metric of ('bits_per_base',), got 'auc'"),
    ("name: a, kind: likelihood, dataset: d, examples: 0", "examples must be 1 or more, got 0"),
]


@pytest.mark.parametrize("fields, message", BAD_TASKS)
def test_bad_tasks_are_said_with_file_task_and_field(fields, message, tmp_path):
    with pytest.raises(InputError) as error:
        task_of(tmp_path, fields)
    found = str(error.value)
    assert found.startswith(f"{tmp_path / 'mine.yaml'}: task ") and message in found and found.isprintable()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty, expected a YAML file"),
        ("name: x\n", "expected name, description and a list of tasks"),
        ("tasks: {}\n", "expected name, description and a list of tasks"),
        ("- tasks\n", "expected name, description and a list of tasks"),
        ("tasks: [x]\n", "task 1: expected its fields, got 'x'"),
        ("tasks: &a [*a]\n", "task 1: expected its fields"),
        ("task: [x]\ntasks: [{name: a, train: x, test: y}]\n", "unknown fields: 'task' (nearest: 'tasks')"),
        ("tasks: [{name: a, train: x, test: y}, {name: a, train: x, test: y}]\n", "two tasks have the same name: 'a'"),
        ("name: [a]\ntasks: [{name: a, train: x, test: y}]\n", "name and description: expected text"),
        ("description: {a: b}\ntasks: [{name: a, train: x, test: y}]\n", "name and description: expected text"),
        ('description: "\\e[2J"\ntasks: [{name: a, train: x, test: y}]\n', "name and description: expected text"),
        ("tasks:\n- {name: a, train: x,\n   train: z, test: y}\n", "line 3: expected YAML, got the key 'train' twice"),
        ("tasks: [}\n", "line 1: expected YAML, got "),
        ("tasks: !!python/object:os.system x\n", "line 1: expected YAML, got could not determine a constructor"),
        ("tasks: !!int x\n", "expected YAML, got "),
        ("[" * 20_000, "expected YAML, got maximum recursion depth"),
        ("tasks:\n- {? [a] : b}\n", "line 2: expected YAML, got found unhashable key"),
        ("a\0b", "expected YAML as text, got bytes that are not text (NUL)"),
        (POINTER, "this is a Git LFS pointer"),
    ],
)
def test_bad_files_are_said_with_their_name(text, message, tmp_path):
    with pytest.raises(InputError) as error:
        suite_of(tmp_path, text)
    found = str(error.value)
    assert found.startswith(str(tmp_path / "mine.yaml")) and message in found and found.isprintable()


def test_text_that_is_not_utf8_is_said_with_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"tasks: \xff\xfe\xff")
    with pytest.raises(InputError, match=r"mine\.yaml: expected YAML"):
        read_suite(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["regulatry", "../suites/regulatory", "/etc/passwd.yaml", "\x1b[2J", "", "."])
def test_a_name_is_one_of_the_package_or_a_file(name):
    with pytest.raises(FileNotFoundError, match="one of likelihood, regulatory, variants") as error:
        read_suite(name)
    assert str(error.value).isprintable()


def test_options_from_python_are_checked_too():
    with pytest.raises(InputError, match="epochs must be of type float, got '3'"):
        FineTuningOptions(epochs="3")
    with pytest.raises(InputError, match="batch_size must be of type int, got True"):
        FineTuningOptions(batch_size=True)
    with pytest.raises(InputError, match="patience must be 1 or more, got an integer of"):
        FineTuningOptions(patience=10**5000)
    with pytest.raises(InputError, match="label_smoothing must be 0 or more and below 1, got 1"):
        FineTuningOptions(label_smoothing=1)


def nested(leaves):
    keys = st.sampled_from([*ClassificationTask.__dataclass_fields__, *VariantTask.__dataclass_fields__, "kind", "x"])
    return st.lists(leaves, max_size=3) | st.dictionaries(keys, leaves, max_size=6)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["variants", "likelihood", "auc", "frozen", "a.csv"]),
    nested,
    max_leaves=12,
)  # fmt: skip
TASKS = st.fixed_dictionaries({"name": st.just("a"), "train": VALUES}, optional={"test": VALUES, "kind": VALUES})


def fuzz_suites(examples: int, folder: Path) -> None:
    suites = st.fixed_dictionaries({"tasks": st.lists(TASKS | VALUES, max_size=2)}, optional={"name": VALUES}) | VALUES
    texts = suites.map(yaml.dump) | st.text(max_size=60) | st.text("{}[]:,-&*!? \n\"'abtasks", max_size=60)
    mutated = st.tuples(texts, st.integers(0, 60), st.text(max_size=2)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
    )
    path = folder / "mine.yaml"

    @settings(max_examples=examples, deadline=None)
    @given(texts | mutated)
    def check(text):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            suite = read_suite(path)
        except InputError as error:
            assert str(path) in str(error) and str(error).isprintable()
            return
        loaded = yaml.load(path.read_bytes(), yaml.BaseLoader)  # what a strict reader refuses is not accepted
        assert len(loaded["tasks"]) == len(suite.tasks)
        assert all(task.name.isprintable() for task in suite.tasks)

    check()


def test_some_mutated_suites(tmp_path):
    fuzz_suites(200, tmp_path)


@pytest.mark.slow
def test_ten_thousand_mutated_suites(tmp_path):
    fuzz_suites(10_000, tmp_path)
