"""The motif memory's operations on tensors: the exact definition, in plain PyTorch.

Source of every formula: `megatron/core/transformer/gengram.py` of the reference, as restated in `operators/README.md`.
Shapes are (batch, length, ...). Nothing here knows a configuration or a model; faster paths are judged by this file.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class NgramPlan(NamedTuple):
    """Which table rows each position reads: computed once per forward pass, shared by all memory layers.

    The three tuples have one entry per n-gram size. `context` earlier tokens stand in front of the `length` current
    ones in `rows` and `valid`, so that a decoding step sees its whole window.
    """

    rows: tuple[torch.Tensor, ...]  # int64 (batch, context + length): row of the n-gram that ends here, 0 if invalid
    valid: tuple[torch.Tensor, ...]  # bool (batch, context + length): all n tokens are letters of one segment
    counts: tuple[torch.Tensor, ...]  # float32 (batch, length): valid n-grams within the window
    spans: tuple[tuple[int, int], ...]  # first and last ending pooled, relative to the position
    context: int
    behind: torch.Tensor | None  # int64 (batch, context + length): earlier tokens of the same segment; None = all
    ahead: torch.Tensor | None  # the same for later tokens; only for centred windows
    exists: torch.Tensor | None  # bool (batch, length): False at padding; None = no padding


def letter_codes(input_ids: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Letter of each token: 1..5 for the five `token_ids` in their order, 0 for any other token.

    Zero means "no letter", so that zero-filled padding and cache states are right as they are.
    """
    codes = torch.zeros_like(input_ids, dtype=torch.int64)
    for digit, token in enumerate(token_ids):
        codes = codes.masked_fill(input_ids == token, digit + 1)
    return codes


def window_span(window: int, size: int, is_causal: bool) -> tuple[int, int]:
    """First and last ending of the n-grams inside a window, relative to its position.

    The causal window is the last `window` tokens. The centred one reaches `(window - 1) // 2` tokens ahead and the
    rest behind: the causal window, moved.
    """
    ahead = 0 if is_causal else (window - 1) // 2
    return ahead - (window - size), ahead


def _shift(x: torch.Tensor, steps: int, reach: torch.Tensor | None) -> torch.Tensor:
    """`x[:, t - steps]`, zero before the start of the row, and where fewer than `steps` tokens are in `reach`."""
    if steps == 0:
        return x
    shifted = F.pad(x, (0, 0) * (x.dim() - 2) + (steps, 0))[:, : x.shape[1]]
    if reach is None:
        return shifted
    return shifted * (reach >= steps).view(*reach.shape, *(1,) * (x.dim() - 2)).to(x.dtype)


def _trailing_sum(x: torch.Tensor, length: int, reach: torch.Tensor | None) -> torch.Tensor:
    """Sum of the last `length` entries along dim 1, by binary doubling.

    No prefix sums, hence no cancellation; and the same additions in the same order however the row is cut in chunks.
    """
    total: torch.Tensor | None = None
    taken, width = 0, 1
    while True:
        if length & width:
            part = _shift(x, taken, reach)
            total = part if total is None else total + part
            taken += width
        if 2 * width > length:
            assert total is not None
            return total
        x = x + _shift(x, width, reach)
        width *= 2


