"""`gengram mutate`: every change beside whole windows in float64, dependencies beside plain passes, resumed runs."""

import doctest
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from effects_oracle import Oracle, reversed_complement
from foreign_models import bert, bert_classifier
from source_tree import ROOT
from tiny_models import tiny_model
from tolerances import FLOAT64_RELATIVE, LOG_LIKELIHOOD_FP32, SAME_MODEL_FP32
from transformers import AutoModelForCausalLM

from gengram import GengramForCausalLM, GengramForSequenceClassification, GengramTokenizer
from gengram.cli import main
from gengram.inference import dependencies, mutations
from gengram.inference.dependencies import DependencyModel
from gengram.inference.jobs import ModelOptions, Share, run_job
from gengram.inference.jobs.dependency import SCHEMA, dependency_job
from gengram.inference.jobs.mutate import mutate_job
from gengram.inference.jobs.region_tables import finished_table
from gengram.inference.jobs.tables import read_written, record_of_table
from gengram.inference.mutations import region_blocks, shared_window
from gengram.sequences.intervals import Interval

pytest.importorskip("pysam")

IDS = {letter: GengramTokenizer().get_vocab()[letter] for letter in "ACGTN"}


def random_bases(length, seed):
    return "".join(random.Random(seed).choices("ACGTacgt", k=length))


GENOME = {
    "chr1": random_bases(90, 1),
    "gaps": f"{random_bases(30, 2)}NNnR{random_bases(30, 3)}",
    "short": random_bases(12, 4),
    "one": "g",
}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in GENOME.items()))
    return path


SIZES = dict(max_position_embeddings=48, num_local_experts=0, num_hidden_layers=2, memory_layers=[0])


def saved(folder, model):
    model.save_pretrained(folder)
    GengramTokenizer(model_max_length=48).save_pretrained(folder)
    return ModelOptions(str(folder), device="cpu")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "tiny-model", tiny_model(GengramForCausalLM, **SIZES))


@pytest.fixture(scope="module")
def oracle(options):
    return Oracle(AutoModelForCausalLM.from_pretrained(options.model).double(), IDS)


@pytest.fixture
def mutated(fasta, options, tmp_path):
    """Rows that a job of these regions and options writes."""
    numbers = itertools.count()

    def run(*regions, make=mutate_job, **choices):
        job = make(fasta, tmp_path / f"{next(numbers)}.parquet", regions, **{"model": options, **choices})
        run_job(job, job.output)
        return read_written(job.output, SCHEMA if make is dependency_job else job.schema).to_pylist()

    return run


def read_as(letters):
    """Letters as a model reads them."""
    return "".join(letter if letter in "ACGT" else "N" for letter in letters.upper())


