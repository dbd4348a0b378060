"""What a conversion to Megatron can be asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, shortened
from ..choices import FORMATS, MEMORY_PREFIXES, OUTPUT_DTYPES


@dataclass(frozen=True)
class Options:
    """The options of `convert_to_megatron`, which explains them.

    Raises:
        ConversionError: if one is not possible, or two do not go together.
    """

    format: str = "torch_dist"
    pipeline_parallel: int = 1
    tensor_parallel: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    name_prefix: str | None = None
    dtype: str | None = None
    iteration: int | None = None

    def __post_init__(self) -> None:
        _check_choice("format", self.format, FORMATS)
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, OUTPUT_DTYPES)
        if self.name_prefix is not None:
            _check_choice("name_prefix", self.name_prefix, MEMORY_PREFIXES)
        if not 1 <= self.pipeline_parallel <= 999 or not 1 <= self.tensor_parallel <= 99:
            raise ConversionError(
                "pipeline_parallel must lie in 1..999 and tensor_parallel in 1..99, got "
                f"{self.pipeline_parallel} and {self.tensor_parallel}"
            )
        cut = (self.pipeline_parallel, self.tensor_parallel, self.first_stage_layers, self.last_stage_layers)
        if self.format == "torch_dist" and cut != (1, 1, None, None):
            raise ConversionError(
                "pipeline and tensor parallelism are for format torch: Megatron cuts a torch_dist checkpoint itself "
                "when it is loaded; leave them out, or say --format torch"
            )
        if self.iteration is not None and not 0 <= self.iteration < 10**12:
            raise ConversionError(f"iteration must lie in 0..{10**12 - 1}, got {self.iteration}")

    @property
    def folder(self) -> str:
        """The name of the iteration's folder."""
        return "release" if self.iteration is None else f"iter_{self.iteration:07d}"

    def stage_layers(self, config: GengramConfig) -> list[int]:
        """Layers per pipeline stage (`get_transformer_layer_offset` in the authors' `transformer_layer.py`)."""
        stages, first, last = self.pipeline_parallel, self.first_stage_layers, self.last_stage_layers
        layers = config.num_hidden_layers
        given = [count for count in (first, last) if count is not None]
        middle, rest = stages - len(given), layers - sum(given)
        possible = middle > 0 or (middle == 0 and rest == 0)
        if min(given, default=1) < 1 or not possible or rest < middle or (middle and rest % middle):
            named = f", of which the first and last have {given}" if given else ""
            raise ConversionError(
                f"{layers} layers (num_hidden_layers) cannot be divided evenly over {stages} pipeline stages{named}; "
                "choose another number, or give --first-stage-layers and --last-stage-layers"
            )
        result = [rest // middle] * middle if middle else []
        return [*([first] if first else []), *result, *([last] if last else [])]

    def check_tensor_parallel(self, config: GengramConfig) -> None:
        """Refuses ranks that cannot have equal parts."""
        sizes: Mapping[str, Any] = {
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "vocab_size": config.vocab_size,
            "intermediate_size": config.intermediate_size,
        }
        for name, size in sizes.items():
            if size % self.tensor_parallel:
                raise ConversionError(
                    f"{name} must be a multiple of the number of tensor-parallel ranks, got {size} and "
                    f"{self.tensor_parallel}; choose another number, or --format torch_dist, which Megatron cuts as "
                    "it needs"
                )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConversionError(f"{name} must be one of {', '.join(choices)}, got {shortened(value)}")
