import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gengram.evaluation.sequence_baselines import kmer_counts, positional_one_hot
from gengram.support.errors import InputError


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ACGTN", max_size=20), min_size=1, max_size=3))
@example(["", "A", "AC", "ACG", "ACGT"])  # all shorter than the longest k-mer
def test_kmer_counts_equal_brute_force(sequences):
    found = kmer_counts(sequences, 5).toarray()
    assert found.shape == (len(sequences), 4 + 16 + 64 + 256 + 1024)
    for row, sequence in zip(found, sequences, strict=True):
        expected = []
        for k in (1, 2, 3, 4, 5):
            windows = [sequence[i : i + k] for i in range(len(sequence) - k + 1)]
            for code in range(4**k):
                word = "".join("ACGT"[code // 4**j % 4] for j in range(k - 1, -1, -1))
                expected.append(math.log1p(windows.count(word)))
        assert row == pytest.approx(expected)


def test_one_hot_has_a_column_per_place_and_base():
    found = positional_one_hot(["ACN", "TTG"]).toarray()
    assert np.flatnonzero(found[0]).tolist() == [0, 5]
    assert np.flatnonzero(found[1]).tolist() == [3, 7, 10]
    with pytest.raises(InputError, match="sequences of one length, got 1 to 2 bases"):
        positional_one_hot(["A", "AC"])
    with pytest.raises(InputError, match="sequences of one length, got none"):
        positional_one_hot([])
