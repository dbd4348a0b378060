"""How values of Megatron's arguments become values of a configuration's fields, and back, each with its checks.

A codec reads one field from one or several arguments, which are given with their defaults on the authors' command line
(`megatron/training/arguments.py`); an argument that the checkpoint does not have, or has as `None`, takes the default.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, shortened

# Routing types that only add a loss; sinkhorn, the other one, routes differently.
_AUXILIARY_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


Values = Mapping[str, Any]


class Codec(Protocol):
    """One field as arguments."""

    def read(self, args: Values, defaults: Values, fields: Values) -> Any:
        """The field's value.

        Args:
            args: Megatron's arguments by name.
            defaults: The names that belong to the field, in the order of its row, with their defaults.
            fields: Fields of earlier rows.

        Raises:
            ConversionError: if an argument has a value that the model cannot express.
        """

    def write(self, value: Any, defaults: Values, fields: Values) -> tuple[Any, ...]:
        """The values of these arguments, in the same order; fewer if some are better left out.

        Args:
            value: The field's value.
            defaults: As for `read`.
            fields: All fields of the configuration.
        """


def integer_argument(args: Mapping[str, Any], name: str, default: int, most: int = 2**24) -> int:
    """An integer argument in `1..most`; absent or None is the default."""
    value = args.get(name)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise ConversionError(f"args.{name} must be an integer in 1..{most}, got {shortened(value)}")
    return value


def flag_argument(args: Mapping[str, Any], name: str) -> bool:
    """A boolean argument; absent is False."""
    value = args.get(name, False)
    if not isinstance(value, bool):
        raise ConversionError(f"args.{name} must be True or False, got {shortened(value)}")
    return value


def number_argument(args: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number from 0; absent or None is the default."""
    value = args.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or abs(value) > 1e15 or not math.isfinite(value) or value < 0:
        raise ConversionError(f"args.{name} must be a number from 0, got {shortened(value)}")
    return float(value)


def integers_argument(args: Mapping[str, Any], name: str, default: Any) -> list[int]:
    """A list of integers; absent or None is the default."""
    value = args.get(name)
    value = default if value is None else value
    if not isinstance(value, list | tuple) or len(value) > 4096 or not all(type(v) is int for v in value):
        raise ConversionError(f"args.{name} must be a list of integers, got {shortened(value)}")
    return list(value)


def is_plain(value: Any) -> bool:
    """Whether a value from a file is a scalar, which is safe to compare and print."""
    return value is None or isinstance(value, bool | int | float | str)


