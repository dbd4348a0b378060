"""Documents: the pieces of records between gaps, one at a time, of any length in bounded memory."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from ..sequences.alphabet import reverse_complement
from ..sequences.letter_counts import FOREIGN
from ..sequences.pieces import SequencePiece
from .split_rules import DROPPED, NO_RULE, Part, SplitRule, cut_record, no_rule_error

IN_MEMORY = 1 << 24  # bases of a document; longer ones lie in a temporary file

_AT_ONCE = 1 << 20


class Document:
    """A piece between gaps: bases `start` to `end` of a record (0-based and half-open), as they were read but for the
    case of N.

    Args:
        record: name of the record.
        start: of its first base in the record.
        folder: where its bases lie if they are many; None is the system's folder for temporary files.
    """

    def __init__(self, record: str, start: int, folder: Path | None):
        self.record, self.start, self.end = record, start, start
        self._folder = folder
        self._bases = bytearray()  # the last ones if there is a file, else all
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self.end - self.start

    def append(self, text: str) -> None:
        """Add bases at its end."""
        self._bases += text.encode("ascii")
        self.end += len(text)
        if len(self._bases) > IN_MEMORY:
            if self._file is None:
                self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=self._folder))
            self._file.write(self._bases)
            self._bases.clear()

    def text(self, left: int, right: int, strand: str) -> str:
        """Bases `left` to `right` of the document, on `-` of its reverse complement."""
        if strand == "-":
            return reverse_complement(self.text(len(self) - right, len(self) - left, "+"))
        if self._file is None:
            return self._bases[left:right].decode("ascii")
        self._file.write(self._bases)
        self._bases.clear()
        self._file.seek(left)
        found = self._file.read(right - left)
        self._file.seek(0, 2)
        return found.decode("ascii")

    def origin(self, left: int, right: int, strand: str) -> str:
        """Where the bases `left` to `right` of a strand lie on the forward strand of the record."""
        start, end = (left, right) if strand == "+" else (len(self) - right, len(self) - left)
        return f"{self.record}:{self.start + start}-{self.start + end}({strand})"

    def close(self) -> None:
        """Give its memory and its file back."""
        self._bases.clear()
        if self._file is not None:
            self._file.close()


class DocumentCutter:
    """Cuts records of any length where there are more than `longest_gap` N, or characters that are not DNA.

    Shorter runs of N stay inside a document; at its ends they are cut off: the streaming counterpart of
    `sequences.windows.runs_between_gaps`.

    Args:
        longest_gap: N that may stay.
        cut_foreign: whether characters that are not IUPAC codes end a document; otherwise they stay in it.
        folder: for documents too long for memory.
    """

    def __init__(self, longest_gap: int, cut_foreign: bool, folder: Path | None):
        gap = f"[Nn]{{{longest_gap + 1},}}"
        self.gap = re.compile(f"{gap}|{FOREIGN.pattern}+" if cut_foreign else gap)
        self.longest_gap, self.folder = longest_gap, folder
        self.document: Document | None = None
        self.waiting = 0  # N behind the document, which belong to it if a base follows soon

    def feed(self, record: str, text: str, start: int) -> Iterator[Document]:
        """Documents that end in `text`, which starts at base `start` and continues what was fed before."""
        place = 0
        for gap in self.gap.finditer(text):
            yield from self._bases(record, text[place : gap.start()], start + place)
            yield from self.end()
            place = gap.end()
        yield from self._bases(record, text[place:], start + place)

    def end(self) -> Iterator[Document]:
        """The document that ends here, if there is one."""
        if self.document is not None:
            yield self.document
            self.document.close()
        self.document, self.waiting = None, 0

    def _bases(self, record: str, text: str, start: int) -> Iterator[Document]:
        bases = text.lstrip("Nn")
        if not bases:
            self.waiting += len(text)
            return
        before = len(text) - len(bases)
        if self.waiting + before > self.longest_gap:
            yield from self.end()
        if self.document is None:
            self.document = Document(record, start + before, self.folder)
        else:
            self._append_unknown(self.waiting + before)
        kept = bases.rstrip("Nn")
        self.document.append(kept)
        self.waiting = len(bases) - len(kept)

    def _append_unknown(self, count: int) -> None:
        assert self.document is not None
        for done in range(0, count, _AT_ONCE):
            self.document.append("N" * min(_AT_ONCE, count - done))


def cut_documents(
    pieces: Iterable[SequencePiece], file: str, rules: Sequence[SplitRule], cutter: DocumentCutter
) -> Iterator[tuple[Part, Document]]:
    """Every document of a file's records with the part it lies in; each can be read until the next one is asked for.

    Args:
        pieces: of the records, in order.
        file: what rules call the file.
        rules: which bases belong to which split; documents end where parts end.
        cutter: cuts the parts.

    Raises:
        InputError: if no rule matches some of the bases.
    """
    parts: Iterator[Part] = iter(())
    part = Part(0, 0, DROPPED)
    for piece in pieces:
        if piece.start == 0:
            parts = iter(cut_record(rules, file, piece.name))
            part = next(parts)
        place, end = piece.start, piece.start + len(piece.text)
        while place < end:
            stop = min(end, part.end)
            if part.split == NO_RULE:
                raise no_rule_error(file, piece.name, place, stop)
            if part.split != DROPPED:
                text = piece.text[place - piece.start : stop - piece.start]
                for document in cutter.feed(piece.name, text, place):
                    yield part, document
            place = stop
            if place == part.end:
                for document in cutter.end():
                    yield part, document
                part = next(parts)
        if piece.is_last:
            for document in cutter.end():
                yield part, document
