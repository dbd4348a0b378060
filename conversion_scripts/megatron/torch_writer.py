"""Writer of Megatron's `torch` format from named lazy tensors, one tensor in memory at a time."""

import argparse
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..mapping.weight_table import split_of
from .ranks import MODEL_FILE, Rank, rank_folder
from .torch_archive import LazyTensor
from .torch_archive_writer import write_torch_archive
from .written_keys import LAYER, NO_EXTRA_STATE, Architecture, Progress, to_disk, top_level


def write_torch(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    args: argparse.Namespace,
    iteration: int,
    architecture: Architecture,
    stage_layers: Sequence[int],
    tensor_ranks: int = 1,
    progress: Progress = lambda count: None,
) -> None:
    """Writes `mp_rank_*` folders: one per pipeline stage and tensor-parallel rank, layers counted within the stage.

    Args:
        folder: Where to write; exists.
        tensors: Weights by Megatron's names with global layer numbers. `output_layer.weight` goes to the last stage.
        args: Megatron's arguments.
        iteration: Training steps.
        architecture: Which keys there are beside the weights.
        stage_layers: How many layers each pipeline stage has.
        tensor_ranks: Into how many parts tensor parallelism cuts.
        progress: Called with the number of bytes written since the last call.
    """
    stages = len(stage_layers)
    for stage in range(stages):
        start = sum(stage_layers[:stage])
        layers = range(start, start + stage_layers[stage])
        for number in range(tensor_ranks):
            model = _stage_model(tensors, architecture, layers, stage == 0, stage == stages - 1, number, tensor_ranks)
            rank = folder / rank_folder(Rank(number, 0, number), stage, stages, 1)
            rank.mkdir()
            with open(rank / MODEL_FILE, "wb") as file:
                saved = {**top_level(args, iteration), "model": model}
                write_torch_archive(file, saved, MODEL_FILE.partition(".")[0], progress)
                to_disk(file)


def _stage_model(
    tensors: Mapping[str, LazyTensor],
    architecture: Architecture,
    layers: range,
    first: bool,
    last: bool,
    rank: int,
    ranks: int,
) -> OrderedDict[str, Any]:
    model: OrderedDict[str, Any] = OrderedDict()
    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        if match and int(match[1]) not in layers:
            continue
        if not match and not (first if name.startswith("embedding.") else last):
            continue
        key = f"decoder.layers.{int(match[1]) - layers.start}.{match[2]}" if match else name
        model[key] = _part(name, tensor, rank, ranks)
    states = [*architecture.extra_states, "self_attention.core_attention"]
    states += ["mlp.experts.linear_fc1", "mlp.experts.linear_fc2"] if architecture.experts else []
    empty = LazyTensor((0,), NO_EXTRA_STATE.dtype, lambda: NO_EXTRA_STATE)
    model |= {f"decoder.layers.{i}.{state}._extra_state": empty for i in range(len(layers)) for state in states}
    if last:
        model["decoder.final_layernorm._extra_state"] = empty
        model["output_layer._extra_state"] = None
    return model


def _part(name: str, tensor: LazyTensor, rank: int, ranks: int) -> LazyTensor:
    split = split_of(name)
    if ranks == 1 or split.axis is None:
        return tensor
    shape = split.shape(tensor.shape, ranks, name)
    return LazyTensor(shape, tensor.dtype, lambda: split.part(tensor.read(), rank, ranks))


def stored_bytes(tensors: Mapping[str, LazyTensor], tensor_ranks: int = 1) -> int:
    """Bytes that the weights need on disk: replicated ones once per tensor-parallel rank, and a margin for headers."""
    copies = (tensor.nbytes * (tensor_ranks if split_of(name).axis is None else 1) for name, tensor in tensors.items())
    return sum(copies) + 4096 * tensor_ranks * len(tensors)
