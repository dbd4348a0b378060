"""What a motif memory is, whatever model it stands in: one typed, validated configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

POOLINGS = ("exact", "as_trained")

LARGEST_SIZE = 13  # of a k-mer: 5**13 rows are numbered by 32 bits
LARGEST_WINDOW = 2**16
LARGEST_REACH = 2**16  # of the convolution, in bases: what decoding must keep of each memory's output
EPSILONS = (1e-30, 1.0)  # a smaller one is nothing beside float32's squares, a larger one is no epsilon


@dataclass(frozen=True)
class MotifMemoryConfig:
    """Sizes and choices of a memory; the defaults are those of the released model.

    Hidden size, letters and causality belong to the model around it.

    Args:
        ngram_sizes: k of the k-mers, in the order of the tables; each has a table of `5**k` rows.
        embedding_dim: width of one table.
        window: bases that a k-mer must lie within to be pooled.
        conv_kernel: taps of the short depthwise convolution; 0 is none.
        conv_dilation: distance of two taps in bases; None means the largest k.
        norm_eps: epsilon of the two root-mean-square norms.
        pooling: `"exact"` takes each window mean on its own, in at least float32; `"as_trained"` repeats the
            original's differences of prefix sums in the dtype of the tables.

    Raises:
        ValueError: if fields are out of bounds or contradict each other: k up to 13, windows and the reach of
            the convolution up to 2**16 bases.

    Example:

    >>> from gengram.motif_memory import MotifMemoryConfig
    >>> MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=16, window=9).conv_dilation
    3
    """

    ngram_sizes: Sequence[int] = (1, 2, 3, 4, 5, 6)
    embedding_dim: int = 1024
    window: int = 21
    conv_kernel: int = 4
    conv_dilation: int | None = None
    norm_eps: float = 1e-5
    pooling: str = "exact"

    def __post_init__(self) -> None:
        sizes = checked_list("ngram_sizes", self.ngram_sizes)
        object.__setattr__(self, "ngram_sizes", tuple(sizes))
        if self.conv_dilation is None and sizes:
            object.__setattr__(self, "conv_dilation", max(sizes))
        check_memory_fields(asdict(self))

    @property
    def features(self) -> int:
        """Width of the concatenated window means."""
        return self.embedding_dim * len(self.ngram_sizes)

    @property
    def context(self) -> int:
        """Earlier bases that a decoding step must remember for the window: `window - 1`."""
        return self.window - 1

    @property
    def conv_context(self) -> int:
        """Earlier inputs of the convolution that a decoding step must remember."""
        return max(self.conv_kernel - 1, 0) * (self.conv_dilation or 1)

    @property
    def states(self) -> tuple[str, ...]:
        """What a cache keeps per memory layer, in the order of its states; see `states_needed`."""
        return states_needed(self.window, self.conv_kernel, self.pooling)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `MotifMemoryConfig(**fields)` reads them back."""
        return asdict(self) | {"ngram_sizes": list(self.ngram_sizes)}


def states_needed(window: int, conv_kernel: int, pooling: str) -> tuple[str, ...]:
    """What a cache keeps per memory layer, in the order of its states, each only where it is needed.

    `"conv_inputs"` (batch, hidden, `conv_context`), `"letter_codes"` (batch, 1, `context`) and, for `"as_trained"`
    pooling, `"prefix_sums"` (batch, features, `window`).
    """
    needed = {"conv_inputs": conv_kernel > 1, "letter_codes": window > 1, "prefix_sums": pooling == "as_trained"}
    return tuple([state for state, is_needed in needed.items() if is_needed])  # compiled code takes no generators


def check_memory_fields(fields: Mapping[str, Any], prefix: str = "", without: str = "") -> None:
    """Refuse fields of a memory that are out of bounds or contradict each other.

    Args:
        fields: by the names of `MotifMemoryConfig`.
        prefix: of the names as the caller knows them, such as `memory_`.
        without: how the caller gets a model without memory, added where a memory without k-mers is asked for.

    Raises:
        ValueError: says what was expected and what came.
    """
    sizes = checked_list(f"{prefix}ngram_sizes", fields["ngram_sizes"])
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{prefix}ngram_sizes must name at least one size, each 1 or more, got {sizes}{without}.")
    if len(sizes) > 64 or max(sizes) > LARGEST_SIZE:
        raise ValueError(f"{prefix}ngram_sizes must be at most 64 sizes up to {LARGEST_SIZE}, got {shown(sizes)}.")
    check_integer(f"{prefix}window", fields["window"], None, LARGEST_WINDOW)
    if fields["window"] < max(sizes):
        raise ValueError(
            f"{prefix}window must be at least the largest of {prefix}ngram_sizes ({max(sizes)}), got "
            f"{shown(fields['window'])}: a k-mer has to fit into the window."
        )
    check_integer(f"{prefix}embedding_dim", fields["embedding_dim"], 1, 2**20)
    check_integer(f"{prefix}conv_kernel", fields["conv_kernel"], 0, 1024, "0 (no convolution) or more")
    check_integer(f"{prefix}conv_dilation", fields["conv_dilation"], 1, LARGEST_REACH)
    if (fields["conv_kernel"] - 1) * fields["conv_dilation"] > LARGEST_REACH:
        raise ValueError(
            f"the convolution must reach back at most {LARGEST_REACH} bases, got ({prefix}conv_kernel - 1) * "
            f"{prefix}conv_dilation = ({fields['conv_kernel']} - 1) * {fields['conv_dilation']}."
        )
    check_number(f"{prefix}norm_eps", fields["norm_eps"], *EPSILONS, "positive")
    if fields["pooling"] not in POOLINGS:
        raise ValueError(f"{prefix}pooling must be one of {POOLINGS}, got {shown(fields['pooling'])}.")


def checked_list(name: str, value: Any) -> list[int]:
    """A list of integers.

    Raises:
        ValueError: if it is none.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not is_list or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        raise ValueError(f"{name} must be a list of integers, got {shown(value)}.")
    return list(value)


def check_integer(name: str, value: Any, least: int | None, most: int, at_least: str = "") -> None:
    """Refuse what is no integer from `least` to `most`.

    Raises:
        ValueError: says what was expected, `at_least` in words if they are given, and what came.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {shown(value)}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be {at_least or f'at least {least}'}, got {shown(value)}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}.")


def check_number(name: str, value: Any, least: float, most: float, at_least: str = "") -> None:
    """Refuse what is no finite number from `least` to `most`.

    Raises:
        ValueError: as `check_integer` does.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}.")
    if value < least:
        raise ValueError(f"{name} must be {at_least or f'at least {least:g}'}, got {shown(value)}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most:g}, got {shown(value)}.")


def shown(value: Any) -> str:
    """A value for a message: short, also if it comes from a hostile file."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, or lists in lists in lists
        return f"something of type {type(value).__name__} that is too large to be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."
