"""Embeddings of sequences of any length, by any model of Transformers."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..sequences.alphabet import check_letters, reverse_complement
from ..support.default_model import DEFAULT_MODEL
from ..support.errors import InputError
from ..support.progress import progress_bar
from .base_tokens import BaseTokens
from .hidden_states import TOKENS_AT_ONCE, HiddenStates
from .loaded_model import LoadedModel, load_model
from .long_sequences import Window, checked_overlap, windows_of
from .pooling import POOLINGS, pool

STRANDS = {"both": "+-", "forward": "+", "reverse": "-"}  # what a choice of strands reads
BATCHES_TOGETHER = 32  # whose sequences are sorted by length together
_RESULTS_ON_THE_WAY = 8  # batches whose results are fetched together, so that a GPU does not wait for each
Choice = tuple[int, str]  # a layer and a pooling
Advance = Callable[[int], Any]


Result = TypeVar("Result")


def _ignored(_tokens: int) -> None:
    pass


def _result_of(steps: Generator[int, None, Result], advance: Advance = _ignored) -> Result:
    """What all steps return; `advance` is called after each with what it gives."""
    while True:
        try:
            advance(next(steps))
        except StopIteration as end:
            return end.value


class Excerpt(NamedTuple):
    """Tokens of a sequence in the order in which they are read, and which of them are wanted.

    Args:
        ids: of the wanted tokens and of those around them that windows need.
        offset: place of the first id in the sequence.
        start, end: the wanted tokens' places in the sequence.
        length: tokens of the sequence.
    """

    ids: np.ndarray
    offset: int
    start: int
    end: int
    length: int

    @classmethod
    def whole(cls, ids: np.ndarray) -> "Excerpt":
        """All of a sequence."""
        return cls(ids, 0, 0, len(ids), len(ids))

    def pooled(self, pooling: str) -> tuple[int, int]:
        """Start and end of those wanted tokens that a pooling reads."""
        place = {"last": self.length - 1, "centre": (self.length - 1) // 2}.get(pooling)
        if place is None:
            return self.start, self.end
        return max(self.start, place), min(self.end, place + 1)


class SequenceEncoder:
    """A model and its tokenizer, as a function of sequences.

    Args:
        model: name or folder of any model that `AutoModel` loads; or a model without a head that is loaded.
        revision, trust_remote_code: as for `from_pretrained`.
        dtype: of the weights and activations.
        device: where to run; the first GPU if there is one, by default.
        batch_tokens: most tokens that the model reads at once, padding included.
        context: tokens of a sequence in one window, if not as many as the model can read.
        overlap: tokens that a window shares with the next one; half the context by default.

    Sequences that are longer than the context are read in overlapping windows, as `long_sequences` describes.

    Raises:
        ValueError: if the model cannot be used, or has no such context.
        OSError: if there is no such model.

    Example:

    >>> from gengram.inference.embeddings import SequenceEncoder
    >>> SequenceEncoder(device="cpu").vectors(["ACGTTGCA", "ttgacaGGCTA"]).shape
    (2, 192)
    """

    def __init__(
        self,
        model: str | LoadedModel = DEFAULT_MODEL,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
        batch_tokens: int = TOKENS_AT_ONCE,
        context: int | None = None,
        overlap: int | None = None,
    ):
        loaded = model
        if not isinstance(loaded, LoadedModel):
            loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
            loaded = load_model(loaded, dtype=dtype, device=device, **loading)
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, loaded.device
        self.tokens = _tokens_of(self.tokenizer)
        self.context = context_of(loaded.context, self.tokens, context)
        self.overlap = checked_overlap(self.context, overlap)
        self.batch_tokens = batch_tokens
        self._states = HiddenStates(loaded, self.tokens, batch_tokens)
        self.layers = self._states.layers  # the embedding is layer 0

    def vectors(
        self, sequences: Sequence[str], layer: int = -1, pooling: str = "mean", strands: str = "both"
    ) -> np.ndarray | list[np.ndarray]:
        """Embeddings of DNA, (sequences, hidden) float32; with pooling `none` a list of (bases, hidden).

        Args:
            sequences: A, C, G, T in either case; other IUPAC codes are read as N.
            layer: 0 is the embedding, -1 the last.
            pooling: over the bases of a sequence, in the order of reading: their `mean` or `max`, the `last` base, the
                one in the `centre` (of two the first), or `none`: a vector for each base.
            strands: `both` is the mean of the two; `forward`; or `reverse`, the reverse complement. For `none` bases
                are in the order of the sequence that was given.

        Raises:
            ValueError: if an argument cannot be used, the model's tokens are not single bases, or a sequence is empty
                or has other letters.
        """
        if pooling != "none":
            return _result_of(self.vector_steps(sequences, layer, pooling, strands))
        excerpts, read = self._on_strands(sequences, strands), STRANDS[strands]
        found = list(self.base_vectors(excerpts, self.layer(layer)))
        return [mean_of_strands(found[start : start + len(read)], read) for start in range(0, len(found), len(read))]

    def vector_steps(
        self, sequences: Sequence[str], layer: int, pooling: str, strands: str
    ) -> Generator[int, None, np.ndarray]:
        """A generator that stops after each pass of the model, and returns the `vectors`, (sequences, hidden)."""
        excerpts = self._on_strands(sequences, strands)
        (pooled,) = (yield from self.pooling_steps(excerpts, [(self.layer(layer), pooling)])).values()
        return pooled.reshape(len(sequences), len(STRANDS[strands]), pooled.shape[1]).mean(axis=1).astype(np.float32)

    def tokens_read(self, length: int, pooling: str, strands: str) -> int:
        """How many tokens the model reads for the vector of so many bases: on each strand, in windows that overlap."""
        excerpt = Excerpt(np.empty(0, dtype=np.int64), 0, 0, length, length)
        windows = [own.window for own in self._windows([excerpt], {pooling})]
        return len(STRANDS[strands]) * sum(window.end - window.start for window in windows)

    def _on_strands(self, sequences: Sequence[str], strands: str) -> list[Excerpt]:
        """Every sequence on each of the strands."""
        if not isinstance(self.tokens, BaseTokens):
            BaseTokens.of(self.tokenizer)  # says why not
        if strands not in STRANDS:
            raise ValueError(f"strands: expected {', '.join(STRANDS)}, got {strands!r}.")
        for number, sequence in enumerate(sequences):
            check_dna(sequence, f"sequence {number}")
        return [self.excerpt(sequence, strand) for sequence in sequences for strand in STRANDS[strands]]

    def embed(
        self,
        sequences: Sequence[str],
        choices: Sequence[Choice],
        both_strands: bool = True,
        progress: str | None = None,
    ) -> dict[Choice, np.ndarray]:
        """Embeddings by (layer, pooling), each (sequences, hidden), float32.

        Args:
            sequences: DNA, also for models whose tokens are not single bases.
            choices: layers and poolings, as `vectors` has them.
            both_strands: embed the reverse complement too and put it behind: (sequences, 2 * hidden). A causal model
                sees only what is before a base; so it sees both sides.
            progress: what a bar is named; no bar by default.

        Raises:
            ValueError: if a layer or pooling does not exist.
        """
        texts = list(sequences) + ([reverse_complement(text) for text in sequences] if both_strands else [])
        excerpts = [Excerpt.whole(self.tokens.encode(text)) for text in texts]
        wanted = {(layer, pooling): (self.layer(layer), pooling) for layer, pooling in choices}
        with progress_bar(progress, "bp", total=sum(excerpt.length for excerpt in excerpts)) as bar:
            found = self.pooled(excerpts, list(wanted.values()), bar.update)
        vectors = {choice: found[own].astype(np.float32) for choice, own in wanted.items()}
        if not both_strands:
            return vectors
        return {choice: np.concatenate(np.split(both, 2), axis=1) for choice, both in vectors.items()}

    def layer(self, number: int) -> int:
        """A layer from 0 (the embedding) on, also of a negative number.

        Raises:
            ValueError: if there is none.
        """
        return self._states.layer(number)

    def excerpt(self, sequence: str, strand: str = "+") -> Excerpt:
        """All of a sequence, on either strand."""
        return Excerpt.whole(self.tokens.encode(sequence if strand == "+" else reverse_complement(sequence)))

    def pooled(
        self, excerpts: Sequence[Excerpt], choices: Sequence[Choice], advance: Advance = _ignored
    ) -> dict[Choice, np.ndarray]:
        """For each (layer, pooling) a vector of each excerpt's wanted tokens: (excerpts, hidden) float64.

        It is NaN where the pooling reads none of them, as `last` where only the first tokens are wanted.

        Args:
            excerpts: what to read.
            choices: layers from 0 on, and poolings.
            advance: called after every batch with the number of tokens that are done.

        Raises:
            ValueError: if a pooling does not exist.
        """
        return _result_of(self.pooling_steps(excerpts, choices), advance)

    def pooling_steps(
        self, excerpts: Sequence[Excerpt], choices: Sequence[Choice]
    ) -> Generator[int, None, dict[Choice, np.ndarray]]:
        """A generator that gives after each batch the number of tokens that are done, and returns what is `pooled`."""
        for _, pooling in choices:
            if pooling not in POOLINGS:
                raise ValueError(f"expected a pooling of {', '.join(POOLINGS)}, got {pooling!r}.")
        windows = self._windows(excerpts, {pooling for _, pooling in choices})
        sums = {choice: _Vectors(len(excerpts), self._states.width, choice[1]) for choice in choices}
        layers = sorted({layer for layer, _ in choices})
        for rows, states in self._of(excerpts, windows, layers):
            for layer, pooling in choices:
                ranges = [_kept(windows[row], excerpts[windows[row].excerpt], pooling) for row in rows]
                places = [place for place, (start, end) in enumerate(ranges) if start < end]
                if places:
                    bounds = torch.tensor([ranges[place] for place in places], device=self.device)
                    pooled = _pool_ranges(states[layer][places], bounds, pooling)
                    owners = [windows[rows[place]].excerpt for place in places]
                    counts = [ranges[place][1] - ranges[place][0] for place in places]
                    sums[layer, pooling].add(owners, counts, pooled)
            yield _tokens_kept(windows, rows)
        return {choice: vectors.result() for choice, vectors in sums.items()}

    def base_vectors(self, excerpts: Sequence[Excerpt], layer: int, advance: Advance = _ignored) -> list[np.ndarray]:
        """A vector of each wanted token of each excerpt: (tokens, hidden) float32; `advance` as in `pooled`."""
        windows = self._windows(excerpts, {"none"})
        found: dict[int, np.ndarray] = {}
        for rows, states in self._of(excerpts, windows, [layer]):
            vectors = states[layer].float().cpu().numpy()
            for place, row in enumerate(rows):
                number, window = windows[row]
                start, end = excerpts[number].start, excerpts[number].end
                if number not in found:
                    found[number] = np.empty((end - start, vectors.shape[-1]), dtype=np.float32)
                found[number][window.keep_start - start : window.keep_end - start] = vectors[place, window.kept()]
            advance(_tokens_kept(windows, rows))
        return [found[number] for number in range(len(excerpts))]

    def _windows(self, excerpts: Sequence[Excerpt], poolings: set[str]) -> list["_OwnWindow"]:
        """The windows that hold what the poolings read."""
        found = []
        for number, excerpt in enumerate(excerpts):
            ranges = [excerpt.pooled(pooling) for pooling in poolings]
            ranges = [(start, end) for start, end in ranges if start < end]
            if not ranges:
                continue
            start, end = min(start for start, _ in ranges), max(end for _, end in ranges)
            both_sides = self._states.sees_both_sides
            windows = windows_of(
                excerpt.length, self.context, self.overlap, both_sides=both_sides, start=start, end=end
            )
            found += [_OwnWindow(number, window) for window in windows]
        return found

    def _of(
        self, excerpts: Sequence[Excerpt], windows: Sequence["_OwnWindow"], layers: Sequence[int]
    ) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
        ids = []
        for number, window in windows:
            first = excerpts[number].offset
            ids.append(excerpts[number].ids[window.start - first : window.end - first])
        yield from self._states.of(ids, layers)


def embed_sequences(
    sequences: Iterable[str],
    encoder: SequenceEncoder,
    layer: int = -1,
    pooling: str = "mean",
    strands: str = "both",
) -> Iterator[np.ndarray]:
    """The vectors of a stream of sequences, one after the other, in bounded memory; see `SequenceEncoder.vectors`."""
    waiting: list[str] = []
    bases = 0
    for sequence in sequences:
        waiting.append(sequence)
        bases += len(sequence)
        if bases >= BATCHES_TOGETHER * encoder.batch_tokens:
            yield from encoder.vectors(waiting, layer, pooling, strands)
            waiting, bases = [], 0
    yield from encoder.vectors(waiting, layer, pooling, strands) if waiting else ()


def excerpt_of(tokens: BaseTokens, text: str, strand: str, offset: int, start: int, end: int, length: int) -> Excerpt:
    """A part of a sequence on either strand, by places on the forward strand.

    Args:
        tokens: of the model.
        text: letters of the forward strand.
        strand: `+`, or `-` for the reverse complement.
        offset, start, end, length: as `Excerpt` has them, of the forward strand.
    """
    if strand == "+":
        return Excerpt(tokens.encode(text), offset, start, end, length)
    ids = tokens.encode(reverse_complement(text))
    return Excerpt(ids, length - offset - len(text), length - end, length - start, length)


def mean_of_strands(vectors: Sequence[np.ndarray], strands: str) -> np.ndarray:
    """Vectors of the bases of each strand in its own order -> their mean in that of the forward strand, float32."""
    onwards = [own[::-1] if strand == "-" else own for own, strand in zip(vectors, strands, strict=True)]
    return np.ascontiguousarray(onwards[0] if len(onwards) == 1 else (onwards[0] + onwards[1]) / 2)


def check_dna(sequence: str, where: str, first: int = 0) -> None:
    """Refuse what has no embedding.

    Args:
        sequence: or a part of it.
        where: what errors begin with.
        first: place of the part's first base.

    Raises:
        InputError: if a sequence is empty, or has a character that is no code of DNA or RNA.
    """
    if not sequence:
        raise InputError(f"{where}: expected bases, got an empty sequence, which has no embedding; remove it.")
    check_letters(sequence, where, first)


def context_of(most_tokens: int, tokens: Any, context: int | None = None) -> int:
    """Tokens of a sequence that are read at once: `context`, or as many as the model can read.

    Args:
        most_tokens: of the model, those around a sequence included.
        tokens: of its tokenizer.
        context: what is asked for.

    Raises:
        ValueError: if it is more than the model can read.
    """
    most = most_tokens - len(tokens.before) - len(tokens.after)
    if context is None:
        return most
    if not 1 <= context <= most:
        raise ValueError(f"expected a context of 1 to {most:,} bases, as the model reads at once, got {context:,}.")
    return context


class _OwnWindow(NamedTuple):
    """A window of an excerpt."""

    excerpt: int
    window: Window


def _tokens_kept(windows: Sequence[_OwnWindow], rows: Sequence[int]) -> int:
    """How many tokens are taken from these windows."""
    return sum(windows[row].window.keep_end - windows[row].window.keep_start for row in rows)


def _kept(own: _OwnWindow, excerpt: Excerpt, pooling: str) -> tuple[int, int]:
    """Which tokens of a window are pooled, as places in it; none if the end is not behind the start."""
    start, end = excerpt.pooled(pooling)
    window = own.window
    return max(start, window.keep_start) - window.start, min(end, window.keep_end) - window.start


def _pool_ranges(states: torch.Tensor, ranges: torch.Tensor, pooling: str) -> torch.Tensor:
    """(batch, length, hidden) and starts and ends (batch, 2) -> (batch, hidden) float32."""
    places = torch.arange(states.shape[1], device=states.device)
    mask = (places >= ranges[:, :1]) & (places < ranges[:, 1:])  # (batch, length)
    return pool(states.float(), mask, pooling)


class _Vectors:
    """Pooled vectors of excerpts, put together from those of their windows in float64."""

    def __init__(self, excerpts: int, width: int, pooling: str):
        self._pooling = pooling
        self._counts = np.zeros(excerpts, dtype=np.int64)
        self._totals = np.full((excerpts, width), -np.inf if pooling == "max" else 0.0)
        self._waiting: list[tuple[list[int], list[int], torch.Tensor]] = []

    def add(self, excerpts: list[int], counts: list[int], pooled: torch.Tensor) -> None:
        """Vectors of windows, (windows, hidden), of so many tokens each; they may still be on their way to us."""
        self._waiting.append((excerpts, counts, pooled))
        if len(self._waiting) > _RESULTS_ON_THE_WAY:
            self._collect()

    def _collect(self) -> None:
        for excerpts, counts, pooled in self._waiting:
            vectors = pooled.cpu().numpy().astype(np.float64)
            if self._pooling == "max":
                np.maximum.at(self._totals, excerpts, vectors)
            else:
                np.add.at(self._totals, excerpts, vectors * np.array(counts)[:, None])
            np.add.at(self._counts, excerpts, counts)
        self._waiting = []

    def result(self) -> np.ndarray:
        """(excerpts, hidden), NaN for excerpts without tokens."""
        self._collect()
        divisors = np.maximum(self._counts, 1)[:, None] if self._pooling != "max" else 1
        return np.where(self._counts[:, None] > 0, self._totals / divisors, np.nan)


class _AnyTokens:
    """Tokens of a tokenizer whose tokens are not single bases."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        own = tokenizer("ACGT", add_special_tokens=False)["input_ids"]
        whole = tokenizer("ACGT")["input_ids"]
        first = next((i for i in range(len(whole)) if whole[i : i + len(own)] == own), 0)
        self.before, self.after = tuple(whole[:first]), tuple(whole[first + len(own) :])
        self.pad = tokenizer.pad_token_id

    def encode(self, sequence: str) -> np.ndarray:
        """Ids without those around them, (length,) int64."""
        return np.array(self._tokenizer(sequence, add_special_tokens=False)["input_ids"], dtype=np.int64)


def _tokens_of(tokenizer: Any) -> Any:
    try:
        return BaseTokens.of(tokenizer)
    except ValueError:
        return _AnyTokens(tokenizer)
