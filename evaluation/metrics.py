"""Metrics by the field's names, with bootstrap intervals."""

import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

from ..support.bootstrap import Estimate, estimate


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve; for more than two classes the mean of one against the rest."""
    return _mean_over_classes(_auc, labels, probabilities)


def auprc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Average precision; for more than two classes the mean of one against the rest."""
    return _mean_over_classes(_average_precision, labels, probabilities)


def mcc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Matthews correlation coefficient of the most probable classes (for more than two that of Gorodkin 2004); 0 if
    all rows are predicted as one class, nan if they are of one."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    rows, right = len(labels), np.count_nonzero(predicted == labels)
    of_label = np.bincount(labels, minlength=classes).astype(float)
    of_prediction = np.bincount(predicted, minlength=classes).astype(float)
    spread = (rows**2 - (of_label**2).sum()) * (rows**2 - (of_prediction**2).sum())
    return float((right * rows - of_label @ of_prediction) / np.sqrt(spread)) if spread else 0.0


def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Share of rows whose most probable class is the true one."""
    return float(np.mean(probabilities.argmax(1) == labels))


# As those of scikit-learn, which checks its arguments for milliseconds in each of thousands of bootstrap samples.


def _auc(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """Chance that a positive row scores above a negative one, ties counting half (Mann and Whitney 1947)."""
    positives = np.count_nonzero(is_positive)
    ranks = rankdata(scores)
    above = ranks[is_positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(scores) - positives)))


def _average_precision(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the positive rows of the precision among the rows that score as high or higher."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_ties = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(scores) - 1)
    found = np.cumsum(is_positive[order])[last_of_ties]
    precision = found / (last_of_ties + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / found[-1])


def _mean_over_classes(metric: Callable[..., float], labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean over the classes that rows have; nan where all rows are of one class."""
    present = np.unique(labels)
    if len(present) < 2:
        return float("nan")
    if probabilities.shape[1] == 2:
        return metric(labels == 1, probabilities[:, 1])
    return float(np.mean([metric(labels == index, probabilities[:, index]) for index in present]))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auc": auc,
    "auprc": auprc,
    "mcc": mcc,
    "accuracy": accuracy,
}


def evaluate(
    labels: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...] = tuple(METRICS), samples: int = 1000
) -> dict[str, Estimate]:
    """Metrics of predicted class probabilities, with intervals.

    What is not defined is nan: AUC, AUPRC and MCC of rows that are all of one class, and the interval of one row. A
    class without rows does not count in the means over classes.

    Args:
        labels: (rows,) true classes, 0..classes-1.
        probabilities: (rows, classes).
        names: of the metrics, among `METRICS`.
        samples: bootstrap samples of the rows; 0 gives no interval (nan).

    Raises:
        ValueError: if there are no rows or fewer than two classes, shapes differ, a label is none of the classes, a
            probability is not finite, or a metric is not known.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.shape != (len(probabilities),):
        raise ValueError(
            f"expected probabilities (rows, 2 classes or more) and labels (rows,), got {probabilities.shape} and "
            f"{labels.shape}."
        )
    if not len(labels):
        raise ValueError("expected rows to evaluate, got none.")
    if labels.dtype.kind not in "biu" or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"expected labels that are whole numbers in 0..{probabilities.shape[1] - 1}, got {np.unique(labels)[:10]}."
        )
    wrong = np.flatnonzero(~np.isfinite(probabilities).all(1))
    if len(wrong):
        raise ValueError(
            f"expected finite probabilities (or scores), got {probabilities[wrong[0]]} in row {wrong[0]} (from 0) and "
            f"others in {len(wrong) - 1} more of {len(labels)} rows."
        )
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; known are {list(METRICS)}.")
    labels = labels.astype(np.int64)
    if len(labels) == 1:
        samples = 0

    def of(metric: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
        return estimate(lambda rows: metric(labels[rows], probabilities[rows]), len(labels), samples)

    with warnings.catch_warnings():  # a metric may be nan in all samples
        warnings.simplefilter("ignore")
        return {name: of(METRICS[name]) for name in names}