@dataclass(frozen=True)
class Integer:
    """An integer from 1; with several arguments, the first that is set, and all of them are written.

    Args:
        most: The largest one that is believed.
        missing: What to say, after "missing", if none is set and there is no default.
    """

    most: int = 2**24
    missing: str = ""

    def read(self, args: Values, defaults: Values, fields: Values) -> int:
        value = 0
        for name, default in list(defaults.items())[::-1]:
            value = integer_argument(args, name, default or value, self.most)
        if not value:
            names = [f"args.{name}" for name in defaults]
            raise ConversionError(f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} missing; {self.missing}")
        return value

    def write(self, value: int, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (value,)


@dataclass(frozen=True)
class FirstInteger(Integer):
    """The same for two arguments, of which the second stands in for the first."""

    def write(self, value: int, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (value, value)


class HeadWidth:
    """The width of a head, by default an equal share of the hidden size."""

    def read(self, args: Values, defaults: Values, fields: Values) -> int:
        (name,) = defaults
        hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
        if args.get(name) is None and hidden % heads:
            raise ConversionError(
                f"args.hidden_size must be a multiple of args.num_attention_heads, got {hidden} and {heads}"
            )
        return integer_argument(args, name, hidden // heads)

    def write(self, value: int, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (value,)


class QueryGroups:
    """Whether heads share keys and values, and the number of groups that do."""

    def read(self, args: Values, defaults: Values, fields: Values) -> int:
        flag, number = defaults
        if flag_argument(args, flag):
            return integer_argument(args, number, defaults[number])
        return fields["num_attention_heads"]

    def write(self, value: int, defaults: Values, fields: Values) -> tuple[Any, ...]:
        grouped = value != fields["num_attention_heads"]
        return (grouped, value if grouped else tuple(defaults.values())[1])


@dataclass(frozen=True)
class Number:
    """A number from 0; 0 is written as `None` where the authors' code asks whether there is one."""

    zero_is_none: bool = False

    def read(self, args: Values, defaults: Values, fields: Values) -> float:
        ((name, default),) = defaults.items()
        return number_argument(args, name, default)

    def write(self, value: float, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return ((value or None) if self.zero_is_none else value,)


class Not:
    """A flag that says the opposite of the field."""

    def read(self, args: Values, defaults: Values, fields: Values) -> bool:
        (name,) = defaults
        return not flag_argument(args, name)

    def write(self, value: bool, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (not value,)


class Rope:
    """Rotary embeddings: the base, and interpolated or scaled ones."""

    def read(self, args: Values, defaults: Values, fields: Values) -> dict[str, Any]:
        base, interpolation, scaling, factor = defaults
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": number_argument(args, base, defaults[base])}
        interpolated = args.get(interpolation) is not None
        scaled = flag_argument(args, scaling)
        if interpolated and scaled:
            raise ConversionError(f"args.{interpolation} and args.{scaling} are both set; the model can have only one")
        if interpolated:
            rope |= {"rope_type": "linear", "factor": number_argument(args, interpolation, 1.0)}
        elif scaled:  # the constants of `RotaryEmbedding._apply_scaling` in the authors' rotary_pos_embedding.py
            rope |= {
                "rope_type": "llama3",
                "factor": number_argument(args, factor, defaults[factor]),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        return rope

    def write(self, value: Mapping[str, Any] | None, defaults: Values, fields: Values) -> tuple[Any, ...]:
        rope = dict(value or {})
        kind = rope.get("rope_type", "default")
        theta, factor = rope.get("rope_theta", GengramConfig.default_theta), rope.get("factor")
        return (
            int(theta) if float(theta).is_integer() else theta,
            factor if kind == "linear" else None,
            kind == "llama3",
            factor if kind == "llama3" else tuple(defaults.values())[3],
        )


class ExpertCount:
    """The number of experts; 0 without."""

    def read(self, args: Values, defaults: Values, fields: Values) -> int:
        (name,) = defaults
        experts = integer_argument(args, name, 0, most=4096)
        if experts == 1:
            raise ConversionError(
                f"args.{name} must be unset or at least 2, got 1: the model has no router for one expert"
            )
        return experts

    def write(self, value: int, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (value if value > 1 else None,)


class ExpertsInEveryLayer:
    """Which layers have experts: all."""

    def read(self, args: Values, defaults: Values, fields: Values) -> None:
        ((name, default),) = defaults.items()
        layers = fields["num_hidden_layers"]
        frequency = args.get(name, default)
        if type(frequency) is int:
            everywhere = frequency == 1
        else:
            is_list = isinstance(frequency, list | tuple)
            everywhere = is_list and len(frequency) == layers and all(f == 1 for f in frequency)
        if not everywhere:
            raise ConversionError(
                f"args.{name} must be 1 or a list of {layers} ones, got {shortened(frequency)}: all layers of the "
                "model have experts, or none"
            )

    def write(self, value: None, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (1,)


class NoCapacity:
    """How many tokens an expert takes: any number, said by None or a number below 0."""

    def read(self, args: Values, defaults: Values, fields: Values) -> None:
        (name,) = defaults
        capacity = args.get(name)
        if capacity is not None and not (type(capacity) in (int, float) and capacity < 0):
            raise ConversionError(f"args.{name} must be None, got {shortened(capacity)}: the model drops no tokens")

    def write(self, value: None, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return ()


class AuxiliaryLoss:
    """The coefficient of the load-balancing loss: the sum over its kinds."""

    def read(self, args: Values, defaults: Values, fields: Values) -> float:
        kind, coefficient = defaults
        losses = args.get(kind, defaults[kind])
        losses = list(losses) if isinstance(losses, list | tuple) else [losses]
        odd = [loss for loss in losses if loss not in _AUXILIARY_LOSSES]
        if odd:
            raise ConversionError(
                f"args.{kind} must be among {', '.join(_AUXILIARY_LOSSES)}, got {shortened(odd[0])}: the model routes "
                "to the experts with the largest logits"
            )
        values = args.get(coefficient, defaults[coefficient])
        values = list(values) if isinstance(values, list | tuple) else [values] * len(losses)
        if len(values) != len(losses):
            raise ConversionError(
                f"args.{coefficient} must have one number per {kind} ({len(losses)}), got {shortened(values)}"
            )
        counted = [value for loss, value in zip(losses, values, strict=True) if loss != "none"]
        return sum(number_argument({coefficient: value}, coefficient, 0.0) for value in counted)

    def write(self, value: float, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return ("aux_loss", value)


@dataclass(frozen=True)
class Written:
    """An argument that is not read; `value`, or what it makes of the fields, is written."""

    value: Any

    def read(self, args: Values, defaults: Values, fields: Values) -> None:
        return None

    def write(self, value: None, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (self.value(fields) if callable(self.value) else self.value,)


class LayersFromOne:
    """Layers, which Megatron counts from 1; without a list, all of them (the authors' `TransformerLayer.__init__`)."""

    def read(self, args: Values, defaults: Values, fields: Values) -> list[int]:
        (name,) = defaults
        layers = fields["num_hidden_layers"]
        numbers = integers_argument(args, name, ()) or list(range(1, layers + 1))
        outside = [number for number in numbers if not 1 <= number <= layers]
        if outside:
            raise ConversionError(f"args.{name} must lie in 1..{layers}, got {shortened(outside)}")
        return [number - 1 for number in sorted(set(numbers))]

    def write(self, value: list[int], defaults: Values, fields: Values) -> tuple[Any, ...]:
        return ([layer + 1 for layer in value],)


class Integers:
    """A list of integers."""

    def read(self, args: Values, defaults: Values, fields: Values) -> list[int]:
        ((name, default),) = defaults.items()
        return integers_argument(args, name, default)

    def write(self, value: list[int], defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (list(value),)


class NgramSizes(Integers):
    """Sizes of k-mers."""

    def read(self, args: Values, defaults: Values, fields: Values) -> list[int]:
        sizes = super().read(args, defaults, fields)
        if not sizes or not all(1 <= size <= 12 for size in sizes):
            raise ConversionError(f"args.{next(iter(defaults))} must name sizes in 1..12, got {shortened(sizes)}")
        return sizes


class ConvolutionTaps:
    """Whether there is a convolution, and its taps; 0 is none."""

    def read(self, args: Values, defaults: Values, fields: Values) -> int:
        flag, kernel = defaults
        has_convolution = flag_argument(args, flag)
        taps = integer_argument(args, kernel, defaults[kernel])
        return taps if has_convolution else 0

    def write(self, value: int, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (value > 0, value or tuple(defaults.values())[1])


class Dilation:
    """The distance of the taps, by default the largest k."""

    def read(self, args: Values, defaults: Values, fields: Values) -> int:
        (name,) = defaults
        return integer_argument(args, name, max(fields["memory_ngram_sizes"]))

    def write(self, value: int, defaults: Values, fields: Values) -> tuple[Any, ...]:
        return (value,)
