import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gengram.data_preparation.leakage import canonical_kmers, containment, sketch
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
