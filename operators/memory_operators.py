"""The memory's operations as PyTorch operators: opaque to `torch.compile` and `torch.export`, native where possible.

`ngram_rows_and_runs`, `window_features`, `gated_memory` and `folded_memory`, each with a schema, shapes for tracing,
and gradients. `motif_memory.py` and `folded_memory.py` say what they compute; `memory_path.py` decides how at every
call (PyTorch or native kernels). Segments, padding and context travel as plain tensors.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .folded_memory import FoldedTables
from .folded_memory import folded_memory as torch_folded_memory
from .folded_memory import folded_memory_backward as torch_folded_memory_backward
from .memory_path import uses_native
from .motif_memory import (
    NgramPlan,
    gated_memory_backward,
    letter_codes_of_few,
    rows_and_runs_of_few,
    window_features_backward,
)
from .motif_memory import gated_memory as torch_gated_memory
from .motif_memory import letter_codes as torch_letter_codes
from .motif_memory import ngram_rows_and_runs as torch_ngram_rows_and_runs
from .motif_memory import window_features as torch_window_features

_FEW_TOKENS = 64  # up to here a loop in Python is faster than the many operations of PyTorch that it replaces
# A copy of this file in a model's folder (remote code) registers its own operators.
_NAMESPACE = "gengram"
if not __name__.startswith("gengram."):
    _NAMESPACE += "_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]


def _operator(name: str, function: Any) -> Any:
    return torch.library.custom_op(f"{_NAMESPACE}::{name}", function, mutates_args=())


def _plan(
    grams: Tensor,
    runs: Tensor,
    behind: Tensor | None,
    ahead: Tensor | None,
    exists: Tensor | None,
    sizes: Sequence[int],
    window: int,
    last: int,
    length: int,
) -> NgramPlan:
    return NgramPlan(grams, runs, behind, ahead, exists, tuple(sizes), window, last, grams.shape[1] - length)


@functools.cache
def _native(name: str) -> Any:
    return getattr(torch.ops.gengram_native, name).default


def _runs_now(*tensors: Tensor) -> bool:
    """Whether nothing is differentiated or traced, so that a function may be called without its operator.

    An operator's way through PyTorch's dispatcher costs as much as a decoding step.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def _are_few(tokens: Tensor) -> bool:
    """Whether Python is faster than PyTorch's operations."""
    return tokens.device.type == "cpu" and tokens.numel() <= _FEW_TOKENS


# ---- letters, rows and runs


def letter_codes(input_ids: Tensor, token_ids: Sequence[int]) -> Tensor:
    """`motif_memory.letter_codes`; a few tokens are read in Python."""
    if _are_few(input_ids) and _runs_now(input_ids):
        return letter_codes_of_few(input_ids, token_ids)
    return torch_letter_codes(input_ids, token_ids)


