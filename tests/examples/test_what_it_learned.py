"""What a model learned, by the script: a tiny model and its twin, and genes that were written by hand."""

import json

import numpy as np
import pytest
from example_scripts import run_script
from tiny_models import tiny_model

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.sequences.alphabet import reverse_complement

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
    found = json.loads((tmp_path / "out" / "what_it_learned.json").read_text())["results"]
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
