"""Reads a Hugging Face folder: its configuration, and its weights tensor by tensor."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, quoted, shortened
from ...support.lfs_pointer import POINTER_BYTES, refuse_lfs_pointer
from ...support.printable import printable
from ..hub.hub_path import SourcePath, size_of
from .dtypes import SAFETENSORS_NAMES

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
INDEX = "model.safetensors.index.json"
RECORD = "conversion.json"  # of the conversion that made the folder


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, index: int | None = None) -> torch.Tensor:
        """The tensor, or its slice at `index` along the first axis."""
        with _opened(self.path) as file:
            if index is None:
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[index : index + 1][0]

    def pieces(self) -> Iterator[torch.Tensor]:
        """The values piece by piece: stacked tensors slice by slice."""
        if len(self.shape) < 3:
            yield self.read()
        else:
            for index in range(self.shape[0]):
                yield self.read(index)


def read_json(path: SourcePath) -> Any:
    """A small JSON file.

    Raises:
        ConversionError: if it is missing, too large or not JSON.
    """
    if not path.is_file():
        raise ConversionError(f"{path} is missing")
    if size_of(path) > 2**28:
        raise ConversionError(f"{path} has {size_of(path)} bytes; at most {2**28} are read")
    content = path.read_bytes()
    refuse_lfs_pointer(content[:POINTER_BYTES], str(path), ConversionError)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON ({shortened(str(error))})") from None


def config_fields(folder: SourcePath) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        ConversionError: if it is not the configuration of a Gengram model.
    """
    fields = read_json(folder / "config.json")
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != GengramConfig.model_type:
        raise ConversionError(
            f"{folder} is a folder of model_type {shortened(kind)}, expected {GengramConfig.model_type!r}"
        )
    return fields


def read_config(folder: SourcePath) -> GengramConfig:
    """The configuration of a Gengram model.

    Raises:
        ConversionError: if it is of another model, or not valid.
    """
    return config_of(config_fields(folder), folder)


def config_of(fields: dict[str, Any], folder: SourcePath) -> GengramConfig:
    """The configuration with these fields, from the `config.json` of a folder.

    Raises:
        ConversionError: if it is not valid, in one line.
    """
    try:
        return GengramConfig.from_dict(fields)
    except Exception as error:  # of any kind: Transformers reads some fields before they are checked
        words = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(f"{folder / 'config.json'} is not valid: {printable(words, most=600)}") from None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's `model*.safetensors`, by name; only headers are read.

    Raises:
        ConversionError: if a file is missing, superfluous or unreadable, or contradicts the index.
    """
    there = sorted(path.name for path in folder.glob("model*.safetensors") if path.is_file())
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConversionError(f"{folder / INDEX} must have a 'weight_map' from tensor names to files")
        named = sorted(set(weight_map.values()))
    else:
        weight_map, named = None, ["model.safetensors"]
    missing = [name for name in named if name not in there]
    if missing:
        raise ConversionError(f"{folder}: missing {quoted(missing)}; convert again")
    extra = [name for name in there if name not in named]
    if extra:
        raise ConversionError(
            f"{folder}: {quoted(extra)} belong to another set of weights; delete them or convert again"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in named:
        with open(folder / name, "rb") as start:
            refuse_lfs_pointer(start.read(POINTER_BYTES), str(folder / name), ConversionError)
        with _opened(folder / name) as file:
            for key in file.keys():
                view = file.get_slice(key)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None or not (dtype.is_floating_point or ".experts." in key or ".self_attn." in key):
                    raise ConversionError(
                        f"{folder / name}: {shortened(key)} has dtype {view.get_dtype()}, expected a float type"
                    )
                tensors[key] = StoredTensor(key, folder / name, tuple(view.get_shape()), dtype)
    if weight_map is not None:
        wrong = sorted(set(weight_map) ^ set(tensors))
        wrong += [key for key in weight_map if key in tensors and tensors[key].path.name != weight_map[key]]
        if wrong:
            raise ConversionError(f"{folder / INDEX} and the files disagree about {quoted(wrong)}; convert again")
    return tensors


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} is not a readable safetensors file ({shortened(str(error))}); convert again"
        ) from None
