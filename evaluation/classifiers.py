"""Classifiers on fixed features; what is to be chosen is chosen on a held-out part of the training rows."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from ..support.errors import MissingExtraError
from .metrics import METRICS, auc

HELD_OUT_SHARE = 0.2
_SPLITS_TRIED = 1000


def candidates(kind: str, seed: int, is_sparse: bool, can_stop_early: bool = True) -> dict[str, Any]:
    """Classifiers of one kind with different strengths, by what tells them apart.

    Args:
        kind: `logistic`, `mlp`, or `xgboost` (200 trees of depth 6).
        seed: of what they draw.
        is_sparse: whether features are sparse.
        can_stop_early: whether there are rows enough for `mlp` to stop by a tenth of them; see `_can_stop_early`.

    Raises:
        ValueError: if the kind is not known.
        MissingExtraError: if it is `xgboost` and that is not installed.
    """
    scaler = MaxAbsScaler if is_sparse else StandardScaler
    if kind == "logistic":
        return {f"C={strength:g}": _logistic(scaler(), strength, seed) for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
    if kind == "mlp":
        settings = {"early_stopping": can_stop_early, "max_iter": 200, "random_state": seed}
        to_the_end = "" if can_stop_early else ", too few rows to stop early"
        return {
            f"alpha={decay:g}{to_the_end}": make_pipeline(scaler(), MLPClassifier((128,), alpha=decay, **settings))
            for decay in (1e-3, 1e-1)
        }
    if kind == "xgboost":
        try:
            from xgboost import XGBClassifier
        except ImportError:
            raise MissingExtraError(
                "the classifier 'xgboost' needs xgboost: pip install 'gengram[evaluation]'"
            ) from None
        return {
            "200 trees": XGBClassifier(n_estimators=200, max_depth=6, learning_rate=0.1, random_state=seed, n_jobs=-1)
        }
    raise ValueError(f"expected the classifier logistic, mlp or xgboost, got {kind!r}.")


def _logistic(scaler: Any, strength: float, seed: int) -> Any:
    return make_pipeline(scaler, LogisticRegression(C=strength, max_iter=200, random_state=seed))


def held_out(
    labels: np.ndarray, groups: np.ndarray | None, seed: int, share: float = HELD_OUT_SHARE
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose by, with every class on both sides.

    Groups stay whole; without groups, classes keep their shares.

    Args:
        labels: (rows,) classes.
        groups: (rows,) what may not be torn apart.
        seed: of the draw.
        share: of the rows (groups) to choose by.

    Raises:
        ValueError: if there is no such split.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise ValueError(
            "expected two classes or more with two rows or more each, to fit on one and to choose by the other, got "
            f"{len(classes)} with {', '.join(map(str, counts[:10]))} rows."
        )
    rows = np.zeros(len(labels))
    if groups is not None:
        return _held_out_groups(labels, groups, seed, share)
    choose_by = max(math.ceil(share * len(labels)), len(classes))
    fit_rows, choose_rows = next(StratifiedShuffleSplit(1, test_size=choose_by, random_state=seed).split(rows, labels))
    for absent in np.setdiff1d(classes, labels[choose_rows]):  # of a class with two rows, shares may give both to one
        moved = fit_rows[labels[fit_rows] == absent][0]
        fit_rows, choose_rows = fit_rows[fit_rows != moved], np.append(choose_rows, moved)
    return fit_rows, choose_rows


def _held_out_groups(labels: np.ndarray, groups: np.ndarray, seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The first of many random splits of the groups that has every class on both sides."""
    found = len(np.unique(groups))
    if found < 2:
        raise ValueError(f"expected two groups (folds) or more to fit on and to choose by, got {found}.")
    classes = len(np.unique(labels))
    splits = GroupShuffleSplit(_SPLITS_TRIED, test_size=share, random_state=seed).split(labels, labels, groups)
    for fit_rows, choose_rows in splits:
        if len(np.unique(labels[fit_rows])) == len(np.unique(labels[choose_rows])) == classes:
            return fit_rows, choose_rows
    raise ValueError(
        f"expected every class both among the groups (folds) to fit on and among those to choose by; no split of the "
        f"{found} groups has this. A class may lie in one group alone."
    )


def class_probabilities(classifier: Any, features: Any, classes: int) -> np.ndarray:
    """(rows, classes): column i is class i, also where the classifier has not met every class (0 for those)."""
    probabilities = np.zeros((features.shape[0], classes))
    probabilities[:, classifier.classes_] = classifier.predict_proba(features)
    return probabilities


def choose(
    kinds: Iterable[str],
    features: Any,
    labels: np.ndarray,
    seed: int,
    groups: np.ndarray | None = None,
    metric: str = "auc",
) -> tuple[Any, str, float]:
    """The best classifier, fitted on all rows; its name, and its metric on the rows held out for the choice.

    Args:
        kinds: of `candidates`.
        features: (rows, features), dense or sparse.
        labels: (rows,) 0..classes-1, two rows or more of each class.
        seed: of the split, and of what classifiers draw.
        metric: of `metrics.METRICS`, the one that the test rows will be judged by; of equals, the one with the larger
            area under the ROC curve is chosen.
        groups: (rows,) what may not be torn apart.

    Raises:
        ValueError: if the rows cannot be split so that every class is on both sides; see `held_out`.
    """
    fit_rows, choose_rows = held_out(labels, groups, seed)
    is_sparse, can_stop_early = not isinstance(features, np.ndarray), _can_stop_early(labels[fit_rows])
    best: tuple[tuple[float, float], str, Any] | None = None
    for kind in kinds:
        for name, classifier in candidates(kind, seed, is_sparse, can_stop_early).items():
            score = _score(classifier, features, labels, fit_rows, choose_rows, metric)
            if best is None or score > best[0]:
                best = (score, f"{kind}, {name}", classifier)
    if best is None:
        raise ValueError("expected one kind of classifier or more, got none.")
    score, name, classifier = best
    _fit(classifier, features, labels)
    return classifier, name, score[0]


def score_of_features(
    features: np.ndarray, labels: np.ndarray, seed: int, groups: np.ndarray | None = None, metric: str = "auc"
) -> tuple[float, float]:
    """How well one moderate logistic regression does on held-out rows: cheap, for choosing among features.

    Returns:
        The metric, and the area under the ROC curve, to tell equals apart.
    """
    fit_rows, choose_rows = held_out(labels, groups, seed)
    return _score(_logistic(StandardScaler(), 1e-2, seed), features, labels, fit_rows, choose_rows, metric)


def _score(
    classifier: Any, features: Any, labels: np.ndarray, fit_rows: np.ndarray, choose_rows: np.ndarray, metric: str
) -> tuple[float, float]:
    _fit(classifier, features[fit_rows], labels[fit_rows])
    probabilities = class_probabilities(classifier, features[choose_rows], int(labels.max()) + 1)
    return METRICS[metric](labels[choose_rows], probabilities), auc(labels[choose_rows], probabilities)


def _can_stop_early(labels: np.ndarray) -> bool:
    """Whether a tenth of the rows, drawn by class, has every class: what `MLPClassifier` asks for."""
    counts = np.unique(labels, return_counts=True)[1]
    return bool(counts.min() > 1 and math.ceil(0.1 * len(labels)) >= len(counts))


def _fit(classifier: Any, features: Any, labels: np.ndarray) -> None:
    with warnings.catch_warnings():  # a weak penalty does not converge in the steps given, and is then not chosen
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features, labels)
