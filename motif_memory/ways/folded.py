"""The memory from packed tables, forward and backward, a block of positions at a time, in PyTorch's operations."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..definition import MemoryLayer, MemoryOutput, NgramPlan, at_least_float32, dilated_taps
from .gradients import gated_memory_backward
from .irregular import irregular_rows, is_regular
from .one_token import one_token_memory, scaled_gate
from .packed_tables import PackedTables, table_sections

_IRREGULAR_AT_A_TIME = 1024  # positions: bounds the memory for their rows' numbers and weights


def _positions_at_a_time(device: torch.device, hidden: int) -> int:
    """As many as keep their rows and sums in a CPU's cache; elsewhere as many as bound the memory."""
    return max(2**20 // hidden, 64) if device.type == "cpu" else 8192


class _Windows:
    """Sums of packed rows over the windows of any block of positions."""

    def __init__(self, tables: PackedTables, plan: NgramPlan, top: torch.Tensor | None):
        self.rows, self.scale, self.plan = tables.rows, tables.scale, plan
        self.hidden = tables.rows.shape[0] * tables.rows.shape[2] // 2
        self.largest = max(plan.ngram_sizes)
        self.endings = plan.window - self.largest + 1
        other = table_sections(self.largest, 0).rows
        self.sections = table_sections(self.largest, tables.rows.shape[1] - other)
        self.top = plan.grams if top is None else top
        self.regular = is_regular(plan)
        self.work = at_least_float32(tables.rows.dtype)

    def row_ids(self, batch: slice, begin: int, end: int) -> torch.Tensor:
        """Rows of A and B that regular windows add up, int32 (batch, end - begin, rows per sum)."""
        first = self.plan.context + begin + self.plan.reach_ahead - self.endings  # ends the (N - 1)-gram of B
        stop = self.plan.context + end + self.plan.reach_ahead
        inside = slice(max(first, 0), min(stop, self.top.shape[1]))
        pad = (inside.start - first, max(stop - max(inside.stop, inside.start), 0))
        ids = F.pad(self.top[batch, inside], pad)[:, 1:].unfold(1, self.endings, 1)
        if self.largest > 1:
            oldest = F.pad(self.plan.grams[batch, inside], pad)[:, : end - begin] % 5 ** (self.largest - 1)
            ids = torch.cat([ids, oldest.unsqueeze(-1) + self.sections.oldest], dim=-1)
        return ids

    def key_value(self, batch: slice, begin: int, end: int) -> torch.Tensor:
        """(batch, end - begin, 2 * hidden) in at least float32."""
        sums = self.scaled_key_value(batch, begin, end)
        return sums.div_(self.scale) if self.scale != 1 else sums

    def scaled_key_value(self, batch: slice, begin: int, end: int) -> torch.Tensor:
        """`key_value` times the scale of the tables."""
        regular = self.regular[batch, begin:end]
        count, length = regular.shape
        places = (~regular).reshape(-1).nonzero().flatten()
        if len(places) < regular.numel():
            ids = self.row_ids(batch, begin, end).flatten(0, 1)
            sums = _sums_of_bags(self.rows, ids).to(self.work)
        else:  # such as windows that are longer than all rows
            sums = torch.empty(count * length, 2 * self.hidden, dtype=self.work, device=self.rows.device)
        for some in places.split(_IRREGULAR_AT_A_TIME):
            in_batch = batch.start + some // length
            sums[some] = self.irregular(in_batch, begin + some % length)
        return sums.view(count, length, -1)

    def irregular(self, batch: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Sums at positions whose window is not full of letters, (positions, 2 * hidden)."""
        bags, ids, weights = irregular_rows(self.plan, self.top, self.sections, batch, positions)
        if not len(ids):  # no letters at all
            return torch.zeros(len(positions), 2 * self.hidden, dtype=self.work, device=self.rows.device)
        starts = torch.searchsorted(bags, torch.arange(len(positions), device=bags.device))
        rows, weights = self.rows, weights.to(self.work)
        if rows.dtype != self.work:
            used, ids = ids.unique(return_inverse=True)
            rows = rows[:, used].to(self.work)
        return _sums_of_bags(rows, ids, starts, weights)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the rows, from that of the sums (batch, length, 2 * hidden), which is overwritten."""
        if self.scale != 1:
            grad /= self.scale
        out = torch.zeros(self.rows.shape[1], grad.shape[-1], dtype=grad.dtype, device=grad.device)
        batch, positions = (~self.regular).nonzero(as_tuple=True)
        for some in torch.arange(len(batch), device=batch.device).split(_IRREGULAR_AT_A_TIME):
            place, rows, weights = irregular_rows(self.plan, self.top, self.sections, batch[some], positions[some])
            order = rows.argsort(stable=True)
            used, counts = rows[order].unique_consecutive(return_counts=True)
            starts, weights = counts.cumsum(0) - counts, weights[order].to(grad.dtype)
            grads = grad[batch[some], positions[some]]
            out[used] += F.embedding_bag(place[order], grads, starts, mode="sum", per_sample_weights=weights)
        grad[batch, positions] = 0
        slabs, _, width = self.rows.shape
        if len(batch) == self.regular.numel():
            return out.view(-1, slabs, width).transpose(0, 1).contiguous()
        ahead = self.plan.context + self.plan.reach_ahead  # position t has the window that ends at token ahead + t
        tokens = self.top.shape[1]
        chunk = _positions_at_a_time(grad.device, self.hidden)
        for row, windows in enumerate(grad):
            first = max(1 - self.endings, -ahead)  # the window that ends here would be the first to hold its n-gram
            for begin in range(first, min(len(windows), tokens - ahead), chunk):
                end = min(begin + chunk, len(windows), tokens - ahead)
                held = windows[max(begin, 0) : end + self.endings - 1]
                missing = (max(-begin, 0), end - begin + self.endings - 1 - max(-begin, 0) - len(held))
                pooled = _leading_sum(F.pad(held, (0, 0, *missing)) if any(missing) else held, self.endings)
                _add_rows(out, self.top[row, ahead + begin : ahead + end], pooled)
                begin = max(begin, self.endings - ahead, 0)  # before, no window is full
                if self.largest > 1 and begin < end:
                    grams = self.plan.grams[row, ahead + begin - self.endings : ahead + end - self.endings]
                    oldest = grams % 5 ** (self.largest - 1) + self.sections.oldest
                    _add_rows(out, oldest, windows[begin:end])
        return out.view(-1, slabs, width).transpose(0, 1).contiguous()


def _sums_of_bags(
    rows: torch.Tensor, ids: torch.Tensor, starts: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums of packed rows, those of all slabs side by side; arguments as of `F.embedding_bag`."""
    by_slab = [F.embedding_bag(ids, slab, starts, mode="sum", per_sample_weights=weights) for slab in rows]
    return by_slab[0] if len(by_slab) == 1 else torch.cat(by_slab, dim=-1)


def _leading_sum(x: torch.Tensor, length: int) -> torch.Tensor:
    """Sum of every `length` consecutive rows, by binary doubling; `length - 1` rows fewer than `x`."""
    count = len(x) - length + 1
    total: torch.Tensor | None = None
    taken, width = 0, 1
    while True:
        if length & width:
            part = x[taken : taken + count]
            total = part if total is None else total + part
            taken += width
        if 2 * width > length:
            assert total is not None
            return total
        x = x[:-width] + x[width:]
        width *= 2


def folded_key_value(
    tables: PackedTables, plan: NgramPlan, top: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of every position, each (batch, length, hidden) in at least float32.

    Args:
        tables: from `pack_tables`, or rows of `project_tables` with a scale of 1.
        plan: which n-grams each window holds.
        top: int32 (batch, context + length), row within section A of every largest n-gram; None if A has all rows.
    """
    windows = _Windows(tables, plan, top)
    out = torch.empty(
        *plan.grams.shape[:1], plan.length, 2 * windows.hidden, dtype=windows.work, device=tables.rows.device
    )
    for batch, begin, end in _blocks(out.shape[0], plan.length, out.device, windows.hidden):
        out[batch, begin:end] = windows.key_value(batch, begin, end)
    key, value = out.chunk(2, dim=-1)
    return key, value


def folded_memory(
    hidden_states: torch.Tensor,
    tables: PackedTables,
    plan: NgramPlan,
    layer: MemoryLayer,
    history: torch.Tensor | None = None,
    top: torch.Tensor | None = None,
) -> MemoryOutput:
    """The whole memory from packed tables, a block of positions at a time, in at least float32.

    Args:
        hidden_states: (batch, length, hidden).
        tables, plan, top: see `folded_key_value`.
        layer: norms and convolution.
        history: (batch, reach_back, hidden), inputs of the convolution before the first token; None is none.

    Returns:
        Residual (batch, length, hidden), gate (batch, length), and the convolution's last inputs, at most as many as
        it reaches: (batch, min(length, reach), hidden).
    """
    batch_size, length, hidden = hidden_states.shape
    if length == 1 and batch_size and hidden_states.device.type == "cpu":
        single = one_token_memory(hidden_states, tables, plan, layer, history, top)
        if single is not None:
            return single
    windows = _Windows(tables, plan, top)
    work = windows.work
    scaled_norm = layer.norm_weight.to(work) / math.sqrt(hidden)
    reach, reach_back = layer.reach, layer.reach_back
    kept = min(length, reach)
    out = torch.empty_like(hidden_states)
    gates = torch.empty(batch_size, length, dtype=work, device=hidden_states.device)
    last = torch.empty(batch_size, kept, hidden, dtype=work, device=hidden_states.device)
    tail = torch.empty(0)  # u from `reach_back` positions before the next one to complete, up to the newest
    done = 0
    for batch, begin, end in _blocks(batch_size, length, hidden_states.device, hidden):
        if begin == 0:
            done = 0
            count = batch.stop - batch.start
            tail = torch.zeros(count, reach_back, hidden, dtype=work, device=out.device)
            if history is not None:
                tail = history[batch].to(work)
        key, value = windows.scaled_key_value(batch, begin, end).chunk(2, dim=-1)
        query = hidden_states[batch, begin:end].to(work)
        gate = scaled_gate(query, key, scaled_norm, layer.norm_eps, windows.scale)
        gates[batch, begin:end] = gate
        gated = (gate / windows.scale).unsqueeze(-1) * value  # by a power of two: nothing is rounded
        if plan.exists is not None:
            gated = gated.masked_fill(~plan.exists[batch, begin:end].unsqueeze(-1), 0)
        gated = torch.cat([tail, gated], dim=1) if reach else gated
        if end == length:
            last[batch] = gated[:, gated.shape[1] - kept :]
            gated = F.pad(gated, (0, 0, 0, reach - reach_back))
        complete = gated.shape[1] - reach  # positions whose taps are all there
        if complete <= 0:
            tail = gated
            continue
        residual = gated[:, reach_back : reach_back + complete]
        if layer.taps is not None:
            here = plan.of_positions(batch, slice(done, done + complete))
            residual = residual + F.silu(
                dilated_taps(gated, layer.taps, layer.dilation, reach_back, here.behind, here.ahead)
            )
        out[batch, done : done + complete] = residual
        tail = gated[:, complete:]
        done += complete
    return MemoryOutput(out, gates, last)


def folded_memory_backward(
    grad_residual: torch.Tensor,
    grad_gate: torch.Tensor | None,
    hidden_states: torch.Tensor,
    tables: PackedTables,
    plan: NgramPlan,
    layer: MemoryLayer,
    top: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `folded_memory` (without history), for hidden states, rows, norm weight and taps.

    Key and value are computed again, a block of positions at a time. Additions are in a fixed order on every device.
    """
    windows = _Windows(tables, plan, top)
    batch_size, length, hidden = hidden_states.shape
    grad_hidden = torch.empty_like(hidden_states)
    grad_sums = torch.empty(batch_size, length, 2 * hidden, dtype=windows.work, device=hidden_states.device)
    grad_norm = torch.zeros_like(layer.norm_weight)
    grad_taps = None if layer.taps is None else torch.zeros_like(layer.taps)
    for batch, begin, end in _blocks(batch_size, length, hidden_states.device, hidden):
        around = slice(max(begin - layer.reach, 0), min(end + layer.reach, length))
        key, value = windows.key_value(batch, around.start, around.stop).chunk(2, dim=-1)
        query, key_gradient, value_gradient, norm, taps = gated_memory_backward(
            grad_residual[batch, around],
            None if grad_gate is None else grad_gate[batch, around],
            hidden_states[batch, around],
            key,
            value,
            plan.of_positions(batch, around),
            layer,
            core=slice(begin - around.start, end - around.start),
        )
        grad_hidden[batch, begin:end] = query
        torch.cat([key_gradient, value_gradient], dim=-1, out=grad_sums[batch, begin:end])
        grad_norm += norm
        if grad_taps is not None and taps is not None:
            grad_taps += taps
    return grad_hidden, windows.gradient(grad_sums), grad_norm, grad_taps


def _add_rows(out: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """`out[rows] += values`, in a fixed order; dim 0."""
    if out.is_cuda:  # sorts; `index_add_` would add in any order
        out.index_put_((rows.long(),), values, accumulate=True)
    else:
        out.index_add_(0, rows, values)


def _blocks(batch_size: int, length: int, device: torch.device, hidden: int) -> Iterator[tuple[slice, int, int]]:
    """Blocks (rows of the batch, begin, end): many short rows at once, or one long row piece by piece."""
    chunk = _positions_at_a_time(device, hidden)
    together = max(chunk // max(length, 1), 1)
    for first in range(0, batch_size, together):
        rows = slice(first, min(first + together, batch_size))
        for begin in range(0, length, chunk):
            yield rows, begin, min(begin + chunk, length)
