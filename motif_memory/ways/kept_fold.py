"""Folded tables that are kept from one pass to the next, and can be neither stale nor wasted.

Never stale: a kept fold is used in a pass only after the contents of the weights were compared with those that it was
made from, by a fingerprint of every byte, whatever wrote them: an optimizer, `load_state_dict`, `weight.data`, NumPy,
another process. Two owners are trusted instead for as long as they live. A cache that holds keys and values of these
weights is checked when it is first continued; whoever changes the weights under a cache has stale keys and values as
well. And `folded_inference(model)`, a block whose end checks that nothing was changed inside it.

Never wasted: a fold is made on request, or for a pass whose own tokens repay it. So the way of a pass, and with it the
last bits of its numbers, depends on the pass and on requests, not on what was computed before.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..definition import MemoryLayer, NgramPlan
from ..state import MemoryState
from .choose import packed_layout
from .packed_tables import PackedTables, pack_tables, table_sections
from .weights import Weights, weights_at_hand

# Costs per column of keys and values, in multiply-adds of a matrix product; fitted to `benchmarks/memory_folding.py`.
ROW_COST = 700.0  # of packing a row: adding up its sections and writing it into fresh memory
LOOKUP_COST = 11.0  # of adding one row of packed tables
POOLING_COST = 100.0  # of everything about an unfolded token but its matrix products
CHECK_COST = 60.0  # of reading one weight for its fingerprint
# Elsewhere products cost next to nothing, so that folding is made on request only, and repays its check from here on
# (13,700 tokens on an H200, at the released model's shape).
TOKENS_TO_CHECK_ON_A_GPU = 16384

# Tables that would be larger than so many times the memory's weights are made on request only.
LARGEST_GROWTH = 16

# Above this share of windows that are not full of letters, folded tables read more than they save.
LARGEST_IRREGULAR_SHARE = 0.25


class Fold(NamedTuple):
    """Folded tables, and what they were made from."""

    tables: PackedTables
    layer: MemoryLayer  # whose reach is causal
    dtype: torch.dtype  # of the hidden states that it serves
    slab_width: int | None
    stamp: tuple[Any, ...]
    fingerprint: list[torch.Tensor]
    held: list[torch.Tensor]  # the weights' memory, so that no other tensor can be given its address

    @property
    def bytes(self) -> int:
        """Size of the tables."""
        return self.tables.rows.numel() * self.tables.rows.element_size()


class FoldKeeper:
    """The fold of one memory, if there is one."""

    def __init__(self) -> None:
        self.fold: Fold | None = None
        self.dtype: torch.dtype | None = None  # of tables made on request
        self.is_requested = False
        self.owners = 0  # blocks of `folded_inference` that are open
        self._trusted: weakref.WeakSet[Any] = weakref.WeakSet()

    def forget(self) -> None:
        """Drop the fold and the request for it."""
        self.drop()
        self.dtype, self.is_requested = None, False

    def drop(self) -> None:
        """Drop a fold of other weights; a request stays."""
        self.fold = None
        self._trusted.clear()

    def __deepcopy__(self, memo: Any) -> "FoldKeeper":
        return FoldKeeper()

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldKeeper, ()

    def find(
        self,
        memory: Any,
        weights: Weights,
        hidden_states: torch.Tensor,
        plan: NgramPlan,
        state: MemoryState | None,
        is_forced: bool,
    ) -> tuple[Fold | None, str]:
        """The fold for a pass without gradients, or None and why there is none."""
        if memory.training and not is_forced:
            return None, "the memory is in training mode"
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        owner = None if state is None else state.owner
        continues = state is not None and state.has_history(memory.layer_idx)
        if owner is not None and not continues:
            self._trusted.discard(owner)  # a cache that starts again
        layout = packed_layout(hidden_states.device, hidden_states.dtype, hidden_states.shape[-1])
        if hidden_states.is_cuda and layout is None and not (is_forced or self.owners):
            return None, "in PyTorch's operations on a GPU folded tables save nothing"
        if self.fold is not None and (
            self.fold.stamp != weights.stamp()
            or self.fold.dtype != hidden_states.dtype
            or self.fold.slab_width != layout
        ):
            self.drop()
        if self.fold is not None and (self.owners or owner in self._trusted):
            return self.fold, ""
        if not (is_forced or self.owners):
            if self.is_requested:
                if not continues and tokens < tokens_to_check(weights, plan):
                    return None, "so few tokens repay no check of the folded tables"
            elif tokens < tokens_to_repay(weights, plan):
                return None, "the tokens of this pass do not repay folding"
            elif not _mostly_regular(plan):
                return None, "too many windows are not full of letters"
        fold = self.fold
        if fold is None or not same_fingerprint(fingerprint(weights), fold.fingerprint):
            self.drop()
            fold = self.make(weights, hidden_states.dtype, plan.ngram_sizes, plan.window)
        if owner is not None:
            self._trusted.add(owner)
        return fold, ""

    @torch.no_grad()
    def make(self, weights: Weights, dtype: torch.dtype, ngram_sizes: tuple[int, ...], window: int) -> Fold:
        """Fold for hidden states of a dtype: 16-bit ones get float16 tables, others their own, unless asked."""
        hidden, device = weights.key.shape[0], weights.key.device
        stored = self.dtype or (torch.float16 if dtype in (torch.bfloat16, torch.float16) else dtype)
        layout = packed_layout(device, dtype, hidden)
        made_from = fingerprint(weights)
        with torch.autocast(device_type=device.type, enabled=False):  # tables serve passes outside of it too
            tables = pack_tables(weights.tables, weights.key, weights.value, ngram_sizes, window, stored, layout)
        layer = weights.layer(is_causal=True)
        if layer.taps is not None:
            layer = layer._replace(taps=layer.taps.t().contiguous().t())  # a tap's weights lie together
        held = [weight.detach() for weight in weights.tensors()]
        self.fold = Fold(tables, layer, dtype, layout, weights.stamp(), made_from, held)
        self._trusted.clear()
        return self.fold


def _mostly_regular(plan: NgramPlan) -> bool:
    """Whether most windows are full of letters."""
    if plan.length <= plan.window:
        return True
    runs = plan.runs[:, plan.context :]
    breaks = (runs[:, :-1] > 0) & (runs[:, 1:] == 0)  # each spoils a window's length
    return breaks.is_meta or breaks.sum().item() * plan.window <= LARGEST_IRREGULAR_SHARE * breaks.numel()


def tokens_to_repay(weights: Weights, plan: NgramPlan) -> float:
    """Tokens after which folding has cost less than projecting each.

    Infinite if a token is cheaper unfolded, as on a GPU, or the tables would be too large to be made unasked.
    """
    if weights.key.device.type != "cpu":
        return math.inf
    columns, width = 2 * weights.key.shape[0], weights.tables[0].shape[1]
    projected = sum(5**size for size in plan.ngram_sizes)
    packed = table_sections(max(plan.ngram_sizes)).rows
    saved = _saved_per_token(weights, plan)
    if saved <= 0 or packed * columns > LARGEST_GROWTH * _elements(weights):
        return math.inf
    return (projected * width + packed * ROW_COST) / saved


def tokens_to_check(weights: Weights, plan: NgramPlan) -> float:
    """Tokens below which reading all weights costs more than folded tables save."""
    if weights.key.device.type != "cpu":
        return TOKENS_TO_CHECK_ON_A_GPU
    saved = _saved_per_token(weights, plan) * 2 * weights.key.shape[0]
    return CHECK_COST * _elements(weights) / saved if saved > 0 else math.inf


def _saved_per_token(weights: Weights, plan: NgramPlan) -> float:
    """What folded tables save per token and column."""
    lookups = plan.window - max(plan.ngram_sizes) + 2  # rows of packed tables per token
    return weights.key.shape[1] + POOLING_COST - LOOKUP_COST * lookups


def _elements(weights: Weights) -> int:
    return sum(weight.numel() for weight in weights.tensors())


# ---- fingerprints

_LANES = 2**17  # 32-bit numbers of a block: their products stay in a CPU's cache
_BLOCKS_ON_A_GPU = 64  # at a time


def fingerprint(weights: Weights) -> list[torch.Tensor]:
    """64-bit sums over blocks of every weight's bits, each number times an odd random one, modulo 2**64.

    Any change of one 32-bit number of a block changes its sum; of several, all but one change in 2**32 does
    (multilinear hashing).
    """
    return [_fingerprint(weight.detach()) for weight in weights.tensors()]


@torch.no_grad()
def _fingerprint(weight: torch.Tensor) -> torch.Tensor:
    lanes = weight.contiguous().view(-1)
    size = lanes.element_size() * lanes.numel()
    lanes = lanes.view(torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.int8)
    factors = _factors(lanes.device)
    whole = lanes.numel() // _LANES * _LANES
    together = 1 if lanes.device.type == "cpu" else _BLOCKS_ON_A_GPU
    products, sums = factors.new_empty(together, _LANES), []
    for blocks in lanes[:whole].view(-1, _LANES).split(together):
        part = products[: len(blocks)]
        torch.mul(blocks, factors, out=part)
        sums.append(part.sum(1))
    rest = lanes[whole:]
    if rest.numel():
        sums.append((rest * factors[: rest.numel()]).sum().unsqueeze(0))
    return torch.cat(sums)


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0x6E6772616D)
    with torch.inference_mode(False):
        factors = torch.randint(-(2**62), 2**62, (_LANES,), generator=generator, device="cpu")
        return (2 * factors + 1).to(device)


def same_fingerprint(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two fingerprints are of the same contents."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- for whole models


def memories_of(model: nn.Module) -> list[Any]:
    """The memories of a model, Gengram's own or grafted, in the order of its layers.

    Of what PEFT trains (`modules_to_save`) only the copy in use counts. Memories of a saved folder's own source code
    are of other classes of the same names.
    """
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if type(vars(module).get("kept_fold")).__name__ == FoldKeeper.__name__:
            found[module] = None
        else:
            waiting += reversed(_parts_in_use(module))
    return list(found)


def _parts_in_use(module: Any) -> list[nn.Module]:
    """The children of a module; of a wrapper of PEFT around copies of a module the one that computes."""
    parts = module._modules
    copies, original = parts.get("modules_to_save"), parts.get("original_module")
    if copies is None or original is None:
        return [part for part in parts.values() if part is not None]
    active = next((name for name in module.active_adapters if name in copies), None)
    return [original if active is None or module.disable_adapters else copies[active]]


def _foldable(model: nn.Module) -> list[Any]:
    """Memories of this source code; those of another one keep folds of their own."""
    return [memory for memory in memories_of(model) if isinstance(memory.kept_fold, FoldKeeper)]


def fold_memory(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold the projections of all memories of a model into their tables now; returns the model.

    Key and value of a position become a sum of table rows instead of two matrix products (`README.md`, "Folding").
    Needs about (5**N + 2 * 5**(N - 1)) * 2 * hidden numbers per memory, N the largest k-mer. The fold follows the
    weights: a pass that is long enough to repay it compares their contents first. `train()`, `to()` and
    `unfold_memory` drop it; it is never saved.

    Args:
        model: a model, or a memory itself, in `eval()` mode.
        dtype: of the folded tables. By default float16 for 16-bit models (scaled by a power of two, so that it cannot
            overflow), and that of the weights for others.

    Raises:
        ValueError: if the model is in training mode, or a memory has adapters, is offloaded or `as_trained`.
    """
    if model.training:
        raise ValueError("fold_memory is for inference; call model.eval() first.")
    for memory in _foldable(model):
        weights, why_not = weights_at_hand(memory, next(memory.parameters()).device)
        if weights is None:
            raise ValueError(f"the memory cannot be folded: {why_not}.")
        keeper: FoldKeeper = memory.kept_fold
        keeper.is_requested, keeper.dtype = True, dtype
        config = memory.config
        keeper.make(weights, weights.key.dtype, config.ngram_sizes, config.window)
    return model


