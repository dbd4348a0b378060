import numpy as np
import pytest
import torch
from tolerances import LOG_LIKELIHOOD_FP32, LOG_PROBABILITY_FP32

from gengram.inference.likelihood import (
    IGNORED,
    log_likelihoods,
    next_token_log_probabilities,
    token_log_probabilities,
)
from gengram.inference.loaded_model import load_model

TEXTS = ["ACGTTGCAAATTGAC", "G", "GGCTA", "TTTN", "ACGTTGCAAATTGAC"]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens() -> torch.Tensor:
    found = torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(1))
    found[1, 2] = IGNORED
    return found


def test_log_probabilities_against_their_definition(logits, tokens):
    found, next_found = token_log_probabilities(logits, tokens), next_token_log_probabilities(logits, tokens)
    assert found.shape == (2, 6) and next_found.shape == (2, 5)
    for row in range(2):
        for place in range(6):
            token = int(tokens[row, place])
            if token == IGNORED:
                assert found[row, place] == 0
                continue
            exact = logits[row, place].double().log_softmax(0)[token]
            assert found[row, place].item() == pytest.approx(exact.item(), abs=LOG_PROBABILITY_FP32)
            if place > 0:
                exact = logits[row, place - 1].double().log_softmax(0)[token]
                assert next_found[row, place - 1].item() == pytest.approx(exact.item(), abs=LOG_PROBABILITY_FP32)


def test_half_precision_is_summed_in_float32(logits, tokens):
    found = next_token_log_probabilities(logits.bfloat16(), tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, next_token_log_probabilities(logits.bfloat16().float(), tokens), rtol=0, atol=0)


def test_log_likelihoods_do_not_depend_on_what_else_is_asked(tiny_folder):
    loaded = load_model(str(tiny_folder), "causal", device="cpu")
    together = log_likelihoods(loaded.model, loaded.tokenizer, TEXTS)
    alone = [log_likelihoods(loaded.model, loaded.tokenizer, [text])[0] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=LOG_LIKELIHOOD_FP32)
    assert together[1] == 0
    np.testing.assert_allclose(together[0], together[4], rtol=0, atol=LOG_LIKELIHOOD_FP32)  # texts that are equal
    assert log_likelihoods(loaded.model, loaded.tokenizer, []).shape == (0,)
