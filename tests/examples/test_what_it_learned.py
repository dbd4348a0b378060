"""What a model learned, by the script: a tiny model and its twin, and genes that were written by hand."""

import json

import numpy as np
import pytest
from example_scripts import load_example, run_script
from tiny_models import tiny_model

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.annotation import read_genes
from gengram.sequences.fasta import read_fasta

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

GENE = 1500


def write_genes(folder, count=14):
    """Genes of one exon on alternating strands: random, from ATG to TAA."""
    generator = np.random.default_rng(1)
    text, lines = "", []
    for gene in range(count):
        body = "".join(generator.choice(list("ACGT"), GENE))
        body = body[:300] + "ATG" + body[303:1197] + "TAA" + body[1200:]
        strand = "+-"[gene % 2]
        low, high = (300, 1200) if strand == "+" else (GENE - 1200, GENE - 300)
        for kind in ("gene", "exon", "CDS"):
            words = f'gene_id "g{gene}"; transcript_id "t{gene}";'
            lines.append(f"r\tx\t{kind}\t{len(text) + low + 1}\t{len(text) + high}\t.\t{strand}\t.\t{words}\n")
        text += body if strand == "+" else reverse_complement(body)
    (folder / "genome.fa").write_text(f">r\n{text}\n")
    (folder / "genes.gtf").write_text("".join(lines))


@pytest.fixture(scope="module")
def learned():
    return load_example("analysis/what_it_learned.py")


def test_codons_and_signals_of_both_strands(learned, tmp_path):
    write_genes(tmp_path)
    ((_, text),) = read_fasta(tmp_path / "genome.fa")
    found = learned.codon_elements(text, read_genes(tmp_path / "genes.gtf", "r", 0, len(text)))
    assert [element for element in found["start codon"] if element[2] != "ATG"] == []
    places = {strand: {place for other, place, _ in found["start codon"] if other == strand} for strand in "+-"}
    assert places == {strand: {gene * GENE + 300 for gene in range(0, 14, 2)} for strand in "+-"}
    for strand, place, word in found["stop codon"]:
        assert word == "TAA" == learned.oriented(text, strand)[place : place + 3] and place % GENE == 1197
    assert len(found["stop codon"]) == 14


def test_islands_stand_beside_as_much_g_and_c(learned):
    generator = np.random.default_rng(0)
    rich, poor = "CG" * 55 + "AT" * 45, "C" * 55 + "T" * 45 + "G" * 55 + "A" * 45
    between = "".join(generator.choice(list("AT"), 200))
    (pair,) = learned.islands(between + rich + between + poor + between, 200, 5)
    assert pair == (between + rich, between + poor)
    assert learned.islands(between + rich + between, 200, 5) == [], "nothing to compare it with"


def test_tata_boxes_of_both_strands(learned, tmp_path):
    text = "GGCC" + "TATAAAAG" + "GCGC" + reverse_complement("TATATAAG") + "CC" + "GGGGGGGG"
    lines = ["chrIV\t4\t12\tbox\t0\t+", "chrIV\t16\t24\tbox\t0\t-", "chrIV\t26\t34\tno box\t0\t+"]
    (tmp_path / "boxes.bed").write_text("\n".join(lines) + "\n")
    found = learned.tata_boxes({"IV": text}, tmp_path / "boxes.bed")
    assert found == {"IV": [("+", 4, "TATAAA"), ("-", len(text) - 24, "TATATA")]}


def test_decoys_are_the_same_letters_where_no_element_is(learned):
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 20_000))
    places = [place for place in range(100, 19_000) if text[place : place + 3] == "ATG"]
    elements = [("+", place, "ATG") for place in places[::3]]
    pairs = learned.with_decoys(text, elements, 50, 20)
    assert len(pairs) == 20 and len({decoy for _, decoy in pairs}) == 20
    around = {text[place - 50 : place + 3 + learned.REACH] for _, place, _ in elements}
    for element, decoy in pairs:
        assert element[50:53] == decoy[50:53] == "ATG" and len(element) == len(decoy) == 53 + learned.REACH
        assert element in around and decoy not in around and decoy in text


@pytest.mark.slow
def test_a_model_and_its_twin(tmp_path):
    write_genes(tmp_path)
    for name, layers in (("model", [0, 2]), ("twin", [])):
        tiny_model(GengramForCausalLM, memory_layers=layers).save_pretrained(tmp_path / name)
        GengramTokenizer().save_pretrained(tmp_path / name)
    done = run_script(
        "analysis/what_it_learned.py", "--fasta", tmp_path / "genome.fa", "--gtf", tmp_path / "genes.gtf",
        "--model", tmp_path / "model", "--twin", tmp_path / "twin", "--context", 60, "--texts", 5, "--length", 64,
        "--permutations", 50, "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model less twin: " in done.stdout
    record = json.loads((tmp_path / "out" / "what_it_learned.json").read_text())
    assert [record["options"][name] for name in ("model", "twin", "fasta")] == ["model", "twin", "genome.fa"]
    found = record["results"]
    assert set(found["readiness"]) == {"model", "twin", "model less twin"}
    assert set(found["symmetry"]) == set(found["codons"]) == {"0", "2"}
    assert {"start codon (human)", "stop codon (human)"} <= set(found["elements"])
    quantities = {"surprisal", "memory gate", "memory residual", "memory residual, no window", "surprisal of the twin"}
    for kind in found["elements"].values():
        assert quantities <= set(kind["auc"])
        assert all(0 <= low <= value <= high <= 1 for value, low, high in kind["auc"].values())
    curves = json.loads((tmp_path / "out" / "profiles.json").read_text())["stop codon (human)"]
    assert np.array(curves["memory residual, no window"]["elements minus decoys"]).shape == (3, 48)
    assert all((tmp_path / "out" / f"{name}.svg").stat().st_size > 10_000 for name in ("what_it_learned", "profiles"))
