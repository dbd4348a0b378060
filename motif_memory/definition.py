"""The motif memory's operations on tensors: the exact definition, in plain PyTorch.

Source of every formula: `megatron/core/transformer/gengram.py` of the reference, as restated in `README.md` beside
this file. Shapes are (batch, length, ...). Nothing here knows a configuration or a model; it judges all faster ways.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class NgramPlan(NamedTuple):
    """Which n-grams each window holds: computed once per forward pass, shared by all memory layers.

    `context` earlier tokens stand in front of the `length` current ones in `grams`, `runs` and `behind`, so that a
    decoding step sees its whole window.
    """

    grams: torch.Tensor  # int32 (batch, context + length): row of the largest n-gram that ends here, no letter as 0
    runs: torch.Tensor  # int32 (batch, context + length): consecutive letters of the same segment that end here
    behind: torch.Tensor | None  # int32 (batch, context + length): earlier tokens of the same segment; None = all
    ahead: torch.Tensor | None  # int32 (batch, length): later tokens of the same segment; None = all
    exists: torch.Tensor | None  # bool (batch, length): False at padding; None = no padding
    ngram_sizes: tuple[int, ...]
    window: int
    reach_ahead: int  # how far the window reaches ahead: 0 if causal
    context: int
    is_causal: bool

    @property
    def length(self) -> int:
        """Number of current tokens."""
        return self.grams.shape[1] - self.context

    def valid(self, index: int) -> torch.Tensor:
        """Whether all letters of the n-gram that ends here are there; bool (batch, context + length)."""
        return self.runs >= self.ngram_sizes[index]

    def rows(self, index: int) -> torch.Tensor:
        """Row of the n-gram that ends here in its table, 0 if it is not valid; int32 (batch, context + length)."""
        return (self.grams % 5 ** self.ngram_sizes[index]).masked_fill(~self.valid(index), 0)

    def span(self, index: int) -> tuple[int, int]:
        """First and last ending pooled, relative to the position."""
        return self.reach_ahead - (self.window - self.ngram_sizes[index]), self.reach_ahead

    def counts(self, index: int) -> torch.Tensor:
        """Valid n-grams within each window; float32 (batch, length)."""
        ones = self.valid(index).unsqueeze(-1).float()
        return window_sum(ones, self.span(index), self.behind, self.ahead_with_context())[:, self.context :, 0]

    def ahead_with_context(self) -> torch.Tensor | None:
        """`ahead` with the context in front; what it holds there is never used."""
        return None if self.ahead is None else F.pad(self.ahead, (self.context, 0))

    def behind_current(self) -> torch.Tensor | None:
        """`behind` of the current tokens, (batch, length)."""
        return None if self.behind is None else self.behind[:, self.context :]

    def of_positions(self, batch: slice, around: slice) -> "NgramPlan":
        """The plan of some positions without what stands before them: for what follows key and value."""
        here = slice(self.context + around.start, self.context + around.stop)
        return self._replace(
            grams=self.grams[batch, here],
            runs=self.runs[batch, here],
            behind=None if self.behind is None else self.behind[batch, here],
            ahead=None if self.ahead is None else self.ahead[batch, around],
            exists=None if self.exists is None else self.exists[batch, around],
            context=0,
        )

    def without_padding(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (batch, length, ...) with zeros at padding, which must not reach its neighbours."""
        return x if self.exists is None else _where(self.exists, x)


class SpelledPlan(NamedTuple):
    """The plan for tokens of several letters: windows over letters, of which each token reads that of its last."""

    letters: NgramPlan
    last: torch.Tensor  # (batch, tokens): place of each token's last letter in the letters' plan
    tokens: NgramPlan  # segments and padding, for what follows key and value

    @property
    def is_causal(self) -> bool:
        """Whether a window looks back only."""
        return self.letters.is_causal


class MemoryLayer(NamedTuple):
    """What follows key and value, as numbers: the norms and the short convolution of one layer."""

    norm_weight: torch.Tensor  # (hidden,): product of the weights of the two root-mean-square norms
    norm_eps: float
    taps: torch.Tensor | None  # (hidden, taps) of the depthwise convolution; None for none
    dilation: int = 1  # distance of two taps
    reach_back: int = 0  # how far the first tap looks back; `(taps - 1) * dilation` is causal

    @property
    def reach(self) -> int:
        """Positions from the first tap to the last."""
        return 0 if self.taps is None else (self.taps.shape[-1] - 1) * self.dilation


class MemoryOutput(NamedTuple):
    """What a memory made of a pass."""

    residual: torch.Tensor  # (batch, length, hidden): to be added to the residual stream
    gate: torch.Tensor  # (batch, length), 0..1: how far the memory opened
    gated: torch.Tensor  # (batch, at most length, hidden): inputs of the convolution, at least the last it will reach
    prefix_sums: torch.Tensor | None = None  # (batch, length, features), of `as_trained` pooling


