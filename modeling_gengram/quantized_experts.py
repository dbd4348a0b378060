"""Experts and linear layers whose weights are kept in 8 or 4 bits; products are in the dtype of the hidden states.

A stack of matrices (experts, rows, columns) or a matrix (rows, columns) becomes whole numbers and scales, both
ordinary tensors:

- `"int8"`: int8 (experts, rows, columns), and one scale per row, (experts, rows). weight = number * scale.
- `"int4"`: numbers -8..7, and one scale per 32 columns, (experts, rows, columns / 32). Two numbers share a byte: byte
  j of the 16 that hold a group has its number j in the low four bits and its number j + 16 in the high ones, each + 8.
  So they are uint8 (experts, rows, columns / 2).

Scales have the dtype of the weights that were quantised. They are rounded to it first, and the numbers are chosen
for the rounded scale, so that its rounding costs nothing.
"""

import functools
import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..motif_memory.ways.native import status
from .quantized_on_gpu import are_few_on_gpu, products_of_few

KINDS = ("int8", "int4")
WEIGHTS = ("gate_up_proj", "down_proj")
NUMBERS = (*WEIGHTS, "qweight")  # of experts and of linear layers
GROUP = 32  # columns that share a scale in "int4"
_HALF = GROUP // 2
# Divisors of a group's largest number that are tried for the scale; the one with the least squared error is kept.
# Beside 8 alone, as in llama.cpp's Q4_0, the error of normally distributed weights is 3.7 % smaller.
_INT4_DIVISORS = (-7.5, -8.0, -8.5)
_BLOCK = 2**20  # weights that are quantised at once, so that what lies between fits the cache
# Tokens of an expert up to which a kernel that multiplies whole numbers beats making floats of the weights first,
# where the CPU has instructions for bfloat16. Without these it always does.
_FEW_TOKENS = 16
# Numbers that `torch._weight_int8pack_mm` reads at once with AVX-512. It reads beyond rows of other lengths, and ends
# the process where the address is not a multiple of their size, as in a file that is mapped into memory.
_PACK = 16
_LEAST_FLOAT16 = 2.0**-24
# A copy of this file in a model's folder (remote code) registers its own operators.
_NAMESPACE = "gengram_experts"
if not __name__.startswith("gengram."):
    _NAMESPACE += "_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]


