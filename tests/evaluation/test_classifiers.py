"""Classifiers: columns follow classes, and every class is on both sides of what is held out."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import matthews_corrcoef, roc_auc_score
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit

from gengram.evaluation.classifiers import candidates, choose, class_probabilities, held_out, score_of_features
from gengram.evaluation.suite import CLASSIFIERS


def blobs(counts: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows around one point per class, and their classes."""
    labels = np.repeat(list(counts), list(counts.values()))
    return np.eye(6)[labels] * 3 + np.random.default_rng(0).normal(size=(len(labels), 6)) * 0.3, labels


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_columns_are_classes_also_where_one_was_never_met(kind):
    features, labels = blobs({0: 40, 2: 40})
    classifier = next(iter(candidates(kind, 0, is_sparse=False).values())).fit(features, labels)
    found = class_probabilities(classifier, features, 4)
    assert found.shape == (80, 4) and (found[:, [1, 3]] == 0).all()
    assert (found[:, [0, 2]] == classifier.predict_proba(features)).all() and (found[:40, 0] > 0.5).mean() > 0.5


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("counts", [{0: 2, 1: 2}, {0: 2, 1: 60, 2: 3}, {0: 30, 1: 30}])
@pytest.mark.parametrize("kind_of_features", ["dense", "sparse", "constant"])
def test_every_classifier_can_be_chosen_on_few_rows(kind, counts, kind_of_features):
    features, labels = blobs(counts)
    if kind_of_features == "constant":
        features = np.ones_like(features)
    if kind_of_features == "sparse":
        features = sparse.csr_matrix(features * (features > 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier, name, score = choose([kind], features, labels, seed=0)
    found = class_probabilities(classifier, features, len(counts))
    assert name.startswith(kind) and 0 <= score <= 1 and np.isfinite(found).all()
    if kind_of_features == "constant":
        assert score == 0.5
    assert ("too few rows" in name) == (kind == "mlp" and counts != {0: 30, 1: 30})


def test_a_choice_of_nothing_and_of_an_unknown_classifier_are_errors():
    features, labels = blobs({0: 9, 1: 9})
    with pytest.raises(ValueError, match="one kind of classifier or more"):
        choose([], features, labels, seed=0)
    with pytest.raises(ValueError, match="got 'forest'"):
        choose(["forest"], features, labels, seed=0)
    assert score_of_features(features, labels, seed=0) == (1, 1)


def test_the_classifier_is_chosen_by_the_metric_that_the_test_rows_are_judged_by():
    generator = np.random.default_rng(1)
    labels = (np.arange(400) % 10 == 0).astype(int)
    features = generator.normal(size=(400, 40))
    features[:, :5] += labels[:, None] * 0.8
    found = {metric: choose(["logistic"], features, labels, seed=0, metric=metric) for metric in ("auc", "mcc")}
    fit_rows, choose_rows = held_out(labels, None, 0)
    scores = {}
    for name, classifier in candidates("logistic", 0, is_sparse=False).items():
        classifier.fit(features[fit_rows], labels[fit_rows])
        predicted = classifier.predict_proba(features[choose_rows])
        truth = labels[choose_rows]
        scores[f"logistic, {name}"] = {
            "auc": roc_auc_score(truth, predicted[:, 1]),
            "mcc": matthews_corrcoef(truth, predicted.argmax(1)),
        }
    for metric, (_, name, score) in found.items():
        assert scores[name][metric] == pytest.approx(score) == max(each[metric] for each in scores.values())
    assert scores[found["auc"][1]]["mcc"] == 0 < found["mcc"][2]  # the best by AUC calls every row negative


labels_of_rows = st.lists(st.integers(0, 3), min_size=2, max_size=40).map(np.array)


@settings(max_examples=200, deadline=None)
@given(labels_of_rows, st.integers(0, 5), st.sampled_from([0.1, 0.2, 0.5]))
def test_every_class_is_on_both_sides_or_the_split_is_refused(labels, seed, share):
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        with pytest.raises(ValueError, match="two classes or more with two rows or more each"):
            held_out(labels, None, seed, share)
        return
    fit_rows, choose_rows = held_out(labels, None, seed, share)
    assert sorted([*fit_rows, *choose_rows]) == list(range(len(labels)))
    assert set(labels[fit_rows]) == set(labels[choose_rows]) == set(classes)


@settings(max_examples=100, deadline=None)
@given(labels_of_rows, st.integers(2, 6), st.integers(0, 5))
def test_groups_stay_whole_with_every_class_on_both_sides_or_are_refused(labels, groups, seed):
    of_rows = np.random.default_rng(seed).integers(0, groups, len(labels))
    try:
        fit_rows, choose_rows = held_out(labels, of_rows, seed)
    except ValueError as error:
        assert "expected" in str(error)
        return
    assert not set(of_rows[fit_rows]) & set(of_rows[choose_rows])
    assert set(labels[fit_rows]) == set(labels[choose_rows]) == set(labels)


def test_groups_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match=r"two groups .* or more to fit on and to choose by, got 1"):
        held_out(np.array([0, 1] * 4), np.zeros(8), 0)
    with pytest.raises(ValueError, match="no split of the 3 groups has this"):
        held_out(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2]), 0)


def test_ordinary_splits_are_those_of_scikit_learn():
    labels = np.array([0, 1, 1, 2] * 50)
    groups = np.arange(200) // 10
    rows = np.zeros(200)
    for seed in range(3):
        expected = next(StratifiedShuffleSplit(1, test_size=0.2, random_state=seed).split(rows, labels))
        assert all(np.array_equal(a, b) for a, b in zip(held_out(labels, None, seed), expected, strict=True))
        expected = next(GroupShuffleSplit(1, test_size=0.2, random_state=seed).split(rows, labels, groups))
        assert all(np.array_equal(a, b) for a, b in zip(held_out(labels, groups, seed), expected, strict=True))
