"""Examples of token ids, made of documents: windows, or blocks that are packed full."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..sequences.windows import window_bounds
from ..tokenization.tokenization_gengram import GengramTokenizer
from .documents import Document
from .window_options import WindowOptions


@dataclass
class SplitCount:
    """What went into one split."""

    examples: int = 0
    tokens: int = 0
    bases_left_over: int = 0  # of the last block, or of windows that were too short or not kept


class ExampleStream:
    """Turns documents of one split into examples: ids (uint8) and origins, see `genome_dataset.features`.

    Args:
        options: how documents are cut.
        keep: share of the examples to keep.
        count: filled with what the split gets.
        generator: draws what is kept.
    """

    def __init__(self, options: WindowOptions, keep: float, count: SplitCount, generator: np.random.Generator):
        self.options, self.keep, self.count, self.generator = options, keep, count, generator
        tokenizer = GengramTokenizer()
        rows = tokenizer([chr(code) for code in range(128)], add_special_tokens=False)["input_ids"]
        self.ids_of_letters = bytes(row[0] for row in rows) + bytes([int(tokenizer.unk_token_id)]) * 128
        self.end_of_document = bytes([tokenizer.get_vocab()["<EOD>"]])
        self.waiting: list[bytes] = []  # of a packed block that is not full yet
        self.origins: list[str] = []
        self.missing = options.length  # tokens of that block

    def examples(self, document: Document) -> Iterator[dict[str, Any]]:
        """What the document completes."""
        make = self._packed if self.options.packed else self._windows
        for strand in "+-" if self.options.both_strands else "+":
            for ids, origin in make(document, strand):
                if self.keep < 1 and self.generator.random() >= self.keep:
                    self.count.bases_left_over += len(ids)
                    continue
                self.count.examples += 1
                self.count.tokens += len(ids)
                yield {"input_ids": np.frombuffer(ids, dtype=np.uint8), "origin": origin}

    def end(self) -> None:
        """No document follows; what waits is left over."""
        self.count.bases_left_over += sum(map(len, self.waiting))

    def _ids(self, document: Document, left: int, right: int, strand: str) -> bytes:
        return document.text(left, right, strand).encode("ascii").translate(self.ids_of_letters)

    def _windows(self, document: Document, strand: str) -> Iterator[tuple[bytes, list[str]]]:
        options, size = self.options, len(document)
        right = 0
        for left, right in window_bounds(0, size, options.length, options.stride or options.length, options.shortest):
            yield self._ids(document, left, right, strand), [document.origin(left, right, strand)]
        self.count.bases_left_over += size - right

    def _packed(self, document: Document, strand: str) -> Iterator[tuple[bytes, list[str]]]:
        left, size = 0, len(document)
        if size < self.options.shortest:
            self.count.bases_left_over += size
            return
        while left < size:
            right = min(left + self.missing, size)
            self.origins.append(document.origin(left, right, strand))
            yield from self._add(self._ids(document, left, right, strand))
            left = right
        yield from self._add(self.end_of_document)

    def _add(self, ids: bytes) -> Iterator[tuple[bytes, list[str]]]:
        """Adds at most `missing` ids to the block; gives it back if it is full."""
        self.waiting.append(ids)
        self.missing -= len(ids)
        if self.missing == 0:
            block = b"".join(self.waiting), self.origins
            self.waiting, self.origins, self.missing = [], [], self.options.length
            yield block
