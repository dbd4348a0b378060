"""Gradients of the definition's operations, in plain PyTorch; additions are in a fixed order on every device."""

import math

import torch
import torch.nn.functional as F

from ..definition import (
    MemoryLayer,
    NgramPlan,
    at_least_float32,
    dilated_taps,
    gate_logit,
    signed_square_root_gate,
    window_sum,
    within_segment,
)


def window_features_backward(grad: torch.Tensor, plan: NgramPlan) -> list[torch.Tensor]:
    """Gradients of `window_features` for the tables, each (5**n, width) in at least float32.

    Args:
        grad: (batch, length, sizes * width).
        plan: from `plan_ngrams`.
    """
    grad = grad.to(at_least_float32(grad.dtype))
    gradients = []
    for index, part in enumerate(grad.chunk(len(plan.ngram_sizes), dim=-1)):
        part = part / plan.counts(index).clamp_min(1).unsqueeze(-1).to(part.dtype)
        part = F.pad(part, (0, 0, plan.context, 0))
        by_ngram = _window_sum_transposed(part, plan.span(index), plan.behind, plan.ahead_with_context())
        by_ngram = by_ngram.masked_fill(~plan.valid(index).unsqueeze(-1), 0)
        rows = 5 ** plan.ngram_sizes[index]
        gradients.append(torch.ops.aten.embedding_dense_backward(by_ngram, plan.rows(index), rows, -1, False))
    return gradients


def _window_sum_transposed(
    x: torch.Tensor, span: tuple[int, int], behind: torch.Tensor | None, ahead: torch.Tensor | None
) -> torch.Tensor:
    """What `window_sum` takes from position j, added up at j: the sum of `x[:, t]` over windows t that hold j."""
    first, last = span
    if first <= 0 and behind is None and ahead is None:
        return window_sum(x, (-last, -first))
    total = torch.zeros_like(x)
    longest = x.shape[1] - 1
    for offset in range(max(first, -longest), min(last, longest) + 1):
        part = within_segment(x, offset, behind, ahead)
        moved = F.pad(part, (0, 0, max(offset, 0), max(-offset, 0)))
        start = max(-offset, 0)
        total = total + moved[:, start : start + x.shape[1]]
    return total


def gated_memory_backward(
    grad_residual: torch.Tensor,
    grad_gate: torch.Tensor | None,
    hidden_states: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: NgramPlan,
    layer: MemoryLayer,
    core: slice | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `gated_memory` (without history) for hidden states, key, value, norm weight and taps.

    Arguments as in `gated_memory`; `grad_residual` (batch, length, hidden) and `grad_gate` (batch, length) or None.
    With `core`, only the share of those positions is returned, and the others are its neighbourhood: as many as the
    convolution reaches on either side, if they exist.
    """
    work = at_least_float32(key.dtype)
    value, grad = value.to(work), grad_residual.to(work)
    weight = layer.norm_weight.to(work)
    length = grad.shape[1]
    begin, end, _ = (core or slice(None)).indices(length)
    core = slice(begin, end)
    logit, query_scale, key_scale = gate_logit(hidden_states.to(work), key.to(work), weight, layer.norm_eps)
    gate = signed_square_root_gate(logit)
    strength = plan.without_padding(gate)
    grad_taps = None
    grad_gated = grad[:, core]
    if layer.taps is not None:
        taps, behind, ahead = layer.taps.to(work), plan.behind_current(), plan.ahead
        gated = F.pad(strength.unsqueeze(-1) * value, (0, 0, layer.reach_back, layer.reach - layer.reach_back))
        mixed = dilated_taps(gated, taps, layer.dilation, layer.reach_back, behind, ahead)
        grad_mixed = torch.ops.aten.silu_backward(grad, mixed)
        by_tap = []
        for tap in range(taps.shape[1]):
            start = tap * layer.dilation
            offset = start - layer.reach_back
            part = within_segment(grad_mixed, offset, behind, ahead)
            by_tap.append((part[:, core] * gated[:, start + begin : start + end]).sum((0, 1)))
            first, last = max(begin - offset, 0), min(end - offset, length)  # whose tap falls into the core
            if first < last:
                spread = part[:, first:last] * taps[:, tap]
                pad = (first + offset - begin, end - last - offset)
                grad_gated = grad_gated + (F.pad(spread, (0, 0, *pad)) if any(pad) else spread)
        grad_taps = torch.stack(by_tap, dim=-1).to(layer.taps.dtype)
    query, key, value = hidden_states[:, core].to(work), key[:, core].to(work), value[:, core]
    logit, gate, query_scale, key_scale = (x[:, core] for x in (logit, gate, query_scale, key_scale))
    grad_value = strength[:, core].unsqueeze(-1) * grad_gated
    grad_strength = (grad_gated * value).sum(-1)
    if plan.exists is not None:
        grad_strength = grad_strength.masked_fill(~plan.exists[:, core], 0)
    if grad_gate is not None:
        grad_strength = grad_strength + grad_gate[:, core]
    slope = torch.where(logit.abs() > 1e-6, 0.5 / logit.abs().clamp_min(1e-6).sqrt(), 0.0)
    grad_logit = grad_strength * gate * (1 - gate) * slope
    hidden = query.shape[-1]
    scale = (grad_logit * query_scale * key_scale / math.sqrt(hidden)).unsqueeze(-1)
    pull = grad_logit * logit / hidden  # through the two norms
    scaled_query, scaled_key = scale * query, scale * key
    grad_query = torch.addcmul(scaled_key * weight, (pull * query_scale.square()).unsqueeze(-1), query, value=-1)
    grad_key = torch.addcmul(scaled_query * weight, (pull * key_scale.square()).unsqueeze(-1), key, value=-1)
    grad_norm = (scaled_query * key).sum((0, 1))
    return (
        grad_query.to(hidden_states.dtype),
        grad_key.to(work),
        grad_value,
        grad_norm.to(layer.norm_weight.dtype),
        grad_taps,
    )
