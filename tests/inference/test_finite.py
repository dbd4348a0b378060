"""A model that gives NaN: no number, no base and no status comes of it, whichever way it is asked."""

import numpy as np
import pytest
import torch
from foreign_models import bert
from tiny_models import tiny_model

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.inference.base_tokens import BaseTokens
from gengram.inference.effects import Change
from gengram.inference.filling import GapFiller, GapWindow
from gengram.inference.generation import BaseGenerator, Sampling
from gengram.inference.tracks import TrackModel
from gengram.inference.window_effects import WindowEffects
from gengram.sequences.gaps import Gap

TEXT = "ACGTTGCAGGATTACA"


@pytest.fixture
def causal():
    model = tiny_model(GengramForCausalLM)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    return model, GengramTokenizer()


@pytest.fixture
def masked():
    model, tokenizer = bert()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5:] = torch.inf
    return model, tokenizer


def track(model, tokenizer):
    is_masked = type(model).__name__.endswith("MaskedLM")
    return TrackModel(model, BaseTokens.of(tokenizer), is_masked, context=48).of_sequence(TEXT)


def score(model, tokenizer):
    return list(WindowEffects(model, tokenizer).of([Change(TEXT, f"A{TEXT[1:4]}A{TEXT[5:]}", 4)]))


def fill(model, tokenizer):
    # PyTorch's attention of AVX-512 gives numbers for queries that are NaN if there are fewer than 16 tokens.
    window = GapWindow(f"ACGTN{TEXT}", (Gap(4),), asked=(0,))
    return list(GapFiller(model, tokenizer).fill([(0, window)]))


def generate(model, tokenizer):
    return BaseGenerator(model, tokenizer, Sampling()).continued([TEXT], np.full((1, 3), 0.5))


@pytest.mark.parametrize("ask", [track, score, fill, generate])
def test_nan_of_a_causal_model_is_an_error(ask, causal):
    with pytest.raises(ValueError, match="gives NaN or infinity in float32; are its weights damaged"):
        ask(*causal)


@pytest.mark.parametrize("ask", [track, score, fill])
def test_nan_of_a_masked_model_is_an_error(ask, masked):
    with pytest.raises(ValueError, match="gives NaN or infinity in float32"):
        ask(*masked)


def test_nan_of_a_memory_is_an_error(causal):
    model, tokenizer = causal
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        TrackModel(model, BaseTokens.of(tokenizer), values=("gate",), context=48).of_sequence(TEXT)


def test_letters_that_are_no_dna_are_not_read_as_n():
    model, tokenizer = tiny_model(GengramForCausalLM), GengramTokenizer()
    with pytest.raises(ValueError, match=r"prompt 0: expected DNA .* got '-' at base 5; remove the gaps"):
        BaseGenerator(model, tokenizer, Sampling()).continued(["ACGT--AC"], np.full((1, 3), 0.5))
    with pytest.raises(ValueError, match=r"the sequence: expected DNA .* got 'X' at base 5"):
        TrackModel(model, BaseTokens.of(tokenizer), context=48).of_sequence("ACGTXXAC")
