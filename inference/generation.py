"""Generation of bases and nothing else."""

import copy
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..sequences.alphabet import BASES, check_letters
from .base_tokens import BaseTokens
from .finite import check_finite
from .loaded_model import context_length
from .memory_use import fast_memory
from .shared_prefix import CausalReader, Pass, branched

# A choice that a probability so little different would change is made by a pass of its sequence alone. Far above what
# float32 probabilities differ by in other batches, and rare: about one base in a thousand.
_MARGIN = 1e-4


def all_but_bases(tokenizer: Any, config: Any, letters: str = BASES) -> list[int]:
    """Ids of all tokens but the bases, for `model.generate(..., suppress_tokens=all_but_bases(tokenizer, config))`.

    The heads of DNA models score special tokens too, and rows that only fill the vocabulary up to a round size.

    Args:
        tokenizer: has one token per base.
        config: of the model; its `vocab_size` counts the scores.
        letters: what may be generated; `"ACGTN"` with unknown bases.

    Raises:
        ValueError: if a letter is no token.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [letter for letter in letters if letter not in vocabulary]
    if missing:
        raise ValueError(f"expected a tokenizer with the tokens {', '.join(letters)}; it lacks {', '.join(missing)}.")
    kept = {vocabulary[letter] for letter in letters}
    return [token for token in range(config.vocab_size) if token not in kept]


@dataclass(frozen=True)
class Sampling:
    """How the next base is drawn from its four probabilities; by default from these as they are.

    Args:
        temperature: the logits are divided by it; 0 always takes the most likely base.
        top_k: only so many of the likeliest bases.
        top_p: of these only the likeliest ones that together reach this probability.

    Raises:
        ValueError: for values out of range.
    """

    temperature: float = 1.0
    top_k: int = len(BASES)
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, is_right, words in (
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", 1 <= self.top_k <= len(BASES), f"1 to {len(BASES)}"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
        ):
            if not is_right:
                raise ValueError(f"{name}: expected {words}, got {getattr(self, name)}.")

    def choose(self, logits: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Digits of the chosen bases, and how far a probability is from where another base would be chosen.

        Args:
            logits: (rows, 4) float64.
            draws: (rows,) uniform in [0, 1).

        Returns:
            Two arrays (rows,).
        """
        order = np.argsort(-logits, axis=1, kind="stable")
        ranked = np.take_along_axis(_softmax(logits / (self.temperature or 1)), order, axis=1)
        if self.temperature == 0:
            return order[:, 0], ranked[:, 0] - ranked[:, 1]
        before = np.cumsum(ranked, axis=1) - ranked  # probability of the likelier ones
        is_kept = before < self.top_p
        is_kept[:, self.top_k :] = False
        chances = np.zeros_like(ranked)
        np.put_along_axis(chances, order, ranked * is_kept, axis=1)
        ends = np.cumsum(chances, axis=1) / chances.sum(1, keepdims=True)
        chosen = (draws[:, None] >= ends[:, :-1]).sum(1)
        margins = [np.abs(draws[:, None] - ends[:, :-1])]
        if self.top_k < len(BASES) or self.top_p < 1:  # which bases are kept could change, too
            steps = ranked[:, :-1] - ranked[:, 1:]
            margins += [np.abs(before[:, 1:] - self.top_p), np.where(is_kept[:, 1:], 1, steps)]
        return chosen, np.concatenate(margins, axis=1).min(1) * min(self.temperature, 1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def random_draws(seed: int, name: str, sample: int, length: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for the bases of one generated sequence; the same wherever it is generated.

    Args:
        seed: of the run.
        name: of the prompt.
        sample: which of the sequences that continue it.
        length: how many numbers; more of them begin with the same.
    """
    key = hashlib.sha256(f"{seed}/{sample}/{name}".encode()).digest()
    raw = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")).random_raw(length)
    return (raw >> np.uint64(11)) * 2.0**-53


class BaseGenerator:
    """Continues prompts by a causal model, base by base: A, C, G and T only.

    A base is drawn given those before it: all of them at first, and where a sequence has reached the context of C
    bases, those from a multiple of C // 2 on, so that it always sees C // 2 at least.

    In float32 the bases do not depend on what else is in a batch: a choice that rounding could change is made by a
    pass of its sequence alone.

    Args:
        model: causal language model of Transformers with single bases as tokens, in `eval()`.
        tokenizer: its tokenizer.
        sampling: how bases are drawn.

    Raises:
        ValueError: if the tokens are not single bases.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling):
        self.tokens, self.sampling = BaseTokens.of(tokenizer), sampling
        self.reader = CausalReader(model, self.tokens)
        self.half = (context_length(model.config, tokenizer) - len(self.tokens.before)) // 2
        if self.half < 1:
            raise ValueError(f"expected a model that reads at least two bases, got {type(model).__name__}.")

    def with_sampling(self, sampling: Sampling) -> "BaseGenerator":
        """One of the same model that draws bases in another way; what was tried of the model is known to both."""
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def continued(self, prompts: Sequence[str], draws: np.ndarray, new: Sequence[int] | None = None) -> list[str]:
        """The new bases behind each prompt: the result of all `steps`."""
        steps = self.steps(prompts, draws, new)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return list(end.value)

    @torch.inference_mode()
    def steps(
        self, prompts: Sequence[str], draws: np.ndarray, new: Sequence[int] | None = None
    ) -> Generator[None, None, list[str]]:
        """A generator that computes a base of each sequence between two stops, and returns the new bases of each.

        Args:
            prompts: sequences of IUPAC codes; those that are not bases are read as N. An empty one begins with the
                model's own first token, or with a random base if it has none.
            draws: (prompts, new bases), uniform in [0, 1).
            new: how many new bases of each are wanted, if not all that there are draws for.

        Raises:
            InputError: if a prompt has other letters.
            ValueError: if the model gives NaN or infinity.
        """
        for number, prompt in enumerate(prompts):
            check_letters(prompt, f"prompt {number}")
        wanted = np.full(len(prompts), draws.shape[1]) if new is None else np.array(new)
        lengths = np.array([len(prompt) for prompt in prompts])
        is_padded = np.array([self._fits(*sizes) for sizes in zip(lengths, wanted, strict=True)], dtype=bool)
        are_alike = len(set(lengths)) == 1 == len(set(wanted))
        found = dict.fromkeys(range(len(prompts)), "")
        with fast_memory(self.reader.model):
            if are_alike or not self.reader.padding:
                is_padded[:] = False
            for rows, make in ((np.flatnonzero(is_padded), self._padded), (np.flatnonzero(~is_padded), self._moving)):
                if len(rows):
                    own = yield from make([prompts[row] for row in rows.tolist()], draws[rows], wanted[rows])
                    found.update(zip(rows.tolist(), own, strict=True))
        return list(found.values())

    def _fits(self, length: int, new: int) -> bool:
        """Whether a text and its new bases are in one window, and there is something to begin with."""
        return 0 < length + len(self.tokens.before) and length + new <= 2 * self.half

    def _padded(self, prompts: Sequence[str], draws: np.ndarray, new: np.ndarray) -> Generator[None, None, list[str]]:
        """The new bases of texts that fit into one window: padded in front, and left out when they are whole."""
        texts = [[*self.tokens.before, *self.tokens.encode(prompt)] for prompt in prompts]
        found, mask = self.reader.read_side_by_side(texts)
        rows = np.arange(len(texts))
        bases = np.array(self.tokens.bases)
        for step in range(int(new.max())):
            chosen, margin = self._choose(found.logits, draws[rows, step])
            for place in np.flatnonzero(margin < _MARGIN):
                alone = self.reader.read(torch.tensor([texts[rows[place]]], device=self.reader.device)).logits
                chosen[place] = self._choose(alone, draws[rows[place], step][None])[0][0]
            for number, token in zip(rows, bases[chosen], strict=True):
                texts[number].append(token)
            (kept,) = np.nonzero(new[rows] > step + 1)
            if len(kept) == 0:
                break
            yield
            cache = found.cache
            if len(kept) < len(rows):
                places = torch.from_numpy(kept).to(self.reader.device)
                cache, mask = branched(cache, places), mask[places]
            rows = rows[kept]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            ids = torch.from_numpy(bases[chosen[kept], None]).to(self.reader.device)
            found = self.reader.read(ids, cache, keeps_cache=True, mask=mask)
        ends = [len(self.tokens.before) + len(prompt) for prompt in prompts]
        return [self._text(np.array(text[end:], dtype=np.int64)) for text, end in zip(texts, ends, strict=True)]

    def _moving(
        self, prompts: Sequence[str], draws: np.ndarray, wanted: np.ndarray
    ) -> Generator[None, None, list[str]]:
        """The new bases of texts of any length, read in windows that move; the places of all move on together."""
        lengths = np.array([len(prompt) for prompt in prompts])
        rows, new = draws.shape
        total = int(lengths.max()) + new
        ids = np.full((rows, total), self.tokens.bases[0])
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = self.tokens.encode(prompt)
        place = int(lengths.min())
        if place == 0 and not self.tokens.before:
            self._place(ids, 0, lengths, (draws[:, 0] * len(BASES)).astype(int))
            place = 1
        while place < total:
            place = yield from self._fill_window(ids, place, lengths, draws)
        ends = lengths + wanted
        return [self._text(ids[row, lengths[row] : ends[row]]) for row in range(rows)]

    def _fill_window(
        self, ids: np.ndarray, place: int, lengths: np.ndarray, draws: np.ndarray
    ) -> Generator[None, None, int]:
        """Choose bases from `place` on until the window moves; returns where that is."""
        first, stop = max(0, (place // self.half - 1) * self.half), max(place // self.half + 1, 2) * self.half
        stop = min(stop, ids.shape[1])
        read, cache = first, None
        for here in range(place, stop):
            if not self.reader.can_continue:
                read = first
            found = self._read(ids[:, read:here], cache, self.reader.can_continue)
            read, cache = here, found.cache
            at = here - lengths  # among the new bases
            drawn = draws[np.arange(len(at)), at.clip(0, draws.shape[1] - 1)]
            chosen, margin = self._choose(found.logits, drawn)
            for row in np.flatnonzero((0 <= at) & (at < draws.shape[1]) & (margin < _MARGIN)):
                alone = self._read(ids[row : row + 1, first:here]).logits
                chosen[row] = self._choose(alone, drawn[row : row + 1])[0][0]
            self._place(ids, here, lengths, chosen)
            yield
        return stop

    def _read(self, ids: np.ndarray, cache: Any = None, keeps_cache: bool = False) -> Pass:
        """A pass over the next tokens; those in front of every sequence come first where there is no cache."""
        around = np.broadcast_to(np.array(self.tokens.before, dtype=np.int64), (len(ids), len(self.tokens.before)))
        whole = ids if cache is not None else np.concatenate([around, ids], axis=1)
        return self.reader.read(torch.from_numpy(whole).to(self.reader.device), cache, keeps_cache)

    def _choose(self, logits: torch.Tensor, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = logits[:, -1, list(self.tokens.bases)].double().cpu().numpy()
        check_finite(found, self.reader.model)
        return self.sampling.choose(found, draws)

    def _place(self, ids: np.ndarray, here: int, lengths: np.ndarray, digits: np.ndarray) -> None:
        """Write bases behind prompts that have ended."""
        ids[:, here] = np.where(here < lengths, ids[:, here], np.array(self.tokens.bases)[digits])

    def _text(self, ids: np.ndarray) -> str:
        letters = dict(zip(self.tokens.bases, BASES, strict=True))
        return "".join(letters[token] for token in ids.tolist())
