"""Calls of the tokenizer answered from the byte table, in the shape that Transformers gives its own answers."""

from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import TensorType

from .backend import byte_table
from .byte_table import padded


def encode_by_table(tokenizer: TokenizersBackend, text: Any, **options: Any) -> BatchEncoding | None:
    """The same as `TokenizersBackend._encode_plus`, from the byte table; None if that does not cover the request."""
    batch = (text,) if isinstance(text, str) else text
    request = _TableRequest.of(options, tokenizer)
    if (
        request is None
        or not isinstance(batch, (list, tuple))
        or not batch
        or not all(isinstance(sequence, str) for sequence in batch)
    ):
        return None
    serialized_backend = tokenizer.backend_tokenizer.to_str()
    table = byte_table(serialized_backend)
    if table is None:
        return None
    truncation, padding = request.truncation(tokenizer.truncation_side), request.padding(tokenizer)
    if truncation is not None and (
        request.truncation_strategy == TruncationStrategy.ONLY_SECOND
        or request.max_length is None
        # The backend refuses, whether these tokens are wanted or not.
        or not 0 <= request.stride < request.max_length - table.added_by_post_processor
    ):
        return None
    rows = table.encode_batch(
        batch,
        add_special_tokens=request.add_special_tokens,
        split_special_tokens=bool(request.split_special_tokens),
        max_length=request.max_length if truncation is not None else None,
        stride=request.stride,
        from_right=tokenizer.truncation_side == "left",
        overflowing=request.return_overflowing_tokens,
        soft_masked=request.return_soft_mask,
    )
    if rows is None:
        return None

    widths = [len(row) for row in rows.ids]
    if padding is not None:
        width = max(widths) if padding["length"] is None else padding["length"]
        multiple = request.pad_to_multiple_of or 1
        widths = [max(length, -(-width // multiple) * multiple) for length in widths]
    for width in widths:
        ids = range(width)  # of which only the length counts
        tokenizer._eventual_warn_about_too_long_sequence(ids, request.max_length, request.verbose)  # type: ignore[arg-type]
    columns = {"input_ids": (rows.ids, padding["pad_id"] if padding is not None else 0)}
    if request.return_attention_mask:
        columns["attention_mask"] = ([b"\1" * len(row) for row in rows.ids], 0)
    if request.return_special_tokens_mask:
        columns["special_tokens_mask"] = (rows.special_tokens_masks, 1)
    if request.return_soft_mask:
        columns["soft_mask"] = (rows.soft_masks, 0)

    tensor_type = None if request.return_tensors is None else TensorType(request.return_tensors)
    as_array = tensor_type in (TensorType.PYTORCH, TensorType.NUMPY) and len(set(widths)) == 1
    data = {
        name: padded(values, widths, fill, request.padding_side == "left", as_array)
        for name, (values, fill) in columns.items()
    }
    if as_array and tensor_type == TensorType.PYTORCH:
        import torch

        data = {name: torch.from_numpy(array) for name, array in data.items()}
    if tensor_type is None and isinstance(text, str) and not request.return_overflowing_tokens:
        data = {name: values[0] for name, values in data.items()}
    if request.return_overflowing_tokens:
        data["overflow_to_sample_mapping"] = rows.samples
    recipe = EncodingRecipe(
        serialized_backend=serialized_backend,
        batch=tuple(batch),
        add_special_tokens=request.add_special_tokens,
        split_special_tokens=bool(request.split_special_tokens),
        truncation=truncation,
        padding=padding,
        return_overflowing_tokens=request.return_overflowing_tokens,
    )
    return LazyBatchEncoding(data, recipe, tensor_type, n_sequences=1)  # type: ignore[arg-type]


@dataclass
class _TableRequest:
    """The arguments of `TokenizersBackend._encode_plus` that the byte table answers, with their defaults there."""

    add_special_tokens: bool = True
    padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD
    truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE
    max_length: int | None = None
    stride: int = 0
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    return_tensors: str | TensorType | None = None
    return_attention_mask: bool | None = None
    return_overflowing_tokens: bool = False
    return_special_tokens_mask: bool = False
    return_soft_mask: bool = False
    verbose: bool = True
    split_special_tokens: bool | None = None

    @classmethod
    def of(cls, options: dict[str, Any], tokenizer: TokenizersBackend) -> "_TableRequest | None":
        """The request, what was not given filled in from `tokenizer`; None if it asks for more or cannot be."""
        answered = cls.__dataclass_fields__
        if any(value is not None and value is not False and name not in answered for name, value in options.items()):
            return None
        request = cls(**{name: value for name, value in options.items() if name in answered})
        if request.return_attention_mask is None:
            request.return_attention_mask = "attention_mask" in tokenizer.model_input_names
        if request.split_special_tokens is None:
            request.split_special_tokens = tokenizer.split_special_tokens
        if request.padding_side is None:
            request.padding_side = tokenizer.padding_side
        if (
            (options.get("return_token_type_ids") is None and "token_type_ids" in tokenizer.model_input_names)
            or request.padding_side not in ("left", "right")
            or min(request.max_length or 0, request.pad_to_multiple_of or 0) < 0
        ):
            return None
        return request

    def truncation(self, side: str) -> dict[str, Any] | None:
        """What the backend calls `truncation`."""
        if self.truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE:
            return None
        strategy = self.truncation_strategy.value
        return {"max_length": self.max_length, "stride": self.stride, "strategy": strategy, "direction": side}

    def padding(self, tokenizer: TokenizersBackend) -> dict[str, Any] | None:
        """What the backend calls `padding`."""
        if self.padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return None
        return {
            "length": self.max_length if self.padding_strategy == PaddingStrategy.MAX_LENGTH else None,
            "direction": self.padding_side,
            "pad_id": tokenizer.pad_token_id,
            "pad_token": tokenizer.pad_token,
            "pad_type_id": tokenizer.pad_token_type_id,
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }


@dataclass(frozen=True)
class EncodingRecipe:
    """What the backend needs to make the `Encoding`s of a batch: independent of what becomes of the tokenizer."""

    serialized_backend: str
    batch: tuple[str, ...]
    add_special_tokens: bool
    split_special_tokens: bool
    truncation: dict[str, Any] | None = None
    padding: dict[str, Any] | None = None
    return_overflowing_tokens: bool = False

    def encode(self) -> list[Encoding]:
        """The encodings, those of overflowing tokens behind the one that they overflow from."""
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


class LazyBatchEncoding(BatchEncoding):
    """A `BatchEncoding` whose backend encodings (`word_ids`, `char_to_token`, ...) are made when first asked for."""

    _encodings_or_recipe: list[Encoding] | EncodingRecipe | None = None

    @property
    def _encodings(self):
        if isinstance(self._encodings_or_recipe, EncodingRecipe):
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
