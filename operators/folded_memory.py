"""The memory's projections folded into its tables: two matrix products become one sum of table rows.

`operators/README.md` ("Folding") has the algebra. The exact definition is `motif_memory.py`. The same packed
tables serve inference (`fold_tables`, once) and training (`table_major.py`, every step).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .motif_memory import NgramPlan, dilated_taps, gated_memory_backward, signed_square_root_gate


def _positions_at_a_time(device: torch.device, hidden: int) -> int:
    """As many as keep their rows and sums in a CPU's cache; elsewhere as many as bound the memory."""
    return max(2**20 // hidden, 64) if device.type == "cpu" else 8192


class FoldedTables(NamedTuple):
    """Projected tables of one memory layer; `rows` holds them times `scale`, a power of two."""

    rows: torch.Tensor  # (slabs, rows, slab width): columns 0..hidden-1 are keys, the others values
    scale: float


class Sections(NamedTuple):
    """Where the parts of packed tables begin: A at row 0, then C_(N-1) .. C_1, then B (`operators/README.md`)."""

    prefix: tuple[int, ...]  # first row of C_m at index m; C_N is A
    oldest: int  # first row of B
    rows: int


def table_sections(largest: int, top_rows: int | None = None) -> Sections:
    """The sections of packed tables for n-grams up to `largest`; `top_rows` is the size of A, 5^N unless given."""
    begin = 5**largest if top_rows is None else top_rows
    prefix = [0] * (largest + 1)
    for size in range(largest - 1, 0, -1):
        prefix[size] = begin
        begin += 5**size
    return Sections(tuple(prefix), begin, begin + (5 ** (largest - 1) if largest > 1 else 0))


def project_tables(
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    ngram_sizes: Sequence[int],
    window: int,
    used: torch.Tensor | None = None,
    slab_width: int | None = None,
) -> torch.Tensor:
    """Packed tables (slabs, rows, slab width), in at least float32, differentiable.

    Args:
        tables: one (5**n, width) per size.
        key_weight, value_weight: (hidden, sizes * width), the two projections.
        ngram_sizes: sizes n, in the order of the tables.
        window: tokens of the window.
        used: int64 (top rows,), the rows of the largest n-gram that section A is to hold; None is all of them.
        slab_width: columns that lie together in memory, a divisor of hidden; None is all of them.
    """
    weight = torch.cat([key_weight, value_weight])  # (2 * hidden, sizes * width)
    work = torch.promote_types(weight.dtype, torch.float32)
    width = tables[0].shape[1]
    weight = weight.to(work).view(-1, slab_width or weight.shape[0], weight.shape[1])  # (slabs, slab width, features)
    largest = max(ngram_sizes)
    sections: list[torch.Tensor] = []  # C_1 .. C_N: sums over the sizes up to m, by the m-gram's row
    for m in range(1, largest + 1):
        rows = used if m == largest else None
        total: torch.Tensor | None = None
        for index, size in enumerate(ngram_sizes):
            if size == m:
                table = tables[index] if rows is None else F.embedding(rows, tables[index])
                part = weight[:, :, index * width : (index + 1) * width] / (window - m + 1)
                projected = table.to(work) @ part.transpose(1, 2)  # (slabs, rows, slab width)
                total = projected if total is None else total + projected
        if sections:
            shorter = sections[-1]  # row g of an m-gram ends in the (m - 1)-gram g mod 5^(m - 1)
            shorter = shorter.repeat(1, 5, 1) if rows is None else shorter[:, rows % 5 ** (m - 1)]
            total = shorter if total is None else total + shorter
        if total is None:
            total = weight.new_zeros(weight.shape[0], 5**m, weight.shape[1])
        sections.append(total)
    packed = sections[::-1]
    if largest > 1:
        oldest = sections[largest - 2]  # B[q] adds up C_m[q div 5^(N - 1 - m)]
        for m in range(1, largest - 1):
            oldest = (oldest.unflatten(1, (5**m, -1)) + sections[m - 1].unsqueeze(2)).flatten(1, 2)
        packed = [*packed, oldest]
    return torch.cat(packed, dim=1)


def fold_tables(
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    ngram_sizes: Sequence[int],
    window: int,
    dtype: torch.dtype = torch.float16,
    slab_width: int | None = None,
) -> FoldedTables:
    """Packed tables for inference; arguments as in `project_tables`.

    Args:
        dtype: of the rows. In float16 they are scaled by a power of two so that no window can overflow.

    Raises:
        ValueError: if the weights are not finite.
    """
    packed = project_tables(tables, key_weight, value_weight, ngram_sizes, window, slab_width=slab_width)
    largest = packed.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("the memory's weights are not finite, so they cannot be folded.")
    scale = 1.0
    bound = largest * (window - max(ngram_sizes) + 2)  # of a window's sum
    if dtype == torch.float16 and bound > 0:
        while bound * scale > 2.0**15:
            scale /= 2
        while bound * scale < 2.0**14:
            scale *= 2
    return FoldedTables((packed * scale).to(dtype), scale)


def is_regular(plan: NgramPlan) -> torch.Tensor:
    """Whether each position's window is full of letters, bool (batch, length): then it is one plain sum of rows."""
    ends = plan.runs[:, plan.context + plan.last :]
    missing = plan.length - ends.shape[1]
    return F.pad(ends, (0, missing)) >= plan.window


class _Windows:
    """Sums of packed rows over the windows of any block of positions."""

    def __init__(self, folded: FoldedTables, plan: NgramPlan, top: torch.Tensor | None):
        self.rows, self.scale, self.plan = folded.rows, folded.scale, plan
        self.hidden = folded.rows.shape[0] * folded.rows.shape[2] // 2
        self.largest = max(plan.ngram_sizes)
        self.endings = plan.window - self.largest + 1
        other = table_sections(self.largest, 0).rows
        self.sections = table_sections(self.largest, folded.rows.shape[1] - other)
        self.top = plan.grams if top is None else top
        self.regular = is_regular(plan)
        self.work = torch.promote_types(folded.rows.dtype, torch.float32)

    def row_ids(self, batch: slice, begin: int, end: int) -> torch.Tensor:
        """Rows of A and B that regular windows add up, int32 (batch, end - begin, rows per sum)."""
        first = self.plan.context + begin + self.plan.last - self.endings  # ends the (N - 1)-gram of B
        stop = self.plan.context + end + self.plan.last
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
        ids = self.row_ids(batch, begin, end)
        count, length, width = ids.shape
        by_slab = [F.embedding_bag(ids.reshape(-1, width), slab, mode="sum") for slab in self.rows]
        sums = (by_slab[0] if len(by_slab) == 1 else torch.cat(by_slab, dim=-1)).to(self.work)
        places = (~self.regular[batch, begin:end]).reshape(-1).nonzero().flatten()
        for some in places.split(64):  # bounds the memory for their rows
            in_batch = batch.start + some // length
            sums[some] = self.irregular(in_batch, begin + some % length)
        return sums.view(count, length, -1)

    def irregular(self, batch: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Sums at positions whose window is not full of letters, (positions, 2 * hidden)."""
        bags, ids, weights = irregular_rows(self.plan, self.top, self.sections, batch, positions)
        out = torch.zeros(len(positions), 2 * self.hidden, dtype=self.work, device=self.rows.device)
        columns = 0
        for slab in self.rows:
            part = slab[ids].to(self.work) * weights.unsqueeze(-1).to(self.work)
            out[:, columns : columns + slab.shape[1]].index_add_(0, bags, part)
            columns += slab.shape[1]
        return out

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the rows, from that of the sums (batch, length, 2 * hidden), which is overwritten."""
        if self.scale != 1:
            grad /= self.scale
        out = torch.zeros(self.rows.shape[1], grad.shape[-1], dtype=grad.dtype, device=grad.device)
        batch, positions = (~self.regular).nonzero(as_tuple=True)
        for some in torch.arange(len(batch), device=batch.device).split(64):  # bounds the memory for their rows
            place, rows, weights = irregular_rows(self.plan, self.top, self.sections, batch[some], positions[some])
            values = grad[batch[some], positions[some]][place] * weights.unsqueeze(-1).to(grad.dtype)
            _add_rows(out, rows, values)
        grad[batch, positions] = 0
        ahead = self.plan.context + self.plan.last  # position t has the window that ends at token ahead + t
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
        slabs, _, width = self.rows.shape
        return out.view(-1, slabs, width).transpose(0, 1).contiguous()


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


def irregular_rows(
    plan: NgramPlan, top: torch.Tensor, sections: Sections, batch: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and weights whose sum is a window that is not full of letters.

    With w_n = L_n / count_n for the sizes n of the memory and 0 for others, an ending whose longest usable n-gram has
    size s adds w_s C_s and, for every m < s, (w_m - w_(m+1)) C_m.

    Args:
        plan: from `plan_ngrams`.
        top: int32 (batch, context + length), row within A of every largest n-gram.
        sections: of the packed tables.
        batch, positions: int64 (places,), where.

    Returns:
        One entry per row read: the place, the row in the packed tables (both int64), and the weight (float64).
    """
    largest = max(plan.ngram_sizes)
    here = (positions + plan.context).unsqueeze(1)
    end = here + plan.last
    begin = (end - plan.window + 1).clamp_min(0)
    stop = torch.full_like(end, plan.grams.shape[1])
    batch = batch.unsqueeze(1)
    if plan.behind is not None:
        begin = torch.maximum(begin, here - plan.behind[batch, here])
    if plan.ahead is not None:
        stop = torch.minimum(stop, here + plan.ahead[batch, positions.unsqueeze(1)] + 1)
    endings = end - torch.arange(plan.window, device=end.device)  # (places, window), the newest first
    is_inside = (endings >= begin) & (endings < stop)
    safe = endings.clamp(0, plan.grams.shape[1] - 1)
    longest = torch.minimum(plan.runs[batch, safe].long(), endings - begin + 1).clamp_max(largest)
    longest = longest.masked_fill(~is_inside, 0)  # size of the longest n-gram that ends here inside the window

    weights = torch.zeros(len(positions), largest + 2, dtype=torch.float64, device=end.device)
    for n in set(plan.ngram_sizes):
        weights[:, n] = (plan.window - n + 1) / (longest >= n).sum(1).clamp_min(1).double()
    sizes = torch.arange(1, largest + 1, device=end.device)  # (places, window, sizes) from here on
    shorter = (weights[:, 1 : largest + 1] - weights[:, 2:]).unsqueeze(1)
    full = weights[:, 1 : largest + 1].unsqueeze(1)
    longest = longest.unsqueeze(-1)
    factors = torch.where(sizes < longest, shorter, torch.where(sizes == longest, full, 0.0))
    grams = plan.grams[batch, safe].long().unsqueeze(-1)
    starts = torch.tensor(sections.prefix[1:], device=end.device)
    rows = grams % 5**sizes + starts
    rows[..., -1] = top[batch, safe].long()
    place, ending, size = factors.nonzero(as_tuple=True)
    return place, rows[place, ending, size], factors[place, ending, size]


def folded_key_value(
    folded: FoldedTables, plan: NgramPlan, top: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of every position, each (batch, length, hidden) in at least float32.

    Args:
        folded: from `fold_tables`, or packed tables of `project_tables` with a scale of 1.
        plan: from `plan_ngrams`.
        top: int32 (batch, context + length), row within section A of every largest n-gram; None if A has all rows.
    """
    windows = _Windows(folded, plan, top)
    out = torch.empty(
        *plan.grams.shape[:1], plan.length, 2 * windows.hidden, dtype=windows.work, device=folded.rows.device
    )
    for batch, begin, end in _blocks(out.shape[0], plan.length, out.device, windows.hidden):
        out[batch, begin:end] = windows.key_value(batch, begin, end)
    key, value = out.chunk(2, dim=-1)
    return key, value


def folded_memory(
    hidden_states: torch.Tensor,
    folded: FoldedTables,
    plan: NgramPlan,
    norm_weight: torch.Tensor,
    norm_eps: float,
    conv_weight: torch.Tensor | None = None,
    dilation: int = 1,
    reach_back: int = 0,
    history: torch.Tensor | None = None,
    top: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole memory from packed tables, a block of positions at a time, in at least float32.

    Args:
        hidden_states: (batch, length, hidden).
        folded, plan, top: see `folded_key_value`.
        norm_weight: (hidden,), product of the weights of the two norms.
        norm_eps: their epsilon.
        conv_weight, dilation, reach_back: see `dilated_taps`; None for no convolution.
        history: (batch, reach_back, hidden), inputs of the convolution before the first token; None is none.

    Returns:
        Residual (batch, length, hidden), gate (batch, length), and the convolution's last inputs, at most as many as
        it reaches: (batch, min(length, (taps - 1) * dilation), hidden).
    """
    batch_size, length, hidden = hidden_states.shape
    if length == 1 and batch_size and hidden_states.device.type == "cpu":
        layer = (norm_weight, norm_eps, conv_weight, dilation, reach_back)
        single = _single_token(hidden_states, folded, plan, *layer, history, top)
        if single is not None:
            return single
    windows = _Windows(folded, plan, top)
    work = windows.work
    scaled_norm = norm_weight.to(work) / math.sqrt(hidden)
    reach = 0 if conv_weight is None else (conv_weight.shape[-1] - 1) * dilation
    reach_ahead = reach - reach_back
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
        gate = _scaled_gate(hidden_states[batch, begin:end].to(work), key, scaled_norm, norm_eps, windows.scale)
        gates[batch, begin:end] = gate
        if plan.exists is not None:
            gate = gate * plan.exists[batch, begin:end].to(work)
        gate = gate / windows.scale  # of the values, by a power of two: nothing is rounded
        gated = torch.cat([tail, gate.unsqueeze(-1) * value], dim=1) if reach else gate.unsqueeze(-1) * value
        if end == length:
            last[batch] = gated[:, gated.shape[1] - kept :]
            gated = F.pad(gated, (0, 0, 0, reach_ahead))
        complete = gated.shape[1] - reach  # positions whose taps are all there
        if complete <= 0:
            tail = gated
            continue
        residual = gated[:, reach_back : reach_back + complete]
        if conv_weight is not None:
            behind = None if plan.behind is None else plan.behind[batch, plan.context + done :][:, :complete]
            ahead = None if plan.ahead is None else plan.ahead[batch, done : done + complete]
            taps = dilated_taps(gated, conv_weight, dilation, reach_back, behind, ahead)
            residual = residual + F.silu(taps)
        out[batch, done : done + complete] = residual
        tail = gated[:, complete:]
        done += complete
    return out, gates, last


def _scaled_gate(
    query: torch.Tensor, scaled_key: torch.Tensor, scaled_norm: torch.Tensor, norm_eps: float, scale: float
) -> torch.Tensor:
    """Gate (batch, length) from keys times `scale`, a power of two, and the norm's weight over sqrt(hidden)."""
    g = (query * scaled_norm * scaled_key).sum(-1) / scale
    key_square = scaled_key.square().mean(-1) / (scale * scale)
    g = g * (query.square().mean(-1) + norm_eps).rsqrt() * (key_square + norm_eps).rsqrt()
    # As wide as a vector, so that a single token takes the same code, and gets the same bits, as many do.
    return signed_square_root_gate(g.unsqueeze(-1).expand(*g.shape, 32).contiguous())[..., 0]


def _single_token(
    hidden_states: torch.Tensor,
    folded: FoldedTables,
    plan: NgramPlan,
    norm_weight: torch.Tensor,
    norm_eps: float,
    conv_weight: torch.Tensor | None,
    dilation: int,
    reach_back: int,
    history: torch.Tensor | None,
    top: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`folded_memory` of one causal token per sequence whose window is full of letters; None for any other.

    The same additions with a third of the operations, for decoding.
    """
    largest, here = max(plan.ngram_sizes), plan.context
    endings, taps = plan.window - largest + 1, 0 if conv_weight is None else conv_weight.shape[-1]
    if plan.last or here + 1 < plan.window or (plan.exists is not None and not plan.exists.all()):
        return None
    if plan.behind is not None and min(plan.behind[:, here].tolist()) < reach_back:
        return None
    if reach_back != max(taps - 1, 0) * dilation or (taps > 1 and history is None) or largest == 1:
        return None
    if min(plan.runs[:, here].tolist()) < plan.window:
        return None
    oldest = folded.rows.shape[1] - 5 ** (largest - 1)  # the first row of B
    found = (plan.grams if top is None else top)[:, here - endings : here + 1].tolist()
    for sequence, gram in zip(found, plan.grams[:, here - endings].tolist(), strict=True):
        sequence.append(oldest + gram % 5 ** (largest - 1))  # last, as in the sums of many tokens
    ids = torch.tensor([sequence[1:] for sequence in found], dtype=torch.int32)
    sums = [F.embedding_bag(ids, slab, mode="sum") for slab in folded.rows]
    work = torch.promote_types(folded.rows.dtype, torch.float32)
    both = (sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)).to(work)
    key, value = both.unsqueeze(1).chunk(2, dim=-1)
    scaled_norm = norm_weight.to(work) / math.sqrt(hidden_states.shape[-1])
    gate = _scaled_gate(hidden_states.to(work), key, scaled_norm, norm_eps, folded.scale).contiguous()
    gated = (gate / folded.scale).unsqueeze(-1) * value
    if conv_weight is None:
        return gated.to(hidden_states.dtype), gate, gated[:, 1:].clone()
    total: torch.Tensor | None = None
    for tap in range(taps):
        part = gated if tap == taps - 1 else history[:, tap * dilation : tap * dilation + 1].to(work)  # type: ignore[index]
        scale = conv_weight[:, 0, tap].to(work)
        total = part * scale if total is None else torch.addcmul(total, part, scale)
    assert total is not None
    residual = gated + F.silu(total)
    return residual.to(hidden_states.dtype), gate, gated if taps > 1 else gated[:, 1:].clone()


def folded_memory_backward(
    grad_residual: torch.Tensor,
    grad_gate: torch.Tensor | None,
    hidden_states: torch.Tensor,
    folded: FoldedTables,
    plan: NgramPlan,
    norm_weight: torch.Tensor,
    norm_eps: float,
    conv_weight: torch.Tensor | None = None,
    dilation: int = 1,
    reach_back: int = 0,
    top: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `folded_memory` (without history), for hidden states, rows, norm and conv weight.

    Key and value are computed again, a block of positions at a time. Additions are in a fixed order on every device.
    """
    windows = _Windows(folded, plan, top)
    batch_size, length, hidden = hidden_states.shape
    reach = 0 if conv_weight is None else (conv_weight.shape[-1] - 1) * dilation
    behind = None if plan.behind is None else plan.behind[:, plan.context :]
    grad_hidden = torch.empty_like(hidden_states)
    grad_sums = torch.empty(batch_size, length, 2 * hidden, dtype=windows.work, device=hidden_states.device)
    grad_norm = torch.zeros_like(norm_weight)
    grad_conv = None if conv_weight is None else torch.zeros_like(conv_weight)

    def part(x: torch.Tensor | None, batch: slice, around: slice) -> torch.Tensor | None:
        return None if x is None else x[batch, around]

    for batch, begin, end in _blocks(batch_size, length, hidden_states.device, hidden):
        around = slice(max(begin - reach, 0), min(end + reach, length))
        key, value = windows.key_value(batch, around.start, around.stop).chunk(2, dim=-1)
        query, key_gradient, value_gradient, norm, conv = gated_memory_backward(
            grad_residual[batch, around],
            part(grad_gate, batch, around),
            hidden_states[batch, around],
            key,
            value,
            norm_weight,
            norm_eps,
            conv_weight,
            dilation,
            reach_back,
            part(plan.exists, batch, around),
            part(behind, batch, around),
            part(plan.ahead, batch, around),
            core=slice(begin - around.start, end - around.start),
        )
        grad_hidden[batch, begin:end] = query
        torch.cat([key_gradient, value_gradient], dim=-1, out=grad_sums[batch, begin:end])
        grad_norm += norm
        if grad_conv is not None and conv is not None:
            grad_conv += conv
    return grad_hidden, windows.gradient(grad_sums), grad_norm, grad_conv


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
