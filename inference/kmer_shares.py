"""What every k-mer of a window wrote: exact shares of a memory's gate logit, or of its output in a direction.

Key and value of a position are sums over the k-mers of its window, as lookup, mean and projection are linear:

    value(t) = sum over n, e of  W_v,n E_n[row(e)] / count_n(t)        e: where the k-mer ends, inside the window of t

With h the hidden state, g(t) = <RMSNorm_q(h), RMSNorm_k(key)> / sqrt(hidden), u = sigmoid(gate logit) * value and
c the taps over u, the output is r = u + SiLU(c). Three places are not linear. There a factor is held at the value that
it has, so that what remains is linear and shares still sum to the whole:

| place | held | the rule's name |
|---|---|---|
| RMSNorm_q, RMSNorm_k | the root mean square | LN rule (Ali et al. 2022, "XAI for Transformers", ICML) |
| gate times value | the gate | signal takes all (Arras et al. 2019, "Explaining and interpreting LSTMs") |
| SiLU(c) = sigmoid(c) * c | sigmoid(c) | rescale, from 0 (DeepLIFT; Shrikumar et al. 2017, ICML) |

So the share of a k-mer in <d(t), r(t)> is the sum, over the sources s of the position (t itself, and what the taps
reach), of gate(s) / count_n(s) * <d(t) * weight of s, W_v,n E_n[row(e)]>: what the convolution brings from earlier
positions is the share of the k-mers there. Everything is computed in float64, whatever the model computes in.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..motif_memory.definition import (
    MemoryLayer,
    NgramPlan,
    dilated_taps,
    gate_logit,
    signed_square_root_gate,
    window_mean,
    within_segment,
)
from ..motif_memory.ways.weights import Weights
from .offloaded import plain_weight_at_hand

LN_RULE = "LN rule: root mean squares are held (Ali et al. 2022)"
GATE_RULE = "signal takes all: the gate is held (Arras et al. 2019)"
SILU_RULE = "rescale from 0: SiLU(c) / c is held (Shrikumar et al. 2017)"

_MOST_NUMBERS = 2**22  # of table rows that are gathered at once


class KmerGrid(NamedTuple):
    """Shares by where a k-mer ends: column c of position t is the k-mer that ends `back - c` letters before its last.

    `back` can be larger than the window, where the convolution reaches earlier ones.
    """

    shares: torch.Tensor  # (batch, length, sizes, columns) float64
    is_there: torch.Tensor  # bool, of the same shape: whether the position has seen a k-mer there
    back: int


class WorkedOut(NamedTuple):
    """A memory's pass in float64; of its weights the matrices as they are stored, and no tables."""

    key: torch.Tensor  # (hidden, features)
    value: torch.Tensor  # likewise
    layer: MemoryLayer
    letters: NgramPlan  # of the letters
    last: torch.Tensor  # (batch, length): the last letter of each position
    tokens: NgramPlan  # of the positions
    rows: list[torch.Tensor]  # per size, (batch, letters, width): the row of the k-mer that ends here
    hidden_states: torch.Tensor  # (batch, length, hidden)
    key_direction: torch.Tensor  # (batch, length, hidden): what the key is multiplied with to give the gate's logit
    logit: torch.Tensor  # (batch, length)
    gate: torch.Tensor  # (batch, length), 0 at padding
    mixed: torch.Tensor | None  # (batch, length, hidden): c, None without a convolution
    residual: torch.Tensor  # (batch, length, hidden)

    @property
    def rules(self) -> tuple[str, ...]:
        """What is held in shares of the output."""
        return (GATE_RULE,) if self.mixed is None else (GATE_RULE, SILU_RULE)


