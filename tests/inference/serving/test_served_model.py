"""What a server's works cost, and that large ones stop between passes with the numbers of direct calls."""

import numpy as np
import pytest
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from tolerances import LOG_LIKELIHOOD_FP32, SAME_HIDDEN_STATES_FP32

from gengram.inference.effects import Change
from gengram.inference.embeddings import SequenceEncoder
from gengram.inference.loaded_model import LoadedModel, load_model
from gengram.inference.serving.served_model import EmbeddingChoice, ServedModel
from gengram.inference.window_effects import WindowEffects

LONG = "".join(np.random.default_rng(0).choice(list("ACGT"), 200))  # the model reads 48 at once


@pytest.fixture(scope="module")
def loaded(tiny_folder):  # noqa: F811
    return load_model(str(tiny_folder), "causal", device="cpu")


@pytest.fixture
def read(loaded):
    """How many tokens each pass of the model reads."""
    sizes = []
    hook = loaded.model.base_model.register_forward_pre_hook(
        lambda module, given, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    yield sizes
    hook.remove()


def wanted(place):
    return True


@pytest.mark.parametrize("pooling, strands", [("mean", "both"), ("max", "forward"), ("last", "both")])
@pytest.mark.parametrize("length", [5, 48, 200])
def test_an_embedding_counts_all_that_is_read(loaded, read, pooling, strands, length):
    served, choice = ServedModel(loaded, 4096), EmbeddingChoice(-1, pooling, strands)
    work = served.embedding(LONG[:length], choice)
    read.clear()  # of what the encoder tries when it is made
    list(served.compute(work.key, [work.payload], wanted))
    assert sum(read) == work.tokens and not work.has_steps


@pytest.mark.parametrize("strands, tokens", [("both", 160), ("forward", 80)])
def test_a_score_counts_both_windows_on_each_strand(loaded, strands, tokens):
    work = ServedModel(loaded, 4096).effect(LONG[:40], LONG[1:41], strands)
    assert work.tokens == tokens and not work.has_steps


def test_a_large_embedding_is_done_alone_and_stops_between_passes(loaded, read):
    served, choice = ServedModel(loaded, 100), EmbeddingChoice(-1, "mean", "both")
    work = served.embedding(LONG, choice)
    assert work.has_steps and work.tokens == 100  # what is in memory at once
    read.clear()
    steps = served.compute(work.key, [work.payload], wanted)
    for passes in range(1, 9):
        assert next(steps) == [] and len(read) == passes
    ((place, vector),) = next(steps)
    (expected,) = SequenceEncoder(LoadedModel(loaded.model.base_model, loaded.tokenizer)).vectors([LONG])
    assert place == 0
    np.testing.assert_allclose(vector, expected, atol=SAME_HIDDEN_STATES_FP32)


def test_a_large_score_is_done_alone_and_stops_between_strands(loaded):
    served, other = ServedModel(loaded, 100), LONG[:20] + "A" + LONG[21:40]
    work = served.effect(LONG[:40], other, "both")
    assert work.has_steps and work.tokens == 100
    nothing, ((_, found),) = served.compute(work.key, [work.payload], wanted)
    (expected,) = WindowEffects(loaded.model, loaded.tokenizer).of([Change(LONG[:40], other, 20)])
    assert nothing == []
    assert found.forward.llr == pytest.approx(expected.forward.llr, abs=LOG_LIKELIHOOD_FP32)
    assert found.reverse.llr == pytest.approx(expected.reverse.llr, abs=LOG_LIKELIHOOD_FP32)
