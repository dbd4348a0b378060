"""What changes in windows do to a class of a classifier of sequences."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..sequences.alphabet import reverse_complement
from .base_tokens import BaseTokens
from .effect_formulas import widest
from .effects import Change
from .memory_use import fast_memory

_CHANGES_AHEAD = 256  # as many are collected before they are computed


class ClassEffect(NamedTuple):
    """Change of a class's score on either strand; None for a strand that was not asked for."""

    forward: float | None
    reverse: float | None


class ClassEffects:
    """A classifier of sequences, as a function of changes in windows.

    The score of a class is its log-odds, log(p / (1 - p)), by all the model's classes; of a model that says yes or no
    to each class alone, by that class; of a regression it is the number itself.

    Args:
        model: for sequence classification; its device and dtype are kept.
        tokenizer: its tokenizer.
        label: number of the class.
        strands: `both`, `forward` or `reverse`; the reverse strand reads the reverse complements.
        tokens_per_pass: how many tokens are read at once; a window in any case.

    Raises:
        ValueError: if the tokens are not single bases.
    """

    def __init__(
        self, model: Any, tokenizer: Any, label: int = 0, strands: str = "both", tokens_per_pass: int = 16384
    ):
        self.model, self.tokens, self.label, self.strands = model.eval(), BaseTokens.of(tokenizer), label, strands
        # Decoders of Transformers find the last token of rows by their padding, and refuse several rows without.
        self.tokens_per_pass = 1 if getattr(model.config, "pad_token_id", None) is None else tokens_per_pass

    def of(self, changes: Iterable[Change | None]) -> Iterator[ClassEffect | None]:
        """The effect of each change, in their order, None where there is None; some hundreds are in memory."""
        portion: list[Change | None] = []
        with fast_memory(self.model):
            for change in changes:
                portion.append(change)
                if len(portion) == _CHANGES_AHEAD:
                    yield from self._measure(portion)
                    portion = []
            yield from self._measure(portion)

    def _measure(self, changes: Sequence[Change | None]) -> Iterator[ClassEffect | None]:
        windows = [window for change in changes if change is not None for window in change[:2]]
        strands: list[Iterator[float | None]] = []
        for name in ("forward", "reverse"):
            if self.strands in ("both", name):
                read = [reverse_complement(window) for window in windows] if name == "reverse" else windows
                scores = self.scores(read)  # of a reference, its alternative, the next reference, ...
                strands.append(after - before for before, after in zip(scores[::2], scores[1::2], strict=True))
            else:
                strands.append(itertools.repeat(None))
        for change in changes:
            yield None if change is None else ClassEffect(*map(next, strands))

    @torch.inference_mode()
    def scores(self, windows: Sequence[str]) -> list[float]:
        """The class's score of each window as it is given; equal windows are read once."""
        by_length: dict[int, list[str]] = {}
        for window in dict.fromkeys(windows):
            by_length.setdefault(len(window), []).append(window)
        found: dict[str, float] = {}
        for length, alike in by_length.items():
            around = len(self.tokens.before) + len(self.tokens.after)
            most = max(1, self.tokens_per_pass // (length + around))
            for start in range(0, len(alike), most):
                batch = alike[start : start + most]
                found |= dict(zip(batch, self._read(batch), strict=True))
        return [found[window] for window in windows]

    def _read(self, windows: Sequence[str]) -> list[float]:
        rows = [[*self.tokens.before, *self.tokens.encode(window), *self.tokens.after] for window in windows]
        ids = torch.tensor(rows, device=next(self.model.parameters()).device)
        logits = self.model(input_ids=ids).logits  # (windows, classes)
        return class_scores(logits, self.label, getattr(self.model.config, "problem_type", None)).tolist()


def class_scores(logits: torch.Tensor, label: int, problem_type: str | None = None) -> torch.Tensor:
    """Log-odds of a class, or the number of a regression: (rows,).

    Args:
        logits: (rows, classes).
        label: number of the class.
        problem_type: of the configuration; without one, several classes exclude each other.
    """
    logits = logits.to(widest(logits.device))
    own = logits[:, label]
    if logits.shape[1] == 1 or problem_type in ("regression", "multi_label_classification"):
        return own
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return own - others.logsumexp(1)
