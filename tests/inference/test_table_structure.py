"""What rows know, of tables that were made so that the answer is known."""

import numpy as np
import pytest
import torch
from tolerances import SHARES_FP64

from gengram.inference.table_structure import (
    CODONS,
    agreements,
    codon_structure,
    kmers_of,
    rows_of,
    symmetry,
    value_norms,
)
from gengram.motif_memory import MotifMemory, MotifMemoryConfig, letter_codes, plan_ngrams
from gengram.sequences.alphabet import reverse_complement


@pytest.fixture
def memory():
    torch.manual_seed(0)
    return MotifMemory(
        MotifMemoryConfig(ngram_sizes=(1, 3, 4), embedding_dim=16, window=6, conv_kernel=0), 24
    ).double()


def test_rows_are_those_of_their_kmers(memory):
    for size in (1, 3, 4):
        kmers, rows = kmers_of(size), rows_of(memory, size)
        assert len(kmers) == len(rows) == 4**size and kmers == sorted(kmers)
        for index in (0, 1, len(kmers) // 3, len(kmers) - 1):
            assert rows[index].tolist() == memory[kmers[index]].tolist()


def test_symmetry_is_seen_where_it_was_put_and_not_elsewhere(memory):
    by_chance = symmetry(memory, 4, 200)
    assert by_chance["pairs"] == 120 and by_chance["p_value"] > 0.01 and abs(by_chance["effect_size"][0]) < 0.3
    for kmer in kmers_of(4):
        memory[reverse_complement(kmer)] = memory[kmer] + 0.01 * torch.randn(16)
    found = symmetry(memory, 4, 200)
    low, high = found["cosine_within_pairs"][1:]
    assert found["p_value"] == 1 / 201 and found["effect_size"][1] > 2 and 0.5 < low < high <= 1
    assert abs(found["cosine_of_matched_partners"][0]) < 0.2


def test_a_share_of_g_and_c_is_no_symmetry(memory):
    """Reverse complements have as many G and C, and so have the partners that they are compared with."""
    for kmer in kmers_of(4):
        memory[kmer] = memory[kmer] + (kmer.count("G") + kmer.count("C"))
    found = symmetry(memory, 4, 200)
    assert found["cosine_within_pairs"][1] > 0.3 and found["p_value"] > 0.01


def test_codons_are_seen_where_they_were_put_and_not_elsewhere(memory):
    pytest.importorskip("sklearn")
    by_chance = codon_structure(memory, 100)
    assert all(found["p_value"] > 0.005 for found in by_chance.values())
    directions = {letter: torch.randn(16) for letter in sorted(set(CODONS))}
    for kmer, letter in zip(kmers_of(3), CODONS, strict=True):
        memory[kmer] = directions[letter] + 0.001 * torch.randn(16)
    found = codon_structure(memory, 100)
    assert found["ARI, amino acid"]["value"] == found["NMI, amino acid"]["value"] == pytest.approx(1)
    assert found["ARI, amino acid"]["p_value"] == 1 / 101
    assert found["ARI, first two bases"]["value"] < 1 and found["ARI, G and C"]["value"] < 0.5


def test_agreements_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    label, clusters = generator.integers(0, 7, 40), generator.integers(0, 5, 40)
    labels = np.array([label, *(generator.permutation(label) for _ in range(5))])
    rand, information = agreements(labels, clusters)
    for row, one, other in zip(labels, rand, information, strict=True):
        assert one == pytest.approx(metrics.adjusted_rand_score(row, clusters))
        assert other == pytest.approx(metrics.normalized_mutual_info_score(row, clusters))


def test_the_genetic_code_is_that_of_ncbi():
    """Table 1 of NCBI, whose order of bases is TCAG."""
    ncbi = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
    order = ["".join((a, b, c)) for a in "TCAG" for b in "TCAG" for c in "TCAG"]
    assert dict(zip(kmers_of(3), CODONS, strict=True)) == dict(zip(order, ncbi, strict=True))


def test_the_norm_of_a_value_is_what_the_memory_adds_with_an_open_gate(memory):
    """All other rows are zero, and only one 4-mer ends in the window."""
    memory.requires_grad_(False)
    for table in (memory.embeddings[0], memory.embeddings[1]):
        table.weight.zero_()
    expected = dict(zip(kmers_of(4), value_norms(memory, 4), strict=True))
    for kmer in ("ACGT", "TTGA"):
        ids = torch.tensor([["ACGTN".index(letter) for letter in kmer]])
        plan = plan_ngrams(letter_codes(ids, letters=(0, 1, 2, 3, 4)), memory.config)
        output = memory(torch.randn(1, 4, 24, dtype=torch.float64), plan)
        norm = (output.residual[0, -1] / output.gate[0, -1]).norm()
        assert float(norm) == pytest.approx(expected[kmer], rel=SHARES_FP64)
    assert np.all(value_norms(memory, 3) == 0)
