import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import MARKOV_BITS

from gengram.evaluation.markov import MarkovModel


def brute_force(order: int, training: list[list[int]], strength: float, context: list[int], base: int) -> float:
    """P(base | context) by the recursion of the docstring, counting anew every time."""
    if order < 0:
        return 0.25
    suffix = context[len(context) - order :]
    counts = [0, 0, 0, 0]
    for sequence in training:
        for i in range(order, len(sequence)):
            window = sequence[i - order : i + 1]
            if all(digit < 4 for digit in window) and window[:-1] == suffix:
                counts[window[-1]] += 1
    prior = brute_force(order - 1, training, strength, context, base)
    return (counts[base] + strength * prior) / (sum(counts) + strength)


sequences = st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=25), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(sequences, st.lists(st.integers(0, 4), max_size=12), st.integers(0, 4), st.sampled_from([0.5, 3.0]))
def test_probabilities_equal_brute_force(training, tested, order, strength):
    model = MarkovModel(order)
    model.count(map(np.array, training))
    found = model.log2_probabilities(np.array(tested, dtype=np.int64), strength)
    for i, base in enumerate(tested):
        if base == 4:
            assert math.isnan(found[i])
            continue
        before = tested[max(0, i - order) : i]
        context = before[max((j + 1 for j, digit in enumerate(before) if digit == 4), default=0) :]
        expected = brute_force(len(context), training, strength, context, base)
        assert found[i] == pytest.approx(math.log2(expected), abs=MARKOV_BITS)


def test_bits_leave_out_the_first_token_and_others():
    model = MarkovModel(1)
    bits, bases = model.evaluate([np.array([0, 1, 4, 2]), np.array([3])], strength=1.0)
    assert bases == 2
    assert bits == pytest.approx(4.0)  # nothing was counted: two bits a base


def test_smoothing_is_chosen_on_development_sequences():
    generator = np.random.default_rng(0)
    model = MarkovModel(4)
    model.count([generator.integers(0, 4, 300)])
    development = [generator.integers(0, 4, 2000)]
    assert model.choose_strength(development, (0.1, 1, 1000)) == 1000  # what was counted means nothing


def test_an_order_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"order must lie in 0\.\.13, got 14"):
        MarkovModel(14)
    with pytest.raises(ValueError, match="strength must be above 0"):
        MarkovModel(0).log2_probabilities(np.array([0]), 0.0)


def test_smoothing_cannot_be_chosen_on_nothing():
    model = MarkovModel(2)
    with pytest.raises(ValueError, match="bases both in the sequences that are counted and in those to choose by"):
        model.choose_strength([np.array([0, 1, 2])])
    model.count([np.array([0, 1])])
    assert model.choose_strength([np.array([0, 1, 2])]) > 0
    for nothing in ([], [np.array([0])], [np.array([0, 4, 4])]):
        with pytest.raises(ValueError, match="to choose by, got none"):
            model.choose_strength(nothing)
