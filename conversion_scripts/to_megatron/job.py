"""A conversion to Megatron that is decided on: what is read, what becomes of it, and how it is cut."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, quoted
from ...support.versions import installed_version
from ..files.conversion_record import read_record
from ..files.dtypes import DTYPES
from ..files.file_facts import check_unchanged, facts_in
from ..files.hf_folder import INDEX, RECORD, StoredTensor, read_config, stored_tensors
from ..mapping.weight_table import TABLE_VERSION, Entry, megatron_entries, model_shapes
from ..megatron.torch_writer import stored_bytes
from .arguments import arguments_for
from .options import Options
from .stored_weights import StoredWeights

_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


class BackJob:
    """A conversion of the Hugging Face folder `source` that is decided on.

    Raises:
        ConversionError: if the folder cannot be used, Megatron cannot express the model, or it cannot be cut as asked.
    """

    def __init__(self, source: Path, options: Options):
        if not source.is_dir():
            raise ConversionError(f"{source} is not a folder; expected a Hugging Face folder of a Gengram model")
        self.source = source
        self.options = options
        self._facts = facts_in(source)
        self.config = read_config(source)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ConversionError(
                f"{source}: the weights are quantised (quantization_config in config.json), Megatron's checkpoints "
                "hold floats. The rounded weights are not the original ones: take the checkpoint, or the folder, that "
                "was quantised"
            )
        stored = stored_tensors(source)
        self._files = [source / name for name in ("config.json", INDEX, RECORD) if (source / name).is_file()]
        self._files += list(dict.fromkeys(tensor.path for tensor in stored.values()))
        self.record = read_record(source)
        self.dtype = DTYPES[options.dtype] if options.dtype else _folder_dtype(stored)
        self.stages = options.stage_layers(self.config)
        options.check_tensor_parallel(self.config)
        self.arguments = arguments_for(self.config, self.record, options, self.dtype, len(self.stages))
        self._entries = megatron_entries(self.config, self.arguments.prefix)
        _check_names(self._entries, stored, self.config)
        if self.config.tie_word_embeddings and (options.format == "torch_dist" or len(self.stages) == 1):
            self._entries.pop(_HEAD)  # only a last stage that is not also the first keeps a copy of the embedding
        hashes_hold = self.record is not None and self.record.table_version == TABLE_VERSION
        self.weights = StoredWeights(stored, self.record.weights if self.record and hashes_hold else {})
        self.tensors = {name: self.weights.lazy(self._entry(name), self.dtype) for name in self._entries}

    def _entry(self, name: str) -> Entry:
        is_copy = name == _HEAD and not self._entries[name].targets
        return self._entries[_EMBEDDING if is_copy else name]

    @cached_property
    def zeros(self) -> list[str]:
        """Tensors that are filled with zeros: memory of layers where it is not active."""
        return [name for name, entry in self._entries.items() if not entry.targets and name != _HEAD]

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, each once."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def written_bytes(self) -> int:
        """Bytes that they need on disk."""
        return stored_bytes(self.tensors, self.options.tensor_parallel)

    @property
    def iteration(self) -> int:
        """The training step that is written into the files."""
        if self.options.iteration is not None:
            return self.options.iteration
        recorded = self.record.iteration if self.record else None
        return recorded if recorded is not None and recorded >= 0 else 0

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the output."""
        return {
            "source": str(self.source.resolve()),
            "source files": [[str(file), *self._facts.get(file, ())] for file in self._files],
            **asdict(self.options),
            "version of gengram": installed_version("gengram"),
            "table_version": TABLE_VERSION,
        }

    def check_unchanged(self) -> None:
        """Refuses what was read if a file of the folder has changed since the job began.

        Raises:
            ConversionError: if one did; the message names it.
            FileNotFoundError: if one is gone.
        """
        check_unchanged(self.source, self._files, self._facts)


def _folder_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    found = sorted({str(tensor.dtype) for tensor in stored.values()})
    if len(found) != 1:
        raise ConversionError(
            f"the folder's weights have dtypes {', '.join(found) or 'of no kind'}; expected one throughout: say "
            "--dtype float32 or --dtype bfloat16"
        )
    return DTYPES[found[0].removeprefix("torch.")]


def _check_names(entries: Mapping[str, Entry], stored: Mapping[str, StoredTensor], config: GengramConfig) -> None:
    """Both sides agree on names and shapes, as sets."""
    shapes = model_shapes(entries.values(), config.num_local_experts)
    missing = [name for name in shapes if name not in stored]
    unknown = [name for name in stored if name not in shapes]
    if missing or unknown:
        parts = [f"lacks {len(missing)}: {quoted(missing, sorted(stored))}"] if missing else []
        parts += [f"has {len(unknown)} others: {quoted(unknown, sorted(shapes))}"] if unknown else []
        raise ConversionError(f"the folder's weights are not those of a language model; it {' and '.join(parts)}")
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ConversionError(f"{name}: expected shape {shape} by config.json, got {stored[name].shape}")
