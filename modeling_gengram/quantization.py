"""Quantised experts and attention by Transformers' ordinary `quantization_config`: made while loading, or read.

The quantisers of the libraries look at `nn.Linear`. A Gengram model's experts are stacked parameters, 92 % of the
released model, which they leave alone without a word; `warn_of_untouched` says so.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantized_experts import (
    GROUP,
    NUMBERS,
    WEIGHTS,
    QuantizedLinear,
    check_kind,
    is_aligned,
    make_room,
    quantize,
    scale_name,
    undo,
)

logger = logging.get_logger(__name__)

METHOD = "gengram_experts"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")  # of attention
_MOST_UNTOUCHED = 0.1  # share of the parameters that a quantisation may leave alone without being told of


class GengramQuantizationConfig(QuantizationConfigMixin):
    """Keeps the stacked experts in 8 or 4 bits, and attention on request.

    Router, norms, embeddings and memory stay as they are.

    Args:
        experts: `"int8"`, a scale per row, or `"int4"`, a scale per 32 weights (4.5 bits per weight).
        attention: the same for the projections of attention; `None` leaves them as they are.

    Example:

    ```python
    >>> GengramQuantizationConfig(experts="int4").to_dict()
    {'quant_method': 'gengram_experts', 'experts': 'int4', 'attention': None}

    ```
    """

    def __init__(self, experts: str = "int8", attention: str | None = None, **kwargs: Any):
        kwargs.pop("quant_method", None)
        if kwargs:
            unknown = ", ".join(map(repr, kwargs))
            raise ValueError(f"a quantisation of experts has the options experts and attention, not {unknown}.")
        self.quant_method: Any = METHOD
        self.experts = check_kind(experts)
        self.attention = None if attention is None else check_kind(attention, "attention")


class GengramQuantizer(HfQuantizer):
    """Makes room for quantised experts before weights are loaded, and quantises weights that are not yet."""

    requires_calibration = False
    quantization_config: GengramQuantizationConfig

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per number of what is quantised while loading; what is quantised already has its own size."""
        if self.pre_quantized:
            return None
        return 1.0 if self.quantization_config.experts == "int8" else 0.5 + 2 / GROUP

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is a weight of experts, or of attention if that is quantised."""
        path, _, name = param_name.rpartition(".")
        return name in NUMBERS and getattr(model.get_submodule(path), "quantization", None) is not None

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """Names in files and in the model; see `QuantizedLinear`. They are undone when the model is saved."""
        if self.quantization_config.attention is None:
            return []
        starts = [f"self_attn.{name}." for name in PROJECTIONS]
        return [WeightRenaming(f"{start}weight", f"{start}qweight") for start in starts]

    def get_quantize_ops(self) -> ConversionOps:
        """What makes numbers and scales of a weight that was read."""
        return _Quantize(self.quantization_config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        stacks = [module for module in model.modules() if hasattr(module, "quantization")]
        if not stacks:
            raise ValueError(
                "the model has no experts (num_local_experts is 0 or 1), so that there is nothing to quantise by "
                "GengramQuantizationConfig; BitsAndBytesConfig and TorchAoConfig quantise its linear layers."
            )
        for experts in stacks:
            make_room(experts, self.quantization_config.experts, has_numbers=self.pre_quantized)
        kind = self.quantization_config.attention
        # Mixtral's class, which is one for all copies of this code in a process
        for attention in [module for module in model.modules() if isinstance(module, MixtralAttention)]:
            for name in PROJECTIONS if kind is not None else ():
                setattr(attention, name, QuantizedLinear(getattr(attention, name), kind, self.pre_quantized))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized and "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(
                "layers on disk cannot be quantised while they are loaded. Save a quantised folder first (load "
                "without device_map and save_pretrained, or use `gengram convert to-hf --experts`), then load it."
            )
        for module in model.modules():
            if getattr(module, "quantization", None) is not None:
                module.requires_grad_(False)
                for parameter in module.parameters(recurse=False):
                    is_whole = parameter.device.type == "cpu" and not hasattr(parameter, "to_local")
                    if is_whole and not is_aligned(parameter):
                        parameter.data = parameter.data.clone()  # out of the file, to where products are fast
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype or model.dtype
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, module.as_floats(dtype))
            elif getattr(module, "quantization", None) is not None:
                undo(module, dtype)
        return model

    def is_serializable(self) -> bool:
        """Quantised models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train; quantised weights do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The product with quantised weights is an operator."""
        return True


class _Quantize(ConversionOps):
    def __init__(self, quantization: GengramQuantizationConfig):
        self.quantization = quantization

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Numbers and scales by name, of one matrix or stack; expert by expert, to need little memory."""
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        if weight.dim() == 2:
            assert self.quantization.attention is not None
            numbers, scales = quantize(weight, self.quantization.attention)
        else:
            parts = zip(*(quantize(expert, self.quantization.experts) for expert in weight), strict=True)
            numbers, scales = (torch.stack(part) for part in parts)
        return {full_layer_name: numbers, scale_name(full_layer_name): scales}


def warn_of_untouched(model: Any) -> None:
    """Say so if the model was loaded with a quantisation that leaves more than a tenth of its parameters alone."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method == METHOD:
        return
    with torch.device("meta"):
        whole = sum(parameter.numel() for parameter in type(model)(model.config).parameters())
    plain = {name: p for name, p in model.named_parameters() if _is_plain(p)}
    untouched = sum(parameter.numel() for parameter in plain.values())
    if untouched <= _MOST_UNTOUCHED * whole:
        return
    in_experts = sum(p.numel() for name, p in plain.items() if name.rpartition(".")[2] in WEIGHTS)
    what = f"{untouched / whole:.0%} of the model's parameters as they are"
    how = f"{type(quantizer.quantization_config).__name__} leaves {what}"
    if in_experts > untouched / 2:
        how += (
            f", most of them the stacked experts ({in_experts / whole:.0%}). Load with quantization_config="
            'GengramQuantizationConfig(experts="int8") or "int4", which quantises these'
        )
    logger.warning(f"{how}.")


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds one whole float per weight; quantisers use tensor classes of their own, or 8 bits."""
    here = getattr(parameter, "_local_tensor", parameter)  # of a weight that is spread over processes
    return type(here) in (nn.Parameter, torch.Tensor) and parameter.is_floating_point() and parameter.itemsize > 1


# A copy of this file in a model's folder (remote code) leaves the registration to the package where that came first.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, GengramQuantizationConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, GengramQuantizer)
