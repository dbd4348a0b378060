"""The memory's operations as PyTorch operators: opaque to `torch.compile` and `torch.export`, native where wanted.

The table at the end registers each with a schema, shapes for tracing and gradients. What an operator computes is said
by the function of `definition.py` or `folded.py` of the same name, which stands behind it with the same arguments; the
last argument, `native`, is the choice of kernels (`choose.py`). Plans and layers travel as their fields.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..definition import MemoryLayer, MemoryOutput, NgramPlan, at_least_float32
from ..definition import gated_memory as defined_gated_memory
from ..definition import letter_codes as defined_letter_codes
from ..definition import ngram_rows_and_runs as defined_rows_and_runs
from ..definition import window_features as defined_window_features
from .folded import folded_memory as torch_folded_memory
from .folded import folded_memory_backward as torch_folded_memory_backward
from .gradients import gated_memory_backward, window_features_backward
from .one_token import letter_codes_of_few, rows_and_runs_of_few
from .packed_tables import PackedTables

_FEW_TOKENS = 64  # up to here a loop in Python is faster than the many operations of PyTorch that it replaces
# A copy of this file in a model's folder (remote code) registers its own operators.
_NAMESPACE = "gengram"
if not __name__.startswith("gengram."):
    _NAMESPACE += "_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]

_PLAN = (
    "Tensor grams, Tensor runs, Tensor? behind, Tensor? ahead, Tensor? exists, int[] ngram_sizes, int window, "
    "int reach_ahead, int context, bool is_causal"
)
_LAYER = "Tensor norm_weight, float norm_eps, Tensor? taps, int dilation, int reach_back"
_PLAN_FIELDS, _LAYER_FIELDS = len(NgramPlan._fields), len(MemoryLayer._fields)


def _plan_of(fields: Sequence[Any]) -> NgramPlan:
    plan = NgramPlan(*fields)
    return plan._replace(ngram_sizes=tuple(plan.ngram_sizes))


def _plan_and_layer(fields: Sequence[Any]) -> tuple[NgramPlan, MemoryLayer, Sequence[Any]]:
    """A plan, a layer, and what follows them."""
    end = _PLAN_FIELDS + _LAYER_FIELDS
    return _plan_of(fields[:_PLAN_FIELDS]), MemoryLayer(*fields[_PLAN_FIELDS:end]), fields[end:]


@functools.cache
def _native(name: str) -> Any:
    return getattr(torch.ops.gengram_native, name).default


# The native operators' order of arguments (csrc/operators.h).


def _native_windows(plan: NgramPlan) -> tuple[Any, ...]:
    return plan.ngram_sizes, plan.window, plan.reach_ahead


def _native_layer(layer: MemoryLayer) -> tuple[Any, ...]:
    return layer.norm_eps, layer.dilation, layer.reach_back


def _native_folded(rows: Tensor, scale: float, top: Tensor | None, history: Tensor | None, *both: Any) -> tuple:
    plan, layer = both
    segments = (plan.grams, plan.runs, top, plan.behind, plan.ahead, plan.exists)
    weights = (layer.norm_weight, layer.taps, history)
    return rows, *segments, *weights, *_native_windows(plan), scale, *_native_layer(layer)


def _native_gated(key: Tensor, value: Tensor, history: Tensor | None, plan: NgramPlan, layer: MemoryLayer) -> tuple:
    segments = (plan.exists, plan.behind_current(), plan.ahead)
    return key, value, *segments, layer.norm_weight, layer.taps, history, *_native_layer(layer)


# ---- letters, rows and runs


def _rows_and_runs(native: bool, codes: Tensor, largest: int, behind: Tensor | None) -> tuple[Tensor, Tensor]:
    if native:
        return _native("ngram_plan")(codes, behind, largest)
    if _are_few(codes):
        return rows_and_runs_of_few(codes, largest, behind)
    return defined_rows_and_runs(codes, largest, behind)


def _rows_and_runs_shapes(codes: Tensor, largest: int, behind: Tensor | None) -> tuple[Tensor, Tensor]:
    return codes.new_empty(codes.shape, dtype=torch.int32), codes.new_empty(codes.shape, dtype=torch.int32)


# ---- window features


def _window_features(native: bool, tables: Sequence[Tensor], *fields: Any) -> Tensor:
    plan = _plan_of(fields)
    if native:
        segments = (plan.grams, plan.runs, plan.behind, plan.ahead)
        return _native("window_features")(tables, *segments, *_native_windows(plan), plan.length)
    return defined_window_features(tables, plan)


def _window_features_shapes(tables: Sequence[Tensor], *fields: Any) -> Tensor:
    plan = _plan_of(fields)
    return tables[0].new_empty(plan.grams.shape[0], plan.length, sum(table.shape[1] for table in tables))


def _window_features_backward(native: bool, grad: Tensor, *fields: Any) -> list[Tensor]:
    plan = _plan_of(fields)
    if native:
        segments = (plan.grams, plan.runs, plan.behind, plan.ahead)
        return _native("window_features_backward")(grad, *segments, *_native_windows(plan))
    return window_features_backward(grad, plan)


def _window_features_backward_shapes(grad: Tensor, *fields: Any) -> list[Tensor]:
    sizes = _plan_of(fields).ngram_sizes
    work = at_least_float32(grad.dtype)
    return [grad.new_empty(5**n, grad.shape[-1] // len(sizes), dtype=work) for n in sizes]


def _differentiate_window_features(native: bool, inputs: Sequence[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
    dtype, *fields = inputs
    gradients = _call("window_features_backward", native, grads[0], *fields)
    return ([gradient.to(dtype) for gradient in gradients],)


# ---- gated memory


def _gated_memory(
    native: bool, hidden_states: Tensor, key: Tensor, value: Tensor, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    plan, layer, (history,) = _plan_and_layer(fields)
    if native:
        return _native("gated_memory")(hidden_states, *_native_gated(key, value, history, plan, layer))
    return defined_gated_memory(hidden_states, key, value, plan, layer, history)[:3]


def _memory_shapes(hidden_states: Tensor, layer: MemoryLayer, work: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, hidden = hidden_states.shape
    return (
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
        hidden_states.new_empty(batch, length, dtype=work),
        hidden_states.new_empty(batch, torch.sym_min(length, layer.reach), hidden, dtype=work),
    )


def _gated_memory_shapes(
    hidden_states: Tensor, key: Tensor, value: Tensor, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, layer, _ = _plan_and_layer(fields)
    return _memory_shapes(hidden_states, layer, at_least_float32(key.dtype))


def _gated_memory_backward(
    native: bool,
    grad_residual: Tensor,
    grad_gate: Tensor | None,
    hidden_states: Tensor,
    key: Tensor,
    value: Tensor,
    *fields: Any,
) -> tuple[Tensor, ...]:
    plan, layer, _ = _plan_and_layer(fields)
    if native:
        rest = _native_gated(key, value, None, plan, layer)
        return _native("gated_memory_backward")(grad_residual, grad_gate, hidden_states, *rest)
    *grads, taps = gated_memory_backward(grad_residual, grad_gate, hidden_states, key, value, plan, layer)
    return *grads, layer.norm_weight.new_zeros(0) if taps is None else taps


def _layer_gradients_shapes(layer: MemoryLayer) -> tuple[Tensor, Tensor]:
    weight, taps = layer.norm_weight, layer.taps
    return torch.empty_like(weight), weight.new_empty(0) if taps is None else torch.empty_like(taps)


def _gated_memory_backward_shapes(
    grad_residual: Tensor, grad_gate: Tensor | None, hidden_states: Tensor, key: Tensor, value: Tensor, *fields: Any
) -> tuple[Tensor, ...]:
    _, layer, _ = _plan_and_layer(fields)
    return *map(torch.empty_like, (hidden_states, key, value)), *_layer_gradients_shapes(layer)


def _differentiate_gated_memory(native: bool, inputs: Sequence[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
    hidden_states, (plan, layer, _) = inputs[0], _plan_and_layer(inputs[3:])
    *by_input, norm, taps = _call(
        "gated_memory_backward", native, _or_zeros(grads[0], hidden_states), grads[1], *inputs[:-1]
    )
    if grads[2] is not None:
        grad = _as_residual(grads[2], hidden_states)
        fields = (*inputs[:3], *plan, *_without_convolution(layer))
        *more, more_norm, _ = _call("gated_memory_backward", native, grad, None, *fields)
        by_input, norm = [one + other for one, other in zip(by_input, more, strict=True)], norm + more_norm
    return *by_input, *[None] * _PLAN_FIELDS, norm, None, None if layer.taps is None else taps


# ---- the whole memory from packed tables


def _folded_memory(
    native: bool, hidden_states: Tensor, rows: Tensor, scale: float, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    plan, layer, (history, top) = _plan_and_layer(fields)
    if native:
        rest = _native_folded(rows, scale, top, history, plan, layer)
        return _native("folded_memory")(hidden_states, *rest)
    return torch_folded_memory(hidden_states, PackedTables(rows, scale), plan, layer, history, top)[:3]


def _folded_memory_shapes(
    hidden_states: Tensor, rows: Tensor, scale: float, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, layer, _ = _plan_and_layer(fields)
    return _memory_shapes(hidden_states, layer, at_least_float32(rows.dtype))


def _folded_memory_backward(
    native: bool,
    grad_residual: Tensor,
    grad_gate: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor,
    scale: float,
    *fields: Any,
) -> tuple[Tensor, ...]:
    plan, layer, (top,) = _plan_and_layer(fields)
    if native:
        rest = _native_folded(rows, scale, top, None, plan, layer)
        return _native("folded_memory_backward")(grad_residual, grad_gate, hidden_states, *rest)
    tables = PackedTables(rows, scale)
    *grads, taps = torch_folded_memory_backward(grad_residual, grad_gate, hidden_states, tables, plan, layer, top)
    return *grads, layer.norm_weight.new_zeros(0) if taps is None else taps


def _folded_memory_backward_shapes(
    grad_residual: Tensor, grad_gate: Tensor | None, hidden_states: Tensor, rows: Tensor, scale: float, *fields: Any
) -> tuple[Tensor, ...]:
    _, layer, _ = _plan_and_layer(fields)
    grad_rows = rows.new_empty(rows.shape, dtype=at_least_float32(rows.dtype))
    return torch.empty_like(hidden_states), grad_rows, *_layer_gradients_shapes(layer)


def _differentiate_folded_memory(native: bool, inputs: Sequence[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
    hidden_states, rows, scale, *fields = inputs
    plan, layer, _ = _plan_and_layer(fields)
    *before, _, top = inputs  # history is None
    grad_hidden, grad_rows, norm, taps = _call(
        "folded_memory_backward", native, _or_zeros(grads[0], hidden_states), grads[1], *before, top
    )
    if grads[2] is not None:
        grad = _as_residual(grads[2], hidden_states)
        without = (hidden_states, rows, scale, *plan, *_without_convolution(layer))
        more = _call("folded_memory_backward", native, grad, None, *without, top)
        grad_hidden, grad_rows, norm = grad_hidden + more[0], grad_rows + more[1], norm + more[2]
    layer_gradients = (norm, None, None if layer.taps is None else taps)
    return grad_hidden, grad_rows.to(rows.dtype), None, *[None] * _PLAN_FIELDS, *layer_gradients


def _as_residual(grad_gated: Tensor, hidden_states: Tensor) -> Tensor:
    """The gradient of `gated`, which a continued text has, as that of the residual of a memory without convolution."""
    missing = hidden_states.shape[1] - grad_gated.shape[1]
    return torch.nn.functional.pad(grad_gated, (0, 0, missing, 0)).to(hidden_states.dtype)


def _without_convolution(layer: MemoryLayer) -> MemoryLayer:
    return layer._replace(taps=None, dilation=1, reach_back=0)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


# ---- registration


class _Row(NamedTuple):
    """One operator; its functions take its arguments, without `native` but for the first and the last."""

    name: str
    arguments: str
    returns: str
    compute: Callable[..., Any]  # (native, *arguments)
    shapes: Callable[..., Any]  # (*arguments): empty tensors like the results
    differentiate: Callable[..., Any] | None = None  # (native, arguments, gradients): of the first arguments


_MEMORY = "Tensor residual, Tensor gate, Tensor gated"
_BACK = "Tensor grad_residual, Tensor? grad_gate"
_STATES = "Tensor hidden_states, Tensor key, Tensor value"
_TABLES = "Tensor hidden_states, Tensor rows, float scale"
_TABLE = (
    _Row(
        "ngram_rows_and_runs",
        "Tensor codes, int largest, Tensor? behind",
        "Tensor grams, Tensor runs",
        _rows_and_runs,
        _rows_and_runs_shapes,
    ),
    _Row(
        "window_features",
        f"Tensor[] tables, {_PLAN}",
        "Tensor features",
        _window_features,
        _window_features_shapes,
        _differentiate_window_features,
    ),
    _Row(
        "window_features_backward",
        f"Tensor grad, {_PLAN}",
        "Tensor[] tables",
        _window_features_backward,
        _window_features_backward_shapes,
    ),
    _Row(
        "gated_memory",
        f"{_STATES}, {_PLAN}, {_LAYER}, Tensor? history",
        _MEMORY,
        _gated_memory,
        _gated_memory_shapes,
        _differentiate_gated_memory,
    ),
    _Row(
        "gated_memory_backward",
        f"{_BACK}, {_STATES}, {_PLAN}, {_LAYER}",
        "Tensor hidden_states, Tensor key, Tensor value, Tensor norm_weight, Tensor taps",
        _gated_memory_backward,
        _gated_memory_backward_shapes,
    ),
    _Row(
        "folded_memory",
        f"{_TABLES}, {_PLAN}, {_LAYER}, Tensor? history, Tensor? top",
        _MEMORY,
        _folded_memory,
        _folded_memory_shapes,
        _differentiate_folded_memory,
    ),
    _Row(
        "folded_memory_backward",
        f"{_BACK}, {_TABLES}, {_PLAN}, {_LAYER}, Tensor? top",
        "Tensor hidden_states, Tensor rows, Tensor norm_weight, Tensor taps",
        _folded_memory_backward,
        _folded_memory_backward_shapes,
    ),
)


def _register(row: _Row) -> Any:
    returns = f"({row.returns})" if "," in row.returns else row.returns
    operator = torch.library.custom_op(
        f"{_NAMESPACE}::{row.name}",
        lambda *arguments: row.compute(arguments[-1], *arguments[:-1]),
        mutates_args=(),
        schema=f"({row.arguments}, bool native) -> {returns}",
    )
    operator.register_fake(lambda *arguments: row.shapes(*arguments[:-1]))
    if row.differentiate is not None:
        differentiate = row.differentiate
        has_history = "Tensor? history" in row.arguments
        history = row.arguments.split(", ").index("Tensor? history") if has_history else None

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if history is not None and inputs[history] is not None:
                raise RuntimeError(
                    "gradients through a cached history are not defined; use the PyTorch composition instead."
                )
            *values, ctx.native = inputs
            if isinstance(values[0], list | tuple):
                values[0] = values[0][0].dtype  # all that the gradients of tables need of them
            ctx.places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
            ctx.values = [None if isinstance(value, Tensor) else value for value in values]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(values[place] for place in ctx.places))

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            values = list(ctx.values)
            for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                values[place] = tensor
            found = differentiate(ctx.native, values, grads)
            return *found, *[None] * (len(values) + 1 - len(found))

        operator.register_autograd(backward, setup_context=save)
    return operator


_ROWS = {row.name: row for row in _TABLE}
OPERATORS = {row.name: _register(row) for row in _TABLE}


def _call(name: str, native: bool, *arguments: Any) -> Any:
    return OPERATORS[name](*arguments, native)


def _call_now(name: str, native: bool, watched: Sequence[Tensor], *arguments: Any) -> Any:
    """The operator, or its function itself where nothing is differentiated or traced.

    An operator's way through PyTorch's dispatcher costs as much as a decoding step.
    """
    return _ROWS[name].compute(native, *arguments) if runs_now(*watched) else _call(name, native, *arguments)


def runs_now(*tensors: Tensor) -> bool:
    """Whether nothing is differentiated or traced."""
    if torch.is_grad_enabled() or is_traced():
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def is_traced() -> bool:
    """Whether something follows the operations instead of computing them."""
    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def _are_few(tokens: Tensor) -> bool:
    """Whether Python is faster than PyTorch's operations."""
    return tokens.device.type == "cpu" and tokens.numel() <= _FEW_TOKENS


