"""Reads `conversion.json`, in which a conversion to Hugging Face says what it made of what."""

import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...support.errors import ConversionError, shortened
from ...support.file_hash import sha256_of
from ..hub.hub_path import SourcePath
from .dtypes import STORED_DTYPES
from .hf_folder import RECORD, read_json


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor as it was read or written.

    Args:
        sha256: Of the bytes of a source; of a tensor of the folder its `WeightHash`.
        unchecked: Why the bytes of a source could not be compared with a checksum; empty if they were.
    """

    sha256: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    unchecked: str = ""


@dataclass(frozen=True)
class ConversionRecord:
    """What `conversion.json` says.

    Args:
        table_version: Of the weight table that was used.
        source: Where the checkpoint was; `None` if that was left out, as the next two may be.
        format: Of the checkpoint.
        iteration: Training steps of the checkpoint.
        args: Megatron's arguments, as far as they are recorded.
        sources: The checkpoint's tensors, by Megatron's names.
        weights: The folder's tensors.
        files: SHA-256 of the folder's other files, by name; empty in records of versions that did not note them.
    """

    table_version: Any
    source: str | None = None
    format: str | None = None
    iteration: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, RecordedTensor] = field(default_factory=dict)
    weights: dict[str, RecordedTensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def read_record(folder: SourcePath) -> ConversionRecord | None:
    """The record of the conversion that made a folder; `None` if there is none.

    Raises:
        ConversionError: if the file is there and is not such a record.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        source = content["source"]
        return ConversionRecord(
            table_version=content["table_version"],
            source=_of_kind(source.get("path"), str),
            format=_of_kind(source.get("format"), str),
            iteration=_of_kind(source.get("iteration"), int),
            args=_of_kind(source.get("args"), dict) or {},
            sources=_tensors(source["tensors"]),
            weights=_tensors(content["weights"]),
            files=_of_kind(content.get("files"), dict) or {},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"{path} is not the record of a conversion ({shortened(str(error))}); fetch or convert the folder again, "
            "or delete this file to do without it"
        ) from None


def file_digests(folder: Path, names: Container[str]) -> dict[str, str]:
    """SHA-256 of those files of a folder that have one of these names."""
    files = sorted(path for path in folder.iterdir() if path.name in names and path.is_file())
    return {path.name: sha256_of(path) for path in files}


def needed_record(folder: Path) -> ConversionRecord:
    """The record of the conversion that made a folder.

    Raises:
        ConversionError: if there is none.
    """
    record = read_record(folder)
    if record is None:
        raise ConversionError(f"{folder / RECORD} is missing; expected a folder written by `gengram convert to-hf`")
    return record


def _of_kind(value: Any, kind: type) -> Any:
    if value is not None and type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {shortened(value)}")
    return value


def _tensors(entries: dict[str, Any]) -> dict[str, RecordedTensor]:
    return {name: _tensor(entry) for name, entry in entries.items()}


def _tensor(entry: dict[str, Any]) -> RecordedTensor:
    digest, dtype, shape = entry["sha256"], entry["dtype"], entry["shape"]
    sizes_are_sound = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**62 for size in shape)
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest) or not sizes_are_sound:
        raise ValueError(f"entry {shortened(entry)}")
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise ValueError(f"dtype {shortened(dtype)}")
    return RecordedTensor(digest, STORED_DTYPES[dtype], tuple(shape), _of_kind(entry.get("unchecked"), str) or "")