def can_be_read(tensor: torch.Tensor) -> bool:
    """Whether looking at values is possible: not while tracing or recording, and not without data."""
    if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.device.type == "meta":
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and gates are taken in."""
    return torch.promote_types(dtype, torch.float32)


def letter_codes(input_ids: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Letter of each token: 1..5 for the five `token_ids` in their order, 0 for any other token.

    Zero means "no letter", so that zero-filled padding and cache states are right as they are.
    """
    codes = torch.zeros_like(input_ids, dtype=torch.int64)
    for digit, token in enumerate(token_ids):
        codes = codes.masked_fill(input_ids == token, digit + 1)
    return codes


def _where(condition: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` (batch, length, ...) where `condition` (batch, length) holds, else 0, also for what is not a number."""
    return x.masked_fill(~condition.view(*condition.shape, *(1,) * (x.dim() - 2)), 0)


def shifted(x: torch.Tensor, steps: int, reach: torch.Tensor | None = None) -> torch.Tensor:
    """`x[:, t - steps]`, zero before the start of the row, and where fewer than `steps` tokens are in `reach`."""
    if steps == 0:
        return x
    pad = steps if torch.compiler.is_compiling() else min(steps, x.shape[1])  # a window may be longer than the row
    shifted = F.pad(x, (0, 0) * (x.dim() - 2) + (pad, 0))[:, : x.shape[1]]
    return shifted if reach is None else _where(reach >= steps, shifted)


def _trailing_sum(x: torch.Tensor, length: int, reach: torch.Tensor | None) -> torch.Tensor:
    """Sum of the last `length` entries along dim 1, by binary doubling.

    No prefix sums, hence no cancellation; and the same additions in the same order however the row is cut in chunks.
    """
    total: torch.Tensor | None = None
    taken, width = 0, 1
    while True:
        if length & width:
            part = shifted(x, taken, reach)
            total = part if total is None else total + part
            taken += width
        if 2 * width > length:
            assert total is not None
            return total
        x = x + shifted(x, width, reach)
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
        later = shifted(_trailing_sum(x.flip(1), last - start + 1, ahead), start, ahead).flip(1)
        total = later if total is None else total + later
    assert total is not None
    return total


def ngram_rows_and_runs(
    codes: torch.Tensor, largest: int, behind: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grams` and `runs` of a plan.

    Args:
        codes: int64 (batch, length) from `letter_codes`.
        largest: the largest n-gram size.
        behind: int32 (batch, length), see `NgramPlan`.

    Returns:
        Two int32 tensors (batch, length). An n-gram belongs to the position of its last letter; that letter is the
        least significant of its base-5 digits.
    """
    places = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device).expand_as(codes)
    breaks = torch.where(codes > 0, -1, places)
    runs = places - (breaks.cummax(1).values if codes.shape[1] else breaks)
    if behind is not None:
        runs = torch.minimum(runs, (behind + 1).clamp_min(0))
    return grams_of(codes, largest, behind), runs


def grams_of(codes: torch.Tensor, largest: int, behind: torch.Tensor | None = None) -> torch.Tensor:
    """The last `largest` letters up to each position as one number, int32 (batch, length)."""
    digits = (codes - 1).clamp_min(0).to(torch.int32).unsqueeze(-1)
    grams = torch.zeros_like(digits)
    for back in range(largest):
        grams = grams + shifted(digits, back, behind) * 5**back
    return grams.squeeze(-1)


def plan_windows(
    codes: torch.Tensor,
    ngram_sizes: Sequence[int],
    window: int,
    *,
    context: int = 0,
    is_causal: bool = True,
    behind: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
    exists: torch.Tensor | None = None,
    rows_and_runs: Callable[..., tuple[torch.Tensor, torch.Tensor]] = ngram_rows_and_runs,
) -> NgramPlan:
    """The n-grams of every window.

    An n-gram counts if all its n tokens are letters of the position's segment and lie inside the window. The causal
    window is the last `window` tokens; the centred one reaches `(window - 1) // 2` tokens ahead and the rest behind:
    the causal window, moved.

    Args:
        codes: int64 (batch, context + length) from `letter_codes`.
        ngram_sizes: sizes n, in the order of the tables.
        window: tokens of the window, at least as many as the largest size.
        context: leading tokens of `codes` that are history.
        is_causal: the last `window` tokens if true, else a window centred on the position.
        behind, ahead, exists: see `NgramPlan`.
        rows_and_runs: computes `grams` and `runs`, as `ngram_rows_and_runs` does.
    """
    behind = None if behind is None else behind.to(torch.int32)
    ahead = None if ahead is None else ahead.to(torch.int32)
    grams, runs = rows_and_runs(codes, max(ngram_sizes), behind)
    reach_ahead = 0 if is_causal else (window - 1) // 2
    return NgramPlan(grams, runs, behind, ahead, exists, tuple(ngram_sizes), window, reach_ahead, context, is_causal)


def window_mean(rows: torch.Tensor, plan: NgramPlan, index: int) -> torch.Tensor:
    """Mean embedding of the valid n-grams within each window, zero where there is none.

    Args:
        rows: (batch, context + length, width), table rows looked up with `plan.rows(index)`.
        plan: which n-grams each window holds.
        index: which of the n-gram sizes.

    Returns:
        (batch, length, width) in at least float32: sums of half-precision rows are taken in float32.
    """
    rows = _where(plan.valid(index), rows).to(at_least_float32(rows.dtype))
    total = window_sum(rows, plan.span(index), plan.behind, plan.ahead_with_context())[:, plan.context :]
    return total / plan.counts(index).clamp_min(1).unsqueeze(-1).to(total.dtype)


def window_features(tables: Sequence[torch.Tensor], plan: NgramPlan) -> torch.Tensor:
    """Concatenated window means of all tables, (batch, length, sizes * width), in the dtype of the tables."""
    means = [
        window_mean(F.embedding(plan.rows(index), table), plan, index).to(table.dtype)
        for index, table in enumerate(tables)
    ]
    return torch.cat(means, dim=-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in at least float32, rounded once to x's dtype."""
    work = at_least_float32(x.dtype)
    wide = x.to(work)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.to(work) * wide).to(x.dtype)


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


