"""Soft masks: 1 where a base was written in lower case, as genome files mark repeats, and 0 elsewhere."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

_LOWER_CASE = bytes(code < 128 and chr(code).islower() for code in range(256))


def soft_mask_of_pieces(pieces: Iterable[tuple[str, int | None]]) -> bytes:
    """One byte per token of `ByteTable.split`: 1 where the token is one lower-case character."""
    masks = []
    for piece, index in pieces:
        if index is not None:  # an added token
            masks.append(bytes([len(piece) == 1 and piece.islower()]))
        elif piece.isascii():
            masks.append(piece.encode("ascii").translate(_LOWER_CASE))
        else:
            masks.append(bytes(character.islower() for character in piece))
    return b"".join(masks)


def soft_mask_of_encoding(encoding: Any, sources: Sequence[Any]) -> list[int]:
    """
    The soft mask of a backend's `Encoding`, from its offsets.

    Args:
        encoding: A `tokenizers.Encoding`.
        sources: The one or two texts that it encodes, each a string or a list of words.
    """
    row = []
    for (start, stop), source, word in zip(encoding.offsets, encoding.sequence_ids, encoding.word_ids, strict=True):
        if stop - start != 1 or source is None:
            row.append(0)
            continue
        text = sources[source]
        row.append(int((text if isinstance(text, str) else text[word])[start].islower()))
    return row


def soft_masked_text(ids: np.ndarray, lower: np.ndarray, piece_of: Callable[[int], str | None]) -> str:
    """
    The text of token ids, with letters in lower case where the mask says so.

    Args:
        ids: Token ids (tokens,).
        lower: The mask (tokens,), of bools.
        piece_of: The text of a token; None or empty if there is no such token.
    """
    if ids.size == 0:
        return ""
    pieces = {index: piece_of(index) or "" for index in set(ids.tolist())}
    if all(len(piece) == 1 and piece.isascii() for piece in pieces.values()):
        cases = np.zeros((2, max(pieces) + 1), dtype=np.uint8)  # (as it is | in lower case, ids)
        for index, piece in pieces.items():
            cases[:, index] = ord(piece), ord(piece.lower())
        return cases[lower.astype(np.intp), ids].tobytes().decode("ascii")
    return "".join(
        [
            pieces[index].lower() if is_lower and len(pieces[index]) == 1 else pieces[index]
            for index, is_lower in zip(ids.tolist(), lower.tolist(), strict=True)
        ]
    )