def _ngram_rows_and_runs(codes: Tensor, behind: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
    if uses_native(codes.device, torch.float32, 16):
        return _native("ngram_plan")(codes, behind, largest)
    if _are_few(codes):
        return rows_and_runs_of_few(codes, largest, behind)
    return torch_ngram_rows_and_runs(codes, largest, behind)


_ngram_rows_and_runs_operator = _operator("ngram_rows_and_runs", _ngram_rows_and_runs)


@_ngram_rows_and_runs_operator.register_fake
def _(codes: Tensor, behind: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
    return codes.new_empty(codes.shape, dtype=torch.int32), codes.new_empty(codes.shape, dtype=torch.int32)


def ngram_rows_and_runs(codes: Tensor, largest: int, behind: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`motif_memory.ngram_rows_and_runs` as an operator."""
    call = _ngram_rows_and_runs if _runs_now(codes) else _ngram_rows_and_runs_operator
    return call(codes, behind, largest)


# ---- window features


def _window_features(
    tables: Sequence[Tensor],
    grams: Tensor,
    runs: Tensor,
    behind: Tensor | None,
    ahead: Tensor | None,
    sizes: Sequence[int],
    window: int,
    last: int,
    length: int,
) -> Tensor:
    if uses_native(grams.device, tables[0].dtype, tables[0].shape[1]):
        return _native("window_features")(tables, grams, runs, behind, ahead, sizes, window, last, length)
    plan = _plan(grams, runs, behind, ahead, None, sizes, window, last, length)
    return torch_window_features(tables, plan)


def _window_features_backward(
    grad: Tensor,
    grams: Tensor,
    runs: Tensor,
    behind: Tensor | None,
    ahead: Tensor | None,
    sizes: Sequence[int],
    window: int,
    last: int,
) -> list[Tensor]:
    width = grad.shape[-1] // len(sizes)
    if uses_native(grad.device, grad.dtype, width):
        return _native("window_features_backward")(grad, grams, runs, behind, ahead, sizes, window, last)
    plan = _plan(grams, runs, behind, ahead, None, sizes, window, last, grad.shape[1])
    return window_features_backward(grad, plan)


_window_features_operator = _operator("window_features", _window_features)
_window_features_backward_operator = _operator("window_features_backward", _window_features_backward)


@_window_features_operator.register_fake
def _(tables, grams, runs, behind, ahead, sizes, window, last, length):
    return tables[0].new_empty(grams.shape[0], length, sum(table.shape[1] for table in tables))


@_window_features_backward_operator.register_fake
def _(grad, grams, runs, behind, ahead, sizes, window, last):
    work = torch.promote_types(grad.dtype, torch.float32)
    return [grad.new_empty(5**n, grad.shape[-1] // len(sizes), dtype=work) for n in sizes]


def _save_window_features(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tables, grams, runs, behind, ahead, ctx.sizes, ctx.window, ctx.last, _ = inputs
    ctx.dtype = tables[0].dtype
    ctx.save_for_backward(grams, runs, behind, ahead)


def _differentiate_window_features(ctx: Any, grad: Tensor) -> tuple:
    grads = _window_features_backward_operator(grad, *ctx.saved_tensors, ctx.sizes, ctx.window, ctx.last)
    return [grad.to(ctx.dtype) for grad in grads], *[None] * 8


_window_features_operator.register_autograd(_differentiate_window_features, setup_context=_save_window_features)


def window_features(tables: Sequence[Tensor], plan: NgramPlan) -> Tensor:
    """`motif_memory.window_features` as an operator."""
    call = _window_features if _runs_now(*tables) else _window_features_operator
    return call(
        list(tables),
        plan.grams,
        plan.runs,
        plan.behind,
        plan.ahead,
        plan.ngram_sizes,
        plan.window,
        plan.last,
        plan.length,
    )


# ---- gated memory


def _gated_memory(
    hidden_states: Tensor,
    key: Tensor,
    value: Tensor,
    exists: Tensor | None,
    behind: Tensor | None,
    ahead: Tensor | None,
    norm_weight: Tensor,
    conv_weight: Tensor | None,
    history: Tensor | None,
    norm_eps: float,
    dilation: int,
    reach_back: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if _all_native(hidden_states, key, value):
        return _native("gated_memory")(
            hidden_states,
            key,
            value,
            exists,
            behind,
            ahead,
            norm_weight,
            conv_weight,
            history,
            norm_eps,
            dilation,
            reach_back,
        )
    return torch_gated_memory(
        hidden_states,
        key,
        value,
        norm_weight,
        norm_eps,
        None if conv_weight is None else conv_weight.unsqueeze(1),
        dilation,
        reach_back,
        history,
        exists,
        behind,
        ahead,
    )


def _all_native(*tensors: Tensor) -> bool:
    return all(uses_native(x.device, x.dtype, x.shape[-1]) for x in tensors)


def _gated_memory_backward(
    grad_residual: Tensor,
    grad_gate: Tensor | None,
    hidden_states: Tensor,
    key: Tensor,
    value: Tensor,
    exists: Tensor | None,
    behind: Tensor | None,
    ahead: Tensor | None,
    norm_weight: Tensor,
    conv_weight: Tensor | None,
    norm_eps: float,
    dilation: int,
    reach_back: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _all_native(hidden_states, key, value):
        return _native("gated_memory_backward")(
            grad_residual,
            grad_gate,
            hidden_states,
            key,
            value,
            exists,
            behind,
            ahead,
            norm_weight,
            conv_weight,
            None,  # history
            norm_eps,
            dilation,
            reach_back,
        )
    hidden, grad_key, grad_value, grad_norm, grad_conv = gated_memory_backward(
        grad_residual,
        grad_gate,
        hidden_states,
        key,
        value,
        norm_weight,
        norm_eps,
        None if conv_weight is None else conv_weight.unsqueeze(1),
        dilation,
        reach_back,
        exists,
        behind,
        ahead,
    )
    conv = norm_weight.new_zeros(0) if grad_conv is None else grad_conv.squeeze(1)
    return hidden, grad_key, grad_value, grad_norm, conv


_gated_memory_operator = _operator("gated_memory", _gated_memory)
_gated_memory_backward_operator = _operator("gated_memory_backward", _gated_memory_backward)


def _fake_memory(hidden_states: Tensor, conv_weight: Tensor | None, dilation: int, work: torch.dtype) -> tuple:
    batch, length, hidden = hidden_states.shape
    reach = 0 if conv_weight is None else (conv_weight.shape[-1] - 1) * dilation
    kept = torch.sym_min(length, reach)
    return (
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
        hidden_states.new_empty(batch, length, dtype=work),
        hidden_states.new_empty(batch, kept, hidden, dtype=work),
    )


@_gated_memory_operator.register_fake
def _(hidden_states, key, value, exists, behind, ahead, norm_weight, conv_weight, history, norm_eps, dilation, back):
    return _fake_memory(hidden_states, conv_weight, dilation, torch.promote_types(key.dtype, torch.float32))


@_gated_memory_backward_operator.register_fake
def _(grad, grad_gate, hidden, key, value, exists, behind, ahead, norm_weight, conv_weight, eps, dilation, back):
    conv = norm_weight.new_empty(0) if conv_weight is None else torch.empty_like(conv_weight)
    return *(torch.empty_like(x) for x in (hidden, key, value, norm_weight)), conv


def _save_gated_memory(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, history, ctx.norm_eps, ctx.dilation, ctx.reach_back = inputs
    if history is not None:
        raise RuntimeError("gradients through a cached history are not defined; use the PyTorch composition instead.")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate_gated_memory(ctx: Any, grad_residual: Tensor | None, grad_gate: Tensor | None, _: Any) -> tuple:
    saved = ctx.saved_tensors  # once: gradient checkpointing allows no second time
    if grad_residual is None:
        grad_residual = torch.zeros_like(saved[0])
    *grads, grad_conv = _gated_memory_backward_operator(
        grad_residual, grad_gate, *saved, ctx.norm_eps, ctx.dilation, ctx.reach_back
    )
    has_conv = saved[7] is not None
    return *grads[:3], None, None, None, grads[3], grad_conv if has_conv else None, None, None, None, None


_gated_memory_operator.register_autograd(_differentiate_gated_memory, setup_context=_save_gated_memory)


def gated_memory(
    hidden_states: Tensor,
    key: Tensor,
    value: Tensor,
    plan: NgramPlan,
    norm_weight: Tensor,
    norm_eps: float,
    conv_weight: Tensor | None = None,
    dilation: int = 1,
    reach_back: int = 0,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`motif_memory.gated_memory` as an operator; `conv_weight` is (hidden, taps)."""
    behind = None if plan.behind is None else plan.behind[:, plan.context :]
    call = _gated_memory if _runs_now(hidden_states, key, value) else _gated_memory_operator
    return call(
        hidden_states,
        key,
        value,
        plan.exists,
        behind,
        plan.ahead,
        norm_weight,
        conv_weight,
        history,
        norm_eps,
        dilation,
        reach_back,
    )


# ---- the whole memory from packed tables


def _folded_memory(
    hidden_states: Tensor,
    rows: Tensor,
    grams: Tensor,
    runs: Tensor,
    top: Tensor | None,
    behind: Tensor | None,
    ahead: Tensor | None,
    exists: Tensor | None,
    norm_weight: Tensor,
    conv_weight: Tensor | None,
    history: Tensor | None,
    sizes: Sequence[int],
    window: int,
    last: int,
    scale: float,
    norm_eps: float,
    dilation: int,
    reach_back: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if _all_native(hidden_states, rows) and hidden_states.shape[-1] % rows.shape[-1] == 0:
        return _native("folded_memory")(
            hidden_states,
            rows,
            grams,
            runs,
            top,
            behind,
            ahead,
            exists,
            norm_weight,
            conv_weight,
            history,
            sizes,
            window,
            last,
            scale,
            norm_eps,
            dilation,
            reach_back,
        )
    plan = _plan(grams, runs, behind, ahead, exists, sizes, window, last, hidden_states.shape[1])
    return torch_folded_memory(
        hidden_states,
        FoldedTables(rows, scale),
        plan,
        norm_weight,
        norm_eps,
        None if conv_weight is None else conv_weight.unsqueeze(1),
        dilation,
        reach_back,
        history,
        top,
    )


def _folded_memory_backward(
    grad_residual: Tensor,
    grad_gate: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor,
    grams: Tensor,
    runs: Tensor,
    top: Tensor | None,
    behind: Tensor | None,
    ahead: Tensor | None,
    exists: Tensor | None,
    norm_weight: Tensor,
    conv_weight: Tensor | None,
    sizes: Sequence[int],
    window: int,
    last: int,
    scale: float,
    norm_eps: float,
    dilation: int,
    reach_back: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _all_native(hidden_states, rows) and hidden_states.shape[-1] % rows.shape[-1] == 0:
        return _native("folded_memory_backward")(
            grad_residual,
            grad_gate,
            hidden_states,
            rows,
            grams,
            runs,
            top,
            behind,
            ahead,
            exists,
            norm_weight,
            conv_weight,
            None,  # history
            sizes,
            window,
            last,
            scale,
            norm_eps,
            dilation,
            reach_back,
        )
    length = hidden_states.shape[1]
    plan = _plan(grams, runs, behind, ahead, exists, sizes, window, last, length)
    hidden, grad_rows, grad_norm, grad_conv = torch_folded_memory_backward(
        grad_residual,
        grad_gate,
        hidden_states,
        FoldedTables(rows, scale),
        plan,
        norm_weight,
        norm_eps,
        None if conv_weight is None else conv_weight.unsqueeze(1),
        dilation,
        reach_back,
        top,
    )
    conv = norm_weight.new_zeros(0) if grad_conv is None else grad_conv.squeeze(1)
    return hidden, grad_rows, grad_norm, conv


_folded_memory_operator = _operator("folded_memory", _folded_memory)
_folded_memory_backward_operator = _operator("folded_memory_backward", _folded_memory_backward)


@_folded_memory_operator.register_fake
def _(
    hidden_states, rows, grams, runs, top, behind, ahead, exists, norm_weight, conv_weight, history, sizes, window,
    last, scale, norm_eps, dilation, reach_back,
):  # fmt: skip
    return _fake_memory(hidden_states, conv_weight, dilation, torch.promote_types(rows.dtype, torch.float32))


@_folded_memory_backward_operator.register_fake
def _(
    grad_residual, grad_gate, hidden_states, rows, grams, runs, top, behind, ahead, exists, norm_weight, conv_weight,
    sizes, window, last, scale, norm_eps, dilation, reach_back,
):  # fmt: skip
    grad_rows = rows.new_empty(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
    conv = norm_weight.new_empty(0) if conv_weight is None else torch.empty_like(conv_weight)
    return torch.empty_like(hidden_states), grad_rows, torch.empty_like(norm_weight), conv


def _save_folded_memory(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, history, sizes, window, last, scale, norm_eps, dilation, reach_back = inputs
    if history is not None:
        raise RuntimeError("gradients through a cached history are not defined; use the PyTorch composition instead.")
    ctx.numbers = (sizes, window, last, scale, norm_eps, dilation, reach_back)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate_folded_memory(ctx: Any, grad_residual: Tensor | None, grad_gate: Tensor | None, _: Any) -> tuple:
    saved = ctx.saved_tensors  # once: gradient checkpointing allows no second time
    if grad_residual is None:
        grad_residual = torch.zeros_like(saved[0])
    grad_hidden, grad_rows, grad_norm, grad_conv = _folded_memory_backward_operator(
        grad_residual, grad_gate, *saved, *ctx.numbers
    )
    rows, has_conv = saved[1], saved[9] is not None
    return (
        grad_hidden,
        grad_rows.to(rows.dtype),
        *[None] * 6,
        grad_norm,
        grad_conv if has_conv else None,
        *[None] * 8,
    )


_folded_memory_operator.register_autograd(_differentiate_folded_memory, setup_context=_save_folded_memory)


def folded_memory(
    hidden_states: Tensor,
    tables: FoldedTables,
    plan: NgramPlan,
    norm_weight: Tensor,
    norm_eps: float,
    conv_weight: Tensor | None = None,
    dilation: int = 1,
    reach_back: int = 0,
    history: Tensor | None = None,
    top: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`folded_memory.folded_memory` as an operator; `conv_weight` is (hidden, taps)."""
    call = _folded_memory if _runs_now(hidden_states, tables.rows) else _folded_memory_operator
    return call(
        hidden_states,
        tables.rows,
        plan.grams,
        plan.runs,
        top,
        plan.behind,
        plan.ahead,
        plan.exists,
        norm_weight,
        conv_weight,
        history,
        plan.ngram_sizes,
        plan.window,
        plan.last,
        tables.scale,
        norm_eps,
        dilation,
        reach_back,
    )
