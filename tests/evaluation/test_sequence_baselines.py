import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram.evaluation.sequence_baselines import kmer_counts, positional_one_hot


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ACGTN", min_size=1, max_size=30), min_size=1, max_size=3))
def test_kmer_counts_equal_brute_force(sequences):
    found = kmer_counts(sequences, 3).toarray()
    assert found.shape == (len(sequences), 4 + 16 + 64)
    for row, sequence in zip(found, sequences, strict=True):
        expected = []
        for k in (1, 2, 3):
            windows = [sequence[i : i + k] for i in range(len(sequence) - k + 1)]
            for code in range(4**k):
                word = "".join("ACGT"[code // 4**j % 4] for j in range(k - 1, -1, -1))
                expected.append(math.log1p(windows.count(word)))
        assert row == pytest.approx(expected)


def test_one_hot_has_a_column_per_place_and_base():
    found = positional_one_hot(["ACN", "TTG"]).toarray()
    assert np.flatnonzero(found[0]).tolist() == [0, 5]
    assert np.flatnonzero(found[1]).tolist() == [3, 7, 10]
    with pytest.raises(ValueError, match="sequences of one length"):
        positional_one_hot(["A", "AC"])