def window(sequence, start, end, context, deleted=0):
    """Where the window of neighbouring bases starts, and how long it is, by the documented rule."""
    size = min(context, len(sequence) - deleted)
    return min(max((start + end) // 2 - size // 2, 0), len(sequence) - size - deleted), size


def expected_llrs(oracle, sequence, place, alternative, block, context):
    """llr of either strand: whole windows of the changed and of the plain sequence."""
    first, size = window(sequence, *block, context, deleted=alternative == "-")
    changed = read_as(sequence[:place] + alternative.replace("-", "") + sequence[place + 1 :])[first : first + size]
    plain = read_as(sequence)[first : first + size]
    return [oracle.llr(turn(plain), turn(changed)) for turn in (str, reversed_complement)]


# ---- windows


@pytest.mark.parametrize(
    "length, context, start, end", [(90, 40, 3, 17), (90, 40, 80, 90), (12, 40, 0, 12), (90, 7, 5, 12)]
)
@pytest.mark.parametrize("deleted", [0, 1])
def test_windows_are_those_of_the_documented_rule(length, context, start, end, deleted):
    (block,) = region_blocks(start, end, context)
    first, last = shared_window(block, length, context, deleted)
    assert (first, last - first) == window("A" * length, start, end, context, deleted)
    assert 0 <= first <= start and min(end, length - deleted) <= last <= length - deleted


@pytest.mark.parametrize("module", [mutations, dependencies])
def test_examples_of_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_where_nothing_can_be_predicted_is_said_as_gengram_score_says_it(options, tmp_path):
    (tmp_path / "short.fa").write_text(">one\nG\n>two\nCA\n")
    job = mutate_job(tmp_path / "short.fa", tmp_path / "out.parquet", whole_genome=True, model=options, deletions=True)
    run_job(job, job.output)
    rows = read_written(job.output, job.schema).to_pylist()
    assert [(row["chrom"], row["pos"], row["alt"], row["status"]) for row in rows] == [
        *(("one", 1, base, "too_short") for base in "ACT"),
        *(("two", 1, base, "scored") for base in "AGT"),
        ("two", 1, "-", "too_short"),
        *(("two", 2, base, "scored") for base in "CGT"),
    ]
    assert all((row["llr"] is None) == (row["status"] == "too_short") for row in rows)
    (tmp_path / "same.csv").write_text("chrom,pos,ref,alt\none,1,G,A\ntwo,1,C,A\ntwo,1,CA,A\n")
    words = ["--fasta", tmp_path / "short.fa", "--model", options.model, "--output", tmp_path / "scores.tsv", "-q"]
    assert main(["score", str(tmp_path / "same.csv"), *map(str, words), "--scores", "llr", "--context", "48"]) == 0
    statuses = [line.split("\t")[-1] for line in (tmp_path / "scores.tsv").read_text().splitlines()[1:]]
    assert statuses == ["too_short", "scored", "too_short"]


def test_blocks_are_even_and_cover_the_region():
    assert [tuple(block) for block in region_blocks(5, 105, 48)] == [(5, 38), (38, 71), (71, 105)]
    assert [tuple(block) for block in region_blocks(5, 6, 48)] == [(5, 6)]


# ---- effects on the likelihood


@pytest.mark.parametrize("region", ["chr1:1-10", "1:81-90", "short", "gaps:27-38"])
def test_effects_are_those_of_whole_windows_on_both_strands(mutated, oracle, region):
    name, _, bounds = region.partition(":")
    name = {"1": "chr1"}.get(name, name)
    sequence = GENOME[name]
    start, end = map(int, bounds.split("-")) if bounds else (1, len(sequence))
    block = (start - 1, end)
    rows = mutated(region, context=40, deletions=True, per_window=40)
    wanted = []
    for place in range(*block):
        base = sequence[place].upper()
        wanted += [(place + 1, base, other) for other in "ACGT" if other != base]
        if base in "ACGT" and place + 1 < len(sequence):
            wanted.append((place + 1, base, "-"))
    assert [(row["pos"], row["ref"], row["alt"]) for row in rows] == wanted
    for row in rows:
        assert row["chrom"] == name
        if row["ref"] not in "ACGT":
            assert row["status"] == "n_at_site" and row["llr"] is row["llr_forward"] is row["llr_reverse"] is None
            continue
        expected = expected_llrs(oracle, sequence, row["pos"] - 1, row["alt"], block, 40)
        assert [row["llr_forward"], row["llr_reverse"]] == pytest.approx(expected, abs=LOG_LIKELIHOOD_FP32)
        assert row["llr"] == pytest.approx(sum(expected) / 2, abs=LOG_LIKELIHOOD_FP32)
        assert row["status"] == "scored"


def test_a_window_for_each_base_gives_the_scores_of_gengram_score(mutated, fasta, options, tmp_path):
    rows = mutated("chr1:1-30", context=24, per_window=1)
    lines = [f"{row['chrom']}\t{row['pos']}\t{row['ref']}\t{row['alt']}" for row in rows]
    (tmp_path / "variants.tsv").write_text("\n".join(["chrom\tpos\tref\talt", *lines]) + "\n")
    words = ["score", tmp_path / "variants.tsv", "--fasta", fasta, "--output", tmp_path / "scores.tsv", "--quiet"]
    assert main([*map(str, words), "--context", "24", "--scores", "llr", "--model", options.model]) == 0
    scored = [line.split("\t") for line in (tmp_path / "scores.tsv").read_text().splitlines()]
    for name in ("llr", "llr_forward", "llr_reverse"):
        column = scored[0].index(name)
        found = [float(cells[column]) for cells in scored[1:]]
        assert found == pytest.approx([row[name] for row in rows], abs=LOG_LIKELIHOOD_FP32)


def test_a_long_region_is_read_in_blocks(mutated, oracle):
    rows = mutated("chr1", context=30)  # blocks of 15 bases
    sequence = GENOME["chr1"]
    for row in random.Random(0).sample(rows, 25):
        place = row["pos"] - 1
        block = (place // 15 * 15, place // 15 * 15 + 15)
        expected = expected_llrs(oracle, sequence, place, row["alt"], block, 30)
        assert [row["llr_forward"], row["llr_reverse"]] == pytest.approx(expected, abs=LOG_LIKELIHOOD_FP32)


def test_one_strand(mutated, options):
    both = mutated("short")
    for strand, other in itertools.permutations(("forward", "reverse")):
        one = mutated("short", model=ModelOptions(options.model, device="cpu", strands=strand))
        for a, b in zip(both, one, strict=True):
            assert b["llr"] == b[f"llr_{strand}"] == pytest.approx(a[f"llr_{strand}"], abs=LOG_LIKELIHOOD_FP32)
            assert b[f"llr_{other}"] is None


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    for part in bert():
        part.save_pretrained(folder)
    return ModelOptions(str(folder), device="cpu")


def masked_rows(model, tokenizer, rows):
    """log P (rows, length, vocabulary) in float64, of rows of tokens."""
    ids = torch.tensor([tokenizer(row)["input_ids"] if isinstance(row, str) else row for row in rows])
    with torch.no_grad():
        return model(input_ids=ids).logits[:, 1:-1].double().log_softmax(-1)


def test_a_masked_model_compares_bases_at_the_masked_place(mutated, bert_folder):
    model, tokenizer = bert()
    vocabulary = tokenizer.get_vocab()
    sequence = GENOME["short"].upper()
    for row in mutated("short", model=bert_folder):
        for strand, turn in (("forward", str), ("reverse", reversed_complement)):
            ids = tokenizer(turn(sequence))["input_ids"]
            place = row["pos"] - 1 if strand == "forward" else len(sequence) - row["pos"]
            ids[place + 1] = tokenizer.mask_token_id
            chances = masked_rows(model.double(), tokenizer, [ids])[0, place]
            llr = chances[vocabulary[turn(row["alt"])]] - chances[vocabulary[turn(row["ref"])]]
            assert row[f"llr_{strand}"] == pytest.approx(float(llr), abs=LOG_LIKELIHOOD_FP32)


# ---- effects on a class


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    changes = dict(SIZES, num_labels=3, id2label={0: "other", 1: "donor", 2: "acceptor"}, classifier_pooling="mean")
    return saved(tmp_path_factory.mktemp("classifier"), tiny_model(GengramForSequenceClassification, **changes))


def class_odds(model, text, label):
    """log-odds of a class of one sequence, in float64."""
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([[IDS[letter] for letter in text]])).logits[0].double().softmax(-1)
    return float(chances[label].log() - (1 - chances[label]).log())


@pytest.mark.parametrize("context", [None, 40])
def test_effects_on_a_class_are_changes_of_its_log_odds(mutated, classifier, context):
    model = GengramForSequenceClassification.from_pretrained(classifier.model).double()
    sequence, block = GENOME["chr1"], (60, 90)
    named = mutated("chr1:61-90", model=classifier, of_class="donor", context=context, deletions=True)
    assert named == mutated("chr1:61-90", model=classifier, of_class="1", context=context, deletions=True)
    assert [row["alt"] for row in named].count("-") == 29
    for row in named[::5]:
        place, alternative = row["pos"] - 1, row["alt"]
        first, size = window(sequence, *block, context or 30, deleted=alternative == "-")
        texts = [
            read_as(text)[first : first + size]
            for text in (sequence, sequence[:place] + alternative.replace("-", "") + sequence[place + 1 :])
        ]
        expected = [
            class_odds(model, turn(texts[1]), 1) - class_odds(model, turn(texts[0]), 1)
            for turn in (str, reversed_complement)
        ]
        assert [row["effect_forward"], row["effect_reverse"]] == pytest.approx(expected, abs=SAME_MODEL_FP32)
        assert row["effect"] == pytest.approx(sum(expected) / 2, abs=SAME_MODEL_FP32)


def test_a_classifier_with_tokens_around_its_sequences(mutated, tmp_path):
    model, tokenizer = bert_classifier()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = ModelOptions(str(tmp_path / "model"), device="cpu", strands="forward")
    sequence = GENOME["short"].upper()

    def odds(text):
        with torch.no_grad():
            chances = model.double()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1)
        return float(chances[2].log() - (1 - chances[2]).log())

    for row in mutated("short", model=options, of_class=2):
        changed = sequence[: row["pos"] - 1] + row["alt"] + sequence[row["pos"] :]
        assert row["effect"] == pytest.approx(odds(changed) - odds(sequence), abs=SAME_MODEL_FP32)


# ---- dependencies


def plain_dependency(chances, other_chances):
    """Largest |log2 of the ratio of odds| of A, C, G and T, from probabilities of both."""
    largest = 0.0
    for p, q in zip(chances, other_chances, strict=True):
        p, q = p / sum(chances), q / sum(other_chances)
        largest = max(largest, abs(math.log2(q / (1 - q)) - math.log2(p / (1 - p))))
    return largest


def causal_chances(oracle, text, j):
    """Probabilities of the bases at place j, by a whole pass."""
    return [math.exp(float(oracle.read(text)[0][j - 1, IDS[base]])) for base in "ACGT"]


def expected_dependency(oracle, text, i, j):
    """Of a causal model reading onwards: j > i."""
    return max(
        plain_dependency(causal_chances(oracle, text, j), causal_chances(oracle, text[:i] + b + text[i + 1 :], j))
        for b in "ACGT"
        if b != text[i]
    )


@pytest.mark.parametrize("region, context", [("chr1:81-90", 30), ("gaps:27-36", 48), ("short", 512)])
def test_dependencies_are_those_of_whole_passes(mutated, oracle, region, context):
    name, _, bounds = region.partition(":")
    sequence = GENOME[name]
    start, end = map(int, bounds.split("-")) if bounds else (1, len(sequence))
    first, size = window(sequence, start - 1, end, min(context, 48))
    text = read_as(sequence)[first : first + size]
    rows = mutated(region, make=dependency_job, context=min(context, 48))
    bases = [place for place in range(start, end + 1) if sequence[place - 1].upper() in "ACGT"]
    assert [(row["i"], row["j"]) for row in rows] == [(i, j) for i in bases for j in bases if i != j]
    last = size - 1
    for row in rows[:: max(1, len(rows) // 40)]:
        i, j = row["i"] - 1 - first, row["j"] - 1 - first
        if j > i:
            own, other, expected = "forward", "reverse", expected_dependency(oracle, text, i, j)
        else:
            turned = reversed_complement(text)
            own, other, expected = "reverse", "forward", expected_dependency(oracle, turned, last - i, last - j)
        assert row["dependency"] == row[f"dependency_{own}"] == pytest.approx(expected, abs=LOG_LIKELIHOOD_FP32)
        assert row[f"dependency_{other}"] is None


def test_a_masked_model_predicts_each_base_from_the_whole_window(mutated, bert_folder):
    model, tokenizer = bert()
    vocabulary, sequence = tokenizer.get_vocab(), GENOME["short"].upper()
    model.double()

    def chances(text):
        return masked_rows(model, tokenizer, [text])[0].exp()[:, [vocabulary[base] for base in "ACGT"]].tolist()

    rows = mutated("short", make=dependency_job, model=bert_folder)
    assert len(rows) == 12 * 11
    for strand, turn in (("forward", str), ("reverse", reversed_complement)):
        text = turn(sequence)
        plain = chances(text)
        for i in range(12):
            changed = [chances(text[:i] + base + text[i + 1 :]) for base in "ACGT" if base != text[i]]
            for j in set(range(12)) - {i}:
                expected = max(plain_dependency(plain[j], other[j]) for other in changed)
                pair = (i + 1, j + 1) if strand == "forward" else (12 - i, 12 - j)
                (row,) = (row for row in rows if (row["i"], row["j"]) == pair)
                assert row[f"dependency_{strand}"] == pytest.approx(expected, abs=LOG_LIKELIHOOD_FP32)
    for row in rows:
        mean = (row["dependency_forward"] + row["dependency_reverse"]) / 2
        assert row["dependency"] == pytest.approx(mean, rel=SAME_MODEL_FP32)


def test_dependencies_do_not_depend_on_the_batch(options):
    model, text = AutoModelForCausalLM.from_pretrained(options.model), GENOME["chr1"][:20].upper()
    one, many = (DependencyModel(model, GengramTokenizer(), tokens_per_pass=tokens).of(text) for tokens in (1, 4096))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, atol=SAME_MODEL_FP32)
    some = DependencyModel(model, GengramTokenizer(), "reverse").of(text, [5, 15])
    assert some.forward is None
    np.testing.assert_allclose(some.reverse, one.reverse[[5, 15]], atol=SAME_MODEL_FP32)


# ---- whole or not at all, and resumed

KILLED = """
import os, signal, sys
from gengram.inference.jobs import ModelOptions, mutate, run_job
mutate._BASES_PER_CHUNK = 16
original, done = mutate.MutateWorker.__call__, []
def dying(self, content):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(content)
    return original(self, content)
mutate.MutateWorker.__call__ = dying
job = mutate.mutate_job(sys.argv[1], sys.argv[3], ["chr1"], model=ModelOptions(sys.argv[2], device="cpu"))
run_job(job, job.output)
"""


def test_a_killed_run_goes_on_and_its_file_is_identical(fasta, options, tmp_path, monkeypatch):
    monkeypatch.setattr("gengram.inference.jobs.mutate._BASES_PER_CHUNK", 16)
    command = [sys.executable, "-c", KILLED, str(fasta), options.model, str(tmp_path / "out.tsv")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out.tsv").exists() and len(list(tmp_path.glob(".out.tsv.chunks/*.arrow"))) == 3
    jobs = [mutate_job(fasta, tmp_path / name, ["chr1"], model=options) for name in ("out.tsv", "other.tsv")]
    summaries = [run_job(job, job.output) for job in jobs]
    assert [summary.items for summary in summaries] == [90, 90] and summaries[0].computed < 90
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "other.tsv").read_bytes()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".tsv", ".tsv"]


@pytest.mark.parametrize("make", [mutate_job, dependency_job])
def test_parts_one_behind_the_other_are_the_whole(fasta, options, tmp_path, make):
    def lines(name, **shard):
        job = make(fasta, tmp_path / name, ["chr1:1-40", "gaps:1-40"], model=options)
        run_job(job, job.output, **shard)
        return job.output.read_text().splitlines()[1:]

    parts = [lines(f"{part}.tsv", shard=Share(part, 2)) for part in range(2)]
    assert all(parts) and list(itertools.chain(*parts)) == lines("whole.tsv")


def test_the_output_says_how_it_was_made(fasta, options, tmp_path):
    for name in ("out.tsv", "out.parquet"):
        job = mutate_job(fasta, tmp_path / name, ["short"], model=options, deletions=True)
        assert finished_table(job, job.output) is None
        summary = run_job(pickle.loads(pickle.dumps(job)), job.output)  # as it goes to other processes
        record = record_of_table(job.output)
        assert record == json.loads(json.dumps(summary.record))
        assert record["inputs"]["fasta"]["sha256"] and record["settings"]["context"] == 48
        assert finished_table(job, job.output).computed == 0
        assert finished_table(mutate_job(fasta, tmp_path / name, ["short"], model=options), job.output) is None
    assert read_written(tmp_path / "out.tsv", job.schema).equals(read_written(tmp_path / "out.parquet", job.schema))


# ---- the command


@pytest.fixture
def command(fasta, options, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words, model=options.model):
        code = main(["mutate", *words, "--fasta", str(fasta), "--model", str(model), "--device", "cpu"])
        return (code, *capsys.readouterr())

    return run


def test_a_table_and_a_picture(command, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["gaps:20-50", "short", "--output", "out.tsv", "--quiet"]
    code, out, error = command(*words, "--json")
    summary = json.loads(out)
    assert (code, error, summary["bases"], summary["changes"]) == (0, "", 43, 39 * 3 + 4 * 4)
    assert summary["scored"] == 39 * 3 and summary["not_scored"] == {"n_at_site": 16}
    before = (tmp_path / "out.tsv").stat().st_mtime_ns
    code, out, error = command(*words[:-1], "--image", "x.svg")
    pictures = ["x.gaps_20-50.svg", "x.short_1-12.svg"]
    assert (code, error) == (0, "")
    assert out.splitlines()[0] == f"scored 117 of 133 changes of 43 bases, wrote out.tsv, and {', '.join(pictures)}"
    assert "16 n_at_site" in out and (tmp_path / "out.tsv").stat().st_mtime_ns == before  # nothing was computed again
    for picture in pictures:
        text = (tmp_path / picture).read_text()
        assert text.startswith("<?xml") and text.rstrip().endswith("</svg>")


def test_a_dependency_map_and_its_picture(command, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["short", "--dependency", "--output", "out.parquet", "--image", "x.png"]
    code, out, error = command(*words, "--quiet", "--json")
    assert (code, error, json.loads(out)["images"]) == (0, "", ["x.png"])
    image = (tmp_path / "x.png").read_bytes()
    assert image.startswith(b"\x89PNG") and image.endswith(b"IEND\xaeB`\x82")


def test_what_is_drawn_is_what_was_found(mutated, options, fasta, tmp_path):
    pytest.importorskip("matplotlib")
    from gengram.inference.jobs import mutate_picture as pictures

    job = mutate_job(fasta, tmp_path / "x.tsv", ["short", "gaps"], model=options, deletions=True)
    run_job(job, job.output)
    table = read_written(job.output, job.schema)
    values, reference = pictures.effects_of_region(table, Interval("short", 2, 12), "llr")
    assert reference == GENOME["short"][2:].upper() and values.shape == (10, 5)
    for row in table.to_pylist():
        if row["chrom"] == "short" and row["pos"] > 2:
            assert values[row["pos"] - 3, "ACGT-".index(row["alt"])] == row["llr"]
    for place, column in enumerate(pictures._expected(values)):
        weights = [math.exp(0 if base == reference[place] else values[place, "ACGT".index(base)]) for base in "ACGT"]
        chances = [weight / sum(weights) for weight in weights]
        information = 2 + sum(chance * math.log2(chance) for chance in chances)
        heights = dict(column)
        assert [height for _, height in column] == sorted(height for _, height in column)
        for base, height in heights.items():
            assert height == pytest.approx(information * chances["ACGT".index(base)], rel=FLOAT64_RELATIVE)
    for part in (Interval("gaps", 29, 34), Interval("gaps", 0, 64)):  # only N in the first
        pictures.draw_mutations(table, part, tmp_path / "gaps.svg", "a title")
    rows = mutated("short", make=dependency_job)
    (tmp_path / "d").mkdir()
    job = dependency_job(fasta, tmp_path / "d" / "d.tsv", ["short"], model=options)
    run_job(job, job.output)
    matrix = pictures.dependencies_of_region(read_written(job.output, SCHEMA), Interval("short", 0, 12))
    assert np.isnan(matrix.diagonal()).all()
    for row in rows:
        assert matrix[row["i"] - 1, row["j"] - 1] == row["dependency"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "expected regions or --whole-genome, and not both"),
        (["chr1:1-91"], "its end is 91, but 'chr1' has 90 bases"),
        (["chr9"], "no record 'chr9'"),
        (["no.bed"], "no.bed does not exist"),
        (["chr1", "--context", "1"], "--context: expected 2 to 48 bases, got 1"),
        (["chr1", "--context", "49"], "expected a context of 1 to 48 bases"),
        (["chr1", "--per-window", "0"], "--per-window: expected 1 to 48 bases, got 0"),
        (["chr1", "--class", "donor"], "--class: tiny-model"),
        (["chr1", "--dependency"], "region chr1:1-90: expected at most 48 bases, so that each pair is read at once"),
        (["chr1", "--dependency", "--deletions"], "--deletions: --dependency has no such choice"),
        (["chr1", "--dependency", "--class", "1"], "--class: --dependency has no such choice"),
        (["chr1", "--image", "x.pdf"], "--image: expected a name that ends in .svg or .png"),
        (["chr1", "--image", "x.svg", "--shard", "1/2"], "--image: a part (--shard) has no picture"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_the_work(command, tmp_path, words, message):
    code, out, error = command(*words, "--output", "out.tsv", "--quiet")
    assert (code, out) == (1, "") and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_cannot_do_is_said(command, classifier, bert_folder, tmp_path):
    def error_of(*words, model):
        code, _, error = command("chr1", "--output", "out.tsv", "--quiet", *words, model=model.model)
        assert code == 1 and list(tmp_path.iterdir()) == []
        return error

    assert "name one of its classes with --class: 'other', 'donor', 'acceptor'" in error_of(model=classifier)
    assert "expected one of 'other', 'donor', 'acceptor', or its number" in error_of("--class", "3", model=classifier)
    assert "expected 2 to 48 bases, which" in error_of("--class", "donor", model=classifier)
    assert "--per-window: a classifier reads" in error_of("--class", "0", "--per-window", "9", model=classifier)
    assert "no causal or masked language model" in error_of("--dependency", model=classifier)
    assert "--deletions:" in error_of("--deletions", model=bert_folder)
    code, _, error = command("chr1", "--output", "out.csv")
    assert code == 1 and "expected a name that ends in .parquet, .tsv, got 'out.csv'" in error
