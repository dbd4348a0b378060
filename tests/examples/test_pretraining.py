"""The pretraining scripts, run as a lab would run them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, load_example, run_script
from tiny_models import tiny_model
from tolerances import BITS_PER_BASE_FP32

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramTokenizer
from gengram.cli import main
from gengram.data_preparation import SplitRule, WindowOptions, prepare_genome_dataset

TINY = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "memory_layers": [1],
    "memory_embedding_dim": 4,
    "memory_ngram_sizes": [1, 2, 3],
    "memory_window": 8,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Packed DNA in which the third base of every codon repeats the first."""
    folder = tmp_path_factory.mktemp("pretraining")
    generator = np.random.default_rng(0)
    codons = generator.choice(list("ACGT"), (3000, 2))
    sequence = "".join(first + second + first for first, second in codons)
    (folder / "a.fa").write_text(f">one\n{sequence}\n")
    rules = [SplitRule("*", "validation", 0, 1500), SplitRule("*", "train")]
    prepare_genome_dataset([folder / "a.fa"], folder / "data", WindowOptions(64, packed=True), rules, progress=False)
    return folder / "data"


def run(script: str, *words: str) -> str:
    done = run_script(f"pretraining/{script}", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def pretrain(dataset: Path, output: Path, *words: str, **changes) -> list[dict]:
    config = output.parent / f"{output.name}.json"
    config.write_text(json.dumps({**TINY, **changes}))
    common = ["--config", str(config), "--dataset", str(dataset), "--output_dir", str(output), "--report_to", "none"]
    common += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--logging_steps", "2"]
    run("pretrain.py", *common, "--eval_strategy", "steps", "--eval_steps", "100", "--disable_tqdm", "true", *words)
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_and_the_router_is_logged(dataset, tmp_path):
    whole = pretrain(dataset, tmp_path / "whole", "--max_steps", "6", "--save_steps", "4")
    logged = [line for line in whole if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    for line in logged:
        shares = np.array(line["router_tokens_per_expert"])  # (layers, experts)
        assert shares.shape == (2, 4) and np.allclose(shares.sum(1), 1)
        assert 0 < line["router_entropy_bits"] <= 2
        assert line["router_load_balancing_loss"] > 0 and line["router_z_loss"] >= 0
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["trained_tokens"] == 6 * 4 * 64

    checkpoint = tmp_path / "cut" / "checkpoint-4"
    checkpoint.parent.mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(checkpoint)
    pretrain(dataset, tmp_path / "cut", "--max_steps", "6", "--save_steps", "4")
    expected = GengramForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    found = GengramForCausalLM.from_pretrained(tmp_path / "cut").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.slow
def test_bits_per_base_are_those_of_the_evaluation(dataset, tmp_path):
    from gengram.cli import main

    log = pretrain(dataset, tmp_path / "model", "--max_steps", "200", num_local_experts=0)
    bits = [line["eval_bits_per_base"] for line in log if "eval_bits_per_base" in line]
    assert 4 / 3 < bits[-1] < 1.9  # a codon holds two free bases
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: [{name: bits, kind: likelihood, dataset: ., test: validation}]")
    words = ["--data", str(dataset), "--output", str(tmp_path / "out"), "--quiet", "--protocols", "likelihood"]
    assert main(["bench", str(tmp_path / "model"), "--suite", str(suite), *words]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["metrics"]["bits_per_base"]["value"] == pytest.approx(bits[-1], abs=BITS_PER_BASE_FP32)


@pytest.mark.slow
def test_the_masked_objective(dataset, tmp_path):
    words = ["--objective", "masked", "--max_steps", "60", "--streaming", "true"]
    log = pretrain(dataset, tmp_path / "model", *words, num_local_experts=0)
    assert log[-1]["eval_bits_per_base"] < 2.05
    assert type(GengramForMaskedLM.from_pretrained(tmp_path / "model")) is GengramForMaskedLM


@pytest.mark.slow
def test_masks_are_those_of_the_whole_run_after_a_cut_and_with_workers_and_the_same_in_every_evaluation(
    dataset, tmp_path
):
    words = ["--objective", "masked", "--max_steps", "6", "--save_steps", "5", "--per_device_train_batch_size", "32"]
    words += ["--logging_steps", "1", "--data_seed", "0"]  # an epoch has four steps
    evaluating = ["--eval_steps", "2", "--learning_rate", "0"]
    whole = pretrain(dataset, tmp_path / "whole", *words, num_local_experts=0)
    checkpoint = tmp_path / "cut" / "checkpoint-5"
    checkpoint.parent.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", checkpoint)
    (checkpoint.parent / "checkpoint-6").mkdir()  # cut off while it was written
    (checkpoint.parent / "checkpoint-6" / "trainer_state.json").write_text("{")
    cut = pretrain(dataset, tmp_path / "cut", *words, "--dataloader_num_workers", "2", num_local_experts=0)
    losses = {line["step"]: line["loss"] for line in whole if "loss" in line}
    assert len(set(losses.values())) == 6
    assert [line["loss"] for line in cut if "loss" in line] == [losses[6]]
    still = pretrain(dataset, tmp_path / "still", *words, *evaluating, num_local_experts=0)
    assert len({line["eval_bits_per_base"] for line in still if "eval_bits_per_base" in line}) == 1
    trained = [line["loss"] for line in still if "loss" in line]
    assert len(set(trained)) == 6


@pytest.mark.slow
def test_the_comparison_does_what_is_missing_and_reports(dataset, tmp_path):
    plan = {
        "base": {**TINY, "num_local_experts": 0},
        "architectures": {"dense": {}, "MoE": {"num_local_experts": 2}},
        "arms": {
            "memory": {},
            "baseline": {"memory_layers": []},
            "widened baseline": {"memory_layers": [], "intermediate_size": "as many parameters as memory"},
        },
        "ablations": {"architecture": "dense", "seeds": [1], "variants": {"window 3": {"memory_window": 3}}},
        "seeds": [1],
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ["--plan", str(tmp_path / "plan.json"), "--output", str(tmp_path / "out")]
    first = run("compare.py", *words, "--dataset", str(dataset))
    assert "7 of 7" in first and not (tmp_path / "out" / "models").exists()
    report, figure = tmp_path / "report.json", tmp_path / "figure.svg"
    again = run("compare.py", *words, "--dataset", str(dataset), "--report", str(report), "--figure", str(figure))
    assert " of 7" not in again and again.strip() in first
    rows = {(row["architecture"], row["arm"]): row for row in json.loads(report.read_text())["rows"]}
    assert set(rows) == {(a, arm) for a in ("dense", "MoE") for arm in plan["arms"]} | {("dense", "memory, window 3")}
    with_memory, wide = (rows["dense", arm]["parameters"] for arm in ("memory", "widened baseline"))
    assert abs(with_memory - wide) / with_memory < 0.05
    assert rows["dense", "memory"]["minus_memory"] == 0
    assert figure.stat().st_size > 1000
    shutil.copytree(dataset, tmp_path / "other")
    parquet = next((tmp_path / "other" / "data").glob("train-*"))
    shutil.copy(next((tmp_path / "other" / "data").glob("validation-*")), parquet)
    other = run_script("pretraining/compare.py", *words, "--dataset", str(tmp_path / "other"))
    assert other.returncode != 0 and "its runs are of another data set" in other.stderr
    words[-1] = str(tmp_path / "out-2")
    other = run_script("pretraining/compare.py", *words, "--dataset", str(tmp_path / "other"), "--done", str(report))
    assert other.returncode != 0 and "report.json: its runs are of another data set" in other.stderr


def test_the_interval_over_all_architectures_is_one_over_seeds(tmp_path):
    compare = load_example("pretraining/compare.py")
    plan = {
        "base": TINY,
        "architectures": {"a": {}, "b": {}},
        "arms": {"memory": {}, "baseline": {"memory_layers": []}},
        "seeds": [1, 2, 3],
        "training": {},
    }
    gains = {("a", 1): 0.01, ("a", 2): 0.02, ("a", 3): 0.03, ("b", 1): 0.03, ("b", 2): 0.04, ("b", 3): 0.05}
    for run_ in compare.planned_runs(plan):
        gain = gains[run_["architecture"], run_["seed"]] if run_["arm"] == "baseline" else 0.0
        counts = dict.fromkeys(("parameters", "parameters_used_per_token", "trained_tokens"), 1)
        result = {**run_, **counts, "bits_per_base": 1.9 + gain, "log": [{"step": 1, "loss": 1.0}]}
        (tmp_path / f"{compare.run_name(run_)}.json").write_text(json.dumps(result))
    pooled = compare.report(plan, tmp_path)["pooled"]["baseline"]
    assert pooled["pairs"] == pooled["above_memory"] == 6 and pooled["minus_memory"] == pytest.approx(0.03)
    # Means of the seeds are 0.02, 0.03, 0.04; t(0.975, 2) = 4.302653.
    assert pooled["half_width_95"] == pytest.approx(4.302653 * 0.01 / 3**0.5)


def test_arms_that_differ_in_a_number_are_a_curve(tmp_path):
    compare = load_example("pretraining/compare.py")
    plan = json.loads((EXAMPLES / "pretraining/comparisons/depth.json").read_text())
    bits = {"layer 1": 1.91, "window 6": 1.92, "memory": 1.93, "baseline": 1.94}
    for run_ in compare.tuning_runs(plan) + [{**each, "learning_rate": 0.0015} for each in compare.planned_runs(plan)]:
        found = bits.get(run_["arm"], 1.95) + 0.01 * run_["seed"] + (run_["learning_rate"] != 0.0015)
        counts = dict.fromkeys(("parameters", "parameters_used_per_token", "trained_tokens"), 1)
        result = {**run_, **counts, "bits_per_base": found, "log": [{"step": 1, "loss": 1.0}]}
        (tmp_path / f"{compare.run_name(run_)}.json").write_text(json.dumps(result))
    report = compare.report(plan, tmp_path)
    assert len(report["runs"]) == len(report["tuning"]) == 36
    compare.draw(report, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    _, axis = compare.pyplot().subplots()
    compare._draw_curve(axis, report, {}, "window (bases)")
    numbers, means = next(line.get_data() for line in axis.get_lines() if len(line.get_xdata()) == 4)
    assert list(numbers) == [6, 12, 21, 34] and list(means) == pytest.approx([1.94, 1.97, 1.95, 1.97])


@pytest.mark.slow
def test_a_comparison_that_was_cut_off_continues_where_it_was(dataset, tmp_path):
    training = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    plan = {
        "base": {**TINY, "num_local_experts": 0},
        "architectures": {"dense": {}, "Llama": {"host": "Llama"}},
        "arms": {"memory": {}, "no gate": {"memory_kind": "no gate"}},
        "seeds": [1],
        "training": {**training, "learning_rate": 1e-2},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ["compare.py", "--plan", str(tmp_path / "plan.json"), "--dataset", str(dataset), "--output"]
    run(*words, str(tmp_path / "whole"))

    work = tmp_path / "cut" / "work" / "dense--no_gate--1"
    work.parent.mkdir(parents=True)
    options = [word for name, value in plan["training"].items() for word in (f"--{name}", str(value))]
    pretrain(dataset, work, *options, "--data_seed", "1", "--seed", "1", num_local_experts=0, memory_kind="no gate")
    shutil.rmtree(work / "checkpoint-4")
    (work / "checkpoint-3").mkdir()  # cut off while it was written
    run(*words, str(tmp_path / "cut"))
    assert not work.exists()
    (tmp_path / "whole" / "models" / "dense--memory--1").mkdir(parents=True)  # kept by an earlier call
    kept = run(*words, str(tmp_path / "whole"), "--keep-models")
    assert "3 of 3" in kept and not (tmp_path / "whole" / "work" / "dense--no_gate--1").exists()
    names = {path.name for path in (tmp_path / "whole" / "models").rglob("*")}
    assert {"dense--no_gate--1", "model.safetensors"} <= names and not any("checkpoint" in name for name in names)
    for name in ("dense--no_gate--1", "dense--memory--1", "Llama--no_gate--1"):
        whole, cut = (json.loads((tmp_path / which / f"{name}.json").read_text()) for which in ("whole", "cut"))
        assert whole["bits_per_base"] == cut["bits_per_base"]
        assert whole["log"] == cut["log"] and [line["step"] for line in cut["log"]] == [1, 2, 3, 4]


def test_windows_of_exons_have_partners_of_the_same_letters_share_in_introns(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path
    texts = {name: list(generator.choice(list("ACGT"), 4000)) for name in ("one", "two")}
    exons = [(800, 900), (2000, 2100), (3960, 4000)]
    for text in texts.values():
        for start, end in exons:
            text[start:end] = generator.choice(list("GGGC"), end - start)
    texts["two"][2050] = "N"
    (folder / "genome.fa").write_text("".join(f">{name}\n{''.join(text)}\n" for name, text in texts.items()))
    parts = [(start, end, "exon") for start, end in exons] + [(900, 2000, "intron"), (2100, 3960, "intron")]
    lines = [f"{name}\t{start}\t{end}\t{kind}" for name in texts for start, end, kind in parts]
    (folder / "parts.bed").write_text("\n".join(lines) + "\n")
    files = ["--fasta", str(folder / "genome.fa"), "--bed", str(folder / "parts.bed"), "--output", str(folder / "out")]
    run("twins/exon_windows.py", *files, "--test", "two", "--length", "60")
    tables = {split: (folder / "out" / f"{split}.csv").read_text().split()[1:] for split in ("train", "test")}
    windows = {split: [row.split(",") for row in rows] for split, rows in tables.items()}
    # Each exon once, but for one that leaves the record on either record, and one that holds N.
    assert [label for _, label in windows["train"]] == ["1", "0"] * 2
    assert [label for _, label in windows["test"]] == ["1", "0"]
    whole = {name: "".join(text) for name, text in texts.items()}
    for split, name in (("train", "one"), ("test", "two")):
        for text, label in windows[split]:
            place = whole[name].index(text) + 30
            distance = min(abs(place - edge) for pair in exons for edge in pair)
            inside = any(start <= place < end for start, end in exons)
            assert inside == (label == "1")
            assert inside or distance >= 60


def test_differences_of_pairs_over_seeds(tmp_path):
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("ACGT"), 30)) for _ in range(90)]
    labels = [text.count("TA") > 1 for text in texts]
    for name, part in (("train", slice(60)), ("test", slice(60, 90))):
        rows = [f"{text},{int(label)}" for text, label in zip(texts[part], labels[part], strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    (tmp_path / "suite.yaml").write_text(
        "name: s\ntasks: [{name: TA, train: train.csv, test: test.csv, protocols: [frozen]}]\n"
    )
    folders, expected = [], []
    for seed in (1, 2):
        for kind, layers in (("baseline", []), ("memory", [1])):
            model = tiny_model(GengramForCausalLM, seed=seed, memory_layers=layers)
            model.save_pretrained(tmp_path / f"{kind}-{seed}")
            GengramTokenizer(model_max_length=48).save_pretrained(tmp_path / f"{kind}-{seed}")
        folders.append(str(tmp_path / f"probes-{seed}"))
        models = [str(tmp_path / f"{kind}-{seed}") for kind in ("baseline", "memory")]
        options = ["--suite", str(tmp_path / "suite.yaml"), "--data", str(tmp_path), "--output", folders[-1]]
        assert main(["bench", *models, *options, "--quiet", "--device", "cpu"]) == 0
        found = json.loads((tmp_path / f"probes-{seed}" / "results.json").read_text())
        values = {result["model"]: result["metrics"]["mcc"]["value"] for result in found}
        expected.append(values[models[1]] - values[models[0]])
    report, figure = tmp_path / "report.json", tmp_path / "figure.svg"
    table = run("twins/probe_differences.py", *folders, "--report", str(report), "--figure", str(figure))
    (row,) = json.loads(report.read_text())
    assert [pair["value"] for pair in row["pairs"]] == pytest.approx(expected)
    assert row["mean"] == pytest.approx(np.mean(expected))
    half = 12.7062047 * np.std(expected, ddof=1) / np.sqrt(2)  # Student's t of one degree of freedom
    assert row["half_width_95"] == pytest.approx(half)
    assert f"| {np.mean(expected):+.3f} ± {half:.3f} |" in table and figure.stat().st_size > 1000
