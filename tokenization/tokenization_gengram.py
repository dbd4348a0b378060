"""Gengram nucleotide tokenizer: one token per character, with a byte table in front of the Rust backend."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, models
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging, to_py_obj

from .backend import MEGATRON_TOKENS, VOCABULARY, build_backend, byte_table
from .byte_table import as_bytes, as_numpy
from .soft_mask import soft_mask_of_encoding, soft_masked_text
from .table_encoding import EncodingRecipe, encode_by_table

logger = logging.get_logger(__name__)

_NUCLEOTIDES = "ACGTN"
_UNKNOWN_POLICIES = ("unk", "error")
_START, _END = "<BOS>", "<EOD>"
# Written to `tokenizer.json` for the unknown token where unknown characters are errors: no such token exists, so
# that the plain backend, without this package, stops at one too.
_NO_UNKNOWN_TOKEN = "(a character that is not DNA is an error)"


def _is_batch(token_ids: Any) -> bool:
    if isinstance(token_ids, (list, tuple)):
        return bool(token_ids) and (isinstance(token_ids[0], (list, tuple)) or getattr(token_ids[0], "ndim", 0) > 0)
    return getattr(token_ids, "ndim", 0) > 1


def _samples(text: Any, text_pair: Any, is_split_into_words: bool) -> list[tuple[Any, ...]]:
    """The one or two sources (a string, or a list of words) of each sequence of a request."""

    def nested(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (list, tuple))

    is_batch = nested(text) if is_split_into_words else isinstance(text, (list, tuple))
    if text_pair:
        return list(zip(text, text_pair, strict=False)) if is_batch else [(text, text_pair)]
    is_pair = nested if is_split_into_words else lambda value: isinstance(value, (list, tuple))
    return [tuple(item) if is_pair(item) else (item,) for item in (text if is_batch else [text])]


def _policy(unknown_characters: str) -> str:
    if unknown_characters not in _UNKNOWN_POLICIES:
        raise ValueError(f"unknown_characters must be one of {_UNKNOWN_POLICIES}, got {unknown_characters!r}.")
    return unknown_characters


class GengramTokenizer(TokenizersBackend):
    r"""
    Turns nucleotide sequences into token ids, always one token per character, with the ids of the authors' tokenizer.

    A, C, G, T and N are letters. Lower case is read as upper case, U as T, and the IUPAC ambiguity codes
    (R Y S W K M B D H V) as N. Any other character, a blank or a line feed too, is one `[UNK]`, so that coordinates
    never shift. Special tokens may be written inside a sequence (`"ACG[MASK]T"`), and none is added unless asked for.

    It is an ordinary fast tokenizer, whose `tokenizer.json` works without this package. Common requests are answered
    from a byte table with the same result; the others, such as pairs and offsets, by the Rust backend.

    Beyond the usual arguments, a call takes `return_soft_mask=True`: an extra field `soft_mask`, aligned with
    `input_ids`, that is 1 where the input character was lower case and 0 elsewhere, padding included. Where this
    package is not installed there is no such field. It also takes `unknown_characters`, for this call only.

    Args:
        vocab (`dict[str, int]`, *optional*): Tokens and ids; `None` is the vocabulary of the released models.
        unknown_characters (`str`, defaults to `"unk"`): `"unk"` reads an unknown character as `[UNK]`, `"error"`
            raises a `ValueError` that names it. An attribute too; saved with the tokenizer. Where this package is not
            installed, `"error"` stops as well, with the backend's words ("Missing [UNK] token from the vocabulary").
        unk_token (`str`, defaults to `"[UNK]"`): Stands for an unknown character.
        sep_token (`str`, defaults to `"[SEP]"`): Separator.
        pad_token (`str`, defaults to `"[PAD]"`): Padding.
        cls_token (`str`, defaults to `"[CLS]"`): Classifier token.
        mask_token (`str`, defaults to `"[MASK]"`): Hides a base in masked language modelling.
        bos_token (`str`, *optional*): Unset, as in `GengramConfig`, so that `Trainer` writes none into the
            configuration of a model; `add_bos_token=True` makes it `<BOS>`.
        eos_token (`str`, *optional*): Unset likewise; `add_eos_token=True` makes it `<EOD>`, which ends a document in
            the authors' training data.
        extra_special_tokens (`list[str]`, *optional*): The other tokens of Megatron's wrapper.
        kwargs: As in `TokenizersBackend`.

    Raises:
        `ValueError`: if `unknown_characters` is neither `"unk"` nor `"error"`.

    Example:

    ```python
    >>> from gengram.tokenization import GengramTokenizer
    >>> tokenizer = GengramTokenizer()
    >>> encoded = tokenizer("ACGTnacg[MASK]", return_soft_mask=True)
    >>> encoded["input_ids"]
    [8, 5, 6, 7, 9, 8, 5, 6, 4]
    >>> tokenizer.decode(encoded["input_ids"], soft_mask=encoded["soft_mask"])
    'ACGTnacg[MASK]'
    >>> tokenizer.nucleotide_ids  # A, C, G, T, N
    [8, 5, 6, 7, 9]

    ```
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    model = models.WordPiece  # type: ignore[assignment]
    # False sends every request through the Rust backend: to compare, or to rule the table out.
    use_lookup = True

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        unknown_characters: str = "unk",
        unk_token: str | AddedToken = "[UNK]",
        sep_token: str | AddedToken = "[SEP]",
        pad_token: str | AddedToken = "[PAD]",
        cls_token: str | AddedToken = "[CLS]",
        mask_token: str | AddedToken = "[MASK]",
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = None,
        extra_special_tokens: list[str] | tuple[str, ...] | dict[str, str] = MEGATRON_TOKENS,
        **kwargs,
    ):
        self.unknown_characters = unknown_characters
        kwargs.pop("merges", None)  # callers that know only byte-pair tokenizers pass an empty list
        extra_special_tokens = kwargs.pop("additional_special_tokens", extra_special_tokens)
        if kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            if vocab is None:
                vocab = {token: index for index, token in enumerate(VOCABULARY)}
            self._tokenizer = build_backend(dict(vocab), str(unk_token))
        # Only what is an argument of the constructor is saved.
        kwargs.setdefault("padding_side", self.padding_side)
        kwargs.setdefault("truncation_side", self.truncation_side)
        super().__init__(
            unknown_characters=unknown_characters,
            unk_token=unk_token,
            sep_token=sep_token,
            pad_token=pad_token,
            cls_token=cls_token,
            mask_token=mask_token,
            bos_token=bos_token,
            eos_token=eos_token,
            extra_special_tokens=extra_special_tokens,
            **kwargs,
        )
        self.backend_tokenizer.model.unk_token = str(unk_token)  # a saved one may lack it, see `_NO_UNKNOWN_TOKEN`

    bos_token: str | None
    eos_token: str | None

    def update_post_processor(self):
        # What is to be added has to have a name first; the parent would silently add nothing.
        if self.add_bos_token and self.bos_token is None:
            self.bos_token = _START
        if self.add_eos_token and self.eos_token is None:
            self.eos_token = _END
        super().update_post_processor()

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        # The saved backend is loaded as it is; the parent would rebuild it from its vocabulary.
        return kwargs

    @property
    def unknown_characters(self) -> str:
        """What happens to a character outside the alphabet: `"unk"` or `"error"`."""
        return self._unknown_characters

    @unknown_characters.setter
    def unknown_characters(self, value: str):
        self._unknown_characters = _policy(value)

    @property
    def nucleotide_ids(self) -> list[int]:
        """
        Token ids of A, C, G, T, N, in this order: `GengramConfig.memory_token_ids`.

        The embedding has more rows than there are tokens, so generation should be held to the first four of them:
        `suppress_tokens=[i for i in range(config.vocab_size) if i not in tokenizer.nucleotide_ids[:4]]`.
        """
        return self.convert_tokens_to_ids(list(_NUCLEOTIDES))  # type: ignore[return-value]

    def _encode_plus(  # type: ignore[override]
        self, text, text_pair=None, return_soft_mask=False, unknown_characters=None, **options
    ) -> BatchEncoding:
        unknown_characters = self.unknown_characters if unknown_characters is None else _policy(unknown_characters)
        if isinstance(text, (list, tuple)) and not text and not text_pair and not options.get("is_split_into_words"):
            one = self._encode_plus([""], return_soft_mask=return_soft_mask, **options)  # the shape of a batch
            return BatchEncoding({name: rows[:0] for name, rows in one.items()}, [], n_sequences=1)
        if unknown_characters == "error":
            self._refuse_unknown_characters(text, text_pair, **options)
        encoded = None
        if self.use_lookup and text_pair is None:
            encoded = encode_by_table(self, text, return_soft_mask=return_soft_mask, **options)
        if encoded is None:
            encoded = super()._encode_plus(text, text_pair, **options)
            if return_soft_mask:
                self._add_soft_mask(encoded, text, text_pair, **options)
        return encoded

    def _add_soft_mask(
        self,
        encoded: BatchEncoding,
        text,
        text_pair,
        is_split_into_words=False,
        return_tensors=None,
        return_overflowing_tokens=False,
        **_,
    ):
        """Adds the field `soft_mask` to what the backend returned."""
        if encoded.encodings is None:
            raise ValueError("return_soft_mask needs the backend's offsets, which this request does not produce.")
        samples = _samples(text, text_pair, is_split_into_words)
        sample_of_row: Iterable[int] = range(len(encoded.encodings))
        if return_overflowing_tokens:
            sample_of_row = np.asarray(encoded["overflow_to_sample_mapping"]).tolist()
        rows = [
            soft_mask_of_encoding(encoding, samples[sample])
            for encoding, sample in zip(encoded.encodings, sample_of_row, strict=True)
        ]
        if return_tensors is not None:
            encoded["soft_mask"] = BatchEncoding({"soft_mask": rows}, tensor_type=return_tensors)["soft_mask"]
        else:
            is_batch = isinstance(encoded["input_ids"][0], list) if encoded["input_ids"] else len(rows) > 1
            encoded["soft_mask"] = rows if is_batch else rows[0]

    def _refuse_unknown_characters(
        self, text, text_pair=None, is_split_into_words=False, split_special_tokens=None, **_
    ):
        """
        Raises:
            `ValueError`: if a sequence holds an unknown character; what truncation would cut off counts too.
        """
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        for index, sources in enumerate(_samples(text, text_pair, is_split_into_words)):
            for part, source in enumerate(sources):
                for word, string in enumerate(source if isinstance(source, (list, tuple)) else [source]):
                    if not isinstance(string, str):
                        continue  # the backend says what it expects
                    unknown = list(self._unknown_characters_of(string, split_special_tokens))
                    if not unknown:
                        continue
                    place = f"sequence {index}"
                    place += ", second text" if part == 1 else ""
                    place += f", word {word}" if is_split_into_words else ""
                    shown = ", ".join(f"{string[position]!r} at position {position}" for position in unknown[:10])
                    more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
                    raise ValueError(
                        f"{place} (counted from 0) holds {len(unknown)} character(s) that are neither a nucleotide "
                        f"nor an IUPAC code: {shown}{more}. Remove them, replace them (N is any base), or set "
                        f'`tokenizer.unknown_characters = "unk"` to read each as {self.unk_token}.'
                    )

    def _unknown_characters_of(self, text: str, split_special_tokens: bool) -> Iterable[int]:
        """Positions of the characters that are read as the unknown token."""
        serialized_backend = self.backend_tokenizer.to_str()
        table = byte_table(serialized_backend)
        positions = table.unknown_positions(text, split_special_tokens) if table is not None else None
        if positions is not None:
            return positions
        unknown_id = self.backend_tokenizer.token_to_id(self.backend_tokenizer.model.unk_token)
        (encoding,) = EncodingRecipe(serialized_backend, (text,), False, split_special_tokens).encode()
        return [
            start
            for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
            if index == unknown_id and stop - start == 1  # a longer one is the unknown token, spelled out
        ]

    def decode(self, token_ids, skip_special_tokens=False, soft_mask=None, **kwargs) -> str | list[str]:
        """
        Text of one sequence of ids, or texts of a batch, without blanks between tokens.

        Args:
            token_ids (`int`, `list[int]`, `list[list[int]]`, `np.ndarray` or `torch.Tensor`): Ids of the tokens.
            skip_special_tokens (`bool`, defaults to `False`): Leave special tokens out.
            soft_mask (*optional*): Of the same shape as `token_ids`; letters are written in lower case where it is 1.
            kwargs: As in `TokenizersBackend.decode`.

        Raises:
            `ValueError`: if `soft_mask` has another shape than `token_ids`.
        """
        if isinstance(token_ids, Mapping):
            token_ids = token_ids["input_ids"]
        if not _is_batch(token_ids):
            return self._decode(token_ids, skip_special_tokens, soft_mask=soft_mask, **kwargs)
        soft_masks = [None] * len(token_ids) if soft_mask is None else soft_mask
        if len(soft_masks) != len(token_ids):
            raise ValueError(f"soft_mask must have {len(token_ids)} rows, as token_ids has, got {len(soft_masks)}.")
        return [
            self._decode(row, skip_special_tokens, soft_mask=row_mask, **kwargs)
            for row, row_mask in zip(token_ids, soft_masks, strict=True)
        ]

    def _decode(
        self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, soft_mask=None, **kwargs
    ) -> str:
        if soft_mask is not None:
            return self._decode_soft_masked(token_ids, soft_mask, skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        ids = as_bytes(token_ids) if self.use_lookup and not clean_up_tokenization_spaces else None
        table = byte_table(self.backend_tokenizer.to_str()) if ids is not None else None
        text = table.decode(ids, skip_special_tokens) if ids is not None and table is not None else None
        if text is None:
            return super()._decode(to_py_obj(token_ids), skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        return text

    def _decode_soft_masked(self, token_ids, soft_mask, skip_special_tokens: bool) -> str:
        ids, lower = np.atleast_1d(as_numpy(token_ids)), np.atleast_1d(as_numpy(soft_mask)).astype(bool)
        if ids.shape != lower.shape:
            raise ValueError(f"soft_mask must be as long as token_ids ({ids.size}), got {lower.size}.")
        if skip_special_tokens:
            special = [index for index, token in self.added_tokens_decoder.items() if token.special]
            kept = ~np.isin(ids, special)
            ids, lower = ids[kept], lower[kept]
        return soft_masked_text(ids, lower, self.backend_tokenizer.id_to_token)

    def _pad(self, encoded_inputs, *args, **kwargs) -> dict:
        length_before = len(encoded_inputs[self.model_input_names[0]])
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        if "soft_mask" in padded:
            added = [0] * (len(padded[self.model_input_names[0]]) - length_before)
            side = kwargs.get("padding_side") or self.padding_side
            padded["soft_mask"] = added + padded["soft_mask"] if side == "left" else padded["soft_mask"] + added
        return padded

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()  # all of it is in tokenizer.json

    def _save_pretrained(self, *args, **kwargs) -> tuple[str, ...]:
        # What the last call padded or truncated to is no property of the tokenizer.
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        model = self.backend_tokenizer.model
        unk_token = model.unk_token
        if self.unknown_characters == "error":
            model.unk_token = _NO_UNKNOWN_TOKEN
        try:
            return super()._save_pretrained(*args, **kwargs)
        finally:
            model.unk_token = unk_token

    def _eventual_warn_about_too_long_sequence(self, ids, max_length, verbose) -> None:
        # The parent foretells indexing errors, which rotary positions do not make.
        said = self.deprecation_warnings
        if max_length is not None or not verbose or not 0 < self.model_max_length < len(ids) or said.get("too long"):
            return
        said["too long"] = True
        logger.warning(
            f"A sequence of {len(ids)} tokens is longer than the {self.model_max_length} that this model is made for "
            "(model_max_length). A model will read it, since its positions are rotary, but may predict worse behind "
            "them: cut it with truncation=True, or read it in windows."
        )


__all__ = ["GengramTokenizer"]