# ---- the operators, with the arguments of the functions behind them


def letter_codes(input_ids: Tensor, letters: Sequence[int]) -> Tensor:
    """`definition.letter_codes`; a few tokens are read in Python."""
    if runs_now(input_ids) and _are_few(input_ids):
        return letter_codes_of_few(input_ids, letters)
    return defined_letter_codes(input_ids, letters)


def ngram_rows_and_runs(
    codes: Tensor, largest: int, behind: Tensor | None = None, *, native: bool = False
) -> tuple[Tensor, Tensor]:
    """`definition.ngram_rows_and_runs` as an operator."""
    return _call_now("ngram_rows_and_runs", native, [codes], codes, largest, behind)


def window_features(tables: Sequence[Tensor], plan: NgramPlan, *, native: bool = False) -> Tensor:
    """`definition.window_features` as an operator."""
    return _call_now("window_features", native, tables, list(tables), *plan)


def gated_memory(
    hidden_states: Tensor,
    key: Tensor,
    value: Tensor,
    plan: NgramPlan,
    layer: MemoryLayer,
    history: Tensor | None = None,
    *,
    native: bool = False,
) -> MemoryOutput:
    """`definition.gated_memory` as an operator."""
    watched = (hidden_states, key, value)
    return MemoryOutput(*_call_now("gated_memory", native, watched, *watched, *plan, *layer, history))


def folded_memory(
    hidden_states: Tensor,
    tables: PackedTables,
    plan: NgramPlan,
    layer: MemoryLayer,
    history: Tensor | None = None,
    top: Tensor | None = None,
    *,
    native: bool = False,
) -> MemoryOutput:
    """`folded.folded_memory` as an operator."""
    watched = (hidden_states, tables.rows)
    return MemoryOutput(
        *_call_now("folded_memory", native, watched, hidden_states, *tables, *plan, *layer, history, top)
    )
