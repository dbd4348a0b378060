"""Whether one model is better than another: differences on the same rows, with intervals."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..support.bootstrap import Estimate, percentile_interval

FIELDS = ("rows_digest", "drawn")  # of a run; needed for differences only


def drawn_of(found: Mapping[str, Estimate], *rows: np.ndarray) -> dict[str, Any]:
    """What a run keeps so that it can be compared with others: metrics of the bootstrap samples, and of which rows.

    Args:
        found: by metric.
        rows: what tells these rows from others, such as their labels.
    """
    digest = hashlib.sha256()
    for values in rows:
        digest.update(np.ascontiguousarray(values, dtype=np.int64).tobytes())
    drawn = {metric: estimate.drawn.round(7).tolist() for metric, estimate in found.items()}
    return {"rows_digest": digest.hexdigest()[:12], "drawn": drawn}


def paired_differences(results: Sequence[Mapping[str, Any]], reference: str | None = None) -> list[dict[str, Any]]:
    """How much every further model differs from one of them, by task and protocol, in the task's metric.

    The interval is a paired one: the 95 % percentile interval of the difference over bootstrap samples of the rows,
    the same samples for both. Over several seeds the mean is compared. Models that were tested on other rows, as where
    one could not score some variants, are left out.

    Args:
        results: runs.
        reference: the model to compare with, by default the first; what it was not run on is left out.

    Returns:
        A row each: task, protocol, metric, model, reference, value, low, high (None if not defined).
    """
    tasks = list(dict.fromkeys((result["task"], result["protocol"]) for result in results if result["model"]))
    models = [reference, *(result["model"] for result in results)]
    reference = next((model for model in models if model is not None), None)
    found = []
    for task, protocol in tasks:
        runs = [run for run in results if (run["task"], run["protocol"]) == (task, protocol)]
        for model in dict.fromkeys(run["model"] for run in runs if run["model"] != reference):
            pairs = _pairs(runs, model, reference)
            if pairs:
                shared = {"task": task, "protocol": protocol, "metric": runs[0]["metric"]}
                found.append({**shared, "model": model, "reference": reference, **_difference(pairs)})
    return found


_Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def _pairs(runs: Iterable[Mapping[str, Any]], model: str, reference: str | None) -> list[_Pair]:
    """Runs of two models with the same seed, on the same rows."""
    by_seed = {(run["model"], run["seed"]): run for run in runs}
    pairs = [
        (run, by_seed[reference, seed])
        for (name, seed), run in by_seed.items()
        if name == model and (reference, seed) in by_seed
    ]
    return pairs if all(one["rows_digest"] == other["rows_digest"] for one, other in pairs) else []


def _difference(pairs: Sequence[_Pair]) -> dict[str, float | None]:
    metric = pairs[0][0]["metric"]

    def number(value: float | None) -> float:
        return np.nan if value is None else value

    values = [[number(run["metrics"][metric]["value"]) for run in pair] for pair in pairs]
    drawn = [[[number(value) for value in run["drawn"][metric]] for run in pair] for pair in pairs]
    value = np.mean([own - other for own, other in values])
    with warnings.catch_warnings():  # a metric may be nan in all samples
        warnings.simplefilter("ignore")
        ends = percentile_interval(np.mean([np.subtract(own, other) for own, other in drawn], axis=0))
    return {
        name: float(found) if np.isfinite(found) else None
        for name, found in zip(("value", "low", "high"), (value, *ends), strict=True)
    }
