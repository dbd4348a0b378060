"""Single tokens: what decoding calls, where a loop in Python beats the many operations of PyTorch that it replaces."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..definition import MemoryLayer, MemoryOutput, NgramPlan, at_least_float32, signed_square_root_gate
from .packed_tables import PackedTables


def letter_codes_of_few(input_ids: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """`letter_codes` token by token in Python: for a few tokens on the CPU."""
    letters = {token: digit + 1 for digit, token in enumerate(token_ids)}
    return torch.tensor([letters.get(token, 0) for token in input_ids.flatten().tolist()]).view(input_ids.shape)


def rows_and_runs_of_few(
    codes: torch.Tensor, largest: int, behind: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ngram_rows_and_runs` token by token in Python: for a few tokens on the CPU."""
    grams: list[int] = []
    runs: list[int] = []
    powers = [5**n for n in range(largest + 1)]
    reaches = [None] * codes.shape[0] if behind is None else behind.tolist()
    for letters, reach in zip(codes.tolist(), reaches, strict=True):
        run = gram = 0
        for token, code in enumerate(letters):
            run = run + 1 if code > 0 else 0
            gram = (5 * gram + (code - 1 if code > 0 else 0)) % powers[largest]  # digits move up
            if reach is None:
                runs.append(run)
                grams.append(gram)
            else:
                inside = max(reach[token] + 1, 0)
                runs.append(min(run, inside))
                grams.append(gram % powers[max(min(inside, largest), 1)])
    # two tensors, not two views of one: outputs of an operator share no memory
    return (
        torch.tensor(grams, dtype=torch.int32).view(codes.shape),
        torch.tensor(runs, dtype=torch.int32).view(codes.shape),
    )


def scaled_gate(
    query: torch.Tensor, scaled_key: torch.Tensor, scaled_norm: torch.Tensor, norm_eps: float, scale: float
) -> torch.Tensor:
    """Gate (batch, length) from keys times `scale`, a power of two, and the norm's weight over sqrt(hidden)."""
    g = (query * scaled_norm * scaled_key).sum(-1) / scale
    key_square = scaled_key.square().mean(-1) / (scale * scale)
    g = g * (query.square().mean(-1) + norm_eps).rsqrt() * (key_square + norm_eps).rsqrt()
    # As wide as a vector, so that a single token takes the same code, and gets the same bits, as many do.
    return signed_square_root_gate(g.unsqueeze(-1).expand(*g.shape, 32).contiguous())[..., 0]


