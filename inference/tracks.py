"""Tracks: numbers for every base of a sequence, as a language model reads it on either strand.

| value | what it says of a base |
|---|---|
| surprisal | -log2 P(base) in bits, P over all tokens of the model: 0 if it was sure of this base, 2 by chance |
| entropy | of what was predicted for its place, over A, C, G and T alone, in bits: 0 is sure, 2 is undecided |
| gate | how far a memory opened at the base, 0 to 1 |
| residual | Euclidean norm of what a memory added to the hidden state there |

Predictions of a causal model are made from the bases before, in the order of the strand, so the first base of a
sequence has none. Those of a masked model are made from both sides with every eighth base masked at once: eight
passes, after which each base was masked once. A, C, G and T have values, other letters have none.

Long sequences are read as `long_sequences` says. A value depends on the window that its base is taken from, which the
base's place in the sequence decides, and on nothing else: not on which bases are asked for, in which order or how many
at once.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..motif_memory.definition import at_least_float32
from ..motif_memory.ways.kept_fold import memories_of
from ..sequences.alphabet import OTHER, base_digits, check_letters, reverse_complement
from .base_tokens import BaseTokens
from .finite import check_finite
from .likelihood import token_log_probabilities
from .long_sequences import Window, windows_of
from .memory_use import fast_memory

PREDICTED = ("surprisal", "entropy")
OF_MEMORY = ("gate", "residual")
VALUES = (*PREDICTED, *OF_MEMORY)
UNITS = {"surprisal": "bits", "entropy": "bits", "gate": "0 to 1", "residual": "norm"}
MASKED_AT_ONCE = 8  # one in so many bases: about the share that masked models learn with

_STRANDS = {"both": "+-", "forward": "+", "reverse": "-"}
_STRAND_NAMES = {"+": "forward", "-": "reverse"}


class Track(NamedTuple):
    """A value for each base of one strand.

    Args:
        value: one of `VALUES`.
        strand: `+` or `-`.
        layer: of the memory, from 0; None if the value is not of a memory.
    """

    value: str
    strand: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """`gate.layer2.forward`."""
        layer = [] if self.layer is None else [f"layer{self.layer}"]
        return ".".join([self.value, *layer, _STRAND_NAMES[self.strand]])


def tracks_of(values: Sequence[str], strands: str, memory_layers: Sequence[int]) -> list[Track]:
    """All tracks of these values.

    Args:
        values: of `VALUES`.
        strands: both, forward or reverse.
        memory_layers: layers of the model that have a memory.
    """
    layers = {value: memory_layers if value in OF_MEMORY else [None] for value in values}
    return [Track(value, strand, layer) for value in values for layer in layers[value] for strand in _STRANDS[strands]]


_Seen = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by layer: gate and norm of the residual, (batch, length) each


class _Reading(NamedTuple):
    """A window as the model reads it."""

    window: Window
    strand: str
    letters: str  # in the order of the strand


@dataclass(frozen=True)
class TrackModel:
    """A model that gives tracks.

    Args:
        model: a language model, on its device and in `eval()` mode.
        tokens: of its tokenizer.
        is_masked: whether it predicts masked bases, and not the next one.
        values: of `VALUES`; gate and residual need a model with memories.
        strands: both, forward or reverse.
        context: how many bases it reads at once.
        overlap: how many bases two windows share; half the context by default.
        batch_tokens: most tokens that it reads at once.
    """

    model: Any
    tokens: BaseTokens
    is_masked: bool = False
    values: tuple[str, ...] = PREDICTED
    strands: str = "both"
    context: int = 1024
    overlap: int | None = None
    batch_tokens: int = 16384

    @property
    def tracks(self) -> list[Track]:
        """What it gives, in the order of values, layers and strands."""
        return tracks_of(self.values, self.strands, [memory.layer_idx for memory in memories_of(self.model)])

    def of_sequence(self, sequence: str) -> dict[str, np.ndarray]:
        """Values of all bases of a sequence by the track's name, (length,) float32 each, nan where there is none."""
        return self.of_part(lambda start, end: sequence[start:end], len(sequence), 0, len(sequence))

    @torch.inference_mode()
    def of_part(
        self,
        read: Callable[[int, int], str],
        length: int,
        start: int,
        end: int,
        advance: Callable[[int], Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Values of the bases `start` to `end` of a sequence, equal to those that `of_sequence` gives them.

        Args:
            read: letters of the sequence from a start to an end; it is asked for a window more than there is on either
                side.
            length: of the whole sequence.
            start, end: of the bases that are wanted, 0-based and half-open.
            advance: is told of progress, in bases; a base on one of two strands is half a base.

        Raises:
            InputError: if there are letters that are no IUPAC codes of DNA, which the model would read as N.
            ValueError: if the model gives NaN or infinity.
        """
        found = {track.name: np.full(end - start, np.nan, dtype=np.float32) for track in self.tracks}
        tokens = max(1, min(self.context, length)) + len(self.tokens.before) + len(self.tokens.after)
        readings = self._readings(read, length, start, end)
        done, told, strands = 0, 0, len(_STRANDS[self.strands])  # bases of either strand, bases, strands
        with fast_memory(self.model), _seen(self.model) as seen:
            while batch := list(itertools.islice(readings, max(1, self.batch_tokens // tokens))):
                self._fill(found, batch, start, seen)
                if advance is not None:
                    done += sum(reading.window.keep_end - reading.window.keep_start for reading in batch)
                    advance(done // strands - told)
                    told = done // strands
        return found

    def _readings(self, read: Callable[[int, int], str], length: int, start: int, end: int) -> Iterator[_Reading]:
        for strand in _STRANDS[self.strands]:
            for window in windows_of(
                length, self.context, self.overlap, strand=strand, both_sides=self.is_masked, start=start, end=end
            ):
                letters = read(window.start, window.end)
                check_letters(letters, "the sequence", window.start)
                letters = reverse_complement(letters) if strand == "-" else letters
                if (base_digits(letters[window.kept(strand)]) < OTHER).any():
                    yield _Reading(window, strand, letters)

    def _fill(self, found: dict[str, np.ndarray], batch: list[_Reading], start: int, seen: _Seen) -> None:
        """Compute the windows of a batch, all of one length, and put what is taken from them into `found`."""
        digits = np.stack([base_digits(reading.letters) for reading in batch])  # (batch, length)
        values = self._values(batch, digits, seen)
        for row, (window, strand, _) in enumerate(batch):
            kept, place = window.kept(strand), slice(window.keep_start - start, window.keep_end - start)
            is_base = digits[row, kept] < OTHER
            for (value, layer), numbers in values.items():
                is_known = is_base.copy()
                if value in PREDICTED and not self.is_masked and kept.start == 0:
                    is_known[:1] = False
                check_finite(numbers[row, kept][is_known], self.model)
                taken = np.where(is_base, numbers[row, kept], np.nan)
                found[Track(value, strand, layer).name][place] = taken[::-1] if strand == "-" else taken

    def _values(
        self, batch: list[_Reading], digits: np.ndarray, seen: _Seen
    ) -> dict[tuple[str, int | None], np.ndarray]:
        """(batch, length) float32 by value and layer, in the order of reading; nan where nothing is predicted."""
        device = next(self.model.parameters()).device
        around = (len(self.tokens.before), len(self.tokens.after))
        rows = [[*self.tokens.before, *self.tokens.encode(reading.letters), *self.tokens.after] for reading in batch]
        ids = torch.tensor(np.array(rows), device=device)  # (batch, length with special tokens)
        letters = slice(around[0], ids.shape[1] - around[1])
        values: dict[tuple[str, int | None], torch.Tensor] = {}
        if not self.is_masked or set(self.values) & set(OF_MEMORY):
            outputs = self.model(input_ids=ids)
            for layer, memory in seen.items():
                values["gate", layer], values["residual", layer] = (part[:, letters] for part in memory)
        if set(self.values) & set(PREDICTED):
            predicted = (
                self._predicted_masked(batch, ids, letters) if self.is_masked else self._next(outputs.logits, letters)
            )
            values["surprisal", None] = -token_log_probabilities(predicted, ids[:, letters]) / math.log(2)
            values["entropy", None] = base_entropy(predicted[..., list(self.tokens.bases)])
        return {key: part.float().cpu().numpy() for key, part in values.items() if key[0] in self.values}

    @staticmethod
    def _next(logits: torch.Tensor, letters: slice) -> torch.Tensor:
        """What a causal model predicts for each letter, (batch, length, vocabulary); nan for the first."""
        before = logits[:, letters.start : letters.stop - 1]
        return torch.cat([torch.full_like(logits[:, :1], math.nan), before], dim=1)

    def _predicted_masked(self, batch: list[_Reading], ids: torch.Tensor, letters: slice) -> torch.Tensor:
        """What a masked model predicts for each letter, (batch, length, vocabulary)."""
        assert self.tokens.mask is not None
        places = np.stack([_places(reading) for reading in batch]) % MASKED_AT_ONCE
        predicted = None
        for turn in range(MASKED_AT_ONCE):
            is_masked = torch.zeros_like(ids, dtype=torch.bool)
            is_masked[:, letters] = torch.tensor(places == turn, device=ids.device)
            logits = self.model(input_ids=ids.masked_fill(is_masked, self.tokens.mask)).logits
            predicted = torch.zeros_like(logits) if predicted is None else predicted
            predicted[is_masked] = logits[is_masked]
        assert predicted is not None
        return predicted[:, letters]


def base_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the distribution over the last dimension, in bits: (..., bases) -> (...) float32."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1) / math.log(2)


def _places(reading: _Reading) -> np.ndarray:
    """Places of a reading's letters in the sequence, on the forward strand."""
    places = np.arange(reading.window.start, reading.window.end)
    return places[::-1] if reading.strand == "-" else places


@contextlib.contextmanager
def _seen(model: Any) -> Iterator[_Seen]:
    """A block in which what the memories do in each pass is seen."""
    seen: _Seen = {}

    def see(memory: Any, _inputs: Any, outputs: Any) -> None:
        residual = outputs.residual.to(at_least_float32(outputs.residual.dtype))
        seen[memory.layer_idx] = (outputs.gate, residual.norm(dim=-1))

    hooks = [memory.register_forward_hook(see) for memory in memories_of(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
