"""What a change of letters does to a model: which numbers there are, and their formulas."""

import math
from typing import NamedTuple

import numpy as np

SCORES = ("llr", "jsd", "embedding", "memory")
NUMBERS = ("llr", "llr_forward", "llr_reverse", "jsd", "embedding_distance", "memory_change")


class Change(NamedTuple):
    """Two windows of one length that hold two alleles at the same place.

    Args:
        reference, alternative: the windows, letters of one strand.
        start: where the alleles begin, in both.
        reference_length, alternative_length: letters of the alleles, which may reach beyond the windows.
    """

    reference: str
    alternative: str
    start: int
    reference_length: int = 1
    alternative_length: int = 1


class Reading(NamedTuple):
    """A change as a model reads it on one strand; places count from the start of that strand.

    Args:
        reference, alternative: ids of the windows, (length,) int64.
        last_reference, last_alternative: places of the alleles' last bases; they may lie beyond the windows.
    """

    reference: np.ndarray
    alternative: np.ndarray
    last_reference: int
    last_alternative: int

    @property
    def first_difference(self) -> int:
        """The first place at which the windows differ; their length if they are equal."""
        different = self.reference != self.alternative
        return int(different.argmax()) if different.any() else len(different)

    @property
    def common_places(self) -> int:
        """How many places behind both alleles, their last bases included, are in both windows."""
        return len(self.reference) - max(self.last_reference, self.last_alternative)


class Effect(NamedTuple):
    """What a change does on one strand; nan where a number was not asked for, or is not defined.

    Args:
        llr: log P(alternative window) - log P(reference window), in nats. Of a causal model each is the sum of
            log P(base | letters before it), the first left out; N is no base. If the windows have other numbers of
            bases, the last ones of that which has more are left out, so that both sums have as many. Of a masked model
            it is the sum of log P(alternative base) - log P(reference base) over the bases that differ, all of them
            masked.
        jsd: Jensen-Shannon divergence of what is predicted for the next base (A, C, G or T) with either allele, in
            nats, summed over the last base of the allele and all behind it. Of causal models.
        embedding_distance: Euclidean distance of two vectors put together, the mean of the last hidden states over the
            window and the one at the allele's last base: sqrt(d_window**2 + d_allele**2).
        memory_change: how much else the memory adds to the residual stream: Euclidean norm of the difference over all
            places from the last base of the allele on, averaged over the layers that have a memory.
    """

    llr: float = math.nan
    jsd: float = math.nan
    embedding_distance: float = math.nan
    memory_change: float = math.nan


class StrandEffects(NamedTuple):
    """Effects of a change on either strand; None for a strand that was not asked for."""

    forward: Effect | None
    reverse: Effect | None

    def numbers(self) -> dict[str, float | None]:
        """The columns `NUMBERS` of a table; None where a number was not asked for, or is not defined."""
        strands = {
            "llr_forward": math.nan if self.forward is None else self.forward.llr,
            "llr_reverse": math.nan if self.reverse is None else self.reverse.llr,
        }
        found = {name: strands[name] if name in strands else self.mean(name) for name in NUMBERS}
        return {name: None if math.isnan(number) else number for name, number in found.items()}

    def mean(self, name: str) -> float:
        """One of the numbers of `Effect`, averaged over the strands."""
        found = [float(getattr(effect, name)) for effect in self if effect is not None]
        return sum(found) / len(found)
