"""Models that Transformers spreads over processes (`DistributedConfig`): what is added to its plans, or refused."""

from typing import Any

from .quantized_experts import NUMBERS, WEIGHTS, QuantizedLinear, scale_name


def prepare_to_spread(model: Any, distributed_config: Any) -> None:
    """Complete the plans of a model, still without values, that is about to be spread.

    Args:
        model: its quantised experts, if it has any, have their parameters already.
        distributed_config: Transformers' `DistributedConfig`, with more than one process.

    Raises:
        ValueError: for what would compute something else, or cannot be loaded.
    """
    if model.config.memory_layers and distributed_config.pp_size > 1:
        raise ValueError(
            "pipeline parallelism (pp_size) hands later layers no tokens, which the motif memory reads. Use tensor, "
            'expert or fully sharded parallelism, or device_map="auto", which puts layers on several GPUs.'
        )
    quantized = [module for module in model.modules() if getattr(module, "quantization", None) is not None]
    if not quantized:
        return
    cuts_attention = distributed_config.tp_size > 1 and any(isinstance(part, QuantizedLinear) for part in quantized)
    if cuts_attention:  # by expert parallelism too
        raise ValueError(
            "tensor and expert parallelism cut the attention, which is quantised here, apart from its scales. "
            "Quantise the experts only and use expert parallelism, or shard fully; see docs/running.md."
        )
    if distributed_config.tp_size > 1 and not distributed_config.enable_expert_parallel:
        raise ValueError(
            "tensor parallelism would cut quantised weights apart from their scales. Use expert parallelism, which "
            "gives each process whole experts; see docs/running.md."
        )
    weights = (weight for module in quantized for name, weight in module.named_parameters() if name in NUMBERS)
    if distributed_config.fsdp_size > 1 and any(weight.is_floating_point() for weight in weights):  # no numbers yet
        raise ValueError(
            "weights cannot be quantised while a model is loaded into fully sharded processes. Save a quantised "
            "folder first (load in one process and save_pretrained, or use `gengram convert to-hf --experts`)."
        )
    plan = model._ep_plan
    plan.update({scale_name(name): style for name, style in plan.items() if name.rpartition(".")[2] in WEIGHTS})