def window_sum(
    x: torch.Tensor,
    span: tuple[int, int],
    behind: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of `x[:, t + first]` to `x[:, t + last]` for every position t.

    Args:
        x: (batch, length, width).
        span: `(first, last)`; `last` must not be negative.
        behind: int64 (batch, length), how many earlier tokens belong to the same segment; None is all of them.
        ahead: the same for later tokens.
    """
    first, last = span
    total = None
    if first <= 0:
        total = _trailing_sum(x, 1 - first, behind)
    if last > 0:
        start = max(first, 1)
        ahead = None if ahead is None else ahead.flip(1)
        later = _shift(_trailing_sum(x.flip(1), last - start + 1, ahead), start, ahead).flip(1)
        total = later if total is None else total + later
    assert total is not None
    return total


def plan_ngrams(
    codes: torch.Tensor,
    ngram_sizes: Sequence[int],
    window: int,
    *,
    context: int = 0,
    is_causal: bool = True,
    behind: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
    exists: torch.Tensor | None = None,
) -> NgramPlan:
    """Rows to read and n-grams to count for every position.

    An n-gram belongs to the position of its last letter; that letter is the least significant of its base-5 digits. It
    is valid if all its n tokens are letters of the same segment.

    Args:
        codes: int64 (batch, context + length) from `letter_codes`.
        ngram_sizes: sizes n, in the order of the tables.
        window: tokens of the window, at least as many as the largest size.
        context: leading tokens of `codes` that are history.
        is_causal: the last `window` tokens if true, else a window centred on the position.
        behind, ahead, exists: see `NgramPlan`.
    """
    digits = codes - 1
    row = torch.zeros_like(codes)
    is_valid = torch.ones_like(codes, dtype=torch.bool)
    by_size = {}
    for back in range(max(ngram_sizes)):
        code = _shift(codes.unsqueeze(-1), back, behind).squeeze(-1) if back else codes
        digits = code - 1
        row = row + digits.clamp_min(0) * 5**back
        is_valid = is_valid & (digits >= 0)
        by_size[back + 1] = (row.masked_fill(~is_valid, 0), is_valid)
    spans = tuple(window_span(window, size, is_causal) for size in ngram_sizes)
    counts = []
    for size, span in zip(ngram_sizes, spans, strict=True):
        ones = by_size[size][1].unsqueeze(-1).float()
        counts.append(window_sum(ones, span, behind, ahead).squeeze(-1)[:, context:])
    return NgramPlan(
        rows=tuple(by_size[size][0] for size in ngram_sizes),
        valid=tuple(by_size[size][1] for size in ngram_sizes),
        counts=tuple(counts),
        spans=spans,
        context=context,
        behind=behind,
        ahead=ahead,
        exists=exists,
    )


def window_mean(rows: torch.Tensor, plan: NgramPlan, index: int) -> torch.Tensor:
    """Mean embedding of the valid n-grams within each window, zero where there is none.

    Args:
        rows: (batch, context + length, width), table rows looked up with `plan.rows[index]`.
        plan: from `plan_ngrams`.
        index: which of the n-gram sizes.

    Returns:
        (batch, length, width) in at least float32: sums of half-precision rows are taken in float32.
    """
    rows = rows * plan.valid[index].unsqueeze(-1).to(rows.dtype)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = window_sum(rows, plan.spans[index], plan.behind, plan.ahead)[:, plan.context :]
    return total / plan.counts[index].clamp_min(1).unsqueeze(-1).to(total.dtype)


def running_sum(x: torch.Tensor, initial: torch.Tensor | None = None) -> torch.Tensor:
    """Prefix sums along dim 1 in the dtype of `x`, as the original takes them on CUDA: every partial sum is rounded.

    Args:
        x: (batch, length, width).
        initial: (batch, width), the sum of what came before.

    CUDA's scan over an outer dimension is sequential per column in the dtype of its input. The CPU's scan accumulates
    half precision in float32, so there the steps are taken one by one: slow, and only for reproduction.
    """
    if initial is not None and x.shape[1]:
        x = torch.cat([(x[:, :1] + initial.unsqueeze(1)), x[:, 1:]], dim=1)
    if x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] == 0:
        return torch.cumsum(x, dim=1)
    sums = [x[:, 0]]
    for step in range(1, x.shape[1]):
        sums.append(sums[-1] + x[:, step])
    return torch.stack(sums, dim=1)


def memory_gate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Gate in (0, 1) of each position: `sigmoid(sign(g) sqrt(max(|g|, 1e-6)))` with `g = <query, key> / sqrt(hidden)`.

    Args:
        query, key: (batch, length, hidden), both RMS-normalised.

    Returns:
        (batch, length).
    """
    return signed_square_root_gate((query * key).sum(dim=-1) / math.sqrt(query.shape[-1]))


def signed_square_root_gate(g: torch.Tensor) -> torch.Tensor:
    """`sigmoid(sign(g) sqrt(max(|g|, 1e-6)))`."""
    return (g.abs().clamp_min(1e-6).sqrt() * g.sign()).sigmoid()


def dilated_taps(
    x: torch.Tensor,
    weight: torch.Tensor,
    dilation: int,
    reach_back: int,
    behind: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Depthwise convolution: the sum over taps i of `weight[:, 0, i] * x[:, t + i * dilation - reach_back]`.

    Args:
        x: (batch, length + (taps - 1) * dilation, hidden), already padded or with its history in front.
        weight: (hidden, 1, taps), the layout of a depthwise `Conv1d`.
        dilation: distance of two taps.
        reach_back: how far the first tap looks back; `(taps - 1) * dilation` is causal.
        behind, ahead: int64 (batch, length), tokens of the same segment on either side; None is all of them.

    Returns:
        (batch, length, hidden), summed in at least float32, in the dtype of `x`.
    """
    taps = weight.shape[-1]
    length = x.shape[1] - (taps - 1) * dilation
    work = torch.promote_types(x.dtype, torch.float32)
    total: torch.Tensor | None = None
    for tap in range(taps):
        offset = tap * dilation - reach_back
        part = x[:, tap * dilation : tap * dilation + length].to(work) * weight[:, 0, tap].to(work)
        if offset < 0 and behind is not None:
            part = part * (behind >= -offset).unsqueeze(-1).to(work)
        elif offset > 0 and ahead is not None:
            part = part * (ahead >= offset).unsqueeze(-1).to(work)
        total = part if total is None else total + part
    assert total is not None
    return total.to(x.dtype)
