"""Generation of bases and nothing else."""

import copy
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
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
# float32 probabilities differ by in other batches, and rare: about one base in a thousand. In bfloat16 and float16 no
# margin would do: where a rounding chooses another expert, probabilities were measured to differ by up to 0.1.
_MARGIN = 1e-4

Whole = tuple[int, str]  # which of the sequences, and all its new bases
Wanted = Callable[[int], bool]
Steps = Callable[[Sequence[str], np.ndarray, np.ndarray, Wanted], Generator[list[Whole], None, None]]


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
        ranked = np.take_along_axis(_softmax(logits, self.temperature or 1), order, axis=1)
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


def _softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    with np.errstate(over="ignore"):  # of a tiny temperature: minus infinity is right there
        powers = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
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
        """The new bases behind each prompt: what all `steps` give."""
        found = dict(whole for step in self.steps(prompts, draws, new) for whole in step)
        return [found[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def steps(
        self,
        prompts: Sequence[str],
        draws: np.ndarray,
        new: Sequence[int] | None = None,
        is_wanted: Wanted = lambda row: True,
    ) -> Generator[list[Whole], None, None]:
        """A generator that computes a base of each sequence between two stops.

        Args:
            prompts: sequences of IUPAC codes; those that are not bases are read as N. An empty one begins with the
                model's own first token, or with a random base if it has none.
            draws: (prompts, new bases), uniform in [0, 1).
            new: how many new bases of each are wanted, if not all that there are draws for.
            is_wanted: whether a sequence still is; one that is not leaves the others at the next step.

        Yields:
            of the sequences that have just become whole: which prompt they continue, and all their new bases.

        Raises:
            InputError: if a prompt has other letters.
            ValueError: if the model gives NaN or infinity.
        """
        for number, prompt in enumerate(prompts):
            check_letters(prompt, f"prompt {number}")
        wanted = np.full(len(prompts), draws.shape[1]) if new is None else np.array(new)
        with fast_memory(self.reader.model):
            for make, group in self._groups(np.array([len(prompt) for prompt in prompts]), wanted):
                rows = [row for row in group if is_wanted(row)]
                if not rows:
                    continue
                steps = make([prompts[row] for row in rows], draws[rows], wanted[rows], _of_rows(is_wanted, rows))
                for whole in steps:
                    yield [(rows[place], text) for place, text in whole]

    def _groups(self, lengths: np.ndarray, new: np.ndarray) -> Iterator[tuple[Steps, list[int]]]:
        """Prompts that are continued together, and how.

        Those that are read in windows move on together from where the shortest prompt ends. So a prompt is in a group
        of its own if it ends further behind than either it or those before it have new bases.
        """
        moving = list(range(len(lengths)))
        if self.reader.padding and not len(set(lengths)) == 1 == len(set(new)):
            padded = [row for row in moving if self._fits(lengths[row], new[row])]
            moving = [row for row in moving if row not in set(padded)]
            if padded:
                yield self._padded, padded
        groups: list[list[int]] = []
        most = 0
        for row in sorted(moving, key=lambda row: lengths[row]):
            if not groups or lengths[row] - lengths[groups[-1][0]] > min(most, new[row]):
                groups.append([])
                most = 0
            groups[-1].append(row)
            most = max(most, new[row])
        for group in sorted(groups, key=lambda group: max(new[group])):  # those that end soon first
            yield self._moving, group

    def _fits(self, length: int, new: int) -> bool:
        """Whether a text and its new bases are in one window, and there is something to begin with."""
        return 0 < length + len(self.tokens.before) and length + new <= 2 * self.half

    def _padded(
        self, prompts: Sequence[str], draws: np.ndarray, new: np.ndarray, is_wanted: Wanted
    ) -> Generator[list[Whole], None, None]:
        """The new bases of texts that fit into one window: padded in front, and left out when they are whole."""
        texts = [[*self.tokens.before, *self.tokens.encode(prompt)] for prompt in prompts]
        starts = [len(text) for text in texts]
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
            yield [(row, self._text(texts[row][starts[row] :])) for row in rows[new[rows] == step + 1].tolist()]
            kept = _rows_that_go_on(rows, new[rows] > step + 1, is_wanted)
            if len(kept) == 0:
                return
            cache = found.cache
            if len(kept) < len(rows):
                places = torch.from_numpy(kept).to(self.reader.device)
                cache, mask = branched(cache, places), mask[places]
            rows = rows[kept]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            ids = torch.from_numpy(bases[chosen[kept], None]).to(self.reader.device)
            found = self.reader.read(ids, cache, keeps_cache=True, mask=mask)

    def _moving(
        self, prompts: Sequence[str], draws: np.ndarray, new: np.ndarray, is_wanted: Wanted
    ) -> Generator[list[Whole], None, None]:
        """The new bases of texts of any length, read in windows that move; the places of all move on together."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = lengths + new
        ids = np.full((len(prompts), int(ends.max())), self.tokens.bases[0])
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = self.tokens.encode(prompt)
        rows = np.arange(len(prompts))
        first, read, cache = 0, 0, None
        for here in range(int(lengths.min()), ids.shape[1]):
            start = max(0, (here // self.half - 1) * self.half)
            if start != first or cache is None:
                first, read, cache = start, start, None
            at = here - lengths[rows]  # among the new bases
            drawn = draws[rows, at.clip(0, draws.shape[1] - 1)]
            if here == 0 and not self.tokens.before:  # there is nothing to read
                chosen = (drawn * len(BASES)).astype(int)
            else:
                found = self._read(ids[rows, read:here], cache, self.reader.can_continue)
                read, cache = here, found.cache
                chosen, margin = self._choose(found.logits, drawn)
                for place in np.flatnonzero((at >= 0) & (margin < _MARGIN)):
                    alone = self._read(ids[rows[place : place + 1], first:here]).logits
                    chosen[place] = self._choose(alone, drawn[place : place + 1])[0][0]
            ids[rows, here] = np.where(at < 0, ids[rows, here], np.array(self.tokens.bases)[chosen])
            whole = rows[ends[rows] == here + 1].tolist()
            yield [(row, self._text(ids[row, lengths[row] : ends[row]].tolist())) for row in whole]
            kept = _rows_that_go_on(rows, ends[rows] > here + 1, is_wanted)
            if len(kept) == 0:
                return
            if len(kept) < len(rows):
                if cache is not None:
                    cache = branched(cache, torch.from_numpy(kept).to(self.reader.device))
                rows = rows[kept]

    def _read(self, ids: np.ndarray, cache: Any = None, keeps_cache: bool = False) -> Pass:
        """A pass over the next tokens; those in front of every sequence come first where there is no cache."""
        around = np.broadcast_to(np.array(self.tokens.before, dtype=np.int64), (len(ids), len(self.tokens.before)))
        whole = ids if cache is not None else np.concatenate([around, ids], axis=1)
        return self.reader.read(torch.from_numpy(whole).to(self.reader.device), cache, keeps_cache)

    def _choose(self, logits: torch.Tensor, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = logits[:, -1, list(self.tokens.bases)].double().cpu().numpy()
        check_finite(found, self.reader.model)
        return self.sampling.choose(found, draws)

    def _text(self, ids: Sequence[int]) -> str:
        letters = dict(zip(self.tokens.bases, BASES, strict=True))
        return "".join(letters[token] for token in ids)


def _of_rows(is_wanted: Wanted, rows: Sequence[int]) -> Wanted:
    """Whether a sequence is wanted, by its place among `rows`."""
    return lambda place: is_wanted(rows[place])


def _rows_that_go_on(rows: np.ndarray, are_longer: np.ndarray, is_wanted: Wanted) -> np.ndarray:
    """Places of the rows that have further bases to come, which somebody wants."""
    return np.flatnonzero([longer and is_wanted(row) for row, longer in zip(rows.tolist(), are_longer, strict=True)])
