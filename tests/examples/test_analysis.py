"""Splice sites beside decoys: which bases are compared, and what comes out for a model that is known."""

import json
import math

import numpy as np
import pytest
import torch
from example_scripts import load_example, run_script
from tolerances import LOG_PROBABILITY_FP32

from gengram import GengramTokenizer
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.annotation import read_transcripts

splice = load_example("analysis/splice_sites.py")

GENE = 4000


def write_genome(folder, genes=12):
    """Genes of one intron each on alternating strands, random but for its ends, GTAAGT and TTTTTCAG."""
    generator = np.random.default_rng(1)
    text, lines = "", []
    for gene in range(genes):
        body = "".join(generator.choice(list("ACGT"), GENE))
        body = body[:1000] + "GTAAGT" + body[1006:1992] + "TTTTTCAG" + body[2000:]
        strand = "+-"[gene % 2]
        start = len(text)
        exons = [(0, 1000), (2000, GENE)] if strand == "+" else [(0, GENE - 2000), (GENE - 1000, GENE)]
        for low, high in exons:
            lines.append(f'r\tx\texon\t{start + low + 1}\t{start + high}\t.\t{strand}\t.\ttranscript_id "t{gene}";\n')
        text += body if strand == "+" else reverse_complement(body)
    (folder / "genome.fa").write_text(f">r\n{text}\n")
    (folder / "genes.gtf").write_text("".join(lines))
    return text


@pytest.mark.parametrize("kind, around", [("donor", "GTAAGT"), ("acceptor", "TTTTTCAG")])
def test_pairs(tmp_path, kind, around):
    text = write_genome(tmp_path)
    transcripts = read_transcripts(tmp_path / "genes.gtf")
    found = splice.pairs({"r": text}, transcripts, kind, 300, 60)
    assert len(found) == 12
    assert len({decoy.place for _, decoy in found}) == 12
    places = {"+": [], "-": []}
    for transcript in transcripts:
        for name in splice.MOTIFS:
            places[transcript.strand] += splice.site_places(transcript, name, len(text))
    before = around.index(splice.MOTIFS[kind]) if kind == "donor" else len(around) - 2
    for site, decoy in found:
        strand = splice.oriented(text, site.strand)
        assert strand[site.place - before :].startswith(around)
        assert strand[decoy.place : decoy.place + 2] == splice.MOTIFS[kind]
        assert min(abs(decoy.place - place) for place in places[site.strand]) >= splice.APART
        assert abs(splice.gc_share(strand, site.place) - splice.gc_share(strand, decoy.place)) <= 0.05
        assert site.place // GENE == decoy.place // GENE, "of the same gene"


def test_profiles_are_those_of_the_last_bases():
    class Even(torch.nn.Module):
        """Half of the probability for A after an A, and a sixth for the others; uniform after the others."""

        config = None

        def forward(self, input_ids):
            logits = torch.full((*input_ids.shape, 16), -torch.inf)
            logits[..., 5:9] = 0.0
            a = TOKENIZER("A")["input_ids"][0]
            logits[..., a] = torch.where(input_ids == a, math.log(3), 0.0)
            return type("Output", (), {"logits": logits})()

    TOKENIZER = GengramTokenizer()
    found = splice.profiles(Even(), TOKENIZER, ["CCAAC", "CCCCA"], 3)
    six = math.log2(6)
    assert list(found) == ["surprisal"]
    assert found["surprisal"] == pytest.approx(np.array([[2, 1, six], [2, 2, 2]]), abs=LOG_PROBABILITY_FP32)


def test_scores_leave_the_motif_out():
    values = np.full((2, 120), 2.0)
    values[:, 60:62] = 0.0  # GT itself
    values[1, 62:66] = 1.0
    values[1, 66] = 0.0  # behind what is scored
    mean, contrast = splice.site_scores(values, "donor", 60)
    assert mean == pytest.approx([2.0, 2 - 4 / 7])
    assert contrast == pytest.approx([0.0, 2 - 4 / 7 - (2 - 2 / 111)])


def test_auc_is_the_share_of_pairs_in_order():
    scores = np.array([3.0, 1.0, 5.0, 2.0, 0.0, 4.0])
    assert splice.auc_with_interval(scores, 3)[0] == pytest.approx(6 / 9)


def test_script(tmp_path):
    write_genome(tmp_path)
    arguments = ("--fasta", tmp_path / "genome.fa", "--gtf", tmp_path / "genes.gtf", "--flank", 30, "--context", 60)
    done = run_script("analysis/splice_sites.py", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "12 donors" in done.stdout and "12 acceptors" in done.stdout
    results = json.loads((tmp_path / "out" / "splice_sites.json").read_text())["results"]
    assert set(results["donor"]["curves"]) == {"surprisal", "memory gate", "memory residual"}
    assert np.array(results["acceptor"]["curves"]["memory gate"]["sites"]).shape == (3, 60)
    assert (tmp_path / "out" / "splice_sites.svg").stat().st_size > 10_000
    few = run_script(
        "analysis/splice_sites.py", *arguments[:2], "--gtf", tmp_path / "few.gtf", "--output", tmp_path / "x"
    )
    assert few.returncode != 0
    assert not (tmp_path / "x").exists()