def work_out(memory: Any, hidden_states: torch.Tensor, plan: Any, has_window: bool = True) -> WorkedOut:
    """Compute a pass of a memory again, by its definition and in float64.

    Args:
        memory: a `MotifMemory`.
        hidden_states: (batch, length, hidden), in front of the memory.
        plan: an `NgramPlan`, or a `SpelledPlan` of tokens of several letters.
        has_window: if not, the k-mers that end at a letter stand for the means over its window; shares cannot be
            taken of this.

    Raises:
        ValueError: if the memory's weights cannot be read, or the pass continues a cache.
    """
    hidden_states = hidden_states.double()
    if hasattr(plan, "last"):
        letters, last, tokens = plan.letters, plan.last, plan.tokens
    else:
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        letters, last, tokens = plan, places.expand(hidden_states.shape[:2]), plan
    if letters.context or tokens.context:
        raise ValueError("expected a pass over a whole sequence, got one that continues a cache.")
    rows = [_rows(table, letters, index) for index, table in enumerate(memory.embeddings)]
    means = [window_mean(found, letters, index) if has_window else found for index, found in enumerate(rows)]
    features = torch.cat(means, dim=-1)
    features = features.gather(1, last.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    weights = _weights(memory)
    key, value = features @ weights.key.double().t(), features @ weights.value.double().t()
    layer = weights.layer(tokens.is_causal)
    logit, query_scale, key_scale = gate_logit(hidden_states, key, layer.norm_weight, layer.norm_eps)
    scale = (query_scale * key_scale / math.sqrt(hidden_states.shape[-1])).unsqueeze(-1)
    gate = tokens.without_padding(signed_square_root_gate(logit))
    gated = gate.unsqueeze(-1) * value
    mixed, residual = None, gated
    if layer.taps is not None:
        padded = F.pad(gated, (0, 0, layer.reach_back, layer.reach - layer.reach_back))
        mixed = dilated_taps(padded, layer.taps, layer.dilation, layer.reach_back, tokens.behind, tokens.ahead)
        residual = gated + F.silu(mixed)
    direction = hidden_states * layer.norm_weight * scale
    return WorkedOut(
        weights.key, weights.value, layer, letters, last, tokens, rows, hidden_states, direction, logit, gate, mixed,
        residual,
    )  # fmt: skip


def shares_of_gate_logit(found: WorkedOut) -> KmerGrid:
    """Share of every k-mer of the window in g, the gate's logit before its signed square root; rule: `LN_RULE`."""
    ones = torch.ones_like(found.logit)
    return _shares(found, found.key, [(0, found.key_direction)], ones)


def shares_of_output(found: WorkedOut, direction: torch.Tensor) -> KmerGrid:
    """Share of every k-mer in <direction, residual>, at each position; rules: `found.rules`.

    Args:
        found: the memory's pass.
        direction: (batch, length, hidden), or what broadcasts to it.
    """
    direction = direction.double().expand_as(found.residual)
    return _shares(found, found.value, list(_sources(found, direction)), found.gate)


def _rows(table: Any, letters: NgramPlan, index: int) -> torch.Tensor:
    """The row of the k-mer that ends at each letter, (batch, letters, width)."""
    with plain_weight_at_hand(table, nn.Embedding) as weight:
        rows = F.embedding(letters.rows(index), weight).double()
    return rows.masked_fill(~letters.valid(index).unsqueeze(-1), 0)


def _weights(memory: Any) -> Weights:
    """The weights without tables: matrices as they are, of which one is computed with at a time, others in float64."""
    with (
        plain_weight_at_hand(memory.key_proj, nn.Linear) as key,
        plain_weight_at_hand(memory.value_proj, nn.Linear) as value,
    ):
        matrices = key, value
    norm_type, _, conv_type = memory.part_types
    conv = None if memory.short_conv is None else memory.short_conv.conv
    norm_q, norm_k = _small_weight(memory.norm_q, norm_type), _small_weight(memory.norm_k, norm_type)
    taps, dilation = (None, 1) if conv is None else (_small_weight(conv, conv_type), conv.dilation)
    return Weights([], *matrices, norm_q, norm_k, taps, memory.norm_q.eps, dilation)


def _small_weight(module: Any, kind: type[nn.Module]) -> torch.Tensor:
    with plain_weight_at_hand(module, kind) as weight:
        return weight.double()


def _sources(found: WorkedOut, direction: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Where gated values come from, relative to a position, and the direction in which they count there."""
    layer = found.layer
    if layer.taps is None or found.mixed is None:
        yield 0, direction
        return
    through_silu = direction * found.mixed.sigmoid()
    is_done = False
    for tap in range(layer.taps.shape[-1]):
        offset = tap * layer.dilation - layer.reach_back
        counted = through_silu * layer.taps[:, tap]
        is_done |= offset == 0
        yield offset, counted + direction if offset == 0 else counted
    if not is_done:
        yield 0, direction


def _shares(
    found: WorkedOut, matrix: torch.Tensor, sources: list[tuple[int, torch.Tensor]], factor: torch.Tensor
) -> KmerGrid:
    """Shares in the sum over sources of factor(source) * <direction, matrix f(source)>.

    Args:
        found: the memory's pass.
        matrix: (hidden, features).
        sources: pairs of an offset and a direction (batch, length, hidden).
        factor: (batch, length), of each source.
    """
    letters, last, matrix = found.letters, found.last, matrix.double()
    batch, length = last.shape
    width = found.rows[0].shape[-1]
    places = torch.arange(length, device=last.device)
    near, far = letters.reach_ahead, letters.window - min(letters.ngram_sizes) - letters.reach_ahead
    moved = []  # per source: its positions, what counts of them, and letters from there to the position
    for offset, _ in sources:
        source = (places + offset).clamp(0, max(length - 1, 0)).expand(batch, -1)
        is_inside = ((places + offset >= 0) & (places + offset < length)).expand(batch, -1)
        counted = factor.gather(1, source) * is_inside
        counted = within_segment(counted.unsqueeze(-1), offset, found.tokens.behind, found.tokens.ahead).squeeze(
            -1
        )  # (batch, length)
        moved.append((source, counted, last - last.gather(1, source)))
    distances = torch.stack([distance for *_, distance in moved]) if length else torch.zeros(1, dtype=torch.int64)
    back = far + max(0, int(distances.max()) if distances.numel() else 0)
    columns = back + near + max(0, -int(distances.min()) if distances.numel() else 0) + 1
    shape = (batch, length, len(letters.ngram_sizes), columns)
    shares = torch.zeros(shape, dtype=torch.float64, device=last.device)
    is_there = torch.zeros(shape, dtype=torch.bool, device=last.device)
    for (_, direction), (source, counted, distance) in zip(sources, moved, strict=True):
        projected = (direction @ matrix).unflatten(-1, (-1, width))  # (batch, length, sizes, width)
        ends = last.gather(1, source)
        for index, row in enumerate(found.rows):
            first, final = letters.span(index)
            offsets = torch.arange(first, final + 1, device=last.device)
            end = ends.unsqueeze(-1) + offsets  # (batch, length, endings)
            is_counted = _is_in_window(letters, index, ends, offsets) & (counted != 0).unsqueeze(-1)
            weight = counted / letters.counts(index).gather(1, ends).clamp_min(1)
            products = _products(row, end.clamp(0, row.shape[1] - 1), projected[:, :, index])
            column = offsets - distance.unsqueeze(-1) + back
            shares[:, :, index].scatter_add_(2, column, (products * weight.unsqueeze(-1)).masked_fill(~is_counted, 0))
            seen = torch.zeros_like(is_there[:, :, index], dtype=torch.uint8)
            is_there[:, :, index] |= seen.scatter_(2, column, is_counted.to(torch.uint8)).bool()
    return KmerGrid(shares, is_there, back)


def _is_in_window(letters: NgramPlan, index: int, ends: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Which k-mers belong to the windows that end at these letters: (batch, length, endings)."""
    end = ends.unsqueeze(-1) + offsets
    is_inside = (end >= 0) & (end < letters.length)
    valid = letters.valid(index).gather(1, end.clamp(0, letters.length - 1).flatten(1)).view_as(end)
    for reach, distance in ((letters.behind, -offsets), (letters.ahead, offsets)):
        if reach is not None:
            reach = reach.expand(end.shape[0], -1).gather(1, ends)
            is_inside = is_inside & (reach.unsqueeze(-1) >= distance)
    return is_inside & valid


def _products(rows: torch.Tensor, ends: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """<projected(t), row of the k-mer that ends at `ends`(t, j)>, (batch, length, endings).

    Args:
        rows: (batch, letters, width).
        ends: (batch, length, endings).
        projected: (batch, length, width).
    """
    batch, length, endings = ends.shape
    step = max(1, _MOST_NUMBERS // max(1, batch * endings * rows.shape[-1]))
    pieces = []
    for start in range(0, length, step):
        block = ends[:, start : start + step]
        index = block.flatten(1).unsqueeze(-1).expand(-1, -1, rows.shape[-1])
        gathered = rows.gather(1, index).view(*block.shape, rows.shape[-1])
        pieces.append((gathered @ projected[:, start : start + step].unsqueeze(-1)).squeeze(-1))
    return torch.cat(pieces, dim=1) if pieces else projected.new_zeros(batch, 0, endings)
