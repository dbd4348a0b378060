"""What changes in windows do to a model's predictions, for any number of windows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..motif_memory.ways.kept_fold import memories_of
from ..sequences.alphabet import reverse_complement
from .base_tokens import BaseTokens
from .causal_effects import CausalEffects
from .effects import SCORES, Change, Reading, StrandEffects
from .finite import check_finite
from .loaded_model import context_length
from .masked_effects import MaskedEffects
from .memory_use import fast_memory

STRANDS = ("both", "forward", "reverse")

_PASSES_AHEAD, _CHANGES_AHEAD = 16, 1024  # as much is collected before it is computed
_TOKENS_PER_PASS = {"cpu": 8192}
_TOKENS_PER_PASS_ELSEWHERE = 65536


class WindowEffects:
    """A model, as a function of changes in windows.

    Any causal or masked language model of Transformers whose tokens are single bases. What several windows begin with
    is computed once, equal windows are computed once, and many are computed at a time; that changes no number beyond
    rounding.

    Args:
        model: causal or masked language model; its device and dtype are kept.
        tokenizer: its tokenizer.
        scores: names of `SCORES`, the numbers of an `Effect` that are wanted; `llr` always is.
        strands: `both`, `forward` or `reverse`.
        is_masked: whether it is a masked model; by default if its class is named so.
        tokens_per_pass: how many tokens are in memory at once.

    Raises:
        ValueError: if the tokens are not single bases, an argument is not known, or `memory` is asked of a model that
            has none.

    Example:

    ```python
    >>> import torch, gengram
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from gengram.inference.effects import Change
    >>> model = AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL, dtype=torch.float32)
    >>> effects = WindowEffects(model, AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL))
    >>> (found,) = effects.of([Change("ACGTTGCAGG", "ACGTTACAGG", start=5)])
    >>> found.mean("llr") == (found.forward.llr + found.reverse.llr) / 2
    True

    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        scores: Sequence[str] = ("llr",),
        strands: str = "both",
        is_masked: bool | None = None,
        tokens_per_pass: int | None = None,
    ):
        unknown = [name for name in scores if name not in SCORES]
        if unknown or strands not in STRANDS:
            raise ValueError(f"expected scores of {SCORES} and strands of {STRANDS}, got {list(scores)}, {strands!r}.")
        if "memory" in scores and not memories_of(model):
            raise ValueError(f"{type(model).__name__} has no motif memory whose change could be measured.")
        self.model, self.strands = model.eval(), strands
        self.tokens, self.context = BaseTokens.of(tokenizer), context_length(model.config, tokenizer)
        self.is_masked = type(model).__name__.endswith("MaskedLM") if is_masked is None else is_masked
        device = next(model.parameters()).device.type
        self.tokens_per_pass = tokens_per_pass or _TOKENS_PER_PASS.get(device, _TOKENS_PER_PASS_ELSEWHERE)
        asked = self.model, self.tokens, scores, self.tokens_per_pass
        self._effects: MaskedEffects | CausalEffects = (
            MaskedEffects(*asked) if self.is_masked else CausalEffects(*asked)
        )

    @property
    def longest(self) -> int:
        """Most bases of a window."""
        return self.context - len(self.tokens.before) - (len(self.tokens.after) if self.is_masked else 0)

    def check_length(self, length: int) -> None:
        """Refuse windows that are longer than what the model can read.

        Raises:
            ValueError: if they are.
        """
        if length > self.longest:
            raise ValueError(f"expected at most {self.longest} bases, which the model can read, got {length}.")

    def of(self, changes: Iterable[Change | None]) -> Iterator[StrandEffects | None]:
        """The effects of each change, in their order, None where there is None; some hundreds are in memory.

        Raises:
            ValueError: if the two windows of a change differ in length, or the model gives NaN or infinity.
        """
        with fast_memory(self.model):
            for ahead in self._portions(changes):
                found = iter(self._measure([change for change in ahead if change is not None]))
                yield from (None if change is None else next(found) for change in ahead)

    def _portions(self, changes: Iterable[Change | None]) -> Iterator[list[Change | None]]:
        """Runs of changes that fill some passes."""
        portion: list[Change | None] = []
        letters = 0
        for change in changes:
            portion.append(change)
            letters += 0 if change is None else 3 * len(change.reference)  # two strands, of which half is shared
            if letters >= _PASSES_AHEAD * self.tokens_per_pass or len(portion) == _CHANGES_AHEAD:
                yield portion
                portion, letters = [], 0
        if portion:
            yield portion

    @torch.inference_mode()
    def _measure(self, changes: Sequence[Change]) -> list[StrandEffects]:
        index: dict[tuple[str, str, int, int], int] = {}  # of what is read, to where its effect will be
        wanted: list[list[int | None]] = []
        for change in changes:
            if len(change.reference) != len(change.alternative):
                lengths = f"{len(change.reference)} and {len(change.alternative)}"
                raise ValueError(f"expected windows of one length, got {lengths} letters.")
            strands = [self.strands in ("both", name) for name in STRANDS[1:]]
            readings = (_forward(change), _reverse(change))
            wanted.append(
                [
                    index.setdefault(reading, len(index)) if is_wanted else None
                    for reading, is_wanted in zip(readings, strands, strict=True)
                ]
            )
        encoded = {text: self.tokens.encode(text) for reading in index for text in reading[:2]}
        effects = self._effects.measure([Reading(encoded[a], encoded[b], *places) for a, b, *places in index])
        check_finite([effect.llr for effect in effects], self.model)
        return [StrandEffects(*(None if place is None else effects[place] for place in places)) for places in wanted]


def _forward(change: Change) -> tuple[str, str, int, int]:
    """Both windows as they are read, and the places of the alleles' last bases."""
    last = [change.start + length - 1 for length in (change.reference_length, change.alternative_length)]
    return change.reference, change.alternative, last[0], last[1]


def _reverse(change: Change) -> tuple[str, str, int, int]:
    last = len(change.reference) - 1 - change.start
    return reverse_complement(change.reference), reverse_complement(change.alternative), last, last