def unfold_memory(model: nn.Module) -> nn.Module:
    """Drop the folded tables of all memories of a model; returns the model."""
    for memory in _foldable(model):
        memory.kept_fold.forget()
    return model


@contextlib.contextmanager
def folded_inference(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Compute from folded tables inside a `with` block that owns the weights: nothing may change them before its end.

    Saves the check of the weights' contents in every pass; it is made once, when the block ends. Then everything is as
    it was before the block.

    Args:
        model, dtype: see `fold_memory`.

    Raises:
        ValueError: as `fold_memory` does.
        RuntimeError: at the end, if the weights are not those of the beginning.
    """
    memories = _foldable(model)
    keepers: list[FoldKeeper] = [memory.kept_fold for memory in memories]
    before = [(keeper.fold, keeper.dtype, keeper.is_requested) for keeper in keepers]
    fold_memory(model, dtype)
    begun_with = [_contents(memory) for memory in memories]
    for keeper in keepers:
        keeper.owners += 1
    try:
        yield model
        for memory, begun in zip(memories, begun_with, strict=True):
            if not same_fingerprint(_contents(memory), begun):
                raise RuntimeError(
                    "the memory's weights were changed inside the block of folded_inference, so what it computed may "
                    "be of the old ones; change weights outside, or use fold_memory, which checks in every pass."
                )
    finally:
        for keeper, (fold, stored, is_requested) in zip(keepers, before, strict=True):
            keeper.owners -= 1
            keeper.drop()
            keeper.fold, keeper.dtype, keeper.is_requested = fold, stored, is_requested


def _contents(memory: Any) -> list[torch.Tensor]:
    """Fingerprint of all parameters of a memory, wherever they are held."""
    return [_fingerprint(weight.detach()) for weight in memory.parameters()]
