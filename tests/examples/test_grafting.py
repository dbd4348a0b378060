"""The example that goes on with a model without a memory, as a method developer would run it."""

import json
import sys

import numpy as np
import pytest
from example_scripts import load_example
from tolerances import BITS_PER_BASE_FP32

from gengram.data_preparation import SplitRule, WindowOptions, prepare_genome_dataset

SCRIPT = "grafting/continue_pretraining.py"
ARMS = ("no memory", "memory", "memory, model frozen")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grafting")
    sequence = "".join(np.random.default_rng(0).choice(list("ACGT"), 3000))
    (folder / "a.fa").write_text(f">one\n{sequence}\n")
    rules = [SplitRule("*", "validation", 0, 600), SplitRule("*", "train")]
    prepare_genome_dataset([folder / "a.fa"], folder / "data", WindowOptions(60, packed=True), rules, progress=False)
    return folder / "data"


def test_all_arms_begin_alike_and_are_not_run_twice(dataset, tmp_path, monkeypatch, capsys):
    words = ["--output", tmp_path, "--dataset", dataset, "--seeds", 1, "--device", "cpu"]
    words += ["--start-steps", 2, "--steps", 4, "--evaluate-every", 2, "--figure", tmp_path / "curves.svg"]
    words += ["--report", tmp_path / "report" / "runs.json"]
    (tmp_path / "report").mkdir()
    monkeypatch.setattr(sys, "argv", ["continue_pretraining.py", *map(str, words)])
    script = load_example(SCRIPT)
    script.main()
    assert capsys.readouterr().out.count("seed 1") == 4
    runs = {run["arm"]: run for run in map(json.loads, map(lambda path: path.read_text(), tmp_path.glob("*.json")))}
    assert set(runs) == set(ARMS)
    for run in runs.values():
        assert [step for step, _ in run["curve"]] == [0, 2, 4]
        assert run["curve"][0][1] == pytest.approx(runs["no memory"]["curve"][0][1], abs=BITS_PER_BASE_FP32)
    memory, frozen, none = (runs[arm]["trained_parameters"] for arm in ("memory", "memory, model frozen", "no memory"))
    assert memory == frozen + none and frozen > 0
    assert len({run["curve"][-1][1] for run in runs.values()}) == 3
    assert "</svg>" in (tmp_path / "curves.svg").read_text()

    found = json.loads((tmp_path / "report" / "runs.json").read_text())
    difference = runs["memory"]["curve"][-1][1] - runs["no memory"]["curve"][-1][1]
    assert found["arms"]["memory"]["by_seed"] == [pytest.approx(difference)] and len(found["runs"]) == 3

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    script.main()
    assert "seed 1" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == before
