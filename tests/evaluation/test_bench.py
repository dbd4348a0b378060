import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from gengram.cli import main
from gengram.data_preparation import SplitRule, WindowOptions, prepare_genome_dataset
from gengram.evaluation import bench as bench_module
from gengram.evaluation.protocols import KINDS
from gengram.evaluation.suite import with_fine_tuning
from gengram.evaluation.suite_files import read_suite
from gengram.support.errors import InputError


def random_sequence(generator: np.random.Generator, length: int) -> str:
    return "".join(generator.choice(list("ACGT"), length))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A set that a motif separates, variants, a genome whose bases follow from those before, and their suite."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    rows = []
    for label in [0, 1] * 60:
        sequence = random_sequence(generator, 40)
        rows.append((sequence[:18] + ("TATAAA" if label else "GCGCGC") + sequence[24:], label, len(rows) % 3))
    table = pd.DataFrame(rows, columns=["sequence", "label", "fold"])
    table[:80].to_csv(folder / "train.csv", index=False)
    pd.concat([table[80:], table[:4]]).to_csv(folder / "test.csv", index=False)
    table.to_csv(folder / "folds.csv", index=False)
    genome = random_sequence(generator, 200)
    (folder / "genome.fa").write_text(f">g\n{genome}\n")
    variants = [
        (i + 101, genome[i], "ACGT"["ACGT".index(genome[i]) ^ (1 + i // 10 % 3)], i // 10 % 2, ["far", "near"][i < 90])
        for i in range(0, 200, 10)
    ]
    variants.append((200, genome[99], "ACGT".replace(genome[99], "")[0], 1, "alone"))
    columns = ["pos", "ref", "alt", "label", "where"]
    pd.DataFrame(variants, columns=columns).to_csv(folder / "variants.csv", index=False)
    (folder / "repeats.fa").write_text("".join(f">{name}\n{'ACGTTGCA' * 40}\n" for name in ("a", "b", "c")))
    rules = [SplitRule("*:a", "train"), SplitRule("*:b", "validation"), SplitRule("*:c", "test")]
    prepare_genome_dataset([folder / "repeats.fa"], folder / "prepared", WindowOptions(40), rules, progress=False)
    (folder / "suite.yaml").write_text(
        """
name: small
tasks:
- {name: motif, train: train.csv, test: test.csv, metric: auc, protocols: [frozen, baseline-positional, baseline-kmer],
   classifiers: [logistic]}
- {name: folds, train: folds.csv, fold: fold, protocols: [linear]}
- {name: effects, kind: variants, variants: variants.csv, fasta: genome.fa, first_base: 101, flank: 12, stratum: where}
- {name: repeats, kind: likelihood, dataset: prepared}
"""
    )
    return folder


def test_a_suite_of_every_kind_and_what_it_leaves(data, tiny_folder, tmp_path, capsys, monkeypatch):
    words = ["bench", str(tiny_folder), "--suite", str(data / "suite.yaml"), "--data", str(data), "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    report = capsys.readouterr().out
    results = {(r["task"], r["protocol"]): r for r in json.loads((tmp_path / "results.json").read_text())}
    assert set(results) == {
        ("motif", "frozen"),
        ("motif", "baseline-positional"),
        ("motif", "baseline-kmer"),
        ("folds", "linear"),
        ("effects", "zero-shot"),
        ("effects", "baseline-transversion"),
        ("repeats", "likelihood"),
        ("repeats", "baseline-markov-5"),
        ("repeats", "baseline-markov-11"),
    }
    assert results["motif", "baseline-positional"]["metrics"]["auc"]["value"] > 0.99
    assert results["motif", "baseline-kmer"]["metrics"]["auc"]["value"] > 0.9
    assert results["motif", "frozen"]["metrics"]["auc"]["value"] > 0.8
    assert results["motif", "frozen"]["test_rows_in_train"] == 4
    assert results["folds", "linear"]["test_rows"] == 120
    assert results["repeats", "baseline-markov-5"]["metrics"]["bits_per_base"]["value"] < 0.2
    assert results["repeats", "likelihood"]["metrics"]["bits_per_base"]["value"] > 1
    strata = results["effects", "baseline-transversion"]["details"]["strata"]
    assert {kind: found["rows"] for kind, found in strata.items()} == {"alone": 1, "far": 11, "near": 9}
    assert strata["alone"]["positives"] == 1 and "auc" not in strata["alone"]
    variants = pd.read_csv(data / "variants.csv").query("where == 'far'")
    crossed = [(a in "AG") != (b in "AG") for a, b in zip(variants["ref"], variants["alt"], strict=True)]
    pairs = [
        (crossed[i] > crossed[j]) + 0.5 * (crossed[i] == crossed[j])
        for i in np.flatnonzero(variants["label"] == 1)
        for j in np.flatnonzero(variants["label"] == 0)
    ]
    assert strata["far"]["auc"]["value"] == pytest.approx(np.mean(pairs))
    assert "## effects, transversion, within each kind" in report and "| alone | 1 | 1 |" in report
    assert "4 of 44 test rows also stand in the training rows" in report
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert len(table) == 4 * 4 + 2 * 2 + 3
    assert (tmp_path / "report.svg").stat().st_size > 1000

    def fail(*arguments, **named):
        raise AssertionError("a run that is there was done again")

    stopped = {kind: dataclasses.replace(known, read=fail, run=fail) for kind, known in KINDS.items()}
    monkeypatch.setattr(bench_module, "KINDS", stopped)
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == report


def test_the_report_is_of_all_runs_that_are_still_those_of_the_suite(data, tiny_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    table = pd.read_csv(data / "test.csv")
    for name in ("train.csv", "test.csv", "genome.fa", "variants.csv"):
        shutil.copy(data / name, tmp_path / name)

    def run(*words: str) -> dict:
        (tmp_path / "suite.yaml").write_text(
            "tasks:\n"
            "- {name: motif, train: train.csv, test: test.csv, metric: auc, protocols: [linear, baseline-kmer]}\n"
            "- {name: effects, kind: variants, variants: variants.csv, fasta: genome.fa, first_base: 101, flank: 12}\n"
        )
        files = ["--suite", str(tmp_path / "suite.yaml"), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
        assert main(["bench", *words, *files, "--quiet"]) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert len({(r["task"], r["protocol"], r["model"], r["seed"]) for r in results}) == len(results)
        report = capsys.readouterr().out
        assert all(f"| {task} |" in report for task in {r["task"] for r in results})
        return {(r["task"], r["protocol"]): r for r in results}

    effects = {("effects", "zero-shot"), ("effects", "baseline-transversion")}
    motif = {("motif", "linear"), ("motif", "baseline-kmer")}
    before = run(str(folder))
    assert set(before) == effects | motif and next(iter(before))[0] == "motif"
    assert before["motif", "linear"]["loading"]["dtype"] == "float32"
    assert run("--tasks", "effects") == before == run(str(folder), "--protocols", "linear", "--tasks", "motif")
    assert run(str(folder), "--tasks", "effects", "--dtype", "bfloat16").keys() == effects | {
        ("motif", "baseline-kmer")
    }
    table.iloc[::-1].to_csv(tmp_path / "test.csv", index=False)
    assert run("--tasks", "effects").keys() == effects
    assert run(str(folder)).keys() == effects | motif
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("A\nC\n")  # of a model whose tokenizer has such a file
    assert run("--tasks", "motif").keys() == {("motif", "baseline-kmer"), ("effects", "baseline-transversion")}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks", "nothing"], "no task matches 'nothing'"),
        (["--protocols", "magic"], "task 'motif': unknown protocols 'magic'; it can do frozen, linear"),
        (["--protocols", "liner"], "'liner' (nearest: 'linear')"),
        (["--fine-tuning", "epoch=3"], "unknown options of fine_tuning: 'epoch' (nearest: 'epochs')"),
        (["--fine-tuning", "epochs"], "expected NAME=VALUE, got 'epochs'"),
        (["--fine-tuning", "epochs=1", "epochs=2"], "expected each name once, got 'epochs' twice"),
        (["--fine-tuning", "epochs=1e400"], "epochs must be above 0, got inf"),
        (["--fine-tuning", "epochs=" + "9" * 6000], "epochs must be of type float"),
        (["--seeds", "a"], "--seeds: expected whole numbers from 0 to 4294967295, separated by commas, got 'a'"),
        (["--seeds", "-1"], "--seeds: expected whole numbers"),
        (["--seeds", "4294967296"], "--seeds: expected whole numbers"),
        (["--data", "absent", "--tasks", "motif", "--protocols", "baseline-kmer"], "absent/train.csv: no such file"),
        (
            ["--data", "absent", "--tasks", "repeats"],
            "absent/prepared: expected the folder that `gengram prepare` wrote",
        ),
        (["--fine-tuning", "pooling=middle"], "expected a pooling of"),
        (["--fine-tuning", "learning_rate=high"], "learning_rate must be of type float, got 'high'"),
        (["--protocols", "frozen", "--tasks", "motif"], "nothing to run"),
    ],
)
def test_what_cannot_be_run_is_a_clear_error(words, message, data, tmp_path, capsys):
    common = ["bench", "--suite", str(data / "suite.yaml"), "--data", str(data), "--output", str(tmp_path), "--quiet"]
    assert main([*common, *words]) == 1
    assert message in capsys.readouterr().err


def test_names_of_models_that_no_report_can_hold_are_refused(data, tmp_path):
    model = bench_module.EvaluatedModel("a\udcff")
    with pytest.raises(InputError, match="names of models without control characters"):
        bench_module.bench(read_suite(data / "suite.yaml"), [model], data, tmp_path)


def test_libraries_are_looked_for_before_the_work(data, tmp_path, monkeypatch, capsys):
    found = bench_module.importlib.util.find_spec
    monkeypatch.setattr(
        bench_module.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "xgboost" else found(name, *rest),
    )
    words = ["bench", "--suite", str(data / "suite.yaml"), "--data", str(data), "--quiet", "--tasks", "motif"]
    words += ["--output", str(tmp_path), "--protocols", "baseline-positional,baseline-kmer-xgboost"]
    assert main(words) == 1
    assert "task 'motif', baseline-kmer-xgboost: needs xgboost: pip install 'gengram[eval" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


def test_help_names_the_suites_and_shows_a_file(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "likelihood, regulatory, variants" in text and "kind: variants" in text and "docs/evaluation.md" in text


def test_options_of_fine_tuning_on_the_command_line():
    suite = with_fine_tuning(read_suite("regulatory"), {"learning_rate": 3e-5, "bf16": True})
    assert {task.fine_tuning["learning_rate"] for task in suite.tasks} == {3e-5}
    assert suite.tasks[0].fine_tuning["epochs"] == read_suite("regulatory").tasks[0].fine_tuning["epochs"]
    assert with_fine_tuning(read_suite("variants"), {"epochs": 1}) == read_suite("variants")


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol, pooling, bidirectional",
    [("fine-tuned", "last", False), ("fine-tuned", "max", True), ("lora", "mean", False)],
)
def test_fine_tuning_learns_a_motif(protocol, pooling, bidirectional, data, tiny_folder, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "tasks: [{name: motif, train: train.csv, test: test.csv, metric: auc, "
        f"fine_tuning: {{epochs: 10, learning_rate: 0.003, batch_size: 8, lora_rank: 4, "
        f"pooling: {pooling}, bidirectional: {str(bidirectional).lower()}, label_smoothing: 0.1}}}}]"
    )
    words = ["bench", str(tiny_folder), "--suite", str(suite), "--data", str(data), "--quiet"]
    assert main([*words, "--output", str(tmp_path / "out"), "--protocols", protocol]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["metrics"]["auc"]["value"] > 0.8
    assert (result["details"]["pooling"], result["details"]["bidirectional"]) == (pooling, bidirectional)