def within_segment(
    x: torch.Tensor, offset: int, behind: torch.Tensor | None, ahead: torch.Tensor | None
) -> torch.Tensor:
    """`x` (batch, length, width) where the token at `offset` belongs to the position's segment, else 0."""
    reach = behind if offset < 0 else ahead
    if offset == 0 or reach is None:
        return x
    return _where(reach >= abs(offset), x)


def dilated_taps(
    x: torch.Tensor,
    weight: torch.Tensor,
    dilation: int,
    reach_back: int,
    behind: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Depthwise convolution: the sum over taps i of `weight[:, i] * x[:, t + i * dilation - reach_back]`.

    Args:
        x: (batch, length + (taps - 1) * dilation, hidden), already padded or with its history in front.
        weight: (hidden, taps).
        dilation: distance of two taps.
        reach_back: how far the first tap looks back; `(taps - 1) * dilation` is causal.
        behind, ahead: int64 (batch, length), tokens of the same segment on either side; None is all of them.

    Returns:
        (batch, length, hidden), summed in at least float32, in the dtype of `x`.
    """
    taps = weight.shape[-1]
    length = x.shape[1] - (taps - 1) * dilation
    work = at_least_float32(x.dtype)
    total: torch.Tensor | None = None
    for tap in range(taps):
        offset = tap * dilation - reach_back
        part = within_segment(x[:, tap * dilation : tap * dilation + length].to(work), offset, behind, ahead)
        scale = weight[:, tap].to(work)
        total = part * scale if total is None else torch.addcmul(total, part, scale)
    assert total is not None
    return total.to(x.dtype)


def gate_logit(
    query: torch.Tensor, key: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`<RMSNorm(query), RMSNorm(key)> / sqrt(hidden)`, and one over the root mean square of query and key."""
    query_scale = (query.square().mean(-1) + norm_eps).rsqrt()
    key_scale = (key.square().mean(-1) + norm_eps).rsqrt()
    product = (query * norm_weight * key).sum(-1)
    return product * query_scale * key_scale / math.sqrt(query.shape[-1]), query_scale, key_scale


def gated_memory(
    hidden_states: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: NgramPlan,
    layer: MemoryLayer,
    history: torch.Tensor | None = None,
) -> MemoryOutput:
    """What the memory adds to the residual stream, from key and value; everything in at least float32.

    Args:
        hidden_states, key, value: (batch, length, hidden).
        plan: for segments and padding.
        layer: norms and convolution.
        history: (batch, reach_back, hidden), inputs of the convolution before the first token; None is none.

    Returns:
        Residual (batch, length, hidden) in the dtype of the hidden states, gate (batch, length), and the last inputs
        of the convolution, at most as many as it reaches: (batch, min(length, reach), hidden).
    """
    work = at_least_float32(key.dtype)
    query, key, value = (x.to(work) for x in (hidden_states, key, value))
    logit, _, _ = gate_logit(query, key, layer.norm_weight.to(work), layer.norm_eps)
    gate = signed_square_root_gate(logit)
    gated = plan.without_padding(gate.unsqueeze(-1) * value)
    length = gated.shape[1]
    if layer.taps is None:
        return MemoryOutput(gated.to(hidden_states.dtype), gate, gated[:, length:].clone())
    padded = F.pad(gated, (0, 0, 0 if history is not None else layer.reach_back, layer.reach - layer.reach_back))
    if history is not None:
        padded = torch.cat([history.to(work), padded], dim=1)
    mixed = dilated_taps(padded, layer.taps, layer.dilation, layer.reach_back, plan.behind_current(), plan.ahead)
    residual = gated + F.silu(mixed)
    return MemoryOutput(residual.to(hidden_states.dtype), gate, gated[:, length - min(length, layer.reach) :].clone())
