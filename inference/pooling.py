"""One vector per sequence from the vectors of its tokens."""

import torch

POOLINGS = ("mean", "max", "last", "centre")


def pool(hidden_states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per sequence: (batch, length, hidden) -> (batch, hidden).

    The same as what the heads of a Gengram model read (`config.classifier_pooling`).

    Args:
        hidden_states: (batch, length, hidden).
        mask: (batch, length), true (or 1) where a token belongs to the sequence, padding on either side false.
        pooling: the `"last"` token, the one in the `"centre"` (the earlier of two), or the `"mean"` or `"max"` of all.

    Raises:
        ValueError: if the pooling is not known.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"expected a pooling of {POOLINGS}, got {pooling!r}.")
    mask = mask.to(device=hidden_states.device, dtype=torch.bool)
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden_states.dtype)
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
    if pooling == "max":
        return hidden_states.masked_fill(~mask.unsqueeze(-1), torch.finfo(hidden_states.dtype).min).amax(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).amax(1)
    first = torch.where(mask, places, mask.shape[1]).amin(1)
    chosen = last if pooling == "last" else (first + last) // 2
    return hidden_states[torch.arange(len(mask), device=mask.device), chosen]
