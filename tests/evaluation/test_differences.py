"""Differences of models on the same rows, against a bootstrap of the difference itself."""

import json
import shutil

import numpy as np
import pytest
from small_benches import labelled, quick_results, run_suite, write_table  # noqa: F401
from tolerances import FLOAT32_RELATIVE, FLOAT64_RELATIVE

from gengram.evaluation.differences import drawn_of, paired_differences
from gengram.evaluation.metrics import accuracy, evaluate

LABELS = np.arange(60) % 2


def run(model: str, seed: int = 0, labels: np.ndarray = LABELS, **changes) -> tuple[dict, np.ndarray]:
    """A result as a run leaves it, and its probabilities."""
    generator = np.random.default_rng([seed, *map(ord, model)])
    score = 1 / (1 + np.exp(-(labels - 0.5 + generator.standard_normal(len(labels)))))
    probabilities = np.stack([1 - score, score], 1)
    found = evaluate(labels, probabilities, ("accuracy",), samples=200)
    result = {"task": "it", "protocol": "frozen", "model": model, "seed": seed, "metric": "accuracy"}
    result |= {"metrics": {name: value.numbers() for name, value in found.items()}, **drawn_of(found, labels)}
    return {**result, **changes}, probabilities


def test_a_difference_is_that_of_the_means_over_seeds_with_a_paired_interval():
    runs = {(model, seed): run(model, seed) for model in ("one", "two") for seed in (0, 1)}
    (found,) = paired_differences([result for result, _ in runs.values()])

    def of(rows: np.ndarray) -> float:
        one, two = (
            np.mean([accuracy(LABELS[rows], runs[model, seed][1][rows]) for seed in (0, 1)])
            for model in ("one", "two")
        )
        return two - one

    generator = np.random.default_rng(0)
    drawn = [of(generator.integers(60, size=60)) for _ in range(200)]
    expected = [of(np.arange(60)), *np.percentile(drawn, [2.5, 97.5])]
    assert [found[name] for name in ("value", "low", "high")] == pytest.approx(expected, abs=FLOAT32_RELATIVE)
    assert (found["model"], found["reference"], found["metric"]) == ("two", "one", "accuracy")


def test_a_paired_interval_is_narrow_where_models_err_on_the_same_rows():
    one, probabilities = run("one")
    almost = probabilities.copy()
    almost[0] = probabilities[0, ::-1]
    found = evaluate(LABELS, almost, ("accuracy",), samples=200)
    two = {**one, "model": "two", "metrics": {name: value.numbers() for name, value in found.items()}}
    (row,) = paired_differences([one, two | drawn_of(found, LABELS)])
    own = one["metrics"]["accuracy"]
    assert abs(row["value"]) == pytest.approx(1 / 60, abs=FLOAT64_RELATIVE)
    assert row["high"] - row["low"] < 0.5 * (own["high"] - own["low"])


@pytest.mark.parametrize(
    "other",
    [
        run("two", labels=LABELS[::-1].copy())[0],
        run("two", labels=np.arange(40) % 2)[0],
        run("two", seed=3)[0],
        run("two", protocol="linear")[0],
        run("two", task="another")[0],
    ],
    ids=["other rows", "fewer rows", "another seed", "another protocol", "another task"],
)
def test_what_was_not_done_on_the_same_rows_is_not_compared(other):
    assert paired_differences([run("one")[0], other]) == []


def test_a_metric_that_is_not_defined_has_no_difference():
    undefined = {"value": None, "low": None, "high": None}
    runs = [run(model, metrics={"accuracy": undefined}, drawn={"accuracy": [None] * 5})[0] for model in ("one", "two")]
    assert [(row["value"], row["low"], row["high"]) for row in paired_differences(runs)] == [(None, None, None)]


def test_two_models_of_a_suite_are_compared(tiny_folder, tmp_path, capsys, quick_results):  # noqa: F811

    write_table(tmp_path / "train.csv", labelled({"a": 20, "c": 20}))
    write_table(tmp_path / "test.csv", labelled({"a": 10, "c": 10}, seed=1))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    fields = "train: train.csv, test: test.csv, protocols: [linear, baseline-kmer], metric: accuracy"
    code, report = run_suite(tmp_path, fields, capsys, str(tiny_folder), str(copy))
    assert code == 0
    (row,) = json.loads((tmp_path / "results" / "differences.json").read_text())
    assert (row["model"], row["reference"], row["protocol"]) == (str(copy), str(tiny_folder), "linear")
    assert (row["value"], row["low"], row["high"]) == (0, 0, 0)  # the same weights
    assert "| it | linear | copy | accuracy | +0.000 (+0.000 to +0.000) |" in report
    assert "drawn" not in (tmp_path / "results" / "results.json").read_text()
