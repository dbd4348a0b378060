"""Rows of classification tasks that cannot be used: an error with task and file, or a line in the report."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from small_benches import labelled, quick_results, random_sequence, run_suite, write_table  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_results")


@pytest.mark.parametrize("protocol", ["baseline-kmer", "baseline-kmer-xgboost", "baseline-positional"])
@pytest.mark.parametrize(
    "train, message",
    [
        ({"a": 20, "c": 1}, "expected 2 training rows or more of each class, got 1 of 'c'"),
        ({"a": 20}, "expected two classes or more, got 'a'"),
        ({"a": 1}, "expected two classes or more, got 'a'"),
    ],
)
def test_too_few_rows_of_a_class_are_an_error_with_task_and_file(protocol, train, message, tmp_path, capsys):
    write_table(tmp_path / "train.csv", labelled(train))
    write_table(tmp_path / "test.csv", labelled({"a": 3}, seed=1))
    code, error = run_suite(tmp_path, f"train: train.csv, test: test.csv, protocols: [{protocol}]", capsys)
    assert code == 1 and f"task 'it': {tmp_path}/train.csv: {message}" in error and error.count("\n") == 1


def test_a_class_that_no_training_row_has_is_an_error(tmp_path, capsys):
    write_table(tmp_path / "train.csv", labelled({"a": 9, "c": 9}))
    write_table(tmp_path / "test.csv", labelled({"a": 3, "g": 3}))
    code, error = run_suite(tmp_path, "train: train.csv, test: test.csv, protocols: [baseline-kmer]", capsys)
    assert code == 1 and f"{tmp_path}/test.csv: expected the classes of the training rows, 'a', 'c', got 'g'" in error


def test_a_rare_class_keeps_its_column(tmp_path, capsys):
    """It has two training rows: one to fit on and one to choose by. Every test row is told by its motif."""
    write_table(tmp_path / "train.csv", labelled({"a": 20, "c": 2, "g": 20}))
    write_table(tmp_path / "test.csv", labelled({"a": 5, "c": 5, "g": 5}, seed=1))
    fields = "train: train.csv, test: test.csv, protocols: [baseline-kmer, baseline-kmer-xgboost], metric: auc"
    assert run_suite(tmp_path, fields, capsys)[0] == 0
    for result in json.loads((tmp_path / "results" / "results.json").read_text()):
        assert result["metrics"]["auc"]["value"] > 0.9
        assert result["test_rows_of_classes"] == {"a": 5, "c": 5, "g": 5}


def test_classes_without_test_rows_are_reported_and_what_is_not_defined_is_null(tmp_path, capsys):
    write_table(tmp_path / "train.csv", labelled({"a": 9, "c": 9, "g": 9}))
    write_table(tmp_path / "test.csv", labelled({"a": 1}, seed=1))
    code, report = run_suite(tmp_path, "train: train.csv, test: test.csv, protocols: [baseline-kmer]", capsys)
    assert code == 0 and "| it | mcc | not defined |" in report
    assert "- it: no test rows of 'c', 'g'; AUC and AUPRC are means over the other classes." in report
    strict = json.loads((tmp_path / "results" / "results.json").read_text(), parse_constant=pytest.fail)
    assert strict[0]["metrics"]["auc"] == {"value": None, "low": None, "high": None}
    table = pd.read_parquet(tmp_path / "results" / "results.parquet").set_index("metric")
    assert np.isnan(table.loc["auc", "value"]) and table.loc["accuracy", "value"] == 1


@pytest.mark.parametrize(
    "folds, message",
    [
        (
            [0, 1],
            "expected each class in three folds or more (one to test, one to choose by, one to fit on), got 'a' in",
        ),
        ([0], "got 'a' in '0' only"),
    ],
)
def test_too_few_folds_are_an_error_with_task_and_file(folds, message, tmp_path, capsys):
    rows = [(*row, folds[index % len(folds)]) for index, row in enumerate(labelled({"a": 10, "c": 10}))]
    write_table(tmp_path / "all.csv", rows, "sequence,label,fold")
    code, error = run_suite(tmp_path, "train: all.csv, fold: fold, protocols: [baseline-kmer]", capsys)
    assert code == 1 and f"task 'it': {tmp_path}/all.csv, column 'fold': " in error and message in error


def test_a_class_in_two_folds_is_an_error_that_names_it(tmp_path, capsys):
    rows = [(*row, index % 5) for index, row in enumerate(labelled({"a": 10, "g": 10}))]
    rows += [(*row, index % 2) for index, row in enumerate(labelled({"c": 4}))]
    write_table(tmp_path / "all.csv", rows, "sequence,label,fold")
    code, error = run_suite(tmp_path, "train: all.csv, fold: fold, protocols: [baseline-kmer]", capsys)
    assert code == 1 and "got 'c' in '0', '1' only" in error


def test_folds_with_every_class_in_three_of_them_are_done(tmp_path, capsys):
    rows = [(*row, index % 5) for index, row in enumerate(labelled({"a": 10, "g": 10}))]
    rows += [(*row, f"{index % 3}.0") for index, row in enumerate(labelled({"c": 3}))]
    write_table(tmp_path / "all.csv", rows, "sequence,label,fold")
    fields = "train: all.csv, fold: fold, protocols: [baseline-kmer], metric: auc"
    assert run_suite(tmp_path, fields, capsys)[0] == 0
    (result,) = json.loads((tmp_path / "results" / "results.json").read_text())
    assert result["metrics"]["accuracy"]["value"] > 0.8 and len(result["details"]) == 5


def test_sequences_shorter_than_the_longest_kmer_are_counted(tmp_path, capsys):
    for name, seed in (("train", 0), ("test", 1)):
        generator = np.random.default_rng(seed)
        rows = [(random_sequence(generator, int(generator.integers(1, 6))), "ac"[i % 2]) for i in range(30)]
        write_table(tmp_path / f"{name}.csv", rows)
    fields = "train: train.csv, test: test.csv, protocols: [baseline-kmer, baseline-kmer-xgboost]"
    assert run_suite(tmp_path, fields, capsys)[0] == 0


def test_what_needs_one_length_is_refused_before_anything_is_run(tmp_path, capsys):
    write_table(tmp_path / "train.csv", [*labelled({"a": 9, "c": 9}), ("ACG", "a")])
    write_table(tmp_path / "test.csv", labelled({"a": 3, "c": 3}))
    code, error = run_suite(
        tmp_path, "train: train.csv, test: test.csv, protocols: [baseline-kmer, baseline-positional]", capsys
    )
    assert code == 1 and not list((tmp_path / "results" / "runs").iterdir())
    assert (
        "task 'it': one-hot positions need sequences of one length, got 3 to 32 bases. Leave baseline-positi" in error
    )


def test_a_draw_of_too_few_rows_names_the_run_and_its_files(tmp_path, capsys):
    write_table(tmp_path / "train.csv", labelled({"a": 9, "c": 9}))
    write_table(tmp_path / "test.csv", labelled({"a": 3, "c": 3}))
    fields = "train: train.csv, test: test.csv, protocols: [baseline-kmer], most_train: 3"
    code, error = run_suite(tmp_path, fields, capsys)
    assert code == 1 and re.search(
        rf"task 'it', baseline-kmer, seed 0 \({tmp_path}/train\.csv, {tmp_path}/test\.csv\): the 3 rows drawn", error
    )
