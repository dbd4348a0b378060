"""The logit lens: what a model would predict from a hidden state at any layer, by its own last norm and head.

The last norm divides by a number that depends on the whole hidden state. Held at the value that it has (the LN rule,
Ali et al. 2022), norm and head are linear, and what a part of the hidden state adds to a logit is its product with a
direction. Source of the lens: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from typing import Any

import torch
from torch import nn

from ..motif_memory.grafts.attach import base_model_of
from ..support.errors import InputError
from .offloaded import weight_at_hand

_LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm")
_AGREEMENT = 1e-2  # of half precision, relative to the largest number


def last_norm(model: Any) -> nn.Module:
    """The norm between a model's last layer and its head.

    Raises:
        InputError: if the model has none that is known.
    """
    base = base_model_of(model)
    for name in _LAST_NORMS:
        found = getattr(base, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError(
        f"{type(model).__name__} has no last norm of a known name ({', '.join(_LAST_NORMS)}), so there is no logit "
        "lens; ask for gate_logit or residual_norm, or give a direction."
    )


def through_norm(norm: nn.Module, hidden_states: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The direction that a part of the hidden state is multiplied with, for one behind the norm.

    Args:
        norm: a root-mean-square norm or a `LayerNorm`.
        hidden_states: (batch, length, hidden), in front of it.
        direction: (hidden,) or (batch, length, hidden), behind it.

    Returns:
        (batch, length, hidden) float64.

    Raises:
        InputError: if the norm computes something else.
    """
    x, direction = hidden_states.double(), direction.double()
    parts: Any = norm
    centre, bias = isinstance(norm, nn.LayerNorm), None
    with weight_at_hand(norm) as found:
        weight, dtype = found.double(), found.dtype
        if centre and parts.bias is not None:
            bias = parts.bias.detach().double()
    eps = next((float(getattr(parts, name)) for name in ("eps", "variance_epsilon") if hasattr(parts, name)), 0.0)
    middle = x.mean(-1, keepdim=True) if centre else torch.zeros_like(x[..., :1])
    scale = ((x - middle).square().mean(-1, keepdim=True) + eps).rsqrt()
    expected = (x - middle) * scale * weight
    if bias is not None:
        expected = expected + bias
    with torch.no_grad():
        given = norm(hidden_states.to(dtype)).double()
    if given.numel() and (given - expected).abs().max() > _AGREEMENT * given.abs().max():
        raise InputError(f"{type(norm).__name__}, the model's last norm, is of an unknown kind; there is no lens.")
    behind = direction * weight
    if centre:
        behind = behind - behind.mean(-1, keepdim=True)
    return behind * scale


def base_contrasts(model: Any, base_ids: list[int]) -> torch.Tensor:
    """For each of the bases the direction, behind the last norm, of its mean log-odds against the other three.

    That is its logit less the mean of theirs, (4, hidden) float64.

    Raises:
        InputError: if the model has no head over its vocabulary.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise InputError(f"{type(model).__name__} predicts no tokens, so bases have no log-odds in it.")
    with weight_at_hand(head) as weight:
        rows = weight[torch.tensor(base_ids, device=weight.device)].double()  # (4, hidden)
    return (rows - rows.mean(0)) * len(base_ids) / (len(base_ids) - 1)
