"""Experts that are quantised on the way: which tensors hold them in the folder, and what they are made of.

The format is that of `modeling_gengram`, which is imported only where a folder is quantised.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, shortened
from ..files.safetensors_writer import TensorSpec
from .match import Output

_SCALE = "_scale"


def quantization_of(config: GengramConfig) -> str | None:
    """How the experts of a folder are kept, by its `config.json`; `None` if they are floats.

    Raises:
        ConversionError: if the folder is quantised in another way.
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    from ...modeling_gengram.quantization import METHOD
    from ...modeling_gengram.quantized_experts import check_kind

    fields = found if isinstance(found, Mapping) else found.to_dict()
    if fields.get("quant_method") != METHOD:
        raise ConversionError(
            f"config.json has a quantization_config of {shortened(fields.get('quant_method'))}, expected "
            f"{METHOD!r}: folders that other libraries quantised are not read here"
        )
    try:
        return check_kind(fields.get("experts"))
    except ValueError as error:
        raise ConversionError(f"config.json: quantization_config: {error}") from None


def is_quantized(name: str) -> bool:
    """Whether a tensor of the model is one that `--experts` quantises."""
    return name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"))


def scale_name(name: str) -> str:
    """The tensor that holds the scales of a quantised one."""
    return name + _SCALE


def numbers_name(name: str) -> str | None:
    """The tensor whose scales a tensor holds; `None` if it holds none."""
    return name.removesuffix(_SCALE) if is_quantized(name.removesuffix(_SCALE)) and name.endswith(_SCALE) else None


def stored_specs(outputs: Iterable[Output], experts: str | None, dtype: torch.dtype) -> Iterator[TensorSpec]:
    """The tensors of the folder: the model's, and for quantised ones numbers and scales.

    Raises:
        ConversionError: if the sizes of the experts do not fit.
    """
    for output in outputs:
        if experts is None or not is_quantized(output.name):
            yield TensorSpec(output.name, output.shape, dtype)
            continue
        from ...modeling_gengram.quantized_experts import numbers_dtype, quantized_shapes

        try:
            numbers, scale = quantized_shapes(output.shape, experts)
        except ValueError as error:
            raise ConversionError(f"{output.name}: {error}") from None
        yield TensorSpec(output.name, numbers, numbers_dtype(experts))
        yield TensorSpec(scale_name(output.name), scale, dtype)


def quantized(name: str, weight: torch.Tensor, experts: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales of one expert, or of a stack of them; weights are rounded to the folder's dtype first.

    Raises:
        ConversionError: if weights are not finite.
    """
    from ...modeling_gengram.quantized_experts import quantize

    try:
        if weight.dim() == 2:
            return quantize(weight.to(dtype), experts)
        numbers, scales = zip(*(quantize(expert.to(dtype), experts) for expert in weight), strict=True)
    except ValueError as error:
        raise ConversionError(f"{name}: {error}") from None
    return torch.stack(numbers), torch.stack(scales)


def as_floats(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weights that numbers and scales stand for, in float32."""
    from ...modeling_gengram.quantized_experts import dequantize

    return dequantize(numbers, scale, torch.float32)
