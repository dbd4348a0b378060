"""The fine-tuning scripts: how they label, weigh and measure; and each as a user runs it, on a tiny random model."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from example_scripts import load_example, run_example, run_script
from peft import AutoPeftModelForSequenceClassification
from tiny_models import tiny_config
from tolerances import FLOAT32_RELATIVE, SAME_FP32, SAME_MODEL_FP32
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.data_preparation import read_split_rules
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.annotation import read_transcripts

label_bases = load_example("fine_tuning/label_bases.py")
classify = load_example("fine_tuning/classify_sequences.py")
regress = load_example("fine_tuning/regress_sequences.py")

TOKENIZER = GengramTokenizer()
SAME = dict(rtol=0, atol=SAME_FP32)  # rows in batches of another size
CLASSES = ("other", "donor", "acceptor")


# Labels of windows


def random_sequence(generator, length: int) -> str:
    return "".join(generator.choice(list("AT"), length))  # C and G are where a gene has them


def write_genome(folder: Path, records: int = 3, genes: int = 4) -> None:
    """Records with genes of two exons on alternating strands, introns GTG...CAG, all else A and T."""
    generator = np.random.default_rng(0)
    fasta, gtf = [], []
    for record in range(records):
        text = ""
        for gene in range(genes):
            exon, intron, other = (random_sequence(generator, n) for n in (30, 24, 50))
            unit = exon + "GTG" + intron + "CAG" + exon[::-1]
            strand = "+-"[gene % 2]
            start = len(text) + 25
            for left, right in ((start, start + 30), (start + 60, start + 90)):
                gtf.append(
                    f'r{record}\tx\texon\t{left + 1}\t{right}\t.\t{strand}\t.\ttranscript_id "t{record}.{gene}";\n'
                )
            text += other[:25] + (unit if strand == "+" else reverse_complement(unit)) + other[25:]
        fasta.append(f">r{record} made\n{text.lower() if record == 0 else text}\n")
    (folder / "genome.fa").write_text("".join(fasta))
    (folder / "genes.gtf").write_text("".join(gtf))
    (folder / "splits.tsv").write_text(
        "pattern\tsplit\tstart\tend\n*:r1\tvalidation\t.\t.\n*:r2\ttest\t100\t.\n*:r2\t-\t.\t.\n*\ttrain\t.\t.\n"
    )


def windows_of(folder: Path, gtf: str = "genes.gtf", **options):
    arguments = label_bases.DataArguments(
        fasta=[str(folder / "genome.fa")], gtf=str(folder / gtf), splits=str(folder / "splits.tsv"), **options
    )
    rules, transcripts = read_split_rules(arguments.splits), read_transcripts(arguments.gtf)
    return label_bases.build_windows(arguments, rules, transcripts, TOKENIZER)


@pytest.fixture
def genome(tmp_path) -> Path:
    write_genome(tmp_path)
    return tmp_path


@pytest.mark.parametrize("window", [1000, 64, 7])
def test_sites_are_where_the_read_strand_spells_them(genome, window):
    """Every GTG starts with a donor and every CAG ends with an acceptor, at any window, on both strands."""
    for name, data in windows_of(genome, labels="splice", window=window).items():
        read: dict[tuple[str, str], dict[int, tuple[str, int]]] = {}
        for index, place in enumerate(data.windows):
            example = data[index]
            text = TOKENIZER.decode(example["input_ids"]).upper()
            assert len(text) == len(example["labels"]) == place.end - place.start
            found = zip(data.positions_of(place).tolist(), text, example["labels"], strict=True)
            read.setdefault((place.record, place.strand), {}).update({p: (base, label) for p, base, label in found})
        assert len(read) == 2
        for (_, strand), bases in read.items():
            order = sorted(bases, reverse=strand == "-")
            text, labels = "".join(bases[p][0] for p in order), np.array([bases[p][1] for p in order])
            donors = [i for i in range(len(text)) if text.startswith("GTG", i)]
            acceptors = [i + 2 for i in range(len(text)) if text.startswith("CAG", i)]
            assert np.flatnonzero(labels == 1).tolist() == donors, (name, strand)
            assert np.flatnonzero(labels == 2).tolist() == acceptors, (name, strand)
            assert len(donors) == len(acceptors) >= 1


def test_a_split_has_its_bases_only(genome):
    data = windows_of(genome, labels="exon", window=50, stride=20)
    places = {name: {(w.record, w.start >= 100) for w in found.windows} for name, found in data.items()}
    assert {record for record, _ in places["train"]} == {"r0"} and places["test"] == {("r2", True)}
    assert {w.end - w.start for w in data["train"].windows} == {50, 40}  # 560 bases
    forward = [w.start for w in data["train"].windows if w.strand == "+"]
    assert forward[:3] == [0, 20, 40]
    assert {w.strand for w in windows_of(genome, both_strands=False)["train"].windows} == {"+"}


def test_gaps_are_left_out_and_names_must_fit(genome):
    text = (genome / "genome.fa").read_text().splitlines()
    text[1] = text[1][:40] + "n" * 30 + text[1][70:]
    (genome / "genome.fa").write_text("\n".join(text))
    assert [(w.start, w.end) for w in windows_of(genome, both_strands=False)["train"].windows] == [(0, 40), (70, 560)]
    lines = (genome / "genes.gtf").read_text().splitlines()
    (genome / "other.gtf").write_text("\n".join("ch" + line for line in lines))
    with pytest.raises(ValueError, match=r"same names in FASTA and GTF, got \['r0', 'r1', 'r2'\] and \['ch"):
        windows_of(genome, "other.gtf")
    (genome / "splits.tsv").write_text("pattern\tsplit\n*\ttrain\n")
    with pytest.raises(ValueError, match=r"got none of \['validation', 'test'\]"):
        windows_of(genome)


def test_tokens_of_several_bases_are_refused(genome):
    data = windows_of(genome)["train"]
    data.tokenizer = lambda text, add_special_tokens: {"input_ids": [0] * (len(text) // 6)}
    with pytest.raises(ValueError, match="one token per base"):
        data[0]


# Loss and metrics


@pytest.mark.parametrize("power, expected", [(0.0, [1, 1]), (1.0, [0.5 / 0.9, 0.5 / 0.1]), (0.5, None)])
def test_weights_of_rare_classes(power, expected):
    weights = label_bases.WeightedLoss(np.array([900, 100]), power).weights
    if expected is None:
        expected = [0.25 * 2.5, 0.75 * 2.5]  # the roots are as 3 to 1
        assert (weights[1] / weights[0]).item() == pytest.approx(3)
    else:
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert (0.9 * weights[0] + 0.1 * weights[1]).item() == pytest.approx(1)


def test_loss_is_a_mean_over_labelled_bases_however_it_is_accumulated():
    loss = label_bases.WeightedLoss(np.array([5, 3, 2]), 1.0)
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 6, 3, generator=generator), torch.randint(3, (4, 6), generator=generator)
    labels[1, 3:] = -100
    whole = loss({"logits": logits}, labels)
    parts = sum(loss({"logits": logits[i : i + 2]}, labels[i : i + 2], torch.tensor(21)) for i in (0, 2))
    torch.testing.assert_close(whole, parts)
    chosen = labels != -100
    by_hand = -logits.log_softmax(-1)[chosen, labels[chosen]] * loss.weights[labels[chosen]]
    torch.testing.assert_close(whole, by_hand.mean())


def test_overlapping_windows_are_averaged_and_measured(genome):
    data = windows_of(genome, labels="splice", window=60, stride=25)["test"]
    probabilities = np.zeros((len(data), 60, 3), dtype=np.float32)
    seen = {}
    for row, window in enumerate(data.windows):
        for column, position in enumerate(data.positions_of(window).tolist()):
            probabilities[row, column] = np.eye(3)[data.labels_of(window)[column]] + row
            seen.setdefault((window.record, window.strand, position), []).append(row)
    table = label_bases.table_of_bases(data, probabilities, CLASSES)
    assert list(zip(table.record, table.strand, table.position, strict=True)) == sorted(seen)
    expected = [np.mean(seen[key]) for key in sorted(seen)]
    np.testing.assert_allclose(table.probability_donor - (table.label == 1), expected, rtol=FLOAT32_RELATIVE)

    table["probability_donor"] = (table.label == 1).astype(float)
    table["probability_acceptor"] = 0.5
    found = label_bases.evaluate(table, CLASSES)
    assert found["donor"]["auprc"] == found["donor"]["auc"] == found["donor"]["top_k"] == 1
    assert found["acceptor"]["auprc"] == pytest.approx(found["acceptor"]["share"])
    assert label_bases.evaluate(table.assign(label=0), CLASSES)["donor"]["auprc"] is None


def test_regression_metrics():
    targets = np.arange(20.0)
    found = regress.evaluate(targets, targets**3)
    assert found["spearman"].value == pytest.approx(1) and found["pearson"].value < 1 and found["r2"].value < 0
    assert regress.r_squared(targets, np.full(20, targets.mean())) == pytest.approx(0)
    noisy = regress.evaluate(targets, targets + np.random.default_rng(0).normal(size=20) * 5)
    assert all(estimate.low < estimate.value < estimate.high for estimate in noisy.values())


def test_regression_metrics_that_are_not_defined_are_nan():
    varied = np.arange(5.0)
    for targets, predictions in ((np.ones(5), varied), (np.ones(1), np.zeros(1))):
        assert all(np.isnan(found.value) for found in regress.evaluate(targets, predictions).values())
    found = regress.evaluate(varied, np.full(5, 2.0))
    assert np.isnan(found["pearson"].value) and np.isnan(found["spearman"].value) and found["r2"].value == 0
    with pytest.raises(ValueError, match="finite predictions, got others for 1 of 5 rows; has training diverged"):
        regress.evaluate(varied, np.array([1, 2, np.nan, 3, 4]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("ACGT\thigh\nACGT\t1\n", r"t\.tsv, line 2: expected a finite number in the column 'target', got 'high'\."),
        ("ACGT\t1\nACGT\tnan\nA\t\n", r"t\.tsv, line 3: .* got 'nan' \(and 1 more such rows\)"),
        ("ACGT\tinf\n", r"line 2: expected a finite number"),
        ("ACGT\t0,5\n", r"line 2: .* got '0,5'"),
        ("\t1\n", r"t\.tsv, line 2: expected a sequence, got an empty cell"),
        ("chr1:1-9\t1\n", r"t\.tsv, line 2: expected DNA"),
        ("ACGT\t1\t2\n", r"t\.tsv, line 2: expected 2 cells"),
        ("", r"t\.tsv: expected rows with a sequence and a number each, got none"),
    ],
)
def test_regression_tables_that_cannot_be_read(text, message, tmp_path):
    arguments = regress.DataArguments(train="", test="")
    path = tmp_path / "t.tsv"
    path.write_text("sequence\ttarget\nACGT\t1.5\nacgu\t-2e-3\n")
    assert regress.read_table(str(path), arguments).values.tolist() == [["ACGT", 1.5], ["ACGT", -0.002]]
    path.write_text("sequence\ttarget\n" + text)
    with pytest.raises(ValueError, match=message):
        regress.read_table(str(path), arguments)
    path.write_text("sequence\tactivity\nACGT\t1\n")
    with pytest.raises(ValueError, match=r"columns 'sequence', 'target', got 'sequence', 'activity'"):
        regress.read_table(str(path), arguments)


@pytest.mark.parametrize("targets", [["1"], ["1", "1.0", "1e0"], ["1e308", "-1e308", "1e308"]])
def test_regression_targets_that_cannot_be_scaled(targets, tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("sequence\ttarget\n" + "".join(f"ACGT\t{target}\n" for target in targets))
    arguments = regress.DataArguments(train=str(path), test=str(path))
    with pytest.raises(ValueError, match=r"t\.tsv: expected two or more targets that differ"):
        regress.read_tables(arguments, seed=0)


def test_repeats_of_a_sequence_are_held_out_together():
    generator = np.random.default_rng(0)
    once = ["".join(generator.choice(list("ACGT"), 20)) for _ in range(40)]
    sequences = [*once, *map(reverse_complement, once), *once]
    found = regress.rows_held_out(sequences, seed=3)
    assert (found[:40] == found[40:80]).all() and (found[:40] == found[80:]).all() and found.sum() == 12
    assert not (found == regress.rows_held_out(sequences, seed=4)).all()
    assert regress.rows_held_out(once, seed=3).sum() == 4
    assert regress.rows_held_out(["ACG", "TTT"], seed=3).sum() == 1


@pytest.mark.slow
def test_labels_of_bases_do_not_depend_on_the_side_of_padding(model, tmp_path):
    write_genome(tmp_path)
    options = ["--fasta", tmp_path / "genome.fa", "--gtf", tmp_path / "genes.gtf", "--splits", tmp_path / "splits.tsv"]
    found = {}
    for side in ("right", "left"):
        shutil.copytree(model, tmp_path / side)
        GengramTokenizer(model_max_length=512, padding_side=side).save_pretrained(tmp_path / side)
        words = [*options, "--model", tmp_path / side, "--window", 170, "--max_steps", 1, "--learning_rate", 0]
        report = run("label_bases.py", tmp_path / f"of-{side}", *words)
        found[side] = report["metrics"], pd.read_parquet(tmp_path / f"of-{side}" / "predictions.parquet")
    assert found["right"][0] == found["left"][0]
    pd.testing.assert_frame_equal(found["right"][1], found["left"][1])


def test_classes_that_cannot_be_learned_are_said_with_their_file(tmp_path):
    path = tmp_path / "t.csv"
    arguments = classify.DataArguments(train=str(path), test=str(path))
    path.write_text("sequence,label\nA,x\nC,x\nG,y\n")
    with pytest.raises(ValueError, match=r"t\.csv: expected 2 training rows or more of each class, got 1 of 'y'"):
        classify.read_tables(arguments, seed=0)
    arguments.validation = str(path)
    assert classify.read_tables(arguments, seed=0)["train"].class_rows() == {"x": 2, "y": 1}
    path.write_text("sequence,label,family\nA,x,1\nC,y,1\nG,y,2\nT,x,1\n")
    arguments.validation, arguments.group_column = None, "family"
    with pytest.raises(ValueError, match=r"t\.csv: expected every class both among the groups"):
        classify.read_tables(arguments, seed=0)


def test_errors_are_one_line_and_metrics_that_are_not_defined_are_null(tmp_path, capsys):
    def fail():
        raise ValueError("t.csv, line 2: no")

    with pytest.raises(SystemExit, match=r"^error: t\.csv, line 2: no$"):
        classify.run_as_script(fail)
    classify.write_results(str(tmp_path), {"metrics": {"auc": float("nan")}}, pd.DataFrame({"a": [1]}))
    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail) == {
        "metrics": {"auc": None}
    }
    assert json.loads(capsys.readouterr().out) == {"auc": None}


def test_bidirectional_and_pooling_are_for_models_that_have_them(tmp_path, model):
    arguments = classify.ModelArguments(model=str(model), bidirectional=True, pooling="centre")
    config = classify.load_model(arguments, ["a", "b"])[0].config
    assert config.is_causal is False and config.classifier_pooling == "centre"
    arguments = regress.ModelArguments(model=str(model), pooling="max")
    assert regress.load_model(arguments, 0.0, 1.0)[0].config.classifier_pooling == "max"
    config = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    for script, rest in ((classify, (["a", "b"],)), (label_bases, (CLASSES,)), (regress, (0.0, 1.0))):
        with pytest.raises(ValueError, match="which a bert model does not have"):
            script.load_model(script.ModelArguments(model=str(tmp_path), bidirectional=True), *rest)
    for script, rest in ((classify, (["a", "b"],)), (regress, (0.0, 1.0))):
        with pytest.raises(ValueError, match="which a bert model does not have"):
            script.load_model(script.ModelArguments(model=str(tmp_path), pooling="mean"), *rest)


# As a user runs them


@pytest.mark.parametrize(
    "script, library", [("fine_tuning/classify_sequences.py", "sklearn"), ("analysis/splice_sites.py", "scipy")]
)
def test_without_the_extra_the_scripts_name_it_in_one_line(script, library, tmp_path, monkeypatch):
    message = f"No module named '{library}'"
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError({message!r}, name={library!r})")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    result = run_script(script, "--help")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.endswith(f"needs {library}: pip install -e '.[evaluation]' in the root of the repository\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GengramForCausalLM(tiny_config(initializer_range=0.05, bos_token_id=14, eos_token_id=12)).save_pretrained(folder)
    GengramTokenizer(model_max_length=512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Sequences that end in a motif or not, and the share of G in them."""
    folder = tmp_path_factory.mktemp("tables")
    generator = np.random.default_rng(0)
    for name, count in (("train", 160), ("test", 40)):
        rows = []
        for index in range(count):
            text = "".join(generator.choice(list("ACGT"), generator.integers(30, 50)))
            text = text[:-8] + "GATTACAA" if index % 2 else text
            rows.append({"sequence": text, "label": ["plain", "motif"][index % 2], "target": 50 + text.count("G")})
        pd.DataFrame(rows).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    return folder


