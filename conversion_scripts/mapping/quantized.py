"""Weights that are quantised on the way: which tensors hold them in the folder, and what they are made of.

The format is that of `modeling_gengram`, which is imported only where a folder is quantised.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, shortened
from ..files.safetensors_writer import TensorSpec
from .match import Output

_SCALE = "_scale"
_EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
_ATTENTION = tuple(f".self_attn.{part}_proj.weight" for part in "qkvo")


class Kinds(NamedTuple):
    """How weights are kept, `"int8"` or `"int4"`; `None` for floats."""

    experts: str | None = None
    attention: str | None = None

    def of(self, name: str) -> str | None:
        """How a tensor of the model is kept."""
        if name.endswith(_EXPERTS):
            return self.experts
        return self.attention if name.endswith(_ATTENTION) else None

    def in_words(self) -> str:
        """What is quantised, such as `experts in int8`."""
        return ", ".join(f"{name} in {kind}" for name, kind in self._asdict().items() if kind)


def quantization_of(config: GengramConfig) -> Kinds:
    """How the weights of a folder are kept, by its `config.json`.

    Raises:
        ConversionError: if the folder is quantised in another way.
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return Kinds()
    from ...modeling_gengram.quantization import METHOD
    from ...modeling_gengram.quantized_experts import check_kind

    fields = found if isinstance(found, Mapping) else found.to_dict()
    if fields.get("quant_method") != METHOD:
        raise ConversionError(
            f"config.json has a quantization_config of {shortened(fields.get('quant_method'))}, expected "
            f"{METHOD!r}: folders that other libraries quantised are not read here"
        )
    try:
        attention = fields.get("attention")
        attention = None if attention is None else check_kind(attention, "attention")
        return Kinds(check_kind(fields.get("experts")), attention)
    except ValueError as error:
        raise ConversionError(f"config.json: quantization_config: {error}") from None


def scale_name(name: str) -> str:
    """The tensor that holds the scales of a quantised one."""
    return name + _SCALE


def numbers_name(name: str) -> str | None:
    """The tensor whose scales a tensor holds; `None` if it holds none."""
    start = name.removesuffix(_SCALE)
    return start if name.endswith(_SCALE) and start.endswith((*_EXPERTS, *_ATTENTION)) else None


def stored_specs(outputs: Iterable[Output], kinds: Kinds, dtype: torch.dtype) -> Iterator[TensorSpec]:
    """The tensors of the folder: the model's, and for quantised ones numbers and scales.

    Raises:
        ConversionError: if the sizes of a weight do not fit.
    """
    for output in outputs:
        kind = kinds.of(output.name)
        if kind is None:
            yield TensorSpec(output.name, output.shape, dtype)
            continue
        from ...modeling_gengram.quantized_experts import numbers_dtype, quantized_shapes

        try:
            numbers, scale = quantized_shapes(output.shape, kind)
        except ValueError as error:
            raise ConversionError(f"{output.name}: {error}") from None
        yield TensorSpec(output.name, numbers, numbers_dtype(kind))
        yield TensorSpec(scale_name(output.name), scale, dtype)


def quantized(name: str, weight: torch.Tensor, kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales of one matrix, or of a stack of them; weights are rounded to the folder's dtype first.

    Raises:
        ConversionError: if weights are not finite.
    """
    from ...modeling_gengram.quantized_experts import quantize

    try:
        if weight.dim() == 2:
            return quantize(weight.to(dtype), kind)
        numbers, scales = zip(*(quantize(expert.to(dtype), kind) for expert in weight), strict=True)
    except ValueError as error:
        raise ConversionError(f"{name}: {error}") from None
    return torch.stack(numbers), torch.stack(scales)


def as_floats(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weights that numbers and scales stand for, in float32."""
    from ...modeling_gengram.quantized_experts import dequantize

    return dequantize(numbers, scale, torch.float32)