def check_kind(kind: Any, of: str = "experts") -> str:
    """The kind of a quantisation, of the option `of`.

    Raises:
        ValueError: if there is none of that name.
    """
    if kind not in KINDS:
        raise ValueError(f"{of} must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    return str(kind)


def quantized_shapes(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the numbers and of the scales for weights (..., rows, columns).

    Raises:
        ValueError: if the columns are no multiple of what shares a scale.
    """
    *rows, columns = shape
    if kind == "int8":
        return shape, tuple(rows)
    if columns % GROUP:
        raise ValueError(
            f'"int4" needs matrices whose columns are a multiple of {GROUP} (of experts: hidden_size and '
            f'intermediate_size; of attention: hidden_size, and heads times head_dim), got {columns}; use "int8".'
        )
    return (*rows, columns // 2), (*rows, columns // GROUP)


def scale_name(name: str) -> str:
    """Of a module's parameter of numbers, the one of its scales."""
    return name.replace("qweight", "weight") + "_scale"


def numbers_dtype(kind: str) -> torch.dtype:
    """The dtype of the stored numbers."""
    return torch.int8 if kind == "int8" else torch.uint8


@torch.no_grad()
def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Numbers and scales of weights (..., rows, columns).

    Raises:
        ValueError: if the columns do not fit the kind, or weights are not finite.
    """
    shapes = quantized_shapes(tuple(weight.shape), kind)
    rows = weight.reshape(-1, weight.shape[-1])
    blocks = [_quantize_block(block, kind) for block in rows.split(max(_BLOCK // rows.shape[1], 1))]
    numbers, scales = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return numbers.reshape(shapes[0]), scales.reshape(shapes[1])


def _quantize_block(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    largest = work.abs().amax(-1, keepdim=True) if kind == "int8" else _signed_largest(_groups(work))
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weights hold numbers that are not finite, which cannot be quantised.")
    if kind == "int8":
        scale = _within_range(_stored(_divided(largest, 127), weight.dtype), largest, -127, 127)
        return _rounded(work, scale, -127, 127).to(torch.int8), scale.squeeze(-1)
    groups = _groups(work)  # (..., rows, columns / 32, 32)
    least, best = None, None
    for divisor in _INT4_DIVISORS:
        scale = _stored(_divided(largest, divisor), weight.dtype)
        numbers = _rounded(groups, scale, -8, 7)
        error = (numbers * scale - groups).square().sum(-1, keepdim=True)
        if least is None or best is None:
            least, best = error, scale
        else:
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    assert best is not None
    best = _within_range(best, largest, -8, 7)
    numbers = (_rounded(groups, best, -8, 7) + 8).to(torch.uint8)
    packed = numbers[..., :_HALF] | (numbers[..., _HALF:] << 4)
    return packed.flatten(-2), best.squeeze(-1)


def _divided(largest: Tensor, divisor: float) -> Tensor:
    """The quotient, the same on every device: a GPU multiplies by one over a Python number, which rounds otherwise."""
    return largest / torch.full_like(largest, divisor)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype that they are kept in; float16 has so few digits for small ones that these are rounded up.

    Rounded down, the largest number would be cut off.
    """
    if dtype == torch.float16:
        rounded_up = (scale.abs() / _LEAST_FLOAT16).ceil() * _LEAST_FLOAT16
        is_small = scale.abs() < torch.finfo(torch.float16).smallest_normal
        scale = torch.where(is_small, rounded_up.copysign(scale), scale)
    return scale.to(dtype)


def _within_range(scale: Tensor, largest: Tensor, least: int, most: int) -> Tensor:
    """Scales that make no infinity of the largest weight's number, as those that were rounded up may at the end of
    their dtype's range: such a one becomes the largest that fits the `least` number."""
    number = _rounded(largest, scale, least, most)
    is_too_large = (number * scale.to(number.dtype)).to(scale.dtype).isinf()
    limits = torch.finfo(scale.dtype)
    end = torch.full_like(scale, limits.max * (1 - limits.eps) / -least)
    return torch.where(is_too_large, end.copysign(scale), scale)


def _groups(work: Tensor) -> Tensor:
    return work.unflatten(-1, (-1, GROUP))


def _signed_largest(groups: Tensor) -> Tensor:
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def _rounded(work: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    scale = scale.to(work.dtype)
    return (work / scale.masked_fill(scale == 0, 1)).round().clamp(least, most)


def dequantize(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (..., rows, columns) in `dtype`."""
    if numbers.dtype == torch.int8:
        return numbers.to(dtype).mul_(scale.to(dtype).unsqueeze(-1))
    halves = numbers.unflatten(-1, (-1, _HALF))
    groups = torch.cat((halves & 15, halves >> 4), -1).to(dtype).sub_(8)
    return groups.mul_(scale.to(dtype).unsqueeze(-1)).flatten(-2)


# ---- the product, opaque to `torch.compile`


@functools.cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_native_product(x: Tensor, numbers: Tensor) -> bool:
    fits = x.shape[-1] % (16 if numbers.dtype == torch.int8 else GROUP) == 0
    return fits and x.dtype != torch.float64 and status().available


def is_aligned(values: Tensor) -> bool:
    """Whether PyTorch's kernel for int8 weights may read them: what `torch.empty` gives always is."""
    return values.data_ptr() % (_PACK * values.element_size()) == 0


def _product(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """(tokens, columns) times the transpose of one expert's (rows, columns)."""
    if x.device.type == "cpu" and len(x) <= _FEW_TOKENS and _has_native_product(x, numbers):
        return torch.ops.gengram_native.quantized_product(x, numbers, scale.to(x.dtype))
    is_narrow = numbers.dtype == torch.int8 and x.dtype in (torch.bfloat16, torch.float16)
    if is_narrow and x.device.type == "cpu" and (len(x) <= _FEW_TOKENS or not _multiplies_bfloat16()):
        if x.shape[-1] % _PACK == 0 and is_aligned(numbers) and is_aligned(x):
            return torch._weight_int8pack_mm(x, numbers, scale.to(x.dtype))
    if _takes_scales_apart(x, numbers):
        return F.linear(x, numbers.to(x.dtype)).mul_(scale.to(x.dtype))
    return F.linear(x, dequantize(numbers, scale, x.dtype))


def _takes_scales_apart(x: Tensor, numbers: Tensor) -> bool:
    """Whether a row's scale may be multiplied with sums of its numbers, which are fewer than the numbers.

    These are exact in bfloat16, too. In float16 their sums would not fit.
    """
    return numbers.dtype == torch.int8 and x.dtype != torch.float16


def _parts(experts: Tensor, count: int) -> list[tuple[int, slice]]:
    """The experts in use, and the tokens of each among those sorted by expert; what has no expert comes last."""
    counts = torch.bincount(experts, minlength=count)[:count].tolist()
    parts, start = [], 0
    for expert, tokens in enumerate(counts):
        if tokens:
            parts.append((expert, slice(start, start + tokens)))
            start += tokens
    return parts


# Counting the tokens of each expert waits for a GPU, which a CUDA graph cannot record.
_COUNTS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(f"{_NAMESPACE}::linear", mutates_args=(), tags=_COUNTS)
def _linear(x: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    x = x.contiguous()
    result = x.new_zeros(len(x), numbers.shape[1])
    for expert, tokens in _parts(experts, len(numbers)):
        result[tokens] = _product(x[tokens], numbers[expert], scale[expert])
    return result


@_linear.register_fake
def _linear_shapes(x: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], numbers.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::linear_backward", mutates_args=(), tags=_COUNTS)
def _linear_backward(grad: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    halving = 1 if numbers.dtype == torch.int8 else 2
    result = grad.new_zeros(len(grad), numbers.shape[2] * halving)
    for expert, tokens in _parts(experts, len(numbers)):
        if _takes_scales_apart(grad, numbers):
            result[tokens] = (grad[tokens] * scale[expert].to(grad.dtype)) @ numbers[expert].to(grad.dtype)
        else:
            result[tokens] = grad[tokens] @ dequantize(numbers[expert], scale[expert], grad.dtype)
    return result


@_linear_backward.register_fake
def _linear_backward_shapes(grad: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    halving = 1 if numbers.dtype == torch.int8 else 2
    return grad.new_empty(grad.shape[0], numbers.shape[2] * halving)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    return _linear_backward(grad, *ctx.saved_tensors) if needed else None, None, None, None


_linear.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op(f"{_NAMESPACE}::few", mutates_args=())
def _few(x: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    return products_of_few(x, numbers, scale, experts)


@_few.register_fake
def _few_shapes(x: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], numbers.shape[1])


_few.register_autograd(_differentiate, setup_context=_keep)


def _products(x: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    """Each token (tokens, columns) times the transpose of its expert's matrix, (tokens, rows)."""
    if not are_few_on_gpu(x):
        return _linear(x, numbers, scale, experts)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _few(x, numbers, scale, experts)
    return products_of_few(x, numbers, scale, experts)  # past the dispatcher, which costs as much


# ---- the modules


class _ReadOnly(Tensor):
    """The floats that numbers stand for, made anew for each reader; what is written into them would be lost."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__set__" or (name.endswith("_") and not name.startswith("_")):
            raise ValueError(
                "quantised weights cannot be changed, as a merged adapter would. Put the adapter on "
                "model.dequantize(), and merge it there."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(Tensor) if isinstance(result, cls) and name != "requires_grad_" else result


class QuantizedLinear(nn.Linear):
    """A linear layer without bias in 8 or 4 bits: `qweight` are the numbers, `weight_scale` their scales.

    In files the numbers' name is `weight`, which here are floats to be read: adapters want to know their shape and
    dtype, and would round what they merge to whole numbers, without a word.

    Args:
        linear: the layer, without values (on the meta device); this one has none either.
        kind: of the quantisation.
        has_numbers: whether quantised numbers will be loaded; otherwise floats are, and are quantised then.
    """

    qweight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, kind: str, has_numbers: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", None)
        _set(self, "qweight", linear.weight)
        _make_room(self, ("qweight",), kind, has_numbers)
        self.quantization = kind

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the numbers stand for, (out_features, in_features), in the dtype of the scales."""
        return dequantize(self.qweight, self.weight_scale, self.weight_scale.dtype).as_subclass(_ReadOnly)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        x = input.reshape(-1, self.in_features)
        all_of_one = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        numbers, scale = self.qweight.unsqueeze(0), self.weight_scale.unsqueeze(0)
        return _products(x, numbers, scale, all_of_one).view(*input.shape[:-1], self.out_features)

    def as_floats(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary layer with the weights that the numbers stand for."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dequantize(self.qweight, self.weight_scale, dtype))
        return linear


def quantized_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts add to each token, (tokens, hidden).

    Args:
        experts: Mixtral's stacked experts with quantised weights.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k), the experts of each token. An index beyond the last expert adds nothing.
        top_k_weights: (tokens, k).

    Raises:
        ValueError: if something was added to the stored numbers, such as an adapter.
    """
    if "parametrizations" in experts._modules:
        raise ValueError(
            f"the weights of these experts are kept in {experts.quantization} and cannot be changed, as LoRA on them "
            "(target_parameters) would. Put the adapter on the attention (target_modules), or load the model "
            "unquantised."
        )
    matrices = [(getattr(experts, name), getattr(experts, scale_name(name))) for name in WEIGHTS]
    tokens, chosen = top_k_index.shape
    used, order = top_k_index.reshape(-1), None
    if are_few_on_gpu(hidden_states, chosen):
        pairs = hidden_states.repeat_interleave(chosen, dim=0)  # (tokens * k, hidden)
    else:  # the tokens of an expert stand together
        used, order = used.sort(stable=True)
        pairs = hidden_states[order // chosen]
    gate, up = _products(pairs, *matrices[0], used).chunk(2, dim=-1)
    del pairs  # what the products make of them is large
    act: Any = experts.act_fn
    out = _products(act(gate) * up, *matrices[1], used)
    if order is not None:
        out = out[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]
    out = out * top_k_weights.reshape(-1, 1)
    return out.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


def make_room(experts: Any, kind: str, has_numbers: bool) -> None:
    """Give stacked experts without values (on the meta device) the parameters of quantised ones, also without values.

    Args:
        experts: the module.
        kind: of the quantisation.
        has_numbers: whether quantised numbers will be loaded; otherwise floats are, and are quantised then.
    """
    _make_room(experts, WEIGHTS, kind, has_numbers)
    experts.quantization = kind


def _make_room(module: nn.Module, names: tuple[str, ...], kind: str, has_numbers: bool) -> None:
    for name in names:
        weight = getattr(module, name)
        numbers, scale = quantized_shapes(tuple(weight.shape), kind)
        if has_numbers:
            _set(module, name, torch.empty(numbers, dtype=numbers_dtype(kind), device=weight.device))
        _set(module, scale_name(name), torch.empty(scale, dtype=weight.dtype, device=weight.device))


def undo(experts: Any, dtype: torch.dtype) -> None:
    """Give quantised experts ordinary weights again."""
    for name in WEIGHTS:
        weight = dequantize(getattr(experts, name), getattr(experts, scale_name(name)), dtype)
        delattr(experts, scale_name(name))
        setattr(experts, name, nn.Parameter(weight))
    experts.quantization = None


def _set(experts: nn.Module, name: str, values: Tensor) -> None:
    experts.register_parameter(name, nn.Parameter(values, requires_grad=False))
