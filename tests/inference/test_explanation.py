"""captum and tangermeme on `OneHotModel`, beside brute force; skipped where they are not installed."""

import math
import warnings

import pytest
import torch
from tiny_models import tiny_model
from tolerances import LOG_LIKELIHOOD_FP32, PATH_INTEGRAL, SAME_FP32

from gengram import GengramForCausalLM, GengramForSequenceClassification, GengramTokenizer, OneHotModel
from gengram.inference.likelihood import log_likelihoods
from gengram.motif_memory import module
from gengram.sequences.alphabet import BASES

SEQUENCES = ["ACGTTGCAAATTGACC", "TTCAGGCATGGACGTA"]


def one_hot(sequences, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor([[[letter == base for letter in text] for base in BASES] for text in sequences]).to(dtype)


@pytest.fixture
def causal():
    return tiny_model(GengramForCausalLM), GengramTokenizer()


@pytest.fixture
def dense():
    """Without a router, which jumps from expert to expert; in float64."""
    model = tiny_model(GengramForSequenceClassification, num_local_experts=0, num_labels=3, classifier_pooling="mean")
    return OneHotModel(model.double(), GengramTokenizer())


@pytest.fixture
def smooth(dense, monkeypatch):
    """With a gate that does not jump where its logit changes sign, and has no root there."""

    def smooth_gate(query, key):
        return ((query * key).sum(-1) / query.shape[-1] ** 0.5).sigmoid()

    monkeypatch.setattr(module, "memory_gate", smooth_gate)
    return dense


@pytest.mark.parametrize("baseline", ["zeros", "shuffled"])
def test_integrated_gradients_add_up(smooth, baseline):
    attr = pytest.importorskip("captum.attr")
    x = one_hot(SEQUENCES, torch.float64)
    start = torch.zeros_like(x) if baseline == "zeros" else x.roll(5, 2)
    found = attr.IntegratedGradients(smooth).attribute(x, start, target=1, n_steps=128)
    with torch.no_grad():
        difference = (smooth(x) - smooth(start))[:, 1]
    assert (difference.abs() > 100 * PATH_INTEGRAL).all()  # else this tests nothing
    torch.testing.assert_close(found.sum((1, 2)), difference, rtol=0, atol=PATH_INTEGRAL)


def test_saliency_and_deep_lift_of_captum_run(dense):
    attr = pytest.importorskip("captum.attr")
    x = one_hot(SEQUENCES, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(dense(x)[:, 2].sum(), x)
    found = attr.Saliency(dense).attribute(x, target=2, abs=False)
    torch.testing.assert_close(found, gradient, rtol=0, atol=SAME_FP32)
    contributions = attr.DeepLift(dense).attribute(x.detach(), torch.zeros_like(x), target=2)
    assert contributions.shape == x.shape and contributions.isfinite().all()


def test_saturation_mutagenesis_is_the_change_of_the_likelihood(causal):
    tangermeme = pytest.importorskip("tangermeme.saturation_mutagenesis")
    x = one_hot(SEQUENCES[:1])
    before, after = tangermeme.saturation_mutagenesis(OneHotModel(*causal), x, raw_outputs=True, device="cpu")
    text = SEQUENCES[0]
    mutants = [text[:place] + base + text[place + 1 :] for base in BASES for place in range(len(text))]
    expected = torch.tensor(log_likelihoods(*causal, mutants)).float().view(1, 4, len(text), 1)
    assert before.item() == pytest.approx(log_likelihoods(*causal, [text])[0], abs=LOG_LIKELIHOOD_FP32)
    torch.testing.assert_close(after, expected, rtol=0, atol=LOG_LIKELIHOOD_FP32)


def test_deep_lift_of_tangermeme_adds_up_with_integrated_gradients(smooth):
    tangermeme = pytest.importorskip("tangermeme.deep_lift_shap")
    x = one_hot(SEQUENCES, torch.float64)
    rule = {OneHotModel: tangermeme.integrated_gradients_op(64)}
    options = dict(target=1, n_shuffles=2, random_state=0, device="cpu", return_references=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, references = tangermeme.deep_lift_shap(
            smooth, x, additional_nonlinear_ops=rule, warning_threshold=PATH_INTEGRAL, **options
        )
    with torch.no_grad():
        differences = smooth(x)[:, None, 1] - smooth(references.flatten(0, 1))[:, 1].view(2, 2)
    assert (differences.abs().mean(1) > 100 * PATH_INTEGRAL).all()
    torch.testing.assert_close(found.sum((1, 2)), differences.mean(1), rtol=0, atol=PATH_INTEGRAL)


def test_design_of_tangermeme_finds_a_likelier_sequence(causal):
    tangermeme = pytest.importorskip("tangermeme.design")
    model = OneHotModel(*causal)
    x = one_hot(SEQUENCES[:1])
    with torch.no_grad():
        before = model(x)
        wish = before + math.log(100)
        found = tangermeme.greedy_substitution(model, x, wish, max_iter=2, device="cpu", verbose=False)
        assert torch.equal(found.sum(1), torch.ones(1, 16))
        assert (model(found) - wish).abs() < (before - wish).abs()
