import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from gengram.evaluation.metrics import evaluate


def test_metrics_of_two_classes_against_their_definitions():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 120)
    scores = np.clip(0.3 * labels + 0.6 * generator.random(120), 0, 1)
    found = evaluate(labels, np.stack([1 - scores, scores], axis=1), samples=200)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert found["auc"].value == pytest.approx(np.mean(pairs))
    predicted = scores > 0.5
    tp, tn = (predicted & (labels == 1)).sum(), (~predicted & (labels == 0)).sum()
    fp, fn = (predicted & (labels == 0)).sum(), (~predicted & (labels == 1)).sum()
    mcc = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert found["mcc"].value == pytest.approx(mcc)
    assert found["accuracy"].value == pytest.approx((tp + tn) / 120)
    order = np.argsort(-scores)
    hits = labels[order] == 1
    precision = np.cumsum(hits) / np.arange(1, 121)
    assert found["auprc"].value == pytest.approx(precision[hits].mean())
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high


def test_intervals_cover_what_is_estimated():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        labels = generator.integers(0, 2, 100)
        is_right = generator.random(100) < 0.8
        scores = np.where(is_right, labels, 1 - labels).astype(float)
        estimate = evaluate(labels, np.stack([1 - scores, scores], axis=1), ("accuracy",), samples=100)["accuracy"]
        covered += estimate.low <= 0.8 <= estimate.high
    assert covered >= 34


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_metrics_are_those_of_scikit_learn(data):
    classes, rows = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 30))
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    ties = st.lists(st.integers(0, 5), min_size=classes, max_size=classes)
    scores = np.array(data.draw(st.lists(ties, min_size=rows, max_size=rows))) / 5
    assume(len(np.unique(labels)) > 1)
    found = {name: estimate.value for name, estimate in evaluate(labels, scores, samples=0).items()}
    present = [1] if classes == 2 else np.unique(labels)
    sides = [(labels == each, scores[:, each]) for each in present]
    assert found == pytest.approx(
        {
            "auc": np.mean([sk.roc_auc_score(*side) for side in sides]),
            "auprc": np.mean([sk.average_precision_score(*side) for side in sides]),
            "mcc": sk.matthews_corrcoef(labels, scores.argmax(1)),
            "accuracy": sk.accuracy_score(labels, scores.argmax(1)),
        }
    )


def test_more_classes_are_one_against_the_rest():
    labels = np.array([0, 1, 2, 0, 1, 2])
    found = evaluate(labels, np.eye(3)[labels], samples=0)
    assert {estimate.value for estimate in found.values()} == {1.0}
    assert np.isnan(found["auc"].low)


@pytest.mark.parametrize(
    "labels, probabilities, message",
    [
        (np.zeros(3, dtype=int), np.ones((2, 2)), r"labels \(rows,\), got \(2, 2\) and \(3,\)"),
        (np.zeros(2, dtype=int), np.ones((2, 1)), "2 classes or more"),
        (np.zeros(2, dtype=int), np.ones(2), "expected probabilities"),
        (np.zeros((2, 1), dtype=int), np.ones((2, 2)), r"and \(2, 1\)"),
        (np.zeros(0, dtype=int), np.ones((0, 2)), "expected rows to evaluate, got none"),
        (np.array([0, 2]), np.ones((2, 2)), r"whole numbers in 0\.\.1, got \[0 2\]"),
        (np.array([0, -1]), np.ones((2, 2)), r"whole numbers in 0\.\.1, got \[-1  0\]"),
        (np.array([0.0, np.nan]), np.ones((2, 2)), "whole numbers"),
        (np.array([0.0, 1.0]), np.ones((2, 2)), "whole numbers"),
        (
            np.array([0, 1, 1]),
            np.array([[0, 1], [0, np.nan], [np.inf, 0]]),
            r"in row 1 \(from 0\) and others in 1 more of 3",
        ),
        (np.array([0, 1]), np.array([[0, 1], [-np.inf, 0]]), "finite"),
    ],
)
def test_what_has_no_metrics_is_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        evaluate(labels, probabilities, samples=0)


def test_unknown_metrics_are_errors():
    with pytest.raises(ValueError, match="unknown metrics"):
        evaluate(np.zeros(2, dtype=int), np.ones((2, 2)), ("f2",))


def test_what_is_not_defined_is_nan_and_never_a_number():
    for label in (0, 1):
        found = evaluate(np.full(5, label), np.tile([0.2, 0.8], (5, 1)), samples=50)
        assert found["accuracy"].value == label
        for name in ("auc", "auprc", "mcc"):
            assert np.isnan([found[name].value, found[name].low, found[name].high]).all()
    alone = evaluate(np.array([1]), np.array([[0.2, 0.8]]))
    assert alone["accuracy"].value == 1 and np.isnan(alone["accuracy"].low)


def area_by_pairs(truth: np.ndarray, scores: np.ndarray) -> float:
    positive, negative = scores[truth][:, None], scores[~truth]
    return float(np.mean((positive > negative) + 0.5 * (positive == negative)))


def precision_by_hand(truth: np.ndarray, scores: np.ndarray) -> float:
    """Average precision: each distinct threshold's precision, weighed by the positives that it adds."""
    total, before = 0.0, 0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = int((truth & chosen).sum())
        total += (hits - before) / truth.sum() * hits / chosen.sum()
        before = hits
    return total


SCORES = st.sampled_from([0.0, 0.1, 0.3, 0.1 + 0.2, 1.0, 1 + 2**-52, -1.0, 1e308, -1e308, 5e-324, -0.0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), SCORES), min_size=1, max_size=12))
def test_areas_of_ties_and_extreme_scores_are_those_by_definition(rows):
    labels, scores = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found = evaluate(labels, np.stack([-scores, scores], axis=1), ("auc", "auprc"), samples=0)
    if len(set(labels)) < 2:
        assert np.isnan(found["auc"].value) and np.isnan(found["auprc"].value)
        return
    assert found["auc"].value == pytest.approx(area_by_pairs(labels == 1, scores))
    assert found["auprc"].value == pytest.approx(precision_by_hand(labels == 1, scores))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_metrics_of_four_classes_are_those_of_scikit_learn(rows):
    """Also where rows lack some of the classes, in truth or in prediction."""
    labels, predicted = np.array(rows).T
    probabilities = np.eye(4)[predicted] * 0.6 + 0.1
    found = evaluate(labels, probabilities, samples=0)
    assert found["accuracy"].value == pytest.approx((labels == predicted).mean())
    present = np.unique(labels)
    if len(present) < 2:
        assert np.isnan([found[name].value for name in ("auc", "auprc", "mcc")]).all()
        return
    assert found["mcc"].value == pytest.approx(sk.matthews_corrcoef(labels, predicted))
    areas = [area_by_pairs(labels == index, probabilities[:, index]) for index in present]
    assert found["auc"].value == pytest.approx(np.mean(areas))
    if len(present) == 4:
        expected = sk.roc_auc_score(labels, probabilities, multi_class="ovr", labels=range(4))
        assert found["auc"].value == pytest.approx(expected)
    precisions = [precision_by_hand(labels == index, probabilities[:, index]) for index in present]
    assert found["auprc"].value == pytest.approx(np.mean(precisions))
