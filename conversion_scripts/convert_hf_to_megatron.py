"""Converts a Hugging Face folder of Gengram into a Megatron checkpoint.

    python -m gengram.conversion_scripts.convert_hf_to_megatron HF_FOLDER OUTPUT [--format torch_dist|torch] ...

The way back of `convert_megatron_to_hf`, by the same table. Weights pass through memory tensor by tensor; the output
folder appears when it is whole, or not at all.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..configuration.configuration_gengram import GengramConfig
from ..support.errors import ConversionError, quoted, shortened, size_text
from .choices import FORMATS, MEMORY_PREFIXES, OUTPUT_DTYPES
from .files.dtypes import DTYPES, dtype_name
from .files.hf_folder import RECORD, StoredTensor, read_config, read_json, stored_tensors
from .files.partial_folder import check_output_is_free, staged_folder
from .mapping.arguments import args_from_config, config_from_args, differing_fields
from .mapping.weight_table import Entry, megatron_entries
from .megatron.checkpoint import TRACKER
from .megatron.torch_archive import LazyTensor
from .megatron.torch_dist_writer import write_torch_dist
from .megatron.torch_writer import stored_bytes, write_torch
from .megatron.written_keys import Architecture

_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@dataclass
class BackReport:
    """What a conversion to Megatron did.

    Args:
        zeros: How many tensors were filled with zeros: memory of layers where it is not active.
        recorded: Whether the arguments of the original checkpoint were used, from `conversion.json`.
        contradiction: Why they were not, if there are any.
    """

    source: Path
    output: Path
    format: str
    iteration: str
    dtype: str
    stages: int
    tensor_ranks: int
    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    zeros: int
    zero_bytes: int
    prefix: str
    recorded: bool
    contradiction: str = ""

    def summary(self) -> str:
        """The report in a few lines for people."""
        ranks = f", {self.stages} pipeline stage(s), {self.tensor_ranks} tensor rank(s)"
        lines = [
            f"Converted {self.source} to {self.output} ({self.format}{ranks if self.format == 'torch' else ''}, "
            f"{self.iteration}) in {self.seconds:.1f} s.",
            f"Wrote {self.tensors} tensors, {self.parameters:,} parameters, {size_text(self.nbytes)} in {self.dtype}; "
            f"the memory is called {self.prefix}.",
            "Arguments: those of the original checkpoint, where they are recorded."
            if self.recorded
            else "Arguments: made from config.json.",
        ]
        if self.contradiction:
            lines.append(f"The recorded arguments were not used: {self.contradiction}.")
        if self.zeros:
            lines.append(
                f"Filled {self.zeros} tensors with zeros ({size_text(self.zero_bytes)}): memory of layers where it is "
                "not active, which Megatron loads and does not use."
            )
        return "\n".join(lines)


def convert_to_megatron(
    source: str | Path,
    output: str | Path,
    format: str = "torch_dist",
    pipeline_parallel: int = 1,
    tensor_parallel: int = 1,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    name_prefix: str | None = None,
    dtype: str | None = None,
    iteration: int | None = None,
    progress: bool = True,
) -> BackReport:
    """Converts the Hugging Face folder `source` into the new Megatron checkpoint `output`.

    Args:
        source: A folder with `config.json` and `model*.safetensors`.
        output: A folder that does not exist or is empty; the root of the checkpoint, for Megatron's `--load`.
        format: `"torch_dist"`, which Megatron loads with any parallelism, or `"torch"`, cut for one.
        pipeline_parallel: Pipeline stages (`"torch"` only).
        tensor_parallel: Tensor-parallel ranks (`"torch"` only).
        first_stage_layers: Layers of the first stage, for `--decoder-first-pipeline-num-layers`.
        last_stage_layers: Layers of the last stage, for `--decoder-last-pipeline-num-layers`.
        name_prefix: What the memory is called in keys and arguments, `"gengram"` or `"engram_dna"`; `None` takes that
            of the original checkpoint, or `"gengram"`.
        dtype: `"float32"` or `"bfloat16"`; `None` keeps the folder's, bit for bit.
        iteration: Training step to write as `iter_*`. `None` writes `release`, which Megatron loads without optimizer
            and random states.
        progress: Show a progress bar on stderr.

    Raises:
        ConversionError: if the folder cannot be used, Megatron cannot express the model, or the sizes cannot be cut as
            asked; nothing is left behind.
        OSError: if reading or writing fails; nothing is left behind.
    """
    started = time.monotonic()
    source, output = Path(source), Path(os.path.abspath(output))
    _check_options(format, pipeline_parallel, tensor_parallel, first_stage_layers, last_stage_layers, dtype)
    if name_prefix not in (None, *MEMORY_PREFIXES):
        raise ConversionError(f"name_prefix must be one of {', '.join(MEMORY_PREFIXES)}, got {shortened(name_prefix)}")
    if iteration is not None and not 0 <= iteration < 10**12:
        raise ConversionError(f"iteration must lie in 0..{10**12 - 1}, got {iteration}")
    check_output_is_free(output)
    if not source.is_dir():
        raise ConversionError(f"{source} is not a folder; expected a Hugging Face folder of a Gengram model")
    config = read_config(source)
    stored = stored_tensors(source)
    record = _recorded_source(source)
    prefix = name_prefix or _recorded_prefix(record)
    target = DTYPES[dtype] if dtype else _folder_dtype(stored)

    recorded, contradiction = _recorded_args(record, config, prefix)
    args = args_from_config(config, prefix) | recorded
    stages = _stage_layers(config, pipeline_parallel, first_stage_layers, last_stage_layers)
    _check_tensor_parallel(config, tensor_parallel)
    entries = megatron_entries(config, prefix)
    _check_names(entries, stored, config)
    if config.tie_word_embeddings and (format == "torch_dist" or len(stages) == 1):
        entries.pop(_HEAD)  # only a last stage that is not also the first keeps a copy of the embedding
    tensors = {name: _lazy(name, entry, entries, stored, target) for name, entry in entries.items()}
    zeros = [name for name, entry in entries.items() if not entry.targets and name != _HEAD]

    steps = iteration if iteration is not None else _recorded_iteration(record)
    args |= _run_args(format, target, len(stages), tensor_parallel, first_stage_layers, last_stage_layers, config)
    namespace = argparse.Namespace(**args)
    experts = config.num_local_experts if config.num_local_experts > 1 else 0
    architecture = Architecture(config.num_hidden_layers, experts)
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    total = stored_bytes(tensors, tensor_parallel)
    with staged_folder(output, total) as root:
        folder = root / name
        folder.mkdir()
        with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
            if format == "torch_dist":
                stacked = not isinstance(args.get("moe_layer_freq"), list | tuple)
                write_torch_dist(folder, tensors, namespace, steps, architecture, stacked, bar.update)
            else:
                write_torch(folder, tensors, namespace, steps, architecture, stages, tensor_parallel, bar.update)
        (root / TRACKER).write_text("release" if iteration is None else str(iteration), encoding="ascii")
    return BackReport(
        source=source,
        output=output,
        format=format,
        iteration=name,
        dtype=dtype_name(target),
        stages=len(stages),
        tensor_ranks=tensor_parallel,
        tensors=len(tensors),
        parameters=sum(prod(tensor.shape) for tensor in tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        seconds=time.monotonic() - started,
        zeros=len(zeros),
        zero_bytes=sum(tensors[name].nbytes for name in zeros),
        prefix=prefix,
        recorded=bool(recorded),
        contradiction=contradiction,
    )


def _check_options(
    format: str, stages: int, ranks: int, first: int | None, last: int | None, dtype: str | None
) -> None:
    if format not in FORMATS:
        raise ConversionError(f"format must be one of {', '.join(FORMATS)}, got {shortened(format)}")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(OUTPUT_DTYPES)}, or None to keep it, got {dtype!r}")
    if stages < 1 or ranks < 1 or ranks > 99 or stages > 999:
        raise ConversionError(
            f"pipeline_parallel must lie in 1..999 and tensor_parallel in 1..99, got {stages} and {ranks}"
        )
    if format == "torch_dist" and (stages, ranks, first, last) != (1, 1, None, None):
        raise ConversionError(
            "pipeline and tensor parallelism are for format torch: Megatron cuts a torch_dist checkpoint itself when "
            "it is loaded; leave them out, or say --format torch"
        )


def _folder_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    found = sorted({str(tensor.dtype) for tensor in stored.values()})
    if len(found) != 1:
        raise ConversionError(
            f"the folder's weights have dtypes {', '.join(found) or 'of no kind'}; expected one throughout: say "
            "--dtype float32 or --dtype bfloat16"
        )
    return DTYPES[found[0].removeprefix("torch.")]


def _recorded_source(folder: Path) -> dict[str, Any]:
    """What `conversion.json` says about the checkpoint that the folder was made from; empty without one."""
    if not (folder / RECORD).is_file():
        return {}
    record = read_json(folder / RECORD)
    source = record.get("source") if isinstance(record, dict) else None
    if not isinstance(source, dict):
        raise ConversionError(f"{folder / RECORD} is not the record of a conversion; delete it to do without")
    return source


def _recorded_iteration(record: Mapping[str, Any]) -> int:
    iteration = record.get("iteration")
    return iteration if type(iteration) is int and iteration >= 0 else 0


def _recorded_prefix(record: Mapping[str, Any]) -> str:
    names = record.get("tensors")
    for prefix in MEMORY_PREFIXES:
        if isinstance(names, dict) and any(f".{prefix}." in name for name in names):
            return prefix
    return MEMORY_PREFIXES[0]


def _recorded_args(record: Mapping[str, Any], config: GengramConfig, prefix: str) -> tuple[dict[str, Any], str]:
    """The recorded arguments if they describe `config`, those of the memory under `prefix`; else none, and why."""
    args = record.get("args")
    if not isinstance(args, dict) or not args:
        return {}, ""
    try:
        differing = differing_fields(config, config_from_args(args))
    except ConversionError as error:
        return {}, str(error)
    if differing:
        return {}, f"config.json has other values of {', '.join(differing)}"
    used = next((known for known in MEMORY_PREFIXES if args.get(f"{known}_enabled")), prefix)
    result = {name: value for name, value in args.items() if not name.startswith(MEMORY_PREFIXES)}
    for name, value in args.items():
        if name.startswith(f"{used}_"):
            result[f"{prefix}_{name.removeprefix(f'{used}_')}"] = value
    return result, ""


def _stage_layers(config: GengramConfig, stages: int, first: int | None, last: int | None) -> list[int]:
    """Layers per stage (`get_transformer_layer_offset` in the authors' `transformer_layer.py`)."""
    layers = config.num_hidden_layers
    given = [count for count in (first, last) if count is not None]
    middle, rest = stages - len(given), layers - sum(given)
    possible = middle > 0 or (middle == 0 and rest == 0)
    if min(given, default=1) < 1 or not possible or rest < middle or (middle and rest % middle):
        named = f", of which the first and last have {given}" if given else ""
        raise ConversionError(
            f"{layers} layers (num_hidden_layers) cannot be divided evenly over {stages} pipeline stages{named}; "
            "choose another number, or give --first-stage-layers and --last-stage-layers"
        )
    result = [rest // middle] * middle if middle else []
    return [*([first] if first else []), *result, *([last] if last else [])]


def _check_tensor_parallel(config: GengramConfig, ranks: int) -> None:
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % ranks:
            raise ConversionError(
                f"{name} must be a multiple of the number of tensor-parallel ranks, got {size} and {ranks}; choose "
                "another number, or --format torch_dist, which Megatron cuts as it needs"
            )


def _check_names(entries: Mapping[str, Entry], stored: Mapping[str, StoredTensor], config: GengramConfig) -> None:
    """Both sides agree on names and shapes, as sets."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries.values():
        for target in entry.targets:
            experts = () if target.index is None else (config.num_local_experts,)
            shapes[target.name] = (*experts, *target.shape)
    missing = [name for name in shapes if name not in stored]
    unknown = [name for name in stored if name not in shapes]
    if missing or unknown:
        parts = [f"lacks {len(missing)}: {quoted(missing, sorted(stored))}"] if missing else []
        parts += [f"has {len(unknown)} others: {quoted(unknown, sorted(shapes))}"] if unknown else []
        raise ConversionError(f"the folder's weights are not those of a language model; it {' and '.join(parts)}")
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ConversionError(f"{name}: expected shape {shape} by config.json, got {stored[name].shape}")


def _lazy(
    name: str,
    entry: Entry,
    entries: Mapping[str, Entry],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> LazyTensor:
    if name == _HEAD and not entry.targets:
        entry = entries[_EMBEDDING]
    if not entry.targets:
        return LazyTensor(entry.shape, dtype, partial(torch.zeros, entry.shape, dtype=dtype))
    return LazyTensor(entry.shape, dtype, partial(_read, entry, stored, dtype))


def _read(entry: Entry, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> torch.Tensor:
    parts = [stored[target.name].read(target.index) for target in entry.targets]
    return entry.layout.to_megatron(parts).to(dtype).contiguous()


def _run_args(
    format: str,
    dtype: torch.dtype,
    stages: int,
    ranks: int,
    first: int | None,
    last: int | None,
    config: GengramConfig,
) -> dict[str, Any]:
    """Arguments about this checkpoint rather than the model; recorded ones give way to them."""
    return {
        "ckpt_format": format,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "pipeline_model_parallel_size": stages,
        "tensor_model_parallel_size": ranks,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": ranks,
        "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
        "decoder_first_pipeline_num_layers": first,
        "decoder_last_pipeline_num_layers": last,
        # Megatron pads the vocabulary to a multiple of this times the tensor-parallel ranks.
        "make_vocab_size_divisible_by": config.vocab_size // ranks,
        # There is no training state here; the loader does not ask for what was not saved.
        "no_save_optim": True,
        "no_save_rng": True,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """`gengram convert to-megatron`, as `python -m gengram.conversion_scripts.convert_hf_to_megatron`."""
    from ..cli import main as gengram

    return gengram(["convert", "to-megatron", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
