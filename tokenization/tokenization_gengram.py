"""Gengram nucleotide tokenizer: one token per character, with a byte table in front of the Rust backend."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import TensorType, is_torch_tensor, to_py_obj

_NUCLEOTIDES = "ACGTN"
# Ids are positions: `tokenizer/one_hot.bpe.model` of the authors, then the tokens that Megatron's wrapper adds to it.
_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "G", "T", "A", "N")
_MEGATRON_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<BOS>", "<EOS>")
# What is read as a letter beside the letter itself: soft-masked bases, uracil, the IUPAC ambiguity codes.
_READ_AS = {"A": "a", "C": "c", "G": "g", "T": "tUu", "N": "nRYSWKMBDHVryswkmbdhv"}
_UNKNOWN_POLICIES = ("unk", "error")
_LOWER_CASE = bytes(code < 128 and chr(code).islower() for code in range(256))


def _build_backend(vocabulary: dict[str, int], unk_token: str) -> Tokenizer:
    """
    The pipeline that `tokenizer.json` holds: normalize letters, cut into characters, look each up.

    WordPiece over single characters, because WordLevel renumbers its ids when saved, and because the token
    classification pipeline takes the tokens of a blank-free string for one word unless the model has a
    `continuing_subword_prefix`.
    """
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=unk_token, continuing_subword_prefix="##"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"[{others}]"), letter) for letter, others in _READ_AS.items()]
    )
    backend.pre_tokenizer = pre_tokenizers.FixedLength(length=1)
    backend.decoder = decoders.Fuse()
    bracketed = [token for token in vocabulary if token.startswith("[") and token.endswith("]")]
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*bracketed, *_MEGATRON_TOKENS)])
    return backend


_DEFAULT_BACKEND = json.loads(_build_backend({t: i for i, t in enumerate(_VOCABULARY)}, "[UNK]").to_str())


@dataclass(frozen=True)
class _LookupTables:
    """
    The Rust pipeline as tables of bytes: a pure function of the serialized backend, so never out of date.

    A text becomes one byte per character (255 and its like for all that is not ASCII), and `bytes.translate` does the
    rest. Ids above 255 have no place here; requests that meet one go to the backend.
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

    def soft_mask(self, text: str) -> bytes:
        """1 where a token of `encode(text)` is one lower-case character, else 0."""
        masks = []
        for piece, index in self.split(text, False) or ():
            if index is not None:
                masks.append(bytes([len(piece) == 1 and piece.islower()]))
            elif piece.isascii():
                masks.append(piece.encode("ascii").translate(_LOWER_CASE))
            else:
                masks.append(bytes(character.islower() for character in piece))
        return b"".join(masks)