def gate_of_few(query: torch.Tensor, key: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """Gate (batch, 1) of one token per sequence: three sums, and the rest as Python's numbers."""
    left, right = torch.cat([query * norm_weight, query, key], dim=1), torch.cat([key, query, key], dim=1)
    hidden, gates = query.shape[-1], []
    for product, query_square, key_square in (left * right).sum(-1).tolist():
        norms = (query_square / hidden + norm_eps) * (key_square / hidden + norm_eps)
        g = product / math.sqrt(hidden) * (1 / math.sqrt(norms) if norms != 0 else math.inf)
        small = math.exp(-math.sqrt(max(abs(g), 1e-6)))
        gates.append(0.5 if g == 0 else 1 / (1 + small) if g > 0 else small / (1 + small))  # NaN stays NaN
    return torch.tensor(gates, dtype=query.dtype).unsqueeze(1)


def one_token_features(
    tables: Sequence[torch.Tensor], plan: NgramPlan, layer: MemoryLayer, history: torch.Tensor | None
) -> torch.Tensor | None:
    """`window_features` of one causal token per sequence whose window is full of letters; None for any other."""
    if not _is_one_full_window(plan, layer, history):
        return None
    work = at_least_float32(tables[0].dtype)
    sums = [
        torch.embedding(table, rows).to(work).sum(1, keepdim=True)
        for table, rows in zip(tables, _rows_of_one(plan), strict=True)
    ]
    counts = _counts_of_full_window(plan.ngram_sizes, plan.window, tables[0].shape[1], work)
    return (torch.cat(sums, dim=-1) / counts).to(tables[0].dtype)


def _rows_of_one(plan: NgramPlan) -> list[torch.Tensor]:
    """Rows (batch, n-grams) of each size in a full window of one token; all memories of a pass share them."""
    grams: Any = plan.grams
    kept: list[torch.Tensor] | None = getattr(grams, "rows_of_one", None)  # lives as long as the plan
    if kept is None:
        inside = grams[:, plan.context + 1 - plan.window :]
        grams.rows_of_one = kept = [inside[:, size - 1 :] % 5**size for size in plan.ngram_sizes]
    return kept


@functools.cache
def _counts_of_full_window(sizes: tuple[int, ...], window: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """How many n-grams are in each feature's mean: (sizes * width,)."""
    with torch.inference_mode(False):
        counts = torch.tensor([window - size + 1 for size in sizes], dtype=dtype, device="cpu")
        return counts.repeat_interleave(width)


def one_token_memory(
    hidden_states: torch.Tensor,
    tables: PackedTables,
    plan: NgramPlan,
    layer: MemoryLayer,
    history: torch.Tensor | None,
    top: torch.Tensor | None,
) -> MemoryOutput | None:
    """`folded_memory` of one causal token per sequence whose window is full of letters; None for any other.

    The same additions with a third of the operations, for decoding.
    """
    largest, here = max(plan.ngram_sizes), plan.context
    if largest == 1 or not _is_one_full_window(plan, layer, history):
        return None
    endings = plan.window - largest + 1
    oldest = tables.rows.shape[1] - 5 ** (largest - 1)  # the first row of B
    found = (plan.grams if top is None else top)[:, here - endings : here + 1].tolist()
    for sequence, gram in zip(found, plan.grams[:, here - endings].tolist(), strict=True):
        sequence.append(oldest + gram % 5 ** (largest - 1))  # last, as in the sums of many tokens
    ids = torch.tensor([sequence[1:] for sequence in found], dtype=torch.int32)
    sums = [F.embedding_bag(ids, slab, mode="sum") for slab in tables.rows]
    both = (sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)).to(at_least_float32(tables.rows.dtype))
    key, value = both.unsqueeze(1).chunk(2, dim=-1)
    scaled_norm = layer.norm_weight.to(key.dtype) / math.sqrt(hidden_states.shape[-1])
    gate = scaled_gate(hidden_states.to(key.dtype), key, scaled_norm, layer.norm_eps, tables.scale).contiguous()
    return _gated_token(hidden_states, gate, value / tables.scale, layer, history)


def _is_one_full_window(plan: NgramPlan, layer: MemoryLayer, history: torch.Tensor | None) -> bool:
    """Whether each sequence has one token, whose window is full of letters and whose convolution has its history."""
    here = plan.context
    if plan.length != 1 or plan.reach_ahead or here + 1 < plan.window:
        return False
    if layer.reach_back != layer.reach or (layer.reach and history is None):
        return False
    if min(plan.runs[:, here].tolist(), default=0) < plan.window:  # of letters, so it is no padding either
        return False
    return plan.behind is None or min(plan.behind[:, here].tolist()) >= layer.reach_back


def gated_token(
    hidden_states: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: MemoryLayer,
    history: torch.Tensor | None,
) -> MemoryOutput:
    """`gated_memory` of one causal token per sequence, no padding."""
    work = at_least_float32(key.dtype)
    gate = gate_of_few(hidden_states.to(work), key.to(work), layer.norm_weight.to(work), layer.norm_eps)
    return _gated_token(hidden_states, gate, value.to(work), layer, history)


def _gated_token(
    hidden_states: torch.Tensor,
    gate: torch.Tensor,
    value: torch.Tensor,
    layer: MemoryLayer,
    history: torch.Tensor | None,
) -> MemoryOutput:
    """What follows the gate, in the gate's dtype."""
    work, gated = gate.dtype, gate.unsqueeze(-1) * value
    if layer.taps is None:
        return MemoryOutput(gated.to(hidden_states.dtype), gate, gated[:, 1:].clone())
    taps, parts = layer.taps.to(work).unbind(1), [gated.squeeze(1)]
    if history is not None and layer.reach:
        parts = [*history[:, :: layer.dilation].to(work).unbind(1), *parts]  # only where a tap is
    total: torch.Tensor | None = None
    for part, weight in zip(parts, taps, strict=True):
        total = part * weight if total is None else torch.addcmul(total, part, weight)
    assert total is not None
    residual = gated + F.silu(total).unsqueeze(1)
    return MemoryOutput(residual.to(hidden_states.dtype), gate, gated if layer.reach else gated[:, 1:].clone())
