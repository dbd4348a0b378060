"""Nucleotide dependencies: how much a base at one place of a window decides what a model predicts at another.

After da Silva et al. 2024, "Nucleotide dependency analysis of DNA language models reveals genomic functional elements"
(doi:10.1101/2024.07.27.605418): the dependency of j on i is the largest |log2 of the ratio of odds| of any base at j,
between the window with any substitution at i and the window as it is,

    max over substitutions at i, bases b of |log2 odds(b at j, substituted) - log2 odds(b at j)|,

with odds p / (1 - p), and p among A, C, G and T. A masked model predicts j from the whole window, nothing masked, as
there. A causal model predicts a base from those before it. So on the forward strand the dependency of j on i exists
for j > i, and on the reverse strand for j < i.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..sequences.alphabet import BASES, OTHER, base_digits, reverse_complement
from .causal_effects import CausalEffects
from .effect_formulas import widest
from .effects import Reading
from .masked_effects import letter_logits
from .memory_use import fast_memory
from .window_effects import WindowEffects

_OTHERS = [[other for other in range(len(BASES)) if other != base] for base in range(len(BASES))]


class Dependencies(NamedTuple):
    """Dependencies of all places j of a window on some places i, on either strand: (i, j) float64.

    nan where there is none: at i itself, at or of letters that are not A, C, G or T, and where a causal model predicts
    j before it sees i. None for a strand that was not asked for.
    """

    forward: np.ndarray | None
    reverse: np.ndarray | None

    def mean(self) -> np.ndarray:
        """The mean of those strands that have a value."""
        strands = np.stack([strand for strand in self if strand is not None])
        counts = (~np.isnan(strands)).sum(0)
        return np.divide(np.nansum(strands, 0), counts, out=np.full(strands.shape[1:], np.nan), where=counts > 0)


class DependencyModel:
    """A causal or masked language model that gives dependencies.

    Args:
        model: in `eval()` mode or not; its device and dtype are kept.
        tokenizer: its tokenizer.
        strands: `both`, `forward` or `reverse`.
        is_masked: whether it is a masked model; by default if its class is named so.
        tokens_per_pass: how many tokens are in memory at once.

    Raises:
        ValueError: if the tokens are not single bases.

    Example:

    >>> import gengram
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model = AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL)
    >>> dependencies = DependencyModel(model, AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL))
    >>> dependencies.of("ACGTTGCAGG").forward.shape
    (10, 10)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        strands: str = "both",
        is_masked: bool | None = None,
        tokens_per_pass: int | None = None,
    ):
        effects = WindowEffects(model, tokenizer, ("llr",), strands, is_masked, tokens_per_pass)
        self.model, self.tokens, self.strands, self.is_masked = model, effects.tokens, strands, effects.is_masked
        self.tokens_per_pass, self.check_length = effects.tokens_per_pass, effects.check_length
        self._windows = CausalEffects(model, self.tokens, (), self.tokens_per_pass)  # of causal models

    @torch.inference_mode()
    def of(self, window: str, places: Sequence[int] | None = None) -> Dependencies:
        """Dependencies on these places of a window, by default on all.

        Raises:
            ValueError: if the window is longer than the model reads.
        """
        self.check_length(len(window))
        places = range(len(window)) if places is None else places
        with fast_memory(self.model):
            strands = [
                self._of_strand(window, places, is_reverse) if self.strands in ("both", name) else None
                for name, is_reverse in (("forward", False), ("reverse", True))
            ]
        return Dependencies(*strands)

    def _of_strand(self, window: str, places: Sequence[int], is_reverse: bool) -> np.ndarray:
        last = len(window) - 1
        letters = reverse_complement(window) if is_reverse else window
        turned = [last - place for place in places] if is_reverse else list(places)
        is_base = base_digits(letters) < OTHER
        rows = {place: row for row, place in enumerate(turned) if is_base[place]}
        found = np.full((len(turned), len(letters)), np.nan)
        readings = list(self._readings(letters, list(rows)))
        for reading, start, changes in self._masked(readings) if self.is_masked else self._causal(readings):
            place = readings[reading].last_reference
            row = found[rows[place]]
            row[start:] = np.fmax(row[start:], changes)
            row[place] = np.nan
            row[: 0 if self.is_masked else place] = np.nan
        found[:, ~is_base] = np.nan
        return found[:, ::-1] if is_reverse else found

    def _readings(self, letters: str, places: Sequence[int]) -> Iterator[Reading]:
        reference = self.tokens.encode(letters)
        for place in places:
            for token in self.tokens.bases:
                if token != reference[place]:
                    alternative = reference.copy()
                    alternative[place] = token
                    yield Reading(reference, alternative, place, place)

    def _causal(self, readings: Sequence[Reading]) -> Iterator[tuple[int, int, np.ndarray]]:
        """For each reading its number, and the largest change at each place from a start on."""
        for branch in self._windows.branches(readings):
            odds = self._log_odds(branch.logits[:, :-1])  # of the second letter and all behind it
            changes = _largest_changes(odds, branch.pairs.reference, branch.pairs.alternative)
            for member, row in zip(branch.members, changes, strict=True):
                yield member, branch.split + 1, row

    def _masked(self, readings: Sequence[Reading]) -> Iterator[tuple[int, int, np.ndarray]]:
        if not readings:
            return
        reference = self._log_odds(letter_logits(self.model, self.tokens, _ids(readings[0].reference)))
        most = max(1, self.tokens_per_pass // len(readings[0].reference))
        for start in range(0, len(readings), most):
            batch = readings[start : start + most]
            ids = _ids(*(reading.alternative for reading in batch))
            odds = torch.cat([reference, self._log_odds(letter_logits(self.model, self.tokens, ids))])
            alternatives = torch.arange(1, len(odds), device=odds.device)
            changes = _largest_changes(odds, torch.zeros_like(alternatives), alternatives)
            for member, row in enumerate(changes, start):
                yield member, 0, row

    def _log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """log2 of the odds of A, C, G and T among themselves: (..., 4)."""
        bases = logits[..., list(self.tokens.bases)].to(widest(logits.device))
        return (bases - bases[..., _OTHERS].logsumexp(-1)) / math.log(2)


def _ids(*rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows))


def _largest_changes(odds: torch.Tensor, references: torch.Tensor, alternatives: torch.Tensor) -> np.ndarray:
    """Of pairs of rows of (rows, length, 4), the largest change at each place: (pairs, length)."""
    return (odds[alternatives] - odds[references]).abs().amax(-1).cpu().numpy()
