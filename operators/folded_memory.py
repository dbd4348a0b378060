"""The memory's projections folded into its tables: at inference two matrix products become one sum of table rows.

`operators/README.md` ("Folding") has the algebra. The exact definition is `motif_memory.py`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .motif_memory import NgramPlan, dilated_taps, signed_square_root_gate

_CHUNK = 256  # positions per gather: their rows and their sum stay in the processor's cache


class FoldedTables(NamedTuple):
    """Projected tables of one memory layer; `rows` holds them times `scale`, a power of two."""

    rows: torch.Tensor  # (5**N + 5**(N - 1), 2 * hidden): A, then B
    scale: float
    largest: int  # N, the largest n-gram size
    largest_index: int  # which of the plan's sizes that is


def fold_tables(
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    ngram_sizes: Sequence[int],
    window: int,
    dtype: torch.dtype = torch.float16,
) -> FoldedTables:
    """Project the tables of a memory, so that a whole window's key and value are sums of rows.

    Args:
        tables: one (5**n, width) per size.
        key_weight, value_weight: (hidden, sizes * width), the two projections.
        ngram_sizes: sizes n, in the order of the tables.
        window: tokens of the window.
        dtype: of the rows. In float16 they are scaled by a power of two so that no window can overflow.

    Raises:
        ValueError: if the weights are not finite.
    """
    weight = torch.cat([key_weight, value_weight])  # (2 * hidden, sizes * width)
    work = torch.promote_types(weight.dtype, torch.float32)
    width = tables[0].shape[1]
    largest = max(ngram_sizes)
    cumulative: list[torch.Tensor] = []  # C_1 .. C_N: sums over the sizes up to m, by the m-gram's row
    for m in range(1, largest + 1):
        total = torch.zeros(5**m, weight.shape[0], dtype=work, device=weight.device)
        for index, size in enumerate(ngram_sizes):
            if size == m:
                part = weight[:, index * width : (index + 1) * width].to(work)
                total += tables[index].to(work) @ part.T / (window - m + 1)
        if cumulative:
            total += cumulative[-1].repeat(5, 1)  # row g of an m-gram ends in the (m - 1)-gram g mod 5^(m - 1)
        cumulative.append(total)
    rows = [cumulative[-1]]
    if largest > 1:
        oldest = torch.arange(5 ** (largest - 1), device=weight.device)
        rows.append(
            torch.stack([cumulative[m - 1][oldest // 5 ** (largest - 1 - m)] for m in range(1, largest)]).sum(0)
        )
    packed = torch.cat(rows)
    bound = packed.abs().max().item() * (window - largest + 2)
    if not torch.isfinite(packed).all():
        raise ValueError("the memory's weights are not finite, so they cannot be folded.")
    scale = 1.0
    if dtype == torch.float16 and bound > 0:
        while bound * scale > 2.0**15:
            scale /= 2
        while bound * scale < 2.0**14:
            scale *= 2
    return FoldedTables((packed * scale).to(dtype), scale, largest, list(ngram_sizes).index(largest))


class _KeyValue:
    """Key and value at any slice of positions, from folded tables; the unfolded ones where a window is not full."""

    def __init__(
        self,
        folded: FoldedTables,
        plan: NgramPlan,
        tables: Sequence[torch.Tensor],
        key_weight: torch.Tensor,
        value_weight: torch.Tensor,
    ):
        self.folded, self.plan, self.tables = folded, plan, tables
        self.key_weight, self.value_weight = key_weight, value_weight
        self.work = torch.promote_types(key_weight.dtype, torch.float32)
        batch, length = plan.counts[0].shape
        first, last = plan.spans[folded.largest_index]
        grams = F.pad(plan.rows[folded.largest_index], (max(-first - plan.context, 0), last))
        start = max(-first, plan.context) + first
        if length:
            windows = grams.unfold(1, last - first + 1, 1)[:, start : start + length]  # (batch, length, endings)
        else:
            windows = grams.new_zeros(batch, 0, last - first + 1)
        if folded.largest > 1:  # the first n-gram of the window without its newest letter picks the row of B
            oldest = windows[..., :1] // 5 + 5**folded.largest
            windows = torch.cat([oldest, windows], dim=-1)
        self.windows = windows  # (batch, length, rows per sum)
        self.is_irregular = plan.counts[folded.largest_index] != last - first + 1  # (batch, length)

    def at(self, row: int, begin: int, end: int) -> torch.Tensor:
        """(end - begin, 2 * hidden) for positions of one row of the batch."""
        sums = F.embedding_bag(self.windows[row, begin:end], self.folded.rows, mode="sum").to(self.work)
        if self.folded.scale != 1:
            sums /= self.folded.scale
        places = self.is_irregular[row, begin:end].nonzero().flatten()
        if len(places):
            features = _features_at(row, places + begin, self.plan, self.tables).to(self.key_weight.dtype)
            key, value = F.linear(features, self.key_weight), F.linear(features, self.value_weight)
            sums[places] = torch.cat([key, value], dim=-1).to(self.work)
        return sums


def folded_key_value(
    folded: FoldedTables,
    plan: NgramPlan,
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of every position, each (batch, length, hidden) in at least float32.

    Positions whose window is full of letters are one sum of rows. The others (the first of a sequence, and those near
    a token that is no letter) are taken from the unfolded weights, as the definition does.

    Args:
        folded: from `fold_tables`.
        plan: from `plan_ngrams`.
        tables, key_weight, value_weight: the unfolded weights, as in `fold_tables`.
    """
    batch, length = plan.counts[0].shape
    source = _KeyValue(folded, plan, tables, key_weight, value_weight)
    out = torch.empty(batch, length, 2 * key_weight.shape[0], dtype=source.work, device=folded.rows.device)
    for row in range(batch):
        for begin in range(0, length, _CHUNK):
            end = min(begin + _CHUNK, length)
            out[row, begin:end] = source.at(row, begin, end)
    key, value = out.chunk(2, dim=-1)
    return key, value