def run(script: str, output: Path, *options: object) -> dict:
    options = ("--output_dir", output, "--num_train_epochs", 2, "--learning_rate", 5e-3, *options)
    result = run_example(f"fine_tuning/{script}", *options)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((output / "metrics.json").read_text())


@torch.no_grad()
def logits_of(model, texts) -> np.ndarray:
    """Row by row, so without padding."""
    tokenizer = TOKENIZER
    return np.stack([model.eval()(**tokenizer([text], return_tensors="pt")).logits[0].numpy() for text in texts])


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(-1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--lora", "--lora_memory", "--lora_experts")], ids=["full", "lora"])
def test_classification(options, model, tables, tmp_path):
    files = ("--model", model, "--train", tables / "train.tsv", "--test", tables / "test.tsv")
    report = run("classify_sequences.py", tmp_path, *files, *options)
    assert set(report["metrics"]) == {"auc", "auprc", "mcc", "accuracy"}
    assert report["metrics"]["auc"]["value"] > 0.8 and report["rows"] == {"train": 144, "validation": 16, "test": 40}

    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.config.id2label == {0: "motif", 1: "plain"}
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is GengramTokenizer
    test = pd.read_csv(tables / "test.tsv", sep="\t")
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    assert predictions.label.tolist() == test.label.tolist()
    columns = predictions[["probability_motif", "probability_plain"]].to_numpy()
    np.testing.assert_allclose(softmax(logits_of(saved, test.sequence)), columns, **SAME)
    if options:
        adapted = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2)
        np.testing.assert_allclose(softmax(logits_of(adapted, test.sequence)), columns, rtol=0, atol=SAME_MODEL_FP32)


