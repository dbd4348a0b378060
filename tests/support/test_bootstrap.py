import math

import numpy as np
import pytest
from tolerances import BOOTSTRAP_INTERVAL, FLOAT64_RELATIVE

from gengram.support.bootstrap import bootstrap, estimate, interval_over_seeds


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    found = estimate(lambda rows: values[rows].mean(), len(values), samples=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == values.mean()
    assert found.low == pytest.approx(found.value - half, abs=BOOTSTRAP_INTERVAL * half)
    assert found.high == pytest.approx(found.value + half, abs=BOOTSTRAP_INTERVAL * half)


def test_samples_are_the_same_for_numbers_arrays_and_every_call():
    values = np.random.default_rng(2).random((30, 4))
    together = bootstrap(lambda rows: values[rows].mean(0), 30)  # (3, columns)
    assert together.shape == (3, 4)
    for column in range(4):
        found = estimate(lambda rows, column=column: values[rows, column].mean(), 30)
        np.testing.assert_allclose(together[:, column], [found.value, found.low, found.high], rtol=FLOAT64_RELATIVE)


def test_samples_without_the_statistic_do_not_count():
    found = estimate(lambda rows: math.nan if 0 in rows else float(len(rows)), 5)
    assert math.isnan(found.value) and (found.low, found.high) == (5, 5)
    none = estimate(lambda rows: 1.0, 5, samples=0)
    assert none.value == 1 and math.isnan(none.low) and math.isnan(none.high)
    one = bootstrap(lambda rows: np.array([[3.0, 4.0]])[rows].mean(0), 1)  # a row says nothing of how others differ
    assert one[0].tolist() == [3, 4] and np.isnan(one[1:]).all() and one.shape == (3, 2)


def test_the_interval_over_seeds_is_that_of_the_t_test():
    stats = pytest.importorskip("scipy.stats")
    values = [1.9, 1.87, 1.95]
    mean, half = interval_over_seeds(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], expected, rtol=FLOAT64_RELATIVE)
    assert math.isnan(interval_over_seeds([1.0])[1])
