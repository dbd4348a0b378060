"""One model, as what a server does with it: continue, embed and compare sequences."""

import base64
import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...sequences.alphabet import check_letters
from ...support.errors import InputError
from ..base_tokens import BaseTokens
from ..effects import Change, StrandEffects
from ..embeddings import STRANDS, SequenceEncoder, check_dna
from ..generation import BaseGenerator, Sampling, Wanted, random_draws
from ..loaded_model import LoadedModel, context_length, head_of
from ..window_effects import WindowEffects
from .batching import Results, Work


class Continuation(NamedTuple):
    """New bases behind a prompt."""

    prompt: str
    new: int
    seed: int
    sample: int


@dataclass(frozen=True)
class EmbeddingChoice:
    """Which vector of a sequence."""

    layer: int
    pooling: str
    strands: str


class ServedModel:
    """A language model with its weights in memory once; `compute` is for one thread.

    Args:
        loaded: with the head that it was saved with.
        batch_tokens: most tokens, padding included, that are read at once.

    Raises:
        ValueError: if it is no causal or masked language model, or its tokens are not single bases.
    """

    def __init__(self, loaded: LoadedModel, batch_tokens: int):
        self.loaded, self.batch_tokens = loaded, batch_tokens
        self.head = head_of(loaded.model.config)
        if self.head is None:
            raise ValueError("expected a causal or a masked language model, got one that is neither.")
        tokens = BaseTokens.of(loaded.tokenizer)
        self.context = context_length(loaded.model.config, loaded.tokenizer) - len(tokens.before) - len(tokens.after)
        body = LoadedModel(loaded.model.base_model, loaded.tokenizer)
        self._encoder = SequenceEncoder(body, batch_tokens=batch_tokens)
        self._effects: dict[str, WindowEffects] = {}

    @functools.cached_property
    def _generator(self) -> BaseGenerator:
        """Kept, since it tries what the model can do when it is first used."""
        return BaseGenerator(self.loaded.model, self.loaded.tokenizer, Sampling())

    def continuations(self, prompt: str, new: int, sampling: Sampling, seed: int, number: int) -> list[Work]:
        """The work of `number` sequences of `new` bases behind a prompt.

        Raises:
            InputError: if the model is a masked one, or the prompt has letters that are no DNA.
        """
        if self.head == "masked":
            raise InputError("this model predicts masked bases from both sides, so it cannot continue a sequence.")
        check_letters(prompt, "prompt")
        wanted = [Continuation(prompt, new, seed, sample) for sample in range(1, number + 1)]
        return [Work(("continue", sampling), each, len(prompt) + new, has_steps=True) for each in wanted]

    def embedding(self, sequence: str, choice: EmbeddingChoice) -> Work:
        """The work of a sequence's vector, (hidden,) float32.

        Raises:
            ValueError: if there is no such layer, or the sequence is empty or no DNA.
        """
        check_dna(sequence, "input")
        self._encoder.layer(choice.layer)
        tokens = self._encoder.tokens_read(len(sequence), choice.pooling, choice.strands)
        return Work(("embed", choice), sequence, *self._in_passes(tokens))

    def effect(self, reference: str, alternative: str, strands: str) -> Work:
        """The work of comparing two windows of one length: its result are `StrandEffects`.

        Raises:
            InputError: if they have no letters, other letters, or other lengths.
        """
        for name, text in (("reference", reference), ("alternative", alternative)):
            check_letters(text, name)
        if len(reference) != len(alternative) or len(reference) < 2:
            raise InputError(
                f"expected two windows of one length, 2 bases or more, got {len(reference)} and {len(alternative)}; "
                "a deletion brings in bases from the right, an insertion pushes some out."
            )
        if len(reference) > self.context:
            raise InputError(f"expected at most {self.context} bases, which the model can read, got {len(reference)}.")
        change = _change(reference.upper(), alternative.upper())
        tokens, has_steps = self._in_passes(2 * len(reference) * len(STRANDS[strands]))
        parts = ("forward", "reverse") if has_steps and strands == "both" else (strands,)
        return Work(("score", parts), change, tokens, has_steps)

    def _in_passes(self, tokens: int) -> tuple[int, bool]:
        """The tokens of a work that are in memory at once, and whether it takes several passes."""
        return min(tokens, self.batch_tokens), tokens > self.batch_tokens

    def compute(self, key: Any, payloads: list[Any], is_wanted: Wanted) -> Generator[Results, None, None]:
        """The results of works of one key: new bases, vectors, or effects. Stops between bases, and between passes."""
        kind, *options = key
        if kind == "continue":
            yield from self._continued(options[0], payloads, is_wanted)
        elif kind == "embed":
            yield from self._embedded(options[0], payloads)
        else:
            yield from self._compared(options[0], payloads)

    def _continued(
        self, sampling: Sampling, wanted: Sequence[Continuation], is_wanted: Wanted
    ) -> Generator[Results, None, None]:
        new = [each.new for each in wanted]
        draws = np.stack([random_draws(each.seed, each.prompt, each.sample, max(new)) for each in wanted])
        generator = self._generator.with_sampling(sampling)
        yield from generator.steps([each.prompt for each in wanted], draws, new, is_wanted)

    def _embedded(self, choice: EmbeddingChoice, sequences: Sequence[str]) -> Generator[Results, None, None]:
        steps = self._encoder.vector_steps(sequences, choice.layer, choice.pooling, choice.strands)
        vectors = yield from _without_results(steps)
        yield list(enumerate(vectors))

    def _compared(self, parts: Sequence[str], changes: Sequence[Change]) -> Generator[Results, None, None]:
        """Strand by strand, or both at once."""
        found: list[list[StrandEffects]] = []
        for strands in parts:
            found.append([effects for effects in self._effects_of(strands).of(changes) if effects is not None])
            if len(found) < len(parts):
                yield []
        merged = [StrandEffects(first.forward, last.reverse) for first, last in zip(found[0], found[-1], strict=True)]
        yield list(enumerate(merged))

    def _effects_of(self, strands: str) -> WindowEffects:
        if strands not in self._effects:
            loaded, is_masked = self.loaded, self.head == "masked"
            self._effects[strands] = WindowEffects(
                loaded.model, loaded.tokenizer, strands=strands, is_masked=is_masked, tokens_per_pass=self.batch_tokens
            )
        return self._effects[strands]


def _without_results(steps: Generator[int, None, np.ndarray]) -> Generator[Results, None, np.ndarray]:
    """The same steps, which give no results but the last."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        yield []


def _change(reference: str, alternative: str) -> Change:
    """Two windows, as a change of all that lies between the first and the last letter that differ."""
    places = [place for place, (one, other) in enumerate(zip(reference, alternative, strict=True)) if one != other]
    first, last = (places[0], places[-1]) if places else (0, 0)
    return Change(reference, alternative, first, last - first + 1, last - first + 1)


def as_base64(vector: np.ndarray) -> str:
    """Little-endian float32, as clients of OpenAI ask for vectors."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def as_list(vector: np.ndarray) -> list[float]:
    """Numbers that JSON holds."""
    return [float(number) for number in vector]
