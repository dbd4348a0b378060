"""Results that are there before a run, and names that become files or reach a terminal."""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from small_benches import FIELDS, GOOD, quick_results, run_suite, write_variants  # noqa: F401

from gengram.cli import main
from gengram.evaluation.report import markdown, plot
from gengram.evaluation.run_files import json_text, read_run, without_nan, write_run
from gengram.evaluation.suite_files import read_suite

pytestmark = pytest.mark.usefixtures("quick_results")


def results_of(folder: Path, capsys) -> tuple[Path, dict]:
    """The file of the one run of a small task, and its result."""
    write_variants(folder, GOOD)
    assert run_suite(folder, FIELDS, capsys)[0] == 0
    (path,) = (folder / "results" / "runs").iterdir()
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{}",
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text[:-20],
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: re.sub(r'"value": 0\.\d', '"value": 0.9', text, count=1),
        lambda text: "[" * 100_000,
        lambda text: "9" * 10_000,
        lambda text: "\0",
        lambda text: json.dumps({"checksum": "0" * 64}),
    ],
)
def test_a_result_that_was_changed_is_refused_before_the_work(damage, tmp_path, capsys):
    path, _ = results_of(tmp_path, capsys)
    path.write_text(damage(path.read_text()))
    code, error = run_suite(tmp_path, FIELDS, capsys)
    assert code == 1 and error.startswith(f"error: {path}: expected the result of a run as `gengram bench` wrote it")
    assert "remove it to have the run done again" in error and error.count("\n") == 1
    path.unlink()
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 0


def test_a_pipe_or_a_folder_in_place_of_a_result_is_refused(tmp_path, capsys):
    path, _ = results_of(tmp_path, capsys)
    path.unlink()
    os.mkfifo(path)
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 1
    path.unlink()
    path.mkdir()
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 1


def test_other_data_under_the_same_name_are_another_run(tmp_path, capsys):
    path, before = results_of(tmp_path, capsys)
    write_variants(tmp_path, [(*row[:3], 1 - row[3]) for row in GOOD])
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 0
    (after,) = json.loads((tmp_path / "results" / "results.json").read_text())
    assert after["metrics"]["auc"]["value"] == pytest.approx(1 - before["metrics"]["auc"]["value"])
    assert len(list(path.parent.iterdir())) == 2


def test_another_metric_of_a_suite_is_shown_for_runs_of_before(tmp_path, capsys):
    results_of(tmp_path, capsys)
    code, report = run_suite(tmp_path, FIELDS + ", metric: auprc", capsys)
    assert code == 0 and "| it | auprc | " in report


def test_results_that_are_not_numbers_are_null(tmp_path):
    found = without_nan({"a": [float("nan"), 1.5, (float("inf"), None)], "b": {"c": "nan", "d": 3}})
    assert found == {"a": [None, 1.5, [None, None]], "b": {"c": "nan", "d": 3}}
    write_run(tmp_path / "run.json", found)
    assert read_run(tmp_path / "run.json") == found and read_run(tmp_path / "absent.json") is None
    with pytest.raises(ValueError):
        json_text({"a": float("nan")})


# Names


def test_names_of_tasks_stay_in_the_folder_and_in_their_cells(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    (tmp_path / "suite.yaml").write_text(
        "".join(
            ["tasks:\n"]
            + [
                f"- {{name: '{name}', {FIELDS}}}\n"
                for name in ("../../evil", "/etc/evil", "a|b", "$x^{$", "..", "long" * 100)
            ]
        )
    )
    words = ["bench", "--suite", str(tmp_path / "suite.yaml"), "--data", str(tmp_path), "--quiet"]
    assert main([*words, "--output", str(tmp_path / "in" / "results")]) == 0
    report = capsys.readouterr().out
    assert "| a\\|b | auc |" in report and "| ../../evil | auc |" in report
    assert len(list((tmp_path / "in" / "results" / "runs").iterdir())) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"genome.fa", "variants.csv", "suite.yaml", "in"}
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["results"]


def test_control_characters_of_tables_do_not_reach_the_terminal(tmp_path, capsys):
    write_variants(
        tmp_path, [(*row, "\x1b[2Jkind|" + str(i % 2)) for i, row in enumerate(GOOD)], "pos,ref,alt,label,kind"
    )
    code, report = run_suite(tmp_path, FIELDS + ", stratum: kind", capsys)
    assert code == 0 and "\x1b" not in report and r"| \x1b[2Jkind\|0 | 20 |" in report


def test_models_of_one_name_are_two_columns():
    suite = read_suite("variants")
    results = [
        {
            "task": "t",
            "metric": "auc",
            "model": model,
            "protocol": "zero-shot",
            "seed": 0,
            "details": {},
            "test_rows": 9,
        }
        | {"metrics": {"auc": {"value": value, "low": 0.1, "high": 0.9}}}
        for model, value in (("a/model", 0.2), ("b/model", 0.6), ("c/other", 0.4))
    ]
    report = markdown(suite, results)
    assert "| task | metric | a/model, zero-shot | b/model, zero-shot | other, zero-shot |" in report
    assert "| 0.200 (0.100 to 0.900) | **0.600** (0.100 to 0.900) | 0.400 (0.100 to 0.900) |" in report


def test_repeated_seeds_and_protocols_are_done_once(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    words = ["--seeds", "0, 0", "--protocols", "baseline-transversion, baseline-transversion"]
    assert run_suite(tmp_path, FIELDS, capsys, *words)[0] == 0
    assert len(json.loads((tmp_path / "results" / "results.json").read_text())) == 1


def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    """Matplotlib takes what is between two of them for a formula, and fails if it is none."""
    estimates = {"auc": {"value": 0.5, "low": None, "high": None}}
    result = {"task": "$x^{$", "metric": "auc", "model": "$\\frac$", "protocol": "linear", "metrics": estimates}
    undefined = result | {"protocol": "frozen", "metrics": {"auc": dict.fromkeys(("value", "low", "high"))}}
    plot(read_suite("variants"), [result, undefined], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_data_that_can_be_read_once_are_refused(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        code, error = run_suite(tmp_path, FIELDS.replace("genome.fa", name), capsys)
        assert code == 1 and "task 'it': " in error and "expected a file, got a folder, a pipe or a device" in error


def test_a_folder_that_prepare_did_not_write_is_said_so(tmp_path, capsys):
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    fields = "kind: likelihood, dataset: set, protocols: [baseline-markov-5]"
    code, error = run_suite(tmp_path, fields, capsys)
    assert code == 1 and f"task 'it': {tmp_path}/set: expected what `gengram prepare` wrote: " in error
    for name in ("train", "test"):
        pd.DataFrame({"text": ["ACGT"]}).to_parquet(tmp_path / "set" / "data" / f"{name}-00000-of-00001.parquet")
    code, error = run_suite(tmp_path, fields, capsys)
    assert code == 1 and "set: expected the splits 'test', 'train', 'validation', got 'train', 'test'" in error
    code, error = run_suite(tmp_path, fields + ", validation: train", capsys)
    assert code == 1 and "set, split 'test': expected examples with input_ids, got 1 with 'text'" in error
