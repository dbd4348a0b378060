"""Classifiers on fixed features; what is to be chosen is chosen on a held-out part of the training rows."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from ..support.errors import MissingExtraError

HELD_OUT_SHARE = 0.2


def candidates(kind: str, seed: int, is_sparse: bool) -> dict[str, Any]:
    """Classifiers of one kind with different strengths, by what tells them apart.

    Args:
        kind: `logistic`, `mlp`, or `xgboost` (200 trees of depth 6).

    Raises:
        ValueError: if the kind is not known.
        MissingExtraError: if it is `xgboost` and that is not installed.
    """
    scaler = MaxAbsScaler if is_sparse else StandardScaler
    if kind == "logistic":
        return {f"C={strength:g}": _logistic(scaler(), strength, seed) for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
    if kind == "mlp":
        return {
            f"alpha={decay:g}": make_pipeline(
                scaler(), MLPClassifier((128,), alpha=decay, early_stopping=True, max_iter=200, random_state=seed)
            )
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
    """Rows to fit on and rows to choose by; groups stay whole, classes keep their shares otherwise."""
    splitter: Any = StratifiedShuffleSplit(1, test_size=share, random_state=seed)
    if groups is not None:
        splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    return next(splitter.split(np.zeros(len(labels)), labels, groups))


def choosing_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """What choices are made by: the area under the ROC curve, the mean of one class against the rest."""
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(roc_auc_score(labels, probabilities, multi_class="ovr"))


def choose(
    kinds: Iterable[str], features: Any, labels: np.ndarray, seed: int, groups: np.ndarray | None = None
) -> tuple[Any, str, float]:
    """The best classifier, fitted on all rows; its name, and its score on the rows held out for the choice."""
    fit_rows, choose_rows = held_out(labels, groups, seed)
    best: tuple[float, str, Any] | None = None
    for kind in kinds:
        for name, classifier in candidates(kind, seed, is_sparse=not isinstance(features, np.ndarray)).items():
            _fit(classifier, features[fit_rows], labels[fit_rows])
            score = choosing_score(labels[choose_rows], classifier.predict_proba(features[choose_rows]))
            if best is None or score > best[0]:
                best = (score, f"{kind}, {name}", classifier)
    assert best is not None
    score, name, classifier = best
    _fit(classifier, features, labels)
    return classifier, name, score


def score_of_features(features: np.ndarray, labels: np.ndarray, seed: int, groups: np.ndarray | None = None) -> float:
    """How well one moderate logistic regression does on held-out rows: cheap, for choosing among features."""
    fit_rows, choose_rows = held_out(labels, groups, seed)
    classifier = _logistic(StandardScaler(), 1e-2, seed)
    _fit(classifier, features[fit_rows], labels[fit_rows])
    return choosing_score(labels[choose_rows], classifier.predict_proba(features[choose_rows]))


def _fit(classifier: Any, features: Any, labels: np.ndarray) -> None:
    with warnings.catch_warnings():  # a weak penalty does not converge in the steps given, and is then not chosen
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features, labels)
