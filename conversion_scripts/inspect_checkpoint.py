"""`gengram info`: says what a Megatron checkpoint or a Hugging Face folder is, without reading weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..configuration.configuration_gengram import GengramConfig
from ..support.errors import ConversionError, quoted, size_text
from ..support.printable import printable
from .files.conversion_record import read_record
from .files.dtypes import dtype_name
from .files.hf_folder import StoredTensor, config_fields, config_of, stored_tensors
from .files.safetensors_writer import TensorSpec
from .hub.hub_path import HubPath, SourcePath, open_source, size_of
from .mapping.arguments import config_from_args
from .mapping.match import Output, match, parameters
from .mapping.quantized import numbers_name, quantization_of, stored_specs
from .mapping.weight_table import megatron_entries, model_shapes
from .megatron.checkpoint import summary_of_dropped
from .megatron.open_checkpoint import NotACheckpointError, open_checkpoint

_BODY = "model."  # which the names of a model's tensors begin with, unless it was saved without a head


@dataclass
class CheckpointInfo:
    """What `path` is.

    Args:
        kind: `"megatron torch"`, `"megatron torch_dist"` or `"hugging face"`.
        parameters: Numbers in the (converted) model.
        problem: Why it cannot be converted or loaded; empty if nothing is wrong.
    """

    path: str
    kind: str
    layout: str = ""
    iteration: int | None = None
    dtypes: list[str] = field(default_factory=list)
    files: int = 0
    nbytes: int = 0
    parameters: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    converted_from: str = ""
    problem: str = ""

    def summary(self) -> str:
        """The information in a few lines for people."""
        step = "" if self.iteration is None else f", iteration {self.iteration}"
        layout = f", {self.layout}" if self.layout else ""
        lines = [f"{self.path}: {self.kind}{step}{layout}", f"files: {self.files}, {size_text(self.nbytes)}"]
        if self.parameters is not None:
            lines.append(f"model: {self.parameters:,} parameters in {', '.join(self.dtypes)}")
        lines += [f"  {name}: {printable(str(value), most=1000)}" for name, value in self.model.items()]
        if self.left_out:
            lines.append("a conversion leaves out:")
            lines += [f"  {line}" for line in self.left_out]
        if self.converted_from:
            lines.append(f"converted from: {printable(self.converted_from, most=1000)}")
        lines.append(f"PROBLEM: {self.problem}" if self.problem else "nothing is missing")
        return "\n".join(lines)


def inspect_checkpoint(path: str | Path, revision: str | None = None) -> CheckpointInfo:
    """What the checkpoint or folder at `path`, or `ORG/NAME[/FOLDER]` on the Hub, is; there metadata is fetched only.

    Raises:
        ConversionError: if it is neither a Megatron checkpoint nor a folder of a Gengram model, or is damaged.
    """
    place = open_source(path, revision)
    if isinstance(place, HubPath):
        place.repository.may_fetch_files = False
    if (place / "config.json").is_file():
        return _inspect_repository(place) if isinstance(place, HubPath) else _inspect_folder(place)
    try:
        checkpoint = open_checkpoint(place)
    except NotACheckpointError as error:
        known = "a Hugging Face folder (with a config.json), or ORG/NAME on the Hub"
        raise ConversionError(f"{error}, {known}") from None
    info = CheckpointInfo(
        path=str(checkpoint.path),
        kind=f"megatron {checkpoint.format}",
        layout=checkpoint.layout,
        iteration=checkpoint.iteration,
        dtypes=sorted({dtype_name(tensor.dtype) for tensor in checkpoint.tensors.values()}),
        files=len(checkpoint.files),
        nbytes=sum(size_of(file) for file in checkpoint.files),
    )
    dropped = checkpoint.dropped
    try:
        config = config_from_args(checkpoint.args)
        info.model = _facts(config)
        plan = match(checkpoint.shapes, config)
        info.parameters = parameters(plan)
        dropped = checkpoint.left_out(plan)
    except ConversionError as error:
        info.problem = str(error)
    info.left_out = summary_of_dropped(dropped)
    return info


def config_at(path: str | Path, revision: str | None = None) -> GengramConfig:
    """The configuration of the model of a checkpoint or folder; of what is on the Hub, metadata is fetched only.

    Raises:
        ConversionError: as `inspect_checkpoint`, or if the checkpoint's arguments describe no such model.
    """
    place = open_source(path, revision)
    if isinstance(place, HubPath):
        place.repository.may_fetch_files = False
    if (place / "config.json").is_file():
        return config_of(config_fields(place), place)
    return config_from_args(open_checkpoint(place).args)


def _inspect_folder(path: Path) -> CheckpointInfo:
    fields = config_fields(path)
    tensors = stored_tensors(path)
    files = {tensor.path for tensor in tensors.values()}
    info = CheckpointInfo(
        path=str(path),
        kind="hugging face",
        dtypes=sorted({dtype_name(tensor.dtype) for tensor in tensors.values()}),
        files=len(files),
        nbytes=sum(file.stat().st_size for file in files),
        parameters=sum(_parameters(tensor) for tensor in tensors.values()),
    )
    _add_description(info, path, fields)
    if not info.problem:
        try:
            info.problem = _weights_problem(config_of(fields, path), tensors)
        except ConversionError as error:
            info.problem = str(error)
    return info


def _weights_problem(config: GengramConfig, tensors: Mapping[str, StoredTensor]) -> str:
    """How the tensors of a folder differ from those of its configuration; empty if they do not.

    Heads of classifiers are not looked at.

    Raises:
        ConversionError: if there is no such model.
    """
    shapes = model_shapes(megatron_entries(config).values(), config.num_local_experts)
    outputs = [Output(name, shape) for name, shape in shapes.items()]
    specs = {spec.name: spec for spec in stored_specs(outputs, quantization_of(config), torch.float32)}
    if config.architectures and not any("LM" in name for name in config.architectures):
        specs = {name: spec for name, spec in specs.items() if name.startswith(_BODY)}
    start = "" if any(name.startswith(_BODY) for name in tensors) else _BODY
    found = {start + name: tensor for name, tensor in tensors.items()}
    missing = [name for name in specs if name not in found]
    others = [name for name in found if name.startswith(_BODY) and name not in specs]
    wrong = [
        f"{name} is {dtype_name(tensor.dtype)} of shape {tensor.shape}, expected "
        f"{'floats' if spec.dtype.is_floating_point else dtype_name(spec.dtype)} of shape {spec.shape}"
        for name, spec in specs.items()
        if (tensor := found.get(name)) is not None and not _fits(tensor, spec)
    ]
    parts = [f"{len(missing)} are missing: {quoted(missing, limit=3)}"] if missing else []
    parts += [f"{len(others)} are of another model: {quoted(others, limit=3)}"] if others else []
    parts += [f"{len(wrong)} are of another kind: {'; '.join(wrong[:3])}"] if wrong else []
    words = f"the weights are not those that config.json describes: {'; '.join(parts)}; fetch or convert them again"
    return words if parts else ""


def _fits(tensor: StoredTensor, spec: TensorSpec) -> bool:
    """Whether a tensor has the right shape and holds numbers of the right kind; floats may have any precision."""
    are_floats = tensor.dtype.is_floating_point and spec.dtype.is_floating_point
    return tensor.shape == spec.shape and (are_floats or tensor.dtype == spec.dtype)


def _parameters(tensor: StoredTensor) -> int:
    """Weights that a tensor holds: scales are none, and two 4-bit numbers share a byte."""
    return 0 if numbers_name(tensor.name) else prod(tensor.shape) * (2 if tensor.dtype == torch.uint8 else 1)


def _inspect_repository(folder: HubPath) -> CheckpointInfo:
    """A converted folder on the Hub, as far as its small files and the list of files tell."""
    fields = config_fields(folder)
    weights = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
    info = CheckpointInfo(
        path=str(folder),
        kind="hugging face",
        dtypes=[printable(str(fields.get("dtype", "unknown")), most=40)],
        files=len(weights),
        nbytes=sum(size_of(file) for file in weights),
    )
    _add_description(info, folder, fields)
    if not weights and not info.problem:
        info.problem = "there are no safetensors files"
    return info


def _add_description(info: CheckpointInfo, folder: SourcePath, fields: dict[str, Any]) -> None:
    try:
        info.model = _facts(config_of(fields, folder))
        record = read_record(folder)
    except ConversionError as error:
        info.problem = str(error)
        return
    if record is not None:
        info.iteration = record.iteration
        info.converted_from = f"{record.source} ({record.format})"


def _facts(config: GengramConfig) -> dict[str, Any]:
    experts = (
        f"{config.num_local_experts} experts, {config.num_experts_per_tok} used, width {config.intermediate_size}"
        if config.num_local_experts > 1
        else f"dense, width {config.intermediate_size}"
    )
    kept = quantization_of(config)
    if kept.experts is not None:
        experts += f", kept in {kept.experts}"
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    memory = "none"
    if config.memory_layers:
        conv = f"convolution {config.memory_conv_kernel} x {config.memory_conv_dilation}"
        memory = (
            f"layers {config.memory_layers} (from 0), k-mers {config.memory_ngram_sizes} of width "
            f"{config.memory_embedding_dim}, window {config.memory_window}, "
            f"{conv if config.memory_conv_kernel else 'no convolution'}"
        )
    return {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention": (
            f"{config.num_attention_heads} heads, {config.num_key_value_heads} groups, head width {config.head_dim}"
            + (f", kept in {kept.attention}" if kept.attention else "")
        ),
        "feed-forward": experts,
        "vocabulary": f"{config.vocab_size}{', tied head' if config.tie_word_embeddings else ''}",
        "context": config.max_position_embeddings,
        "rotary": ", ".join(f"{name} {value}" for name, value in rope.items()),
        "memory": memory,
    }
