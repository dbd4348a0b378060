"""The motif memory's operations on tensors: the exact definition, in plain PyTorch.

Source of every formula: `megatron/core/transformer/gengram.py` of the reference, as restated in `operators/README.md`.
Shapes are (batch, length, ...). Nothing here knows a configuration or a model; faster paths are judged by this file.
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
    last: int  # how far the window reaches ahead: 0 if causal
    context: int

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
        return self.last - (self.window - self.ngram_sizes[index]), self.last

    def counts(self, index: int) -> torch.Tensor:
        """Valid n-grams within each window; float32 (batch, length)."""
        ones = self.valid(index).unsqueeze(-1).float()
        return window_sum(ones, self.span(index), self.behind, self._ahead_of_all())[:, self.context :, 0]

    def _ahead_of_all(self) -> torch.Tensor | None:
        """`ahead` with the context in front; what it holds there is never used."""
        return None if self.ahead is None else F.pad(self.ahead, (self.context, 0))


def letter_codes(input_ids: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Letter of each token: 1..5 for the five `token_ids` in their order, 0 for any other token.

    Zero means "no letter", so that zero-filled padding and cache states are right as they are.
    """
    codes = torch.zeros_like(input_ids, dtype=torch.int64)
    for digit, token in enumerate(token_ids):
        codes = codes.masked_fill(input_ids == token, digit + 1)
    return codes


def letter_codes_of_few(input_ids: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """`letter_codes` token by token in Python: for a few tokens on the CPU."""
    letters = {token: digit + 1 for digit, token in enumerate(token_ids)}
    return torch.tensor([letters.get(token, 0) for token in input_ids.flatten().tolist()]).view(input_ids.shape)


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
    digits = (codes - 1).clamp_min(0).to(torch.int32).unsqueeze(-1)
    grams = torch.zeros_like(digits)
    for back in range(largest):
        grams = grams + _shift(digits, back, behind) * 5**back
    places = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device).expand_as(codes)
    breaks = torch.where(codes > 0, -1, places)
    runs = places - (breaks.cummax(1).values if codes.shape[1] else breaks)
    if behind is not None:
        runs = torch.minimum(runs, (behind + 1).clamp_min(0))
    return grams.squeeze(-1), runs


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
    return NgramPlan(
        grams=grams,
        runs=runs,
        behind=behind,
        ahead=ahead,
        exists=exists,
        ngram_sizes=tuple(ngram_sizes),
        window=window,
        last=0 if is_causal else (window - 1) // 2,
        context=context,
    )


def window_mean(rows: torch.Tensor, plan: NgramPlan, index: int) -> torch.Tensor:
    """Mean embedding of the valid n-grams within each window, zero where there is none.

    Args:
        rows: (batch, context + length, width), table rows looked up with `plan.rows(index)`.
        plan: from `plan_ngrams`.
        index: which of the n-gram sizes.

    Returns:
        (batch, length, width) in at least float32: sums of half-precision rows are taken in float32.
    """
    rows = rows * plan.valid(index).unsqueeze(-1).to(rows.dtype)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = window_sum(rows, plan.span(index), plan.behind, plan._ahead_of_all())[:, plan.context :]
    return total / plan.counts(index).clamp_min(1).unsqueeze(-1).to(total.dtype)


def window_features(tables: Sequence[torch.Tensor], plan: NgramPlan) -> torch.Tensor:
    """Concatenated window means of all tables, (batch, length, sizes * width), in the dtype of the tables."""
    means = [
        window_mean(F.embedding(plan.rows(index), table), plan, index).to(table.dtype)
        for index, table in enumerate(tables)
    ]
    return torch.cat(means, dim=-1)


def window_features_backward(grad: torch.Tensor, plan: NgramPlan) -> list[torch.Tensor]:
    """Gradients of `window_features` for the tables, each (5**n, width) in at least float32.

    Args:
        grad: (batch, length, sizes * width).
        plan: from `plan_ngrams`.
    """
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    gradients = []
    for index, part in enumerate(grad.chunk(len(plan.ngram_sizes), dim=-1)):
        part = part / plan.counts(index).clamp_min(1).unsqueeze(-1).to(part.dtype)
        part = F.pad(part, (0, 0, plan.context, 0))
        by_ngram = _window_sum_transposed(part, plan.span(index), plan.behind, plan._ahead_of_all())
        by_ngram = by_ngram * plan.valid(index).unsqueeze(-1).to(part.dtype)
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
    for offset in range(first, last + 1):
        part = _within(x, offset, behind, ahead)
        moved = F.pad(part, (0, 0, max(offset, 0), max(-offset, 0)))
        start = max(-offset, 0)
        total = total + moved[:, start : start + x.shape[1]]
    return total


def _within(x: torch.Tensor, offset: int, behind: torch.Tensor | None, ahead: torch.Tensor | None) -> torch.Tensor:
    """`x` (batch, length, width) where the token at `offset` belongs to the position's segment, else 0."""
    reach = behind if offset < 0 else ahead
    if offset == 0 or reach is None:
        return x
    return x * (reach >= abs(offset)).unsqueeze(-1).to(x.dtype)


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
        part = _within(x[:, tap * dilation : tap * dilation + length].to(work), offset, behind, ahead)
        scale = weight[:, 0, tap].to(work)
        total = part * scale if total is None else torch.addcmul(total, part, scale)
    assert total is not None
    return total.to(x.dtype)


