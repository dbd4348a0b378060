"""How sequences are cut into examples."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowOptions:
    """How sequences are cut into examples.

    Args:
        length: tokens of an example.
        stride: distance of two windows in bases, `length` by default; only without `packed`.
        packed: fill every example to `length`: pieces between gaps are documents, ended by `<EOD>`, written one
            behind the other and cut anywhere, as the authors train. Otherwise an example is one window of one piece.
        both_strands: add the reverse complement of every piece.
        longest_gap: runs of more N than this are cut out.
        shortest: windows, or pieces if packed, of fewer bases are left out.
        seed: of the draw where a split rule keeps a share only.

    Raises:
        ValueError: if the numbers contradict each other.
    """

    length: int = 1024
    stride: int | None = None
    packed: bool = False
    both_strands: bool = False
    longest_gap: int = 10
    shortest: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.length < 2 or self.longest_gap < 0 or self.shortest < 1:
            raise ValueError(
                f"expected length >= 2, longest_gap >= 0 and shortest >= 1, got {self.length}, {self.longest_gap} "
                f"and {self.shortest}."
            )
        if self.stride is not None and (self.packed or self.stride < 1):
            raise ValueError(f"stride is for windows that are not packed and at least 1, got {self.stride}.")
