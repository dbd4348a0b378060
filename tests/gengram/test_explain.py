"""`gengram explain`, from the command line to tables and a report that needs nothing else."""

import base64
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from graft_hosts import DECODERS, grafted
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from tiny_models import tiny_model
from tolerances import ROUNDED_MEANS, SAME_FP32, SHARES_FP64
from transformers import AutoModelForCausalLM

import gengram
from gengram import GengramForCausalLM, GengramForSequenceClassification, GengramTokenizer
from gengram.cli import main
from gengram.inference.explanation import residual_norms
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.genome import open_genome

for library in ("matplotlib", "pysam"):
    pytest.importorskip(library)

FASTA, GTF = (str(gengram.DEMO_DATA / f"region.{kind}.gz") for kind in ("fa", "gtf"))
VOID = {"meta", "img", "br", "link", "input", "hr"}


class StrictPage(HTMLParser):
    """Reads a page whose every tag is closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag: str, name: str) -> list[str]:
        return [value for found, key, value in self.attributes if (found, key) == (tag, name)]


@pytest.fixture
def explain(tiny_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Runs the command in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words, model=tiny_folder):
        code = main(["explain", *words, "--model", str(model), "--device", "cpu", "--quiet"])
        return (code, *capsys.readouterr())

    return run


def rows_of(folder, name) -> list[dict]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def check_page(folder) -> StrictPage:
    page = StrictPage((folder / "report.html").read_text())
    assert page.of("meta", "name") == ["viewport"] and "width=device-width" in page.of("meta", "content")[0]
    assert not page.of("script", "src") and not page.of("link", "href")  # nothing is fetched
    assert all(target.startswith("#") for target in page.of("a", "href"))
    assert {target[1:] for target in page.of("a", "href")} <= set(page.of("section", "id"))
    pictures = page.of("img", "src")
    for picture in pictures:
        kind, _, data = picture.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert len(pictures) == len(list((folder / "pictures").iterdir())) and all(page.of("img", "alt"))
    return page


def test_regions_have_the_names_of_their_bed_file(explain, tmp_path):
    rows = [(35060, 35070, "TATA <b>box</b>"), (35065, 35080, "CAAT"), (35100, 35110, "x" * 99)]
    bed = "".join(f"chr21_25.7M\t{start}\t{end}\t{name}\n" for start, end, name in rows)
    (tmp_path / "some.bed").write_text(bed)
    options = ["--fasta", FASTA, "--output", "out", "--context", "40", "--no-mutate"]
    assert explain("some.bed", *options)[0] == 0
    check_page(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    for heading in ("35,061-35,080 (TATA &lt;b&gt;box&lt;/b&gt;, CAAT)", f"35,101-35,110 ({'x' * 60}...)"):
        assert page.count(f"chr21_25.7M:{heading}</h2>") == page.count(f"chr21_25.7M:{heading}</a>") == 1


def test_a_region_with_a_knock_out(explain, tmp_path, tiny_folder):  # noqa: F811
    words = ["chr21_25.7M:35,061-35,080", "--fasta", FASTA, "--gtf", GTF, "--output", "out", "--context", "40"]
    code, out, error = explain(*words, "--knock-out", "GTA", "--knock-out-reverse-complement", "--json")
    assert (code, error) == (0, "")
    assert json.loads(out)["targets"] == ["gate_logit", "residual_norm", "base:actual"]
    folder = tmp_path / "out"
    names = {path.stem for path in folder.glob("*.parquet")}
    assert names == {"bases", "changes", "contributions", "dependencies", "kmers", "knock_out", "motifs"}
    check_page(folder)

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    window = open_genome(FASTA).fetch("chr21_25.7M", 35050, 35090)  # 40 bases with the region in their middle
    tokenizer = GengramTokenizer()
    found = rows_of(folder, "contributions")
    for strand in "+-":
        text = window if strand == "+" else reverse_complement(window)
        expected = gengram.explain_memory(model, tokenizer(text)["input_ids"], layer=2, target="residual_norm")
        places = [10 + place if strand == "+" else 39 - 10 - place for place in range(20)]
        sums = np.zeros(20)
        for row in found:
            if (row["strand"], row["layer"], row["target"]) == (strand, "2", "residual_norm"):
                sums[row["pos"] - 35061] += row["contribution"]
                there = window[row["start"] - 35051 : row["end"] - 35050]
                assert (there if strand == "+" else reverse_complement(there)).upper() == row["kmer"]
        np.testing.assert_allclose(sums, expected.total[0, places], rtol=SHARES_FP64)
    shown = [row for row in rows_of(folder, "bases") if row["value"] in ("residual", "contribution:residual_norm")]
    assert {row["pos"] for row in shown} == set(range(35061, 35081))
    for strand in "+-":  # one window for all: what is drawn is what k-mers share in
        for layer in "02":
            text = window if strand == "+" else reverse_complement(window)
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            norms = residual_norms(model, ids, layer=int(layer))[0]
            norms = norms[10:30] if strand == "+" else norms.flip(0)[10:30]
            wanted = (strand, layer, "residual")
            drawn = [row["number"] for row in shown if (row["strand"], row["layer"], row["value"]) == wanted]
            np.testing.assert_allclose(drawn, norms, atol=SAME_FP32)
    knock_out = rows_of(folder, "knock_out")
    assert {row["strand"] for row in knock_out} == {"+", "-"}
    assert any(row["before"] != row["after"] for row in knock_out)
    assert explain(*words)[0] == 1  # it is there


def test_sequences_of_a_file_and_a_class(explain, tmp_path):
    model = tiny_model(GengramForSequenceClassification, max_position_embeddings=48, num_labels=2)
    model.config.id2label = {0: "other", 1: "promoter"}
    model.save_pretrained(tmp_path / "classifier")
    GengramTokenizer(model_max_length=48).save_pretrained(tmp_path / "classifier")
    (tmp_path / "two.fa").write_text(">one\nACGTTGCATTACGGCA\n>two\nTTGACCATTACGGNCATC\n")
    words = ["two.fa", "--class", "promoter", "--output", "out", "--strands", "forward", "--knock-out", "TAC"]
    code, out, error = explain(*words, model=tmp_path / "classifier")
    assert (code, out, error) == (0, "", "")
    page = check_page(tmp_path / "out")
    assert page.of("section", "id") == ["region1", "region2", "kmers"]
    totals = {row["kmer"]: row for row in rows_of(tmp_path / "out", "kmers") if row["target"] == "class:promoter"}
    assert totals["TAC"]["regions"] in (2, 4)  # of each memory
    scores = [row for row in rows_of(tmp_path / "out", "knock_out") if row["value"] == "log-odds of the class"]
    ids = torch.tensor([GengramTokenizer()("ACGTTGCATTACGGCA")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits[0]
        for memory in model.memory.values():
            memory["TAC"] = 0
        after = model(ids).logits[0]
    assert scores[0]["before"] == pytest.approx(float(before[1] - before[0]), abs=SAME_FP32)
    assert scores[0]["after"] == pytest.approx(float(after[1] - after[0]), abs=SAME_FP32)
    words = ["chr21_25.7M:35,061-35,080", "--fasta", FASTA, "--class", "promoter", "--output", "beside"]
    code, _, error = explain(*words, "--context", "40", model=tmp_path / "classifier")
    assert code == 1 and "the classifier's head reads bases outside the region only" in error
    assert not (tmp_path / "beside").exists()


def test_an_empty_record_is_not_left_out_without_a_word(explain, tmp_path):
    (tmp_path / "gap.fa").write_text(">a\nACGTACGTAC\n>empty\n>b\nACGTTTTT\n")
    code, _, error = explain("gap.fa", "--output", "out")
    assert code == 1 and "expected bases in every record, got none in 'empty'" in error
    assert explain("a:1-4", "--fasta", "gap.fa", "--output", "out", "--no-mutate")[0] == 0


def test_a_base_alone_is_explained_where_others_stand_beside_it(explain, tmp_path):
    (tmp_path / "x.fa").write_text(">x\nACGTTGCATTACGGNcat\n>y\nA\n")
    words = ["--fasta", "x.fa", "--knock-out", "cau,CAT"]  # one k-mer
    assert explain("x:18-18", *words, "--output", "out") == (0, "", "")  # lower case, at the end
    check_page(tmp_path / "out")
    assert {row["pos"] for row in rows_of(tmp_path / "out", "contributions")} == {18}
    assert {row["alt"] for row in rows_of(tmp_path / "out", "changes")} >= {"A", "C", "G"}
    assert json.loads((tmp_path / "out" / "record.json").read_text())["settings"]["knock_out"] == ["CAT"]
    assert explain("x:12-18", *words, "--output", "beside_n", "--no-mutate") == (0, "", "")
    assert {row["pos"] for row in rows_of(tmp_path / "beside_n", "contributions")} == {12, 13, 14, 16, 17, 18}
    rows = rows_of(tmp_path / "beside_n", "bases")
    assert {row["pos"] for row in rows if row["value"] == "gate" and row["number"] is None} == {15}
    code, _, error = explain("y:1-1", *words, "--output", "other")
    assert code == 1 and "a base that nothing stands beside" in error


def test_the_whole_model_beside_its_twin(explain, tmp_path, tiny_folder):  # noqa: F811
    pytest.importorskip("sklearn")
    tiny_model(GengramForCausalLM, seed=3, memory_layers=[]).save_pretrained(tmp_path / "twin")
    GengramTokenizer(model_max_length=48).save_pretrained(tmp_path / "twin")
    code, out, _ = explain("--model-only", FASTA, "--twin", str(tmp_path / "twin"), "--output", "out")
    assert (code, out) == (0, "")
    page = check_page(tmp_path / "out")
    assert page.of("section", "id") == ["readiness", "symmetry", "codons", "kmers"]
    found = json.loads((tmp_path / "out" / "model.json").read_text())
    assert found["pieces"] == 40 and set(found["readiness"]) == {"model", "twin", "model less twin"}
    for name in ("divergence", "bits_per_base"):
        mean, twin, less = (np.array(found["readiness"][of][name])[..., 0] for of in found["readiness"])
        np.testing.assert_allclose(mean - twin, less, atol=ROUNDED_MEANS)  # each is rounded to four digits
    assert set(found["symmetry"]) == set(found["codons"]) == {"0", "2"}
    rows = rows_of(tmp_path / "out", "kmers")
    assert len(rows) == 2 * (4 + 16 + 64) and sum(row["occurrences"] or 0 for row in rows) > 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert set(record["inputs"]) >= {"fasta", "twin/model.safetensors", "twin/config.json"}
    code, _, error = explain("--model-only", FASTA, "--twin", str(tiny_folder), "--output", "same")
    assert code == 1 and "trained without its memory" in error and "has a motif memory" in error
    tiny_model(GengramForCausalLM, memory_layers=[], num_hidden_layers=1).save_pretrained(tmp_path / "short")
    code, _, error = explain("--model-only", FASTA, "--twin", str(tmp_path / "short"), "--output", "same")
    assert code == 1 and "layers, as many as the other has, got 1" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_of_another_model_with_a_memory(dtype, explain, tmp_path):
    """Beside the model that it was attached to: what is in front of the memory is the same."""
    pytest.importorskip("sklearn")
    tokenizer = GengramTokenizer(model_max_length=512)
    letters = [token if token in set("ACGTN") else "" for token in tokenizer.convert_ids_to_tokens(range(16))]
    for name, model in (("graft", grafted("llama", letters)), ("host", DECODERS["llama"].make())):
        model.to(dtype).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    words = ["--model-only", FASTA, "--twin", str(tmp_path / "host")]
    assert explain(*words, "--output", "out", model=tmp_path / "graft")[0] == 0
    found = json.loads((tmp_path / "out" / "model.json").read_text())
    assert set(found["symmetry"]) == set(found["codons"]) == {"layers.1", "layers.3"}
    assert len(found["readiness"]["model"]["divergence"]) == 4
    less = np.array(found["readiness"]["model less twin"]["bits_per_base"])
    assert less[0] != 0 and less[1] <= less[0] <= less[2]
    rows = rows_of(tmp_path / "out", "kmers")
    assert {row["layer"] for row in rows} == {"layers.1", "layers.3"}
    assert all(np.isfinite(row["value_norm"]) and row["value_norm"] > 0 for row in rows)


def test_a_classifier_has_tables_but_no_readiness(explain, tmp_path):
    pytest.importorskip("sklearn")
    tiny_model(GengramForSequenceClassification, max_position_embeddings=48).save_pretrained(tmp_path / "classifier")
    GengramTokenizer(model_max_length=48).save_pretrained(tmp_path / "classifier")
    code, _, error = explain("--model-only", "--output", "out", model=tmp_path / "classifier")
    assert (code, error) == (0, "")
    assert check_page(tmp_path / "out").of("section", "id") == ["symmetry", "codons", "kmers"]
    assert all(row["contribution"] is None for row in rows_of(tmp_path / "out", "kmers"))
    code, _, error = explain("--model-only", FASTA, "--output", "other", model=tmp_path / "classifier")
    assert code == 1 and "predicts no bases" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chr21_25.7M:1-20"], "expected one FASTA file of sequences, or regions with --fasta"),
        (["chr21_25.7M:1-2000", "--fasta", FASTA], "expected at most 48 bases, so that they are read at once"),
        (["chr21_25.7M:1-20", "--fasta", FASTA, "--gtf", FASTA], "expected 9 tab-separated columns"),
        (["chr21_25.7M:1-20", "--fasta", FASTA, "--knock-out", "TATAAA"], "of a size that the memory has (1, 2, 3)"),
        (["chr21_25.7M:1-20", "--fasta", FASTA, "--knock-out-reverse-complement"], "name the k-mers with --knock-out"),
        (["chr21_25.7M:1-20", "--fasta", FASTA, "--shard", "1/2"], "--shard: a part has no report"),
        (["chr21_25.7M:1-20", "--fasta", FASTA, "--class", "x"], "is no classifier"),
        (["chr9:1-20", "--fasta", FASTA], "no record 'chr9'"),
        (["--model-only", "--knock-out", "TAT"], "--knock-out is of regions; leave it out with --model-only"),
        (["--model-only", FASTA, "chr9:1-20"], "expected one FASTA file of sequences at most"),
        (["--model-only", "--twin", "x"], "name a FASTA file, too"),
        (["--model-only", "missing.fa"], "missing.fa does not exist"),
        (["--model-only", "--strands", "forward"], "--strands is of regions; leave it out with --model-only"),
        (["missing.fa"], "missing.fa: no such file"),
        ([FASTA, "--fasta", FASTA], "line 1: expected regions (BED), got sequences"),
        (["--fasta", FASTA], "or sequences without --fasta: gengram explain FILE"),
        (["chr21_25.7M:1-20", "--fasta", FASTA, "--twin", "x"], "--twin belongs to --model-only"),
    ],
)
def test_what_is_wrong_is_said_in_one_message_and_nothing_is_left(explain, tmp_path, words, message):
    code, out, error = explain(*words, "--output", "out")
    assert (code, out) == (1, "") and error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []
