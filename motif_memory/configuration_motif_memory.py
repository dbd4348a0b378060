"""What a motif memory is, whatever model it stands in: one typed, validated configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

POOLINGS = ("exact", "as_trained")


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
        ValueError: if fields contradict each other.

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
        object.__setattr__(self, "ngram_sizes", tuple(self.ngram_sizes))
        if self.conv_dilation is None and self.ngram_sizes:
            object.__setattr__(self, "conv_dilation", max(self.ngram_sizes))
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
    """Refuse fields of a memory that contradict each other.

    Args:
        fields: by the names of `MotifMemoryConfig`.
        prefix: of the names as the caller knows them, such as `memory_`.
        without: how the caller gets a model without memory, added where a memory without k-mers is asked for.

    Raises:
        ValueError: says what was expected and what came.
    """
    sizes, window = fields["ngram_sizes"], fields["window"]
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"{prefix}ngram_sizes must name at least one size, each 1 or more, got {list(sizes)}{without}."
        )
    if window < max(sizes):
        raise ValueError(
            f"{prefix}window must be at least the largest of {prefix}ngram_sizes ({max(sizes)}), got {window}: a "
            "k-mer has to fit into the window."
        )
    for name, least, words in (
        ("embedding_dim", 1, "at least 1"),
        ("conv_kernel", 0, "0 (no convolution) or more"),
        ("conv_dilation", 1, "at least 1"),
    ):
        if fields[name] < least:
            raise ValueError(f"{prefix}{name} must be {words}, got {fields[name]}.")
    if not 0 < fields["norm_eps"] < math.inf:
        raise ValueError(f"{prefix}norm_eps must be positive, got {fields['norm_eps']}.")
    if fields["pooling"] not in POOLINGS:
        raise ValueError(f"{prefix}pooling must be one of {POOLINGS}, got {fields['pooling']!r}.")
