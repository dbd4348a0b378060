"""One pass of a memory by the way that `choose.py` finds; every way gives the definition's numbers up to rounding."""

from typing import Any, NamedTuple

import torch

from ..as_trained import memory_as_trained
from ..definition import MemoryOutput, NgramPlan
from ..state import MemoryState
from .bags import features_by_bags
from .choose import Way, choose_kernels, choose_way, packed_layout
from .folded import folded_key_value
from .one_token import gated_token, one_token_features
from .operators import folded_memory, gated_memory, is_traced, runs_now, window_features
from .packed_tables import PackedTables
from .table_major import packed_rows, rows_to_project, used_rows
from .weights import Weights, weights_at_hand


class _Pass(NamedTuple):
    """What a way computes from."""

    memory: Any  # a `MotifMemory`
    hidden_states: torch.Tensor
    plan: NgramPlan
    state: MemoryState | None
    weights: Weights | None  # None where only the modules may read them
    history: torch.Tensor | None  # inputs of the convolution before this pass


def compute(memory: Any, hidden_states: torch.Tensor, plan: NgramPlan, state: MemoryState | None) -> MemoryOutput:
    """What a `MotifMemory` makes of a pass; arguments as for its `forward`."""
    _check(memory, hidden_states, plan)
    weights, why_not = weights_at_hand(memory, hidden_states.device)

    def find_fold(is_forced: bool) -> tuple[Any, str]:
        assert weights is not None
        return memory.kept_fold.find(memory, weights, hidden_states, plan, state, is_forced)

    history = None if state is None else state.conv_inputs(memory.layer_idx)
    work = _Pass(memory, hidden_states, plan, state, weights, history)
    way = choose_way(
        hidden_states,
        is_as_trained=memory.config.pooling == "as_trained",
        can_project=why_not,
        continues=history is not None,
        table_rows=rows_to_project(plan.ngram_sizes),
        find_fold=find_fold,
    )
    return _WAYS[way.algorithm](work, way)


def _check(memory: Any, hidden_states: torch.Tensor, plan: NgramPlan) -> None:
    """Refuse a plan of another memory, or of other tokens."""
    config = memory.config
    if not isinstance(plan, NgramPlan):
        raise TypeError(f"expected a plan from plan_ngrams, got a {type(plan).__name__}.")
    if plan.ngram_sizes != config.ngram_sizes or plan.window != config.window:
        raise ValueError(
            f"the plan is of n-grams {plan.ngram_sizes} in windows of {plan.window}, but this memory has "
            f"{config.ngram_sizes} and {config.window}; make the plan with the memory's own configuration."
        )
    if torch.compiler.is_compiling():  # whose shapes may be symbols
        return
    expected = (plan.grams.shape[0], plan.length, memory.norm_q.weight.shape[0])
    if hidden_states.shape != expected:
        raise ValueError(
            f"expected hidden states of (batch, length, hidden) {expected}, as the plan and the memory have them, got "
            f"{tuple(hidden_states.shape)}."
        )


def _as_trained(work: _Pass, way: Way) -> MemoryOutput:
    return memory_as_trained(work.memory, work.hidden_states, work.plan, work.state)


def _token_major(work: _Pass, way: Way) -> MemoryOutput:
    memory, hidden_states, plan, state, weights, history = work
    if weights is None:
        return memory.by_definition(hidden_states, plan, state)
    if way.kernels == "torch" or _keeps_more(work):
        return _one_token(work) or _by_bags(work) or memory.by_definition(hidden_states, plan, state)
    table = weights.tables[0]
    fits = table.shape[1] % 16 == 0  # the width that native kernels need
    native = fits and choose_kernels(table.device, (table.dtype,), table.shape[1])[0] == "native"
    if not native and (found := _one_token(work)) is not None:
        return found
    features = window_features(weights.tables, plan, native=native)
    key, value = memory.key_proj(features), memory.value_proj(features)
    if key.dtype != value.dtype:
        return memory.from_key_and_value(hidden_states, key, value, plan, state)
    layer = weights.layer(plan.is_causal)
    return gated_memory(hidden_states, key, value, plan, layer, history, native=True)


def _one_token(work: _Pass) -> MemoryOutput | None:
    """The definition of a decoding step with a quarter of the operations; None for any other pass."""
    memory, hidden_states, plan, _, weights, history = work
    if hidden_states.shape[1] != 1 or hidden_states.device.type != "cpu" or not runs_now(hidden_states):
        return None
    assert weights is not None
    layer = weights.layer(plan.is_causal)
    features = one_token_features(weights.tables, plan, layer, history)
    if features is None:
        return None
    key, value = memory.key_proj(features), memory.value_proj(features)
    return gated_token(hidden_states, key, value, layer, history)


def _by_bags(work: _Pass) -> MemoryOutput | None:
    """The definition on a GPU, its features by fewer operations; None where it runs elsewhere, or is traced."""
    memory, hidden_states, plan, state, weights, _ = work
    assert weights is not None
    if is_traced() or not all(table.is_cuda for table in weights.tables):
        return None
    features = features_by_bags(weights.tables, plan)
    key, value = memory.key_proj(features), memory.value_proj(features)
    return memory.from_key_and_value(hidden_states, key, value, plan, state)


def _table_major(work: _Pass, way: Way) -> MemoryOutput:
    weights = work.weights
    assert weights is not None
    used = top = None
    if not torch.compiler.is_compiling():  # their number depends on the data
        used, top = used_rows(work.plan)
    layout = packed_layout(weights.key.device, work.hidden_states.dtype, work.hidden_states.shape[-1])
    tables = packed_rows(weights.tables, weights.key, weights.value, work.plan, used, layout)
    return _from_tables(work, way, tables, top)


def _folded(work: _Pass, way: Way) -> MemoryOutput:
    return _from_tables(work, way, way.fold.tables, None)


def _from_tables(work: _Pass, way: Way, tables: PackedTables, top: torch.Tensor | None) -> MemoryOutput:
    memory, hidden_states, plan, state, weights, history = work
    assert weights is not None
    if _keeps_more(work):
        key, value = folded_key_value(tables, plan, top)
        return memory.from_key_and_value(hidden_states, key, value, plan, state)
    layer = way.fold.layer if way.fold is not None and plan.is_causal else weights.layer(plan.is_causal)
    return folded_memory(hidden_states, tables, plan, layer, history, top, native=way.kernels == "native")


def _keeps_more(work: _Pass) -> bool:
    """Whether more inputs of the convolution are wanted than those that it reaches."""
    if work.state is None or not work.state.keeps_all:
        return False
    return work.plan.length > work.memory.config.conv_context


_WAYS = {"as_trained": _as_trained, "token_major": _token_major, "table_major": _table_major, "folded": _folded}
