"""How FASTA files are read and cut into examples."""

from dataclasses import dataclass

from ..support.errors import InputError

LONGEST_EXAMPLE = 1 << 24  # tokens; an example is in memory as a whole
FOREIGN = ("limit", "cut", "keep", "fail")
REPEATED_NAMES = ("fail", "number")  # without names of their own, origins would not say where examples are from


@dataclass(frozen=True)
class WindowOptions:
    """How FASTA files are read and cut into examples.

    Args:
        length: tokens of an example, at most `LONGEST_EXAMPLE`.
        stride: distance of two windows in bases, `length` by default; only without `packed`.
        packed: fill every example to `length`: pieces between gaps are documents, ended by `<EOD>`, written one
            behind the other and cut anywhere, as the authors train. Otherwise an example is one window of one piece.
        both_strands: add the reverse complement of every piece.
        longest_gap: runs of more N than this are cut out.
        shortest: windows, or pieces if packed, of fewer bases are left out.
        seed: of the draw where a split rule keeps a share only.
        foreign: what happens to characters that are not IUPAC codes, as the gaps of alignments. `cut` ends a piece
            there, as a long run of N does; `limit` does so too, but refuses a file in which they are more than
            `most_foreign`; `keep` makes each of them `[UNK]`; `fail` refuses the first one.
        most_foreign: share of all characters of a file, for `limit`.
        repeated_names: what happens to a record whose name another one of its file has: `fail` refuses the file,
            `number` calls it `chr1#2`, also for split rules.

    Raises:
        InputError: if the numbers contradict each other.
    """

    length: int = 1024
    stride: int | None = None
    packed: bool = False
    both_strands: bool = False
    longest_gap: int = 10
    shortest: int = 64
    seed: int = 0
    foreign: str = "limit"
    most_foreign: float = 0.001
    repeated_names: str = "fail"

    def __post_init__(self):
        if not 2 <= self.length <= LONGEST_EXAMPLE or self.longest_gap < 0 or self.shortest < 1:
            raise InputError(
                f"expected 2 <= length <= {LONGEST_EXAMPLE:,}, longest_gap >= 0 and shortest >= 1, got {self.length}, "
                f"{self.longest_gap} and {self.shortest}."
            )
        if self.stride is not None and (self.packed or self.stride < 1):
            raise InputError(f"stride is for windows that are not packed and at least 1, got {self.stride}.")
        if self.foreign not in FOREIGN or not 0 <= self.most_foreign <= 1:
            raise InputError(
                f"expected foreign as one of {', '.join(FOREIGN)} and 0 <= most_foreign <= 1, got {self.foreign!r} "
                f"and {self.most_foreign}."
            )
        if self.repeated_names not in REPEATED_NAMES:
            raise InputError(f"expected repeated_names as fail or number, got {self.repeated_names!r}.")
