import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengram.data_preparation import leakage
from gengram.data_preparation.leakage import KMER, KmerSketch, canonical_kmers, containment, shares_in, sketch
from gengram.sequences.alphabet import reverse_complement


def brute_force(sequence: str, k: int) -> list[int]:
    codes = []
    for i in range(len(sequence) - k + 1):
        word = sequence[i : i + k].upper()
        if set(word) <= set("ACGT"):
            both = (word, reverse_complement(word))
            codes.append(min(int("".join(str("ACGT".index(base)) for base in w), 4) for w in both))
    return codes


@given(st.text("ACGTNacgt", max_size=70), st.sampled_from([1, 2, 3, 8, 31]))
def test_canonical_kmers_equal_brute_force(sequence, k):
    assert canonical_kmers(sequence, k).tolist() == brute_force(sequence, k)


def random_sequence(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


def test_a_sketch_estimates_the_share_of_common_kmers():
    shared, own = random_sequence(40_000, 0), random_sequence(60_000, 1)
    outer = sketch(canonical_kmers(reverse_complement(shared)), 8)
    inner = sketch(canonical_kmers(shared + own), 8)
    assert abs(len(inner) / (100_000 - 30) - 1 / 8) < 0.01
    assert abs(containment(inner, outer) - 0.4) < 0.02
    assert containment(outer, inner) == 1.0
    assert math.isnan(containment(outer[:0], inner))


@given(st.lists(st.lists(st.text("ACGTNacgt", max_size=50), max_size=3), max_size=4), st.sampled_from([31, 40, 1000]))
def test_a_sketch_of_pieces_is_that_of_whole_runs(runs, at_once):
    found = KmerSketch(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leakage, "_AT_ONCE", at_once)
        for pieces in runs:
            for piece in pieces:
                found.add(piece)
            found.end_run()
        kmers = found.kmers()
    expected = [sketch(canonical_kmers("".join(pieces)), 2) for pieces in runs]
    assert kmers.tolist() == sorted(set(np.concatenate([np.empty(0, np.uint64), *expected]).tolist()))


def test_a_sketch_of_much_sequence_is_thinned_and_still_comparable():
    shared, own = random_sequence(60_000, 0), random_sequence(90_000, 1)
    large, small = KmerSketch(2, most=4000), KmerSketch(2)
    large.add(shared + own)
    small.add(shared)
    assert len(large.kmers()) <= 4000 and large.scale == 64 and small.scale == 2
    assert np.array_equal(large.kmers(), sketch(canonical_kmers(shared + own), 64))
    assert shares_in(large, {"small": small}) == {"small": 1.0}
    assert abs(shares_in(small, {"large": large})["large"] - 0.4) < 0.04
    assert len(shared) - KMER + 1 > len(small.kmers()) > len(shared) * 0.48
