"""Intervals: how far a result depends on which rows were drawn, or on the seed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number, and its 95 % percentile interval over bootstrap samples of the rows that it was computed from.

    Args:
        value, low, high: the number and the ends.
        drawn: the number of each sample, (samples,): those of two estimates of the same rows are of the same samples.
    """

    value: float
    low: float
    high: float
    drawn: np.ndarray = field(repr=False, compare=False)

    def numbers(self) -> dict[str, float]:
        """The number and the ends, by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap(statistic: Callable[[np.ndarray], Any], rows: int, samples: int = 1000) -> np.ndarray:
    """A statistic of all rows, and the ends of its 95 % percentile interval over bootstrap samples: (3, ...).

    The samples are drawn from a fixed seed, so statistics of the same rows are compared on the same samples.

    Args:
        statistic: from indices of rows, (rows,), to a number or an array.
        rows: number of rows.
        samples: 0 gives no interval (nan), nor does a single row. A sample for which the statistic is nan does not
            count.
    """
    value = np.asarray(statistic(np.arange(rows)))
    return np.stack([value, *percentile_interval(_drawn(statistic, rows, samples), value.shape)])


def estimate(statistic: Callable[[np.ndarray], float], rows: int, samples: int = 1000) -> Estimate:
    """`bootstrap` of a statistic that is one number."""
    drawn = np.array(_drawn(statistic, rows, samples), dtype=float)
    low, high = percentile_interval(drawn).tolist()
    return Estimate(float(statistic(np.arange(rows))), low, high, drawn)


def percentile_interval(drawn: Any, shape: tuple[int, ...] = ()) -> np.ndarray:
    """The 2.5th and 97.5th percentile of what was drawn, without nan: (samples, *shape) to (2, *shape)."""
    return np.nanpercentile(drawn, [2.5, 97.5], axis=0) if len(drawn) else np.full((2, *shape), np.nan)


def _drawn(statistic: Callable[[np.ndarray], Any], rows: int, samples: int) -> list[Any]:
    generator = np.random.default_rng(0)
    samples = samples if rows > 1 else 0
    return [statistic(generator.integers(rows, size=rows)) for _ in range(samples)]


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t, needs SciPy); the half width is nan for one value."""
    from scipy.stats import t

    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
