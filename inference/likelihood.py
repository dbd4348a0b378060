"""How likely sequences are: log P of the next base, of any causal model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..support.progress import progress_bar

IGNORED = -100  # a label that is no token, as everywhere in Transformers
_TOKENS_PER_BATCH = 8192


def token_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log P of each token by the logits at its place, in nats: (batch, length) float32, 0 where it is `IGNORED`.

    Args:
        logits: (batch, length, vocabulary).
        tokens: (batch, length) ids.
    """
    scores = logits.transpose(1, 2).float()  # (batch, vocabulary, length)
    return -torch.nn.functional.cross_entropy(scores, tokens, ignore_index=IGNORED, reduction="none")


def next_token_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log P of each token but the first given those before it, in nats: (batch, length - 1) float32.

    Args:
        logits: (batch, length, vocabulary) of a causal model.
        tokens: (batch, length) ids that it read, `IGNORED` where none is asked for.
    """
    return token_log_probabilities(logits[:, :-1], tokens[:, 1:])


@torch.inference_mode()
def log_likelihoods(model: Any, tokenizer: Any, texts: Sequence[str], progress: str | None = None) -> np.ndarray:
    """Sum of log P(token | tokens before it) of each text in nats, without its first token; (texts,) float64.

    Args:
        model: causal language model; its device and dtype are kept.
        tokenizer: its tokenizer.
        texts: sequences.
        progress: what a bar is named; no bar by default.
    """
    result = np.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    device = next(model.parameters()).device
    limit = max(1, _TOKENS_PER_BATCH // max(1, max(map(len, texts), default=1)))
    model.eval()
    for start in progress_bar(progress, "batch", over=range(0, len(order), limit)):
        rows = order[start : start + limit]
        batch = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt").to(device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = next_token_log_probabilities(logits, ids).double()
        result[rows] = (found * (mask[:, 1:] * mask[:, :-1])).sum(1).cpu().numpy()
    return result