@functools.lru_cache(maxsize=64)
def _lookup_tables(serialized_backend: str) -> _LookupTables | None:
    """Tables for a backend, or None if its pipeline is not the one of `_build_backend`."""
    description = json.loads(serialized_backend)
    model = description["model"]
    if (
        description["pre_tokenizer"] != _DEFAULT_BACKEND["pre_tokenizer"]
        or description["normalizer"] not in (None, _DEFAULT_BACKEND["normalizer"])
        or model["type"] != "WordPiece"
        or model["unk_token"] not in model["vocab"]
        or any(len(token) == 1 and not token.isascii() for token in model["vocab"])
    ):
        return None
    backend = Tokenizer.from_str(serialized_backend)
    backend.no_truncation()
    backend.no_padding()

    ascii_characters = [chr(code) for code in range(128)]
    encodings = backend.encode_batch(ascii_characters, add_special_tokens=False)
    if any(len(encoding.ids) != 1 for encoding in encodings):  # a post-processor that repeats its sequence
        return None
    unknown_id = model["vocab"][model["unk_token"]]
    ids = [encoding.ids[0] for encoding in encodings] + [unknown_id] * 128
    known = "".join(character for character, index in zip(ascii_characters, ids, strict=False) if index != unknown_id)
    if max(ids) > 255 or not known:
        return None

    tokens = description["added_tokens"]
    normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
    first_characters = {token["content"][0] for token in tokens}
    first_normalized = {normalize(token["content"])[:1] for token in tokens if token["normalized"]}
    first_characters.update(character for character in ascii_characters if normalize(character) in first_normalized)
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
    own_decoder = description["decoder"] == _DEFAULT_BACKEND["decoder"]
    return _LookupTables(
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


def _pad_rows(rows: list[bytes], widths: list[int], fill: int, on_left: bool, as_array: bool) -> Any:
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


def _as_numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if is_torch_tensor(values) else np.asarray(values)


def _is_batch(token_ids: Any) -> bool:
    if isinstance(token_ids, (list, tuple)):
        return bool(token_ids) and (isinstance(token_ids[0], (list, tuple)) or getattr(token_ids[0], "ndim", 0) > 0)
    return getattr(token_ids, "ndim", 0) > 1


def _flat_bytes(values: Any) -> bytes | None:
    """One sequence of integers 0..255 as bytes, or None if it is anything else."""
    if is_torch_tensor(values) or isinstance(values, np.ndarray):
        values = _as_numpy(values)
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


def _samples(text: Any, text_pair: Any, is_split_into_words: bool) -> list[tuple[Any, ...]]:
    """The one or two sources (a string, or a list of words) of each sequence of a request."""

    def nested(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (list, tuple))

    is_batch = nested(text) if is_split_into_words else isinstance(text, (list, tuple))
    if text_pair:
        return list(zip(text, text_pair, strict=False)) if is_batch else [(text, text_pair)]
    is_pair = nested if is_split_into_words else lambda value: isinstance(value, (list, tuple))
    return [tuple(item) if is_pair(item) else (item,) for item in (text if is_batch else [text])]


@dataclass(frozen=True)
class _EncodingRecipe:
    """What the backend needs to make the `Encoding`s that belong to a looked-up batch."""

    serialized_backend: str
    batch: tuple[str, ...]
    add_special_tokens: bool
    split_special_tokens: bool
    truncation: dict[str, Any] | None
    padding: dict[str, Any] | None
    return_overflowing_tokens: bool

    def encode(self) -> list[Encoding]:
        backend = Tokenizer.from_str(self.serialized_backend)
        backend.encode_special_tokens = self.split_special_tokens
        backend.no_truncation()
        backend.no_padding()
        if self.truncation is not None:
            backend.enable_truncation(**self.truncation)
        if self.padding is not None:
            backend.enable_padding(**self.padding)
        encodings = backend.encode_batch(list(self.batch), add_special_tokens=self.add_special_tokens)
        if not self.return_overflowing_tokens:
            return encodings
        return [part for encoding in encodings for part in (encoding, *encoding.overflowing)]


class _LazyBatchEncoding(BatchEncoding):
    """A `BatchEncoding` whose backend encodings (`word_ids`, `char_to_token`, ...) are made when first asked for."""

    _encodings_or_recipe: list[Encoding] | _EncodingRecipe | None = None

    @property
    def _encodings(self):
        if isinstance(self._encodings_or_recipe, _EncodingRecipe):
            self._encodings_or_recipe = self._encodings_or_recipe.encode()
        return self._encodings_or_recipe

    @_encodings.setter
    def _encodings(self, value):
        self._encodings_or_recipe = value

    @property
    def is_fast(self) -> bool:
        return True

    def __getstate__(self):
        return {"data": self.data, "encodings": self._encodings_or_recipe}


class GengramTokenizer(TokenizersBackend):
    r"""
    Turns nucleotide sequences into token ids, always one token per character, with the ids of the authors' tokenizer.

    A, C, G, T and N are letters. Lower case is read as upper case, U as T, and the IUPAC ambiguity codes
    (R Y S W K M B D H V) as N. Any other character, a blank or a line feed too, is one `[UNK]`, so that coordinates
    never shift. Special tokens may be written inside a sequence (`"ACG[MASK]T"`), and none is added unless asked for.

    It is an ordinary fast tokenizer, whose `tokenizer.json` works without this package. Common requests are answered
    from a byte table with the same result; the others, such as pairs and offsets, by the Rust backend.

    Beyond the usual arguments, a call takes `return_soft_mask=True`: an extra field `soft_mask`, aligned with
    `input_ids`, that is 1 where the input character was lower case and 0 elsewhere, padding included.

    Args:
        vocab (`dict[str, int]`, *optional*): Tokens and ids; `None` is the vocabulary of the released models.
        unknown_characters (`str`, defaults to `"unk"`): `"unk"` reads an unknown character as `[UNK]`, `"error"`
            raises a `ValueError` that names it. An attribute too; saved with the tokenizer. Where this package is not
            installed, unknown characters are always `[UNK]`.
        unk_token (`str`, defaults to `"[UNK]"`): Stands for an unknown character.
        sep_token (`str`, defaults to `"[SEP]"`): Separator.
        pad_token (`str`, defaults to `"[PAD]"`): Padding.
        cls_token (`str`, defaults to `"[CLS]"`): Classifier token.
        mask_token (`str`, defaults to `"[MASK]"`): Hides a base in masked language modelling.
        bos_token (`str`, defaults to `"<BOS>"`): Named, never added by default.
        eos_token (`str`, defaults to `"<EOD>"`): End of a document in the authors' training data; never added by
            default.
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
        bos_token: str | AddedToken = "<BOS>",
        eos_token: str | AddedToken = "<EOD>",
        extra_special_tokens: list[str] | tuple[str, ...] | dict[str, str] = ("<CLS>", "<SEP>", "<MASK>", "<EOS>"),
        **kwargs,
    ):
        self.unknown_characters = unknown_characters
        kwargs.pop("merges", None)  # callers that know only byte-pair tokenizers pass an empty list
        extra_special_tokens = kwargs.pop("additional_special_tokens", extra_special_tokens)
        if kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            if vocab is None:
                vocab = {token: index for index, token in enumerate(_VOCABULARY)}
            self._tokenizer = _build_backend(dict(vocab), str(unk_token))
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
        if value not in _UNKNOWN_POLICIES:
            raise ValueError(f"unknown_characters must be one of {_UNKNOWN_POLICIES}, got {value!r}.")
        self._unknown_characters = value

    @property
    def nucleotide_ids(self) -> list[int]:
        """
        Token ids of A, C, G, T, N, in this order: `GengramConfig.memory_token_ids`.

        The embedding has more rows than there are tokens, so generation should be held to the first four of them:
        `suppress_tokens=[i for i in range(config.vocab_size) if i not in tokenizer.nucleotide_ids[:4]]`.
        """
        return self.convert_tokens_to_ids(list(_NUCLEOTIDES))  # type: ignore[return-value]

    def _encode_plus(  # type: ignore[override]
        self, text, text_pair=None, return_soft_mask=False, **options
    ) -> BatchEncoding:
        if isinstance(text, (list, tuple)) and not text and not text_pair and not options.get("is_split_into_words"):
            one = self._encode_plus([""], return_soft_mask=return_soft_mask, **options)
            return BatchEncoding({name: rows[:0] for name, rows in one.items()}, [], n_sequences=1)
        if self.unknown_characters == "error":
            self._refuse_unknown_characters(text, text_pair, **options)
        encoded = None
        if self.use_lookup and text_pair is None:
            encoded = self._encode_by_lookup(text, return_soft_mask=return_soft_mask, **options)
        if encoded is None:
            encoded = super()._encode_plus(text, text_pair, **options)
            if return_soft_mask:
                self._add_soft_mask(encoded, text, text_pair, **options)
        return encoded

    def _encode_by_lookup(
        self,
        text,
        add_special_tokens=True,
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.DO_NOT_TRUNCATE,
        max_length=None,
        stride=0,
        is_split_into_words=False,
        pad_to_multiple_of=None,
        padding_side=None,
        return_tensors=None,
        return_token_type_ids=None,
        return_attention_mask=None,
        return_overflowing_tokens=False,
        return_special_tokens_mask=False,
        return_offsets_mapping=False,
        return_length=False,
        return_soft_mask=False,
        verbose=True,
        split_special_tokens=None,
        **others,
    ) -> BatchEncoding | None:
        """The same as the parent's `_encode_plus`, from the tables; None if they do not cover the request."""
        batch = (text,) if isinstance(text, str) else text
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        if padding_side is None:
            padding_side = self.padding_side
        if (
            not isinstance(batch, (list, tuple))
            or not batch
            or not all(isinstance(sequence, str) for sequence in batch)
            or is_split_into_words
            or return_token_type_ids
            or return_offsets_mapping
            or padding_side not in ("left", "right")
            or min(max_length or 0, pad_to_multiple_of or 0) < 0
            or any(value is not None and value is not False for value in others.values())
        ):
            return None

        serialized_backend = self.backend_tokenizer.to_str()
        tables = _lookup_tables(serialized_backend)
        if tables is None or (add_special_tokens and tables.prefix is None):
            return None
        prefix, suffix = (tables.prefix or b"", tables.suffix) if add_special_tokens else (b"", b"")
        room, truncation = None, None
        if truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE:
            if truncation_strategy == TruncationStrategy.ONLY_SECOND or max_length is None:
                return None
            if not 0 <= stride < max_length - tables.added_by_post_processor:
                return None  # the backend refuses, whether these tokens are wanted or not
            room = max_length - len(prefix) - len(suffix)
            truncation = {
                "max_length": max_length,
                "stride": stride,
                "strategy": truncation_strategy.value,
                "direction": self.truncation_side,
            }

        rows, soft_masks, sample_of_row = [], [], []
        for sample, sequence in enumerate(batch):
            try:
                ids = tables.encode(sequence, split_special_tokens)
            except UnicodeEncodeError:  # a lone surrogate: let the backend raise its error
                return None
            if ids is None:
                return None
            soft_mask = tables.soft_mask(sequence) if return_soft_mask else b""
            spans = _windows(len(ids), room, stride, from_right=self.truncation_side == "left")
            for start, stop in spans if return_overflowing_tokens else spans[:1]:
                rows.append(prefix + ids[start:stop] + suffix)
                soft_masks.append(bytes(len(prefix)) + soft_mask[start:stop] + bytes(len(suffix)))
                sample_of_row.append(sample)

        widths = [len(row) for row in rows]
        padding = None
        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            length = max_length if padding_strategy == PaddingStrategy.MAX_LENGTH else None
            target = max(widths) if length is None else length
            if pad_to_multiple_of:
                target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
            widths = [max(width, target) for width in widths]
            padding = {
                "length": length,
                "direction": padding_side,
                "pad_id": self.pad_token_id,
                "pad_token": self.pad_token,
                "pad_type_id": self.pad_token_type_id,
                "pad_to_multiple_of": pad_to_multiple_of,
            }
        for width in widths:
            self._eventual_warn_about_too_long_sequence(range(width), max_length, verbose)  # type: ignore[arg-type]

        columns = {"input_ids": (rows, padding["pad_id"] if padding else 0)}
        if return_attention_mask:
            columns["attention_mask"] = ([b"\x01" * len(row) for row in rows], 0)
        if return_special_tokens_mask:
            ones = b"\x01" * len(prefix), b"\x01" * len(suffix)
            inner = [bytes(len(row) - len(prefix) - len(suffix)) for row in rows]
            columns["special_tokens_mask"] = ([ones[0] + zeros + ones[1] for zeros in inner], 1)
        if return_soft_mask:
            columns["soft_mask"] = (soft_masks, 0)

        tensor_type = None if return_tensors is None else TensorType(return_tensors)
        as_array = tensor_type in (TensorType.PYTORCH, TensorType.NUMPY) and len(set(widths)) == 1
        data = {
            name: _pad_rows(values, widths, fill, padding_side == "left", as_array)
            for name, (values, fill) in columns.items()
        }
        if as_array and tensor_type == TensorType.PYTORCH:
            import torch

            data = {name: torch.from_numpy(array) for name, array in data.items()}
        if tensor_type is None and isinstance(text, str) and not return_overflowing_tokens:
            data = {name: values[0] for name, values in data.items()}
        if return_length:
            data["length"] = widths
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = sample_of_row
        recipe = _EncodingRecipe(
            serialized_backend=serialized_backend,
            batch=tuple(batch),
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
            truncation=truncation,
            padding=padding,
            return_overflowing_tokens=return_overflowing_tokens,
        )
        return _LazyBatchEncoding(data, recipe, tensor_type, n_sequences=1)  # type: ignore[arg-type]

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
        """Adds the field `soft_mask` to what the backend returned, from the offsets of its encodings."""
        if encoded.encodings is None:
            raise ValueError("return_soft_mask needs the backend's offsets, which this request does not produce.")
        samples = _samples(text, text_pair, is_split_into_words)
        sample_of_row = range(len(encoded.encodings))
        if return_overflowing_tokens:
            sample_of_row = np.asarray(encoded["overflow_to_sample_mapping"]).tolist()
        rows = []
        for encoding, sample in zip(encoded.encodings, sample_of_row, strict=True):
            row = []
            for (start, stop), source, word in zip(
                encoding.offsets, encoding.sequence_ids, encoding.word_ids, strict=True
            ):
                if stop - start != 1 or source is None:
                    row.append(0)
                    continue
                string = samples[sample][source]
                row.append(int((string[word] if is_split_into_words else string)[start].islower()))
            rows.append(row)
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

    def _unknown_characters_of(self, text: str, split_special_tokens: bool) -> Iterator[int]:
        """Positions of the characters that are read as the unknown token."""
        serialized_backend = self.backend_tokenizer.to_str()
        tables = _lookup_tables(serialized_backend)
        if tables is not None and text.isascii() and not text.encode("ascii").translate(None, tables.known):
            return
        pieces = tables.split(text, split_special_tokens) if tables is not None else None
        if tables is not None and pieces is not None:
            offset = 0
            for piece, index in pieces:
                if index is None:
                    yield from (offset + match.start() for match in tables.unknown.finditer(piece))
                offset += len(piece)
            return
        recipe = _EncodingRecipe(serialized_backend, (text,), False, split_special_tokens, None, None, False)
        unknown_id = self.backend_tokenizer.token_to_id(self.backend_tokenizer.model.unk_token)
        (encoding,) = recipe.encode()
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if index == unknown_id and stop - start == 1:  # a longer one is the unknown token, spelled out
                yield start

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
        ids = _flat_bytes(token_ids) if self.use_lookup and not clean_up_tokenization_spaces else None
        tables = _lookup_tables(self.backend_tokenizer.to_str()) if ids is not None else None
        if ids is None or tables is None or tables.characters is None:
            return super()._decode(to_py_obj(token_ids), skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        skipped = tables.special_ids if skip_special_tokens else b""
        characters = ids.translate(tables.characters, skipped)
        if b"\0" not in characters:
            return characters.decode("ascii")
        return "".join([tables.pieces[index] for index in ids.translate(None, skipped)])

    def _decode_soft_masked(self, token_ids, soft_mask, skip_special_tokens: bool) -> str:
        ids, lower = np.atleast_1d(_as_numpy(token_ids)), np.atleast_1d(_as_numpy(soft_mask)).astype(bool)
        if ids.shape != lower.shape:
            raise ValueError(f"soft_mask must be as long as token_ids ({ids.size}), got {lower.size}.")
        if skip_special_tokens:
            special = [index for index, token in self.added_tokens_decoder.items() if token.special]
            kept = ~np.isin(ids, special)
            ids, lower = ids[kept], lower[kept]
        if ids.size == 0:
            return ""
        pieces = {index: self.backend_tokenizer.id_to_token(index) or "" for index in set(ids.tolist())}
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
        return super()._save_pretrained(*args, **kwargs)


__all__ = ["GengramTokenizer"]