@pytest.mark.slow
def test_regression(model, tables, tmp_path):
    files = ("--model", model, "--train", tables / "train.tsv", "--test", tables / "test.tsv")
    report = run("regress_sequences.py", tmp_path, *files, "--bidirectional")
    assert set(report["metrics"]) == {"pearson", "spearman", "r2"} and report["metrics"]["pearson"]["value"] > 0.5
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.config.problem_type == "regression" and saved.config.is_causal is False
    test = pd.read_csv(tables / "test.tsv", sep="\t")
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    logits = logits_of(saved, test.sequence)[:, 0]
    numbers = logits * saved.config.target_deviation + saved.config.target_mean
    np.testing.assert_allclose(numbers, predictions.predicted, rtol=0, atol=SAME_MODEL_FP32)
    np.testing.assert_allclose(test.target, predictions.target)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["splice", "exon"])
def test_labels_of_bases(labels, model, tmp_path):
    write_genome(tmp_path, records=6, genes=12)
    options = ("--fasta", tmp_path / "genome.fa", "--gtf", tmp_path / "genes.gtf", "--splits", tmp_path / "splits.tsv")
    options += ("--labels", labels, "--window", 200, "--stride", 100, "--bidirectional", "--num_train_epochs", 3)
    output = tmp_path / "output"
    report = run("label_bases.py", output, "--model", model, *options)
    for metrics in report["metrics"].values():
        assert metrics["auprc"] > 2 * metrics["share"] or labels == "exon"
    saved = AutoModelForTokenClassification.from_pretrained(output)
    assert tuple(saved.config.id2label.values()) == label_bases.LABELS[labels] and saved.config.is_causal is False

    table = pd.read_parquet(output / "predictions.parquet")
    data = windows_of(tmp_path, labels=labels, window=200, stride=100)["test"]
    assert len(table) == 2 * (len(data.sequences["r2"]) - 100)
    first = data.windows[0]  # its first 100 bases are in no other window
    text = data.sequences[first.record][first.start : first.end]
    columns = [f"probability_{name}" for name in label_bases.LABELS[labels]]
    found = table[(table.strand == "+") & (table.position < first.start + 100)][columns].to_numpy()
    np.testing.assert_allclose(softmax(logits_of(saved, [text])[0])[:100], found, **SAME)