def gated_memory(
    hidden_states: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    conv_weight: torch.Tensor | None = None,
    dilation: int = 1,
    reach_back: int = 0,
    history: torch.Tensor | None = None,
    exists: torch.Tensor | None = None,
    behind: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the memory adds to the residual stream, from key and value; everything in at least float32.

    Args:
        hidden_states, key, value: (batch, length, hidden).
        norm_weight: (hidden,), product of the weights of the two root-mean-square norms.
        norm_eps: their epsilon.
        conv_weight, dilation, reach_back: see `dilated_taps`; None for no convolution.
        history: (batch, reach_back, hidden), inputs of the convolution before the first token; None is none.
        exists: bool (batch, length), False at padding.
        behind, ahead: (batch, length), tokens of the same segment on either side; None is all of them.

    Returns:
        Residual (batch, length, hidden) in the dtype of the hidden states, gate (batch, length), and the last inputs
        of the convolution, at most as many as it reaches: (batch, min(length, (taps - 1) * dilation), hidden).
    """
    work = torch.promote_types(key.dtype, torch.float32)
    query, key, value = (x.to(work) for x in (hidden_states, key, value))
    logit, _, _ = _gate_logit(query, key, norm_weight.to(work), norm_eps)
    gate = signed_square_root_gate(logit)
    strength = gate if exists is None else gate * exists.to(work)
    gated = strength.unsqueeze(-1) * value
    length = gated.shape[1]
    if conv_weight is None:
        return gated.to(hidden_states.dtype), gate, gated[:, length:].clone()
    reach = (conv_weight.shape[-1] - 1) * dilation
    padded = F.pad(gated, (0, 0, 0 if history is not None else reach_back, reach - reach_back))
    if history is not None:
        padded = torch.cat([history.to(work), padded], dim=1)
    residual = gated + F.silu(dilated_taps(padded, conv_weight, dilation, reach_back, behind, ahead))
    return residual.to(hidden_states.dtype), gate, gated[:, length - min(length, reach) :].clone()


def _gate_logit(
    query: torch.Tensor, key: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`<RMSNorm(query), RMSNorm(key)> / sqrt(hidden)`, and one over the root mean square of query and key."""
    query_scale = (query.square().mean(-1) + norm_eps).rsqrt()
    key_scale = (key.square().mean(-1) + norm_eps).rsqrt()
    product = (query * norm_weight * key).sum(-1)
    return product * query_scale * key_scale / math.sqrt(query.shape[-1]), query_scale, key_scale


def gated_memory_backward(
    grad_residual: torch.Tensor,
    grad_gate: torch.Tensor | None,
    hidden_states: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    conv_weight: torch.Tensor | None = None,
    dilation: int = 1,
    reach_back: int = 0,
    exists: torch.Tensor | None = None,
    behind: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
    core: slice | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `gated_memory` (without history) for hidden states, key, value, norm weight and conv weight.

    Arguments as in `gated_memory`; `grad_residual` (batch, length, hidden) and `grad_gate` (batch, length) or None.
    With `core`, only the share of those positions is returned, and the others are its neighbourhood: as many as the
    convolution reaches on either side, if they exist.
    """
    work = torch.promote_types(key.dtype, torch.float32)
    value, grad = value.to(work), grad_residual.to(work)
    weight = norm_weight.to(work)
    length = grad.shape[1]
    begin, end, _ = (core or slice(None)).indices(length)
    core = slice(begin, end)
    logit, query_scale, key_scale = _gate_logit(hidden_states.to(work), key.to(work), weight, norm_eps)
    gate = signed_square_root_gate(logit)
    strength = gate if exists is None else gate * exists.to(work)
    grad_conv = None
    grad_gated = grad[:, core]
    if conv_weight is not None:
        taps = conv_weight[:, 0].to(work)
        reach = (taps.shape[1] - 1) * dilation
        gated = F.pad(strength.unsqueeze(-1) * value, (0, 0, reach_back, reach - reach_back))
        x = dilated_taps(gated, conv_weight.to(work), dilation, reach_back, behind, ahead)
        grad_taps = torch.ops.aten.silu_backward(grad, x)
        by_tap = []
        for tap in range(taps.shape[1]):
            offset = tap * dilation - reach_back
            part = _within(grad_taps, offset, behind, ahead)
            by_tap.append((part[:, core] * gated[:, tap * dilation + begin : tap * dilation + end]).sum((0, 1)))
            first, last = max(begin - offset, 0), min(end - offset, length)  # whose tap falls into the core
            if first < last:
                spread = part[:, first:last] * taps[:, tap]
                pad = (first + offset - begin, end - last - offset)
                grad_gated = grad_gated + (F.pad(spread, (0, 0, *pad)) if any(pad) else spread)
        grad_conv = torch.stack(by_tap, dim=-1).unsqueeze(1).to(conv_weight.dtype)
    query, key, value = hidden_states[:, core].to(work), key[:, core].to(work), value[:, core]
    logit, gate, query_scale, key_scale = (x[:, core] for x in (logit, gate, query_scale, key_scale))
    grad_value = strength[:, core].unsqueeze(-1) * grad_gated
    grad_strength = (grad_gated * value).sum(-1)
    if exists is not None:
        grad_strength = grad_strength * exists[:, core].to(work)
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
        grad_norm.to(norm_weight.dtype),
        grad_conv,
    )
