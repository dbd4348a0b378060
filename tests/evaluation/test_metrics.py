import numpy as np
import pytest

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
    for _ in range(100):
        labels = generator.integers(0, 2, 100)
        is_right = generator.random(100) < 0.8
        scores = np.where(is_right, labels, 1 - labels).astype(float)
        estimate = evaluate(labels, np.stack([1 - scores, scores], axis=1), ("accuracy",), samples=300)["accuracy"]
        covered += estimate.low <= 0.8 <= estimate.high
    assert covered >= 85


def test_more_classes_are_one_against_the_rest():
    labels = np.array([0, 1, 2, 0, 1, 2])
    found = evaluate(labels, np.eye(3)[labels], samples=0)
    assert {estimate.value for estimate in found.values()} == {1.0}
    assert np.isnan(found["auc"].low)


def test_contradictions_are_errors():
    with pytest.raises(ValueError, match="expected finite probabilities"):
        evaluate(np.zeros(3, dtype=int), np.ones((2, 2)))
    with pytest.raises(ValueError, match="unknown metrics"):
        evaluate(np.zeros(2, dtype=int), np.ones((2, 2)), ("f2",))
