"""Megatron's arguments as a `GengramConfig`, or a refusal that names the argument, and the way back."""

import math
from collections.abc import Mapping
from typing import Any

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, quoted, shortened
from ...support.printable import printable
from ..choices import MEMORY_PREFIXES
from .argument_codecs import flag_argument, is_plain
from .argument_table import FIXED, KEPT, PAIRS, REQUIRED, WITHOUT_ARGUMENT, Pair


class RecordedArgs(dict[str, Any]):
    """Arguments that remember which of them were asked for, so that a conversion can say what it used."""

    def __init__(self, args: Mapping[str, Any]):
        super().__init__(args)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def as_json(self) -> dict[str, Any]:
        """The arguments that were asked for or serve the way back, and are there, as JSON values.

        What JSON cannot say, or nobody would expect (a number of thousands of digits, text that is not Unicode), is
        there as a short text about it.
        """
        return {name: _as_json(self[name]) for name in sorted(self.asked | KEPT) if name in self}


def _as_json(value: Any) -> Any:
    if _is_json(value):
        return value
    if isinstance(value, list | tuple) and len(value) <= 4096 and all(map(_is_json, value)):
        return list(value)
    return shortened(value)


def _is_json(value: Any) -> bool:
    """Whether every reader of JSON takes the value, and gives it back as it is."""
    if isinstance(value, str):
        return len(value) <= 4096 and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if type(value) is int:
        return abs(value) < 2**63
    return is_plain(value) and (not isinstance(value, float) or math.isfinite(value))


def config_from_args(args: Mapping[str, Any], dtype: str | None = None) -> GengramConfig:
    """The configuration that a checkpoint's arguments describe.

    Args:
        args: Megatron's arguments by name; layers are counted from 1 in `*_layer_ids`.
        dtype: What to record as the dtype of the weights.

    Raises:
        ConversionError: if the model cannot express an argument; the message has its name, what was expected and got.
    """
    for name in REQUIRED:
        if args.get(name) is None:
            raise ConversionError(f"args.{name} is missing; the checkpoint's arguments do not describe a model")
    _check_fixed(args)
    prefix = _memory_prefix(args)
    fields: dict[str, Any] = {}
    for pair in PAIRS:
        if _applies(pair, fields.get("num_local_experts", 0), prefix is not None):
            value = pair.codec.read(args, _named(pair, prefix), fields)
            if pair.field:
                fields[pair.field] = value
    if prefix is None:
        fields["memory_layers"] = []
    try:
        return GengramConfig(**fields, dtype=dtype, architectures=["GengramForCausalLM"])
    except (ValueError, TypeError) as error:
        words = printable(" ".join(str(error).split()), most=600)
        raise ConversionError(f"the checkpoint's arguments do not make a valid model: {words}") from None


def args_from_config(config: GengramConfig, prefix: str = "gengram") -> dict[str, Any]:
    """Megatron's arguments for a configuration; `config_from_args` of them is the configuration again.

    Args:
        config: A model that the authors' code can express.
        prefix: What the memory is called: `"gengram"` or `"engram_dna"`.

    Raises:
        ConversionError: if the authors' code cannot express it; the message names the fields.
    """
    fields = {name: getattr(config, name) for name in GengramConfig.__annotations__}
    args: dict[str, Any] = {name: accepted[0] for name, _, accepted, _ in FIXED}
    for pair in PAIRS:
        defaults = _named(pair, prefix)
        if pair.part == "memory" and not config.memory_layers:
            args |= defaults
        elif _applies(pair, config.num_local_experts, has_memory=True):
            values = pair.codec.write(fields.get(pair.field), defaults, fields)
            args |= zip(defaults, values, strict=False)

    lost = differing_fields(config, config_from_args(args))
    if lost:
        texts = ", ".join(f"{name}={shortened(getattr(config, name))}" for name in lost)
        raise ConversionError(
            f"the authors' code has no argument for this model's {texts}; only models as it makes them can go back"
        )
    return args


def differing_fields(config: GengramConfig, other: GengramConfig, all_fields: bool = False) -> list[str]:
    """Fields in which two configurations describe different models; what does not apply to both is not looked at.

    Fields that a Megatron checkpoint does not know are left out, unless `all_fields` says otherwise.
    """
    ignored: set[str] = set() if all_fields else set(WITHOUT_ARGUMENT)
    if max(config.num_local_experts, other.num_local_experts) <= 1:
        of_all = {pair.field for pair in PAIRS if pair.part != "experts"}
        ignored |= {"num_local_experts"} | {pair.field for pair in PAIRS if pair.field not in of_all}
    if not config.memory_layers and not other.memory_layers:
        ignored |= {name for name in GengramConfig.__annotations__ if name.startswith("memory_")}
    if config.memory_conv_kernel == other.memory_conv_kernel == 0:
        ignored.add("memory_conv_dilation")
    names = [name for name in GengramConfig.__annotations__ if name not in ignored]
    return [name for name in names if getattr(config, name) != getattr(other, name)]


def _applies(pair: Pair, experts: int, has_memory: bool) -> bool:
    """Whether a model with so many experts, with or without memory, has this row."""
    return {"all": True, "dense": experts <= 1, "experts": experts > 1, "memory": has_memory}[pair.part]


def _named(pair: Pair, prefix: str | None) -> dict[str, Any]:
    """The row's arguments under their whole names, with their defaults."""
    start = f"{prefix}_" if pair.part == "memory" else ""
    return {start + name: default for name, default in pair.arguments.items()}


def _check_fixed(args: Mapping[str, Any]) -> None:
    for name, default, accepted, what in FIXED:
        value = args.get(name, default)
        if not any(type(value) in _like(choice) and value == choice for choice in accepted):
            absent = "" if name in args else " (the default: the checkpoint does not say)"
            raise ConversionError(
                f"args.{name} must be {' or '.join(map(repr, accepted))}, got {shortened(value)}{absent}: the model "
                f"has {what}"
            )


def _like(choice: Any) -> tuple[type, ...]:
    return (int, float) if type(choice) in (int, float) else (type(choice),)


def _memory_prefix(args: Mapping[str, Any]) -> str | None:
    """What the memory is called (released checkpoints say `engram_dna`); `None` if the model has none."""
    enabled = [prefix for prefix in MEMORY_PREFIXES if flag_argument(args, f"{prefix}_enabled")]
    if len(enabled) > 1:
        raise ConversionError("args.gengram_enabled and args.engram_dna_enabled are both True; expected one")
    if not enabled:
        return None
    (prefix,) = enabled
    known = [name for pair in PAIRS if pair.part == "memory" for name in _named(pair, prefix)]
    unknown = [name for name in args if name.startswith(f"{prefix}_") and name not in known]
    unknown = [name for name in unknown if args[name] not in (None, False)]
    if unknown:
        raise ConversionError(
            f"the memory has settings that are not known: {quoted(['args.' + name for name in unknown])}; expected "
            f"{', '.join(known)}"
        )
    return prefix
