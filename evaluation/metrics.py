"""Metrics by the field's names, with bootstrap intervals."""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn import metrics as sk

from ..support.bootstrap import Estimate, estimate


def _auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve; for more than two classes the mean of one against the rest."""
    return _mean_over_classes(sk.roc_auc_score, labels, probabilities)


def _auprc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Average precision; for more than two classes the mean of one against the rest."""
    return _mean_over_classes(sk.average_precision_score, labels, probabilities)


def _mean_over_classes(metric: Callable[..., float], labels: np.ndarray, probabilities: np.ndarray) -> float:
    if len(np.unique(labels)) < 2:
        return float("nan")
    if probabilities.shape[1] == 2:
        return float(metric(labels == 1, probabilities[:, 1]))
    present = [index for index in range(probabilities.shape[1]) if 0 < (labels == index).sum() < len(labels)]
    return float(np.mean([metric(labels == index, probabilities[:, index]) for index in present]))


def _of_predictions(metric: Callable[..., float]) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda labels, probabilities: float(metric(labels, probabilities.argmax(1)))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auc": _auc,
    "auprc": _auprc,
    "mcc": _of_predictions(sk.matthews_corrcoef),
    "accuracy": _of_predictions(sk.accuracy_score),
}


def evaluate(
    labels: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...] = tuple(METRICS), samples: int = 1000
) -> dict[str, Estimate]:
    """Metrics of predicted class probabilities, with intervals.

    Args:
        labels: (rows,) true classes, 0..classes-1.
        probabilities: (rows, classes).
        names: of the metrics, among `METRICS`.
        samples: bootstrap samples of the rows; 0 gives no interval (nan).

    Raises:
        ValueError: if shapes differ, a value is not finite, or a metric is not known.
    """
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or not np.isfinite(probabilities).all():
        raise ValueError(
            f"expected finite probabilities (rows, classes) for {len(labels)} rows, got {probabilities.shape}."
        )
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; known are {list(METRICS)}.")

    def of(metric: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
        return estimate(lambda rows: metric(labels[rows], probabilities[rows]), len(labels), samples)

    with warnings.catch_warnings():  # a sample may lack a class
        warnings.simplefilter("ignore")
        return {name: of(METRICS[name]) for name in names}
