"""Text to token ids, and back, through tables of bytes.

A tokenizer that reads one token per character is a table: a text becomes one byte per character (255 and its like for
all that is not ASCII), and `bytes.translate` does the rest. Nothing here needs a library of Hugging Face.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .soft_mask import soft_mask_of_pieces


@dataclass(frozen=True)
class ByteTable:
    """
    A Rust backend as tables of bytes: a pure function of the serialized backend, so never out of date.

    Ids above 255 have no place here; requests that meet one go to the backend.
    """

    ids: bytes  # byte of a character -> token id
    known: bytes  # characters that are not read as the unknown token
    unknown: re.Pattern[str]  # one character that is
    added: dict[str, int]  # added tokens: text -> id
    added_pattern: re.Pattern[str]
    added_are_plain: bool  # found by their exact text, before normalization
    triggers: str  # a text without any of these characters holds no added token
    prefix: bytes | None  # what the post-processor puts before one sequence; None if it does anything else
    suffix: bytes
    added_by_post_processor: int
    characters: bytes | None  # token id -> byte of its one ASCII character, 0 for other tokens; None: unknown decoder
    pieces: tuple[str, ...]  # token id -> text
    special_ids: bytes

    @classmethod
    def of(cls, backend: Any, reference: dict[str, Any]) -> "ByteTable | None":
        """
        The tables of a `tokenizers.Tokenizer` that neither truncates nor pads; None if it is no such tokenizer.

        Args:
            backend: The tokenizer. It is asked for its ids, never changed.
            reference: The serialized tokenizer whose pre-tokenizer, normalizer (or none) and decoder it must have.
        """
        description = json.loads(backend.to_str())
        model = description["model"]
        if (
            description["pre_tokenizer"] != reference["pre_tokenizer"]
            or description["normalizer"] not in (None, reference["normalizer"])
            or model["type"] != "WordPiece"
            or model["unk_token"] not in model["vocab"]
            or any(len(token) == 1 and not token.isascii() for token in model["vocab"])
        ):
            return None

        ascii_characters = [chr(code) for code in range(128)]
        encodings = backend.encode_batch(ascii_characters, add_special_tokens=False)
        if any(len(encoding.ids) != 1 for encoding in encodings):  # a post-processor that repeats its sequence
            return None
        unknown_id = model["vocab"][model["unk_token"]]
        ids = [encoding.ids[0] for encoding in encodings] + [unknown_id] * 128
        known = "".join(chr(code) for code in range(128) if ids[code] != unknown_id)
        if max(ids) > 255 or not known:
            return None

        tokens = description["added_tokens"]
        normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
        first_characters = {token["content"][0] for token in tokens}
        first_normalized = {normalize(token["content"])[:1] for token in tokens if token["normalized"]}
        first_characters.update(char for char in ascii_characters if normalize(char) in first_normalized)
        by_length = sorted((token["content"] for token in tokens), key=len, reverse=True)  # the longest match wins

        bare = backend.encode("AC", add_special_tokens=False)
        framed = backend.encode("AC", add_special_tokens=True)
        start = framed.special_tokens_mask.index(0) if 0 in framed.special_tokens_mask else 0
        stop = start + len(bare.ids)
        frame = framed.ids[:start] + framed.ids[stop:]
        is_frame = (
            framed.ids[start:stop] == bare.ids
            and framed.special_tokens_mask == [1] * start + [0] * len(bare.ids) + [1] * (len(framed.ids) - stop)
            and max(frame, default=0) <= 255
        )

        pieces = [backend.id_to_token(index) or "" for index in range(256)]
        own_decoder = description["decoder"] == reference["decoder"]
        return cls(
            ids=bytes(ids),
            known=known.encode("ascii"),
            unknown=re.compile(f"[^{re.escape(known)}]"),
            added={token["content"]: token["id"] for token in tokens},
            added_pattern=re.compile(f"({'|'.join(map(re.escape, by_length))})"),
            added_are_plain=not any(
                token[flag] for token in tokens for flag in ("single_word", "lstrip", "rstrip", "normalized")
            ),
            triggers="".join(sorted(first_characters)),
            prefix=bytes(framed.ids[:start]) if is_frame else None,
            suffix=bytes(framed.ids[stop:]) if is_frame else b"",
            added_by_post_processor=backend.num_special_tokens_to_add(False),
            characters=bytes(ord(p) if len(p) == 1 and p.isascii() else 0 for p in pieces) if own_decoder else None,
            pieces=tuple(pieces),
            special_ids=bytes(token["id"] for token in tokens if token["special"] and token["id"] <= 255),
        )

    def split(self, text: str, split_special_tokens: bool) -> list[tuple[str, int | None]] | None:
        """Pieces of `text` with the id of those that are added tokens; None if only the backend can tell."""
        if not any(character in text for character in self.triggers):
            return [(text, None)]
        if split_special_tokens or not self.added_are_plain:
            return None
        return [(piece, self.added.get(piece)) for piece in self.added_pattern.split(text) if piece]

    def encode(self, text: str, split_special_tokens: bool) -> bytes | None:
        """Token ids of `text`, one byte each; None if only the backend can tell."""
        pieces = self.split(text, split_special_tokens)
        if pieces is None or any(index is not None and index > 255 for _, index in pieces):
            return None
        return b"".join(
            _character_bytes(piece).translate(self.ids) if index is None else bytes([index]) for piece, index in pieces
        )

    def encode_batch(
        self,
        texts: Sequence[str],
        add_special_tokens: bool,
        split_special_tokens: bool,
        max_length: int | None = None,
        stride: int = 0,
        from_right: bool = False,
        overflowing: bool = False,
        soft_masked: bool = False,
    ) -> "Rows | None":
        """
        Token ids of each text; None if only the backend can tell.

        Args:
            max_length: Longest row, special tokens included; None does not truncate.
            stride: Tokens that two windows of one text share.
            from_right: Keep the end of a text that is too long, not its start.
            overflowing: Return the other windows of such a text too, as rows of their own.
            soft_masked: Also say where the text is in lower case.
        """
        if add_special_tokens and self.prefix is None:
            return None
        prefix, suffix = (self.prefix or b"", self.suffix) if add_special_tokens else (b"", b"")
        width = None if max_length is None else max_length - len(prefix) - len(suffix)
        rows = Rows([], [], [], len(prefix), len(suffix))
        for sample, text in enumerate(texts):
            try:
                ids = self.encode(text, split_special_tokens)
            except UnicodeEncodeError:  # a lone surrogate: let the backend raise its error
                return None
            if ids is None:
                return None
            lower = soft_mask_of_pieces(self.split(text, split_special_tokens) or []) if soft_masked else b""
            spans = _windows(len(ids), width, stride, from_right)
            for start, stop in spans if overflowing else spans[:1]:
                rows.ids.append(prefix + ids[start:stop] + suffix)
                rows.soft_masks.append(bytes(len(prefix)) + lower[start:stop] + bytes(len(suffix)))
                rows.samples.append(sample)
        return rows

    def unknown_positions(self, text: str, split_special_tokens: bool) -> Iterator[int] | None:
        """Positions of the characters that are read as the unknown token; None if only the backend can tell."""
        if text.isascii() and not text.encode("ascii").translate(None, self.known):
            return iter(())
        pieces = self.split(text, split_special_tokens)
        return None if pieces is None else self._unknown_in(pieces)

    def _unknown_in(self, pieces: list[tuple[str, int | None]]) -> Iterator[int]:
        offset = 0
        for piece, index in pieces:
            if index is None:
                yield from (offset + match.start() for match in self.unknown.finditer(piece))
            offset += len(piece)

    def decode(self, ids: bytes, skip_special_tokens: bool) -> str | None:
        """The text of token ids, without blanks between them; None if only the backend can tell."""
        if self.characters is None:
            return None
        skipped = self.special_ids if skip_special_tokens else b""
        characters = ids.translate(self.characters, skipped)
        if b"\0" not in characters:
            return characters.decode("ascii")
        return "".join([self.pieces[index] for index in ids.translate(None, skipped)])


@dataclass
class Rows:
    """Encoded texts: one byte per token, one row per window of a text."""

    ids: list[bytes]
    soft_masks: list[bytes]
    samples: list[int]  # which text a row is of
    prefix: int  # special tokens in front of each row
    suffix: int

    @property
    def special_tokens_masks(self) -> list[bytes]:
        """1 for the tokens that were put around a text, else 0."""
        before, after = b"\1" * self.prefix, b"\1" * self.suffix
        return [before + bytes(len(row) - self.prefix - self.suffix) + after for row in self.ids]


def padded(rows: list[bytes], widths: list[int], fill: int, on_left: bool, as_array: bool) -> Any:
    """`rows` as an array (rows, width) of int64 (all widths must be equal), or as lists."""
    if as_array:
        array = np.full((len(rows), widths[0]), fill, dtype=np.int64)
        for target, row in zip(array, rows, strict=True):
            begin = len(target) - len(row) if on_left else 0
            target[begin : begin + len(row)] = np.frombuffer(row, dtype=np.uint8)
        return array
    lists = []
    for row, width in zip(rows, widths, strict=True):
        values, padding = list(row), [fill] * (width - len(row))
        lists.append((padding + values if on_left else values + padding) if padding else values)
    return lists


def as_numpy(values: Any) -> np.ndarray:
    """Numbers of a list, an array or a tensor on any device."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def as_bytes(values: Any) -> bytes | None:
    """One sequence of integers 0..255 as bytes, or None if it is anything else."""
    if hasattr(values, "detach") or isinstance(values, np.ndarray):
        values = as_numpy(values)
        if values.ndim != 1 or values.dtype.kind not in "iub":
            return None
        in_range = values.size == 0 or (values.min() >= 0 and values.max() <= 255)
        return values.astype(np.uint8).tobytes() if in_range else None
    if isinstance(values, (list, tuple)):
        try:
            return bytes(values)
        except (TypeError, ValueError):
            return None
    return None


def _character_bytes(text: str) -> bytes:
    """One byte per character: ASCII as it is, 128 to 255 for everything else."""
    if text.isascii():
        return text.encode("ascii")
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return np.minimum(code_points, 255).astype(np.uint8).tobytes()


def _windows(length: int, width: int | None, stride: int, from_right: bool) -> list[tuple[int, int]]:
    """Spans that truncation to `width` keeps, the first one first; consecutive ones share `stride` tokens."""
    if width is None or length <= width:
        return [(0, length)]
    starts = range(0, length - stride, width - stride)
    spans = [(start, min(start + width, length)) for start in starts]
    return [(length - stop, length - start) for start, stop in spans] if from_right else spans
