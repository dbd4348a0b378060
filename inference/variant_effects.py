"""Zero-shot effects of variants: how much less likely a sequence becomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..sequences.alphabet import reverse_complement
from .likelihood import log_likelihoods


class Variant(NamedTuple):
    """A substitution, insertion or deletion; `position` is 0-based, of the first base of `reference`."""

    position: int
    reference: str
    alternative: str


@dataclass(frozen=True)
class VariantScores:
    """Log-likelihood ratios in nats, log P(alternative) - log P(reference): negative is less likely.

    Args:
        forward, reverse: (variants,) of the window on the forward strand and of its reverse complement.
    """

    forward: np.ndarray
    reverse: np.ndarray

    @property
    def llr(self) -> np.ndarray:
        """Mean of both strands."""
        return (self.forward + self.reverse) / 2


def variant_windows(sequence: str, variant: Variant, flank: int) -> tuple[str, str]:
    """The bases around a variant with its reference and with its alternative allele.

    Args:
        sequence: the reference sequence.
        flank: bases on either side, fewer at the ends of the sequence.

    Raises:
        ValueError: if the reference allele is not what the sequence holds there.
    """
    end = variant.position + len(variant.reference)
    found = sequence[max(variant.position, 0) : end]
    if variant.position < 0 or found.upper() != variant.reference.upper():
        raise ValueError(
            f"expected the reference allele {variant.reference!r} at position {variant.position} (0-based), the "
            f"sequence has {found!r}: is it another assembly, or are the positions 1-based?"
        )
    left, right = sequence[max(0, variant.position - flank) : variant.position], sequence[end : end + flank]
    return left + found + right, left + variant.alternative + right


def score_variants(
    model: Any,
    tokenizer: Any,
    sequence: str,
    variants: Sequence[Variant],
    flank: int = 256,
    progress: str | None = None,
) -> VariantScores:
    """Scores of variants of one sequence by a causal language model, on both strands.

    Args:
        model: causal language model; its device and dtype are kept.
        tokenizer: its tokenizer.
        sequence: reference sequence that positions refer to.
        variants: what to score.
        flank: bases of context on either side of a variant.
        progress: what a bar is named; no bar by default.

    Raises:
        ValueError: if a reference allele is not what the sequence holds.
    """
    texts: list[str] = []
    index: dict[str, int] = {}
    pairs = []
    for variant in variants:
        windows = variant_windows(sequence.upper(), variant, flank)
        places = []
        for text in (*windows, *map(reverse_complement, windows)):
            if text not in index:  # alternatives at one place share their reference
                index[text] = len(texts)
                texts.append(text)
            places.append(index[text])
        pairs.append(places)
    likelihoods = log_likelihoods(model, tokenizer, texts, progress)
    found = likelihoods[np.array(pairs).reshape(-1, 4)]  # (variants, reference, alternative, both reversed)
    return VariantScores(found[:, 1] - found[:, 0], found[:, 3] - found[:, 2])
