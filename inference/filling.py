"""Which bases fill the gaps of a sequence, and with which probabilities."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..sequences.alphabet import BASES, OTHER, base_digits, reverse_complement
from ..sequences.gaps import Gap
from .effects import Change
from .finite import check_finite
from .masked_effects import letter_logits
from .window_effects import WindowEffects

# What became of a gap, and in words.
FILLED = "filled"
NEAREST = "filled_nearest"
UNSURE = "unsure"
TOO_MANY = "too_many_gaps"
STATUSES = {
    FILLED: "filled together with all other gaps of their windows",
    NEAREST: "filled together with the nearest gaps only, the others being N",
    UNSURE: "left, no base being probable enough, or no base of the window being known",
    TOO_MANY: "left, too many gaps being in their windows; --nearest fills them, too",
}

_DIGITS = 7  # that mean something: the model computes in float32 at best
MOST_JOINT = 6  # gaps: 4,096 fillings
DEFAULT_JOINT = 4
DEFAULT_CONTEXT = 1024  # bases, if the model reads so many


class GapWindow(NamedTuple):
    """A window whose gaps are filled together.

    Args:
        text: the letters of the window.
        gaps: those that are filled together; places count in the window. Others are read as they are, as N.
        asked: which of them, by their number, belong to this window; the others are asked for in windows of their own.
        is_exact: whether all gaps of the window are filled together.
    """

    text: str
    gaps: tuple[Gap, ...]
    asked: tuple[int, ...]
    is_exact: bool = True


def check_fill_options(context: int, joint: int, longest_run: int, least_probability: float) -> None:
    """Refuse options of filling that make no sense.

    Raises:
        ValueError: if one is out of its range; the message names it.
    """
    for name, value, is_right, words in (
        ("context", context, context >= 1, "at least 1"),
        ("joint", joint, 1 <= joint <= MOST_JOINT, f"1 to {MOST_JOINT}, since 4^{MOST_JOINT} fillings are compared"),
        ("longest_run", longest_run, longest_run >= 1, "at least 1"),
        ("least_probability", least_probability, 0 <= least_probability <= 1, "0 to 1"),
    ):
        if not is_right:
            raise ValueError(f"{name}: expected {words}, got {value}.")


def gap_windows(letters: str, gaps: Sequence[Gap], context: int, joint: int | None) -> Iterator[tuple[int, GapWindow]]:
    """The windows in which gaps are filled, each with its start, in the order of the gaps; equal ones are shared.

    The window of a gap at place p has N = min(context, length) bases and starts at clip(p - N // 2, 0, length - N), as
    that of a variant. All gaps in it are filled together if they are at most `joint`; otherwise the `joint` nearest
    ones, the gap itself included and the left one first of two equally near, and the others are N.

    Args:
        letters: the sequence.
        gaps: all of its gaps, in their order.
        context: most bases of a window.
        joint: most gaps that are filled together; None for any number.
    """
    length = min(context, len(letters))
    places = np.array([gap.place for gap in gaps], dtype=np.int64)
    starts = np.clip(places - length // 2, 0, len(letters) - length)
    lows, highs = np.searchsorted(places, starts), np.searchsorted(places, starts + length)
    chosen = [
        _nearest(places, number, int(low), int(high), joint)
        for number, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]
    windows = zip(range(len(gaps)), starts.tolist(), chosen, (highs - lows).tolist(), strict=True)
    for (start, members, count), group in itertools.groupby(windows, key=lambda window: window[1:]):
        own = [gap._replace(place=gap.place - start) for gap in gaps[members.start : members.stop]]
        asked = tuple(number - members.start for number, *_ in group)
        yield start, GapWindow(letters[start : start + length], tuple(own), asked, len(own) == count)


def _nearest(places: np.ndarray, number: int, low: int, high: int, joint: int | None) -> range:
    """Numbers of the gaps, of those from `low` to `high`, that are filled together with one of them."""
    if joint is None or high - low <= joint:
        return range(low, high)
    first, stop = number, number + 1
    while stop - first < joint:
        left = places[number] - places[first - 1] if first > low else np.inf
        right = places[stop] - places[number] if stop < high else np.inf
        first, stop = (first - 1, stop) if left <= right else (first, stop + 1)
    return range(first, stop)


class FilledGap(NamedTuple):
    """What became of a gap.

    Args:
        place: in the sequence, from 0.
        base: the most probable one; N if none was compared.
        status: one of `STATUSES`.
        chances: of A, C, G and T, if they were compared.
    """

    place: int
    base: str
    status: str
    chances: tuple[float, ...] | None = None

    def row(self) -> dict[str, Any]:
        """As columns: start, base, p_A, p_C, p_G, p_T (to 7 digits) and status."""
        chances = self.chances or (None,) * len(BASES)
        numbers = {
            f"p_{base}": None if chance is None else round(chance, _DIGITS)
            for base, chance in zip(BASES, chances, strict=True)
        }
        return {"start": self.place, "base": self.base, **numbers, "status": self.status}


def with_bases(letters: str, gaps: Iterable[tuple[int, str, str]]) -> str:
    """A sequence whose gaps hold their bases, in the case that they had.

    Args:
        letters: the sequence.
        gaps: places, bases and statuses; only what is filled changes.
    """
    result = bytearray(letters.encode())
    for place, base, status in gaps:
        if status in (FILLED, NEAREST):
            result[place] = ord(base.lower() if letters[place].islower() else base)
    return result.decode()


class GapFiller:
    """A model, as a function of windows with gaps.

    A causal model gives the posterior of the bases: each filling of all gaps of a window is weighted with the
    likelihood of the whole window, the product of P(base | letters before it) over all bases but the first (N is no
    base), and a base at a gap gets the sum over the fillings that have it. Of both strands the log-likelihoods are
    averaged. A masked model gives its probabilities of A, C, G and T at each gap, all gaps masked at once; of both
    strands the geometric mean.

    Args:
        model: causal or masked language model with single bases as tokens; it is put in `eval()` mode.
        tokenizer: its tokenizer.
        strands: `both`, `forward` or `reverse`.
        is_masked: whether it is a masked model; by default if its class is named so.
        tokens_per_pass: how many tokens are in memory at once.

    Raises:
        ValueError: if the tokens are not single bases, or a masked model's tokenizer has no mask.

    Example:

    >>> import gengram
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model = AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL)
    >>> filler = GapFiller(model, AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL))
    >>> (found,) = filler.probabilities([GapWindow("ACGTNACG", (Gap(4),), asked=(0,))])
    >>> found.shape  # of A, C, G and T at the one gap
    (1, 4)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        strands: str = "both",
        is_masked: bool | None = None,
        tokens_per_pass: int | None = None,
    ):
        self._effects = WindowEffects(model, tokenizer, ("llr",), strands, is_masked, tokens_per_pass)
        self.is_masked = self._effects.is_masked

    @property
    def longest(self) -> int:
        """Most bases of a window."""
        return self._effects.longest

    def check_length(self, length: int) -> None:
        """Refuse windows that are longer than what the model can read.

        Raises:
            ValueError: if they are.
        """
        self._effects.check_length(length)

    def fill(
        self, windows: Sequence[tuple[int, GapWindow]], nearest: bool = False, least_probability: float = 0.0
    ) -> Iterator[list[FilledGap]]:
        """The gaps that each of the windows of `gap_windows` is asked for.

        Args:
            windows: each with its start.
            nearest: whether windows are filled in which not all gaps are filled together.
            least_probability: of a base that fills a gap.

        Raises:
            ValueError: if a window is longer than the model reads.
        """
        compared = [window.is_exact or nearest for _, window in windows]
        found = iter(self.probabilities([window for _, window in itertools.compress(windows, compared)]))
        for (start, window), is_compared in zip(windows, compared, strict=True):
            places = [start + window.gaps[number].place for number in window.asked]
            if not is_compared:
                yield [FilledGap(place, "N", TOO_MANY) for place in places]
                continue
            gaps = []
            knows_a_base = bool((base_digits(window.text) < OTHER).any())
            for place, chances in zip(places, next(found), strict=True):
                status = FILLED if window.is_exact else NEAREST
                status = UNSURE if chances.max() < least_probability or not knows_a_base else status
                gaps.append(FilledGap(place, BASES[chances.argmax()], status, tuple(chances.tolist())))
            yield gaps

    def probabilities(self, windows: Sequence[GapWindow]) -> list[np.ndarray]:
        """Probabilities of A, C, G and T at the gaps that each window is asked for: (asked, 4) float64.

        Raises:
            ValueError: if a window is longer than the model reads.
        """
        for window in windows:
            self.check_length(len(window.text))
        found = self._masked(windows) if self.is_masked else self._posteriors(windows)
        return [chances[list(window.asked)] for window, chances in zip(windows, found, strict=True)]

    def _posteriors(self, windows: Sequence[GapWindow]) -> Iterator[np.ndarray]:
        """(gaps, 4) for each window, by a causal model."""
        fillings = [list(itertools.product(*(gap.bases for gap in window.gaps))) for window in windows]
        changes = (
            _change(window, filling[0], other)
            for window, filling in zip(windows, fillings, strict=True)
            for other in filling[1:]
        )
        ratios = iter([effects.mean("llr") for effects in self._effects.of(changes) if effects is not None])
        for window, filling in zip(windows, fillings, strict=True):
            logs = np.array([0.0, *itertools.islice(ratios, len(filling) - 1)])  # of each filling beside the first
            weights = np.exp(logs - logs.max())
            chances = np.zeros((len(window.gaps), len(BASES)))
            for gap, bases in enumerate(zip(*filling, strict=True)):
                np.add.at(chances[gap], [BASES.index(base) for base in bases], weights)
            yield chances / weights.sum()

    def _masked(self, windows: Sequence[GapWindow]) -> Iterator[np.ndarray]:
        """(gaps, 4) for each window, by a masked model."""
        strands = {"forward": (False,), "reverse": (True,), "both": (False, True)}[self._effects.strands]
        logs = [np.zeros((len(window.gaps), len(BASES))) for window in windows]
        readings = list(itertools.product(range(len(windows)), strands))
        readings.sort(key=lambda reading: len(windows[reading[0]].text))
        for length, alike in itertools.groupby(readings, key=lambda reading: len(windows[reading[0]].text)):
            while batch := list(itertools.islice(alike, max(1, self._effects.tokens_per_pass // length))):
                for (number, is_reverse), found in zip(batch, self._log_probabilities(windows, batch), strict=True):
                    found = found[::-1, ::-1] if is_reverse else found
                    logs[number] += found[[gap.place for gap in windows[number].gaps]]
        for window, log in zip(windows, logs, strict=True):
            may_be = np.array([[base in gap.bases for base in BASES] for gap in window.gaps])
            check_finite(log, self._effects.model)
            chances = np.exp(log / len(strands)) * may_be
            yield chances / chances.sum(1, keepdims=True)

    @torch.inference_mode()
    def _log_probabilities(self, windows: Sequence[GapWindow], batch: Sequence[tuple[int, bool]]) -> np.ndarray:
        """log P of A, C, G and T at each place of windows as they are read, gaps masked: (batch, length, 4)."""
        tokens = self._effects.tokens
        rows = []
        for number, is_reverse in batch:
            window = windows[number]
            ids = tokens.encode(reverse_complement(window.text) if is_reverse else window.text)
            places = np.array([gap.place for gap in window.gaps])
            ids[len(ids) - 1 - places if is_reverse else places] = tokens.mask
            rows.append(ids)
        logits = letter_logits(self._effects.model, tokens, torch.from_numpy(np.stack(rows)))
        return logits[..., list(tokens.bases)].double().log_softmax(-1).cpu().numpy()


def _change(window: GapWindow, bases: Sequence[str], other_bases: Sequence[str]) -> Change:
    """Two fillings of a window, as alleles that reach from the first gap to the last."""
    first, last = window.gaps[0].place, window.gaps[-1].place
    texts = []
    for filling in (bases, other_bases):
        letters = list(window.text)
        for gap, base in zip(window.gaps, filling, strict=True):
            letters[gap.place] = base
        texts.append("".join(letters))
    length = last - first + 1
    return Change(texts[0], texts[1], first, length, length)