def folded_memory(
    hidden_states: torch.Tensor,
    folded: FoldedTables,
    plan: NgramPlan,
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    query_norm_weight: torch.Tensor,
    key_norm_weight: torch.Tensor,
    norm_eps: float,
    conv_weight: torch.Tensor | None = None,
    dilation: int = 1,
    reach_back: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole memory without history: its residual (batch, length, hidden) and gate (batch, length).

    Everything is done for a few hundred positions at a time, in at least float32, so that intermediate values stay in
    the processor's cache. Arguments are those of `folded_key_value`, `memory_gate` and `dilated_taps`; `plan` must
    have no context.
    """
    batch, length, hidden = hidden_states.shape
    source = _KeyValue(folded, plan, tables, key_weight, value_weight)
    work = source.work
    norm_weight = (query_norm_weight.to(work) * key_norm_weight.to(work)) / math.sqrt(hidden)
    reach_ahead = 0 if conv_weight is None else (conv_weight.shape[-1] - 1) * dilation - reach_back
    out = torch.empty_like(hidden_states)
    gates = torch.empty(batch, length, dtype=work, device=hidden_states.device)
    padded = reach_back + length + reach_ahead
    gated = torch.zeros(padded, hidden, dtype=work, device=hidden_states.device)  # u of one row, with zeros around it
    for row in range(batch):
        done = 0
        for begin in range(0, length, _CHUNK):
            end = min(begin + _CHUNK, length)
            key, value = source.at(row, begin, end).chunk(2, dim=-1)
            query = hidden_states[row, begin:end].to(work)
            g = (query * norm_weight * key).sum(-1)
            g = g * (query.square().mean(-1) + norm_eps).rsqrt() * (key.square().mean(-1) + norm_eps).rsqrt()
            gate = signed_square_root_gate(g)
            gates[row, begin:end] = gate
            if plan.exists is not None:
                gate = gate * plan.exists[row, begin:end].to(work)
            torch.mul(gate.unsqueeze(-1), value, out=gated[reach_back + begin : reach_back + end])

            complete = length if end == length else max(end - reach_ahead, done)  # all that their taps see is there
            residual = gated[reach_back + done : reach_back + complete]
            if conv_weight is not None:
                behind = None if plan.behind is None else plan.behind[row : row + 1, done:complete]
                ahead = None if plan.ahead is None else plan.ahead[row : row + 1, done:complete]
                taps = gated[done : complete + reach_back + reach_ahead].unsqueeze(0)
                residual = residual + F.silu(dilated_taps(taps, conv_weight, dilation, reach_back, behind, ahead)[0])
            out[row, done:complete] = residual.to(out.dtype)
            done = complete
    return out, gates


def _features_at(row: int, positions: torch.Tensor, plan: NgramPlan, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Window means at some positions of one row of the batch, (positions, sizes * width), in at least float32."""
    total = plan.rows[0].shape[1]
    here = positions[:, None] + plan.context
    means = []
    for index, (table, (first, last)) in enumerate(zip(tables, plan.spans, strict=True)):
        offsets = torch.arange(first, last + 1, device=positions.device)
        endings = here + offsets  # (positions, endings)
        use = (endings >= 0) & (endings < total)
        endings = endings.clamp(0, total - 1)
        use &= plan.valid[index][row, endings]
        if plan.behind is not None:
            use &= plan.behind[row, here] >= -offsets
        if plan.ahead is not None:
            use &= plan.ahead[row, positions[:, None]] >= offsets
        work = torch.promote_types(table.dtype, torch.float32)
        sums = (table[plan.rows[index][row, endings]].to(work) * use.unsqueeze(-1).to(work)).sum(1)
        means.append(sums / plan.counts[index][row, positions].clamp_min(1).unsqueeze(-1).to(work))
    return torch.cat(means, dim=-1)
