"""Effects of changes by a masked model, which sees both sides of a base at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .base_tokens import BaseTokens
from .effect_formulas import row_pairs, widest
from .effects import Effect, Reading
from .parts import distances_of_parts, seen


class MaskedEffects:
    """Effects by a masked model, of substitutions only.

    Args:
        model: masked language model, in `eval()`.
        tokens: of its tokenizer.
        scores: names of `SCORES`.
        tokens_per_pass: how many tokens are read at once; a window in any case.

    Raises:
        ValueError: if the tokenizer has no mask.
    """

    def __init__(self, model: Any, tokens: BaseTokens, scores: Sequence[str], tokens_per_pass: int):
        if tokens.mask is None:
            raise ValueError("expected a tokenizer with a mask, as a masked model needs it, got one without.")
        self.model, self.tokens, self.scores, self.tokens_per_pass = model, tokens, scores, tokens_per_pass

    def measure(self, readings: Sequence[Reading]) -> list[Effect]:
        """The effect of each reading; what is computed together does not change a number beyond rounding."""
        found: list[Effect] = [Effect()] * len(readings)
        by_length: dict[int, list[int]] = {}
        for index, reading in enumerate(readings):
            by_length.setdefault(len(reading.reference), []).append(index)
        for length, members in by_length.items():
            most = max(1, self.tokens_per_pass // (3 * length))
            for start in range(0, len(members), most):
                chosen = members[start : start + most]
                effects = self._read([readings[member] for member in chosen])
                for member, effect in zip(chosen, effects, strict=True):
                    found[member] = effect
        return found

    def _read(self, readings: Sequence[Reading]) -> Iterator[Effect]:
        device = next(self.model.parameters()).device
        reference = torch.from_numpy(np.stack([reading.reference for reading in readings]))
        alternative = torch.from_numpy(np.stack([reading.alternative for reading in readings]))
        changed = reference != alternative  # (readings, length)
        masked = reference.masked_fill(changed, self.tokens.mask or 0)
        different, rows = masked.unique(dim=0, return_inverse=True)  # alternatives to one base are masked alike
        logits = letter_logits(self.model, self.tokens, different)[rows.to(device)]
        chances = logits.to(widest(device)).log_softmax(-1)
        of_each = [chances.gather(-1, ids.to(device).unsqueeze(-1)).squeeze(-1) for ids in (alternative, reference)]
        are_counted = changed & (reference != self.tokens.other) & (alternative != self.tokens.other)
        found = {"llr": (of_each[0] - of_each[1]).masked_fill(~are_counted.to(device), 0).sum(1)}
        with seen(self.model, "embedding" in self.scores, "memory" in self.scores) as parts:
            if {"embedding", "memory"} & set(self.scores):
                letter_logits(self.model, self.tokens, torch.cat([reference, alternative]))
                count = len(readings)
                pairs = row_pairs(readings, range(count), range(count, 2 * count), 0, device)
                # What stands before a difference is read with it.
                pairs = pairs._replace(first_difference=torch.zeros_like(pairs.first_difference))
                found |= distances_of_parts(parts, pairs, len(self.tokens.before))
        for row in torch.stack(list(found.values()), dim=1).tolist():
            yield Effect(**dict(zip(found, row, strict=True)))


def letter_logits(model: Any, tokens: BaseTokens, ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch, length, vocabulary) of letters, read within what the tokenizer puts around them.

    Args:
        model: masked language model.
        tokens: of its tokenizer.
        ids: (batch, length), of the letters alone.
    """
    around = [torch.tensor(list(part), dtype=ids.dtype) for part in (tokens.before, tokens.after)]
    before, after = (part.expand(len(ids), -1) for part in around)
    outputs = model(input_ids=torch.cat([before, ids, after], dim=1).to(next(model.parameters()).device))
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits[:, before.shape[1] : before.shape[1] + ids.shape[1]]
