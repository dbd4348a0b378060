"""Megatron's arguments for a folder: those of its original checkpoint, if they are recorded and still hold."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError
from ..choices import MEMORY_PREFIXES
from ..files.conversion_record import ConversionRecord
from ..mapping.arguments import args_from_config, config_from_args, differing_fields
from .options import Options


@dataclass(frozen=True)
class Arguments:
    """The arguments that are written.

    Args:
        values: By name.
        prefix: What the memory is called in names and keys.
        recorded: Whether the arguments of the original checkpoint were used.
        contradiction: Why they were not, if there are any.
    """

    values: dict[str, Any]
    prefix: str
    recorded: bool
    contradiction: str = ""

    @property
    def namespace(self) -> argparse.Namespace:
        return argparse.Namespace(**self.values)

    @property
    def layers_are_stacked(self) -> bool:
        """Whether Megatron stacks layers in the `torch_dist` format; it does not if `moe_layer_freq` is a list."""
        return not isinstance(self.values.get("moe_layer_freq"), list | tuple)


def arguments_for(
    config: GengramConfig, record: ConversionRecord | None, options: Options, dtype: torch.dtype, stages: int
) -> Arguments:
    """The arguments of a checkpoint of `config`.

    Args:
        config: The model.
        record: Of the conversion that made the folder, if there is one.
        options: How the checkpoint is written.
        dtype: Of its weights.
        stages: Pipeline stages.

    Raises:
        ConversionError: if the authors' code cannot express the model.
    """
    prefix = options.name_prefix or _recorded_prefix(record)
    recorded, contradiction = _recorded_args(record, config, prefix)
    values = args_from_config(config, prefix) | recorded | _of_this_checkpoint(options, dtype, stages, config)
    return Arguments(values, prefix, bool(recorded), contradiction)


def _recorded_prefix(record: ConversionRecord | None) -> str:
    names = record.sources if record else {}
    return next((p for p in MEMORY_PREFIXES if any(f".{p}." in name for name in names)), MEMORY_PREFIXES[0])


def _recorded_args(record: ConversionRecord | None, config: GengramConfig, prefix: str) -> tuple[dict[str, Any], str]:
    """The recorded arguments if they describe `config`, those of the memory under `prefix`; else none, and why."""
    args = record.args if record else {}
    if not args:
        return {}, ""
    try:
        differing = differing_fields(config, config_from_args(args))
    except ConversionError as error:
        return {}, str(error)
    if differing:
        return {}, f"config.json has other values of {', '.join(differing)}"
    used = next((known for known in MEMORY_PREFIXES if args.get(f"{known}_enabled")), prefix)
    result = {name: value for name, value in args.items() if not name.startswith(MEMORY_PREFIXES)}
    for name, value in args.items():
        if name.startswith(f"{used}_"):
            result[f"{prefix}_{name.removeprefix(f'{used}_')}"] = value
    return result, ""


def _of_this_checkpoint(options: Options, dtype: torch.dtype, stages: int, config: GengramConfig) -> dict[str, Any]:
    """Arguments about this checkpoint rather than the model; recorded ones give way to them."""
    ranks = options.tensor_parallel
    return {
        "ckpt_format": options.format,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "pipeline_model_parallel_size": stages,
        "tensor_model_parallel_size": ranks,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": ranks,
        "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
        "decoder_first_pipeline_num_layers": options.first_stage_layers,
        "decoder_last_pipeline_num_layers": options.last_stage_layers,
        # Megatron pads the vocabulary to a multiple of this times the tensor-parallel ranks.
        "make_vocab_size_divisible_by": config.vocab_size // ranks,
        # There is no training state here; the loader does not ask for what was not saved.
        "no_save_optim": True,
        "no_save_rng": True,
    }
