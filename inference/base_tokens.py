"""Which tokens single bases are, for models whose tokenizers read one base at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..sequences.alphabet import BASES, OTHER, base_digits
from ..support.errors import shortened

# Two probes that differ everywhere, so that the places of their bases show; no k-mer of theirs is repeated.
_PROBE = "ACGTTGCAAGTCCTGAATTCGGAC"
_OTHER_PROBE = _PROBE.translate(str.maketrans("ACGT", "CGTA"))

_AMINO_ACIDS = "EFILPQ"  # letters of proteins that are no code of DNA
_MOST_TOKENS_OF_PROTEIN = 128  # tokenizers of bytes have more, and every letter too


@dataclass(frozen=True)
class BaseTokens:
    """Token ids of single bases, and of what a tokenizer puts around a sequence.

    Args:
        bases: ids of A, C, G and T.
        other: id of N, which stands for every letter that is not a base.
        before, after: ids that the tokenizer puts in front of a sequence and behind it, such as BOS, CLS and SEP.
        mask: id of the mask; None if there is none.
        pad: id of padding; None if there is none.

    Example:

    >>> from gengram import GengramTokenizer
    >>> tokens = BaseTokens.of(GengramTokenizer())
    >>> tokens.bases, tokens.other, tokens.before
    ((8, 5, 6, 7), 9, ())
    >>> tokens.encode("acgtN").tolist()
    [8, 5, 6, 7, 9]
    """

    bases: tuple[int, int, int, int]
    other: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    mask: int | None = None
    pad: int | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> "BaseTokens":
        """The tokens of a tokenizer of Transformers, found by what it makes of DNA.

        Raises:
            ValueError: if it does not read one base at a time (k-mers, byte pairs), or reads proteins.
        """
        found, other = _ids(tokenizer, _PROBE), _ids(tokenizer, _OTHER_PROBE)
        places = [place for place, (one, two) in enumerate(zip(found, other, strict=False)) if one != two]
        start = places[0] if places else 0
        end = start + len(_PROBE)
        pairs = set(zip(_PROBE, found[start:end], strict=False))  # of a letter and its id
        if not (
            len(found) == len(other)
            and places == list(range(start, end))
            and len(pairs) == len(BASES) == len({token for _, token in pairs} - {tokenizer.unk_token_id})
        ):
            raise ValueError(
                f"expected a tokenizer with one token per base, got {type(tokenizer).__name__}, which reads the "
                f"{len(_PROBE)} bases {_PROBE} as {_pieces(tokenizer, found)}: k-mer or byte-pair tokens, or no DNA. "
                "Jobs on single bases need a model whose tokens are single bases."
            )
        if len(tokenizer) < _MOST_TOKENS_OF_PROTEIN and set(_AMINO_ACIDS) <= tokenizer.get_vocab().keys():
            raise ValueError(
                f"expected a tokenizer of DNA, got {type(tokenizer).__name__}, whose tokens are amino acids: A, C, G "
                "and T would be read as a protein's."
            )
        ids = dict(pairs)
        unknown = _ids(tokenizer, "ANC")[start:][:2]
        return cls(
            bases=(ids["A"], ids["C"], ids["G"], ids["T"]),
            other=unknown[1] if unknown[0] == ids["A"] else tokenizer.unk_token_id,
            before=tuple(found[:start]),
            after=tuple(found[end:]),
            mask=getattr(tokenizer, "mask_token_id", None),
            pad=getattr(tokenizer, "pad_token_id", None),
        )

    def encode(self, sequence: str) -> np.ndarray:
        """Ids of the letters of a sequence alone, without those around it: (length,) int64.

        Lower case is read as upper case and U as T; letters that are not bases become `other`.
        """
        return self._table()[base_digits(sequence)]

    def _table(self) -> np.ndarray:
        """Ids by the digit of a base."""
        table = np.empty(OTHER + 1, dtype=np.int64)
        table[: len(BASES)], table[OTHER] = self.bases, self.other
        return table


def padding_id(pad: int | None, otherwise: int, model: Any) -> int:
    """The id of padding for a model: `otherwise`, if the tokenizer has none, or one beyond the model's tokens."""
    try:
        known = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # a model's own code may not say
        known = getattr(getattr(model, "config", None), "vocab_size", None)
    return otherwise if pad is None or (known is not None and pad >= known) else pad


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text)["input_ids"]]


def _pieces(tokenizer: Any, ids: list[int]) -> str:
    """Number of tokens, and the first few of them."""
    words = ", ".join(shortened(word) for word in tokenizer.convert_ids_to_tokens(ids[:4]))
    return f"{len(ids)} tokens ({words}{', ...' if len(ids) > 4 else ''})"
