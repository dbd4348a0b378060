"""Reader of Megatron's `torch` format: one `model_optim_rng.pt` per pipeline stage and rank, layers counted within it.

Ranks of tensor and expert parallelism are merged: a tensor is put together when it is read, and where ranks hold
copies of the same, they must be equal.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...support.errors import ConversionError, quoted, shortened
from ..files.weight_hash import tensor_bytes
from ..hub.hub_path import SourcePath, size_of
from ..mapping.argument_codecs import integer_argument, is_plain
from ..mapping.layouts import Split
from ..mapping.weight_table import look_up
from .checkpoint import Dropped, MegatronCheckpoint, args_of, iteration_of, nbytes_inside
from .ranks import MODEL_FILE, Rank, rank_folder, saving_ranks
from .safe_pickle import TensorReference
from .torch_archive import LazyTensor, TorchArchive

_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
_MOST_FILES = 2**16

# What else may stand beside "model"; anything unknown there is reported the same way.
_NOT_WEIGHTS = {
    "optimizer": "optimizer state",
    "opt_param_scheduler": "learning-rate schedule",
    "rng_state": "random number states",
    "rerun_state_machine": "rerun state of the trainer",
}
_DESCRIPTION = ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "content_metadata")

# Stages and ranks of one checkpoint agree on these.
_COMMON_ARGS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("num_experts", "moe_ffn_hidden_size", "padded_vocab_size", "rotary_base", "norm_epsilon"),
    *("pipeline_model_parallel_size", "tensor_model_parallel_size", "expert_model_parallel_size"),
    "expert_tensor_parallel_size",
)


@dataclass(frozen=True)
class _Grid:
    """How a model is cut: pipeline stages, and the ranks that wrote each."""

    stages: int
    tensor: int
    expert: int
    expert_tensor: int

    @property
    def files(self) -> int:
        return self.stages * self.expert * self.expert_tensor

    @property
    def ranks(self) -> list[Rank]:
        return saving_ranks(self.tensor, self.expert, self.expert_tensor)

    def folder(self, rank: Rank, stage: int) -> str:
        return rank_folder(rank, stage, self.stages, self.expert)

    def __str__(self) -> str:
        words = [f"{self.stages} pipeline stage{'s' if self.stages > 1 else ''}"]
        words += [f"tensor parallelism {self.tensor}"] if self.tensor > 1 else []
        words += [f"expert parallelism {self.expert}"] if self.expert > 1 else []
        if self.expert_tensor != self.tensor:
            words.append(f"expert tensor parallelism {self.expert_tensor}")
        return ", ".join(words)


@dataclass(frozen=True)
class _RankFile:
    """What one rank wrote."""

    rank: Rank
    archive: TorchArchive
    saved: dict[str, Any]


def open_torch_checkpoint(folder: SourcePath) -> MegatronCheckpoint:
    """The checkpoint in the `mp_rank_*` folders of `folder`; only the zip directories and pickles are read.

    Raises:
        ConversionError: if a file is missing, superfluous, damaged or from another checkpoint, or the model is split
            in a way that this reader does not merge (interleaved pipeline stages, legacy grouped experts on ranks).
    """
    names = sorted(child.name for child in folder.iterdir() if child.name.startswith("mp_rank_"))
    odd = [name for name in names if not _RANK.fullmatch(name)]
    if odd:
        raise ConversionError(f"{folder}: expected folders such as mp_rank_00 or mp_rank_00_001, got {quoted(odd)}")
    missing = [name for name in names if not (folder / name / MODEL_FILE).is_file()]
    if missing:
        raise ConversionError(f"{folder}: {quoted(missing)} without {MODEL_FILE}; fetch it again")

    first = TorchArchive(folder / names[0] / MODEL_FILE)
    saved = first.load()
    args = args_of(saved, first.path)
    grid = _grid(args, folder)
    if grid.files > _MOST_FILES:
        raise ConversionError(f"{folder}: args describe {grid}, more than {_MOST_FILES} files; they make no sense")
    expected = [grid.folder(rank, stage) for stage in range(grid.stages) for rank in grid.ranks]
    if set(names) != set(expected):
        absent = [name for name in expected if name not in names]
        extra = [name for name in names if name not in expected]
        parts = [f"missing {quoted(absent)}"] if absent else []
        parts += [f"superfluous {quoted(extra)}"] if extra else []
        raise ConversionError(
            f"{folder}: the checkpoint was saved by {grid} (args.*_parallel_size), in {len(expected)} folders; "
            f"{' and '.join(parts)}"
        )

    checkpoint = MegatronCheckpoint(folder, "torch", iteration_of(saved), args, {})
    checkpoint.layout = str(grid)
    offset = 0
    for stage in range(grid.stages):
        files = []
        for rank in grid.ranks:
            name = grid.folder(rank, stage)
            is_first = name == names[0]
            archive = first if is_first else TorchArchive(folder / name / MODEL_FILE)
            content = saved if is_first else archive.load()
            _check_same_checkpoint(checkpoint, content, archive.path)
            checkpoint.files.append(archive.path)
            files.append(_RankFile(rank, archive, content))
            for child_name in sorted(child.name for child in (folder / name).iterdir()):
                child = folder / name / child_name
                if child_name != MODEL_FILE and child.is_file():
                    kind = "optimizer state" if "optim" in child_name else "file that is not part of the model"
                    checkpoint.dropped.append(Dropped(f"{name}/{child_name}", kind, size_of(child)))
        offset += _add_stage(checkpoint, files, grid, offset)
    layers = integer_argument(args, "num_layers", 0)
    if offset != layers:
        raise ConversionError(
            f"{folder}: the stages hold {offset} layers together, but args.num_layers is {layers}; a stage is damaged "
            "or belongs to another checkpoint"
        )
    return checkpoint


def _grid(args: dict[str, Any], folder: SourcePath) -> _Grid:
    virtual = integer_argument(args, "virtual_pipeline_model_parallel_size", 1)
    if virtual != 1:
        raise ConversionError(
            f"{folder}: args.virtual_pipeline_model_parallel_size must be unset for the torch format, got {virtual}: "
            "interleaved stages are not supported; have Megatron save the checkpoint as torch_dist and convert that"
        )
    stages = integer_argument(args, "pipeline_model_parallel_size", 1, most=4096)
    tensor = integer_argument(args, "tensor_model_parallel_size", 1, most=99)
    expert = integer_argument(args, "expert_model_parallel_size", 1, most=999)
    sparse = args.get("num_experts") is not None
    expert_tensor = integer_argument(args, "expert_tensor_parallel_size", tensor, most=99) if sparse else tensor
    grid = _Grid(stages, tensor, expert, expert_tensor)
    ranks = grid.ranks
    folders = {grid.folder(rank, 0) for rank in ranks}
    if len(folders) != len(ranks) or {rank.tensor for rank in ranks} != set(range(tensor)):
        raise ConversionError(
            f"{folder}: a torch checkpoint of {grid} is not whole: Megatron has no file name for every part; have it "
            "save the checkpoint as torch_dist (--ckpt-convert-format torch_dist) and convert that"
        )
    return grid


def _check_same_checkpoint(checkpoint: MegatronCheckpoint, saved: Any, source: SourcePath) -> None:
    args = args_of(saved, source)
    for name in _COMMON_ARGS:
        here, first = args.get(name), checkpoint.args.get(name)
        if not (is_plain(here) and is_plain(first) and here == first):
            raise ConversionError(
                f"{source}: args.{name} is {shortened(here)}, but {shortened(first)} in the first file; the files "
                "belong to different checkpoints"
            )
    if iteration_of(saved) != checkpoint.iteration:
        raise ConversionError(
            f"{source}: saved at iteration {iteration_of(saved)}, the first file at {checkpoint.iteration}; the "
            "files belong to different checkpoints"
        )


def _add_stage(checkpoint: MegatronCheckpoint, files: Sequence[_RankFile], grid: _Grid, offset: int) -> int:
    """Adds one stage's tensors under global names; returns how many layers it has."""
    held: dict[str, list[tuple[_RankFile, TensorReference]]] = {}
    layers: set[int] = set()
    for file in files:
        for name, value in _model_of(file).items():
            match = _LAYER.fullmatch(name)
            if match:
                layers.add(int(match[1]))
                name = f"decoder.layers.{int(match[1]) + offset}.{match[2]}"
            if name.endswith("._extra_state"):
                checkpoint.dropped.append(Dropped(name, "_extra_state (FP8 scales, unused)", nbytes_inside(value)))
                continue
            if not isinstance(value, TensorReference):
                raise ConversionError(
                    f"{file.archive.path}: {shortened(name)} must be a tensor, got {shortened(value)}"
                )
            held.setdefault(name, []).append((file, value))
    for name, parts in held.items():
        _add_merged(checkpoint, name, parts, files, grid)
    if layers != set(range(len(layers))):
        raise ConversionError(
            f"{files[0].archive.path}: the layers of a stage must be numbered 0..{len(layers) - 1}, got "
            f"{shortened(sorted(layers))}"
        )
    for file in files:
        for key, value in file.saved.items():
            if key != "model" and key not in _DESCRIPTION:
                default = "entry that is not part of the model"
                reason = _NOT_WEIGHTS.get(key, default) if isinstance(key, str) else "entry"
                name = f"{file.archive.path.parent.name}: {key if isinstance(key, str) else shortened(key)}"
                checkpoint.dropped.append(Dropped(name, reason, nbytes_inside(value)))
    return len(layers)


def _model_of(file: _RankFile) -> dict[str, Any]:
    if "model" not in file.saved:
        found = file.saved
        chunks = [key for key in found if isinstance(key, str) and re.fullmatch(r"model\d+", key)]
        why = ": interleaved stages are not supported; have Megatron save it as torch_dist" if chunks else ""
        raise ConversionError(
            f"{file.archive.path}: expected weights under 'model', found {quoted(map(str, found))}{why}"
        )
    model = file.saved["model"]
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise ConversionError(f"{file.archive.path}: 'model' must be a dictionary of tensors, got {shortened(model)}")
    return model


def _add_merged(
    checkpoint: MegatronCheckpoint,
    name: str,
    parts: Sequence[tuple[_RankFile, TensorReference]],
    files: Sequence[_RankFile],
    grid: _Grid,
) -> None:
    """Adds the tensor, or one per slice of experts, that the ranks of a stage hold under `name`."""
    if len(parts) != len(files):
        there = [file.archive.path.parent.name for file, _ in parts]
        raise ConversionError(
            f"{checkpoint.path}: {shortened(name)} is in {quoted(there)}, expected in all {len(files)} files of its "
            "stage"
        )
    named = look_up(name)
    split = Split() if named is None else named.row.split  # what the table does not have is refused later
    if len(files) > 1 and split is None:
        raise ConversionError(
            f"{checkpoint.path}: {shortened(name)} is in the layout of legacy grouped experts, which is not merged "
            "from several ranks; have Megatron save the checkpoint as torch_dist and convert that"
        )
    for file, reference in parts[1:]:
        if (reference.shape, reference.dtype) != (parts[0][1].shape, parts[0][1].dtype):
            raise ConversionError(
                f"{file.archive.path}: {shortened(name)} has shape {reference.shape} and {reference.dtype}, in the "
                f"first file {parts[0][1].shape} and {parts[0][1].dtype}"
            )
    split = split or Split()
    if named is None or named.expert is None:
        by_rank: list[list[LazyTensor]] = [[] for _ in range(grid.tensor)]
        for file, reference in parts:
            by_rank[file.rank.tensor].append(file.archive.lazy(reference))
        _add(checkpoint, name, _merged(name, split, by_rank, checkpoint.path))
        return
    experts = integer_argument(checkpoint.args, "num_experts", grid.expert, most=4096)
    if experts % grid.expert:
        raise ConversionError(
            f"{checkpoint.path}: args.num_experts must be a multiple of args.expert_model_parallel_size, got "
            f"{experts} and {grid.expert}"
        )
    per_slice = experts // grid.expert
    if named.expert >= per_slice:
        raise ConversionError(
            f"{checkpoint.path}: {shortened(name)} is beyond the {per_slice} experts of a rank (args.num_experts / "
            "args.expert_model_parallel_size)"
        )
    for number in range(grid.expert):
        by_rank = [[] for _ in range(grid.expert_tensor)]
        for file, reference in parts:
            if file.rank.expert == number:
                by_rank[file.rank.expert_tensor].append(file.archive.lazy(reference))
        whole = named.with_expert(number * per_slice + named.expert)
        _add(checkpoint, whole, _merged(whole, split, by_rank, checkpoint.path))


def _add(checkpoint: MegatronCheckpoint, name: str, tensor: LazyTensor) -> None:
    if name in checkpoint.tensors:
        raise ConversionError(f"{checkpoint.path}: {shortened(name)} is also in an earlier stage")
    checkpoint.tensors[name] = tensor


def _merged(name: str, split: Split, by_rank: Sequence[Sequence[LazyTensor]], folder: SourcePath) -> LazyTensor:
    """One tensor from the copies that each rank's folders hold of its part."""
    first = by_rank[0][0]
    if sum(map(len, by_rank)) == 1:
        return first
    shape = split.whole_shape(first.shape, len(by_rank))
    if split.axis is None:
        by_rank = [[tensor for copies in by_rank for tensor in copies]]
    elif len(first.shape) <= split.axis or (split.halves and first.shape[split.axis] % 2):
        raise ConversionError(f"{folder}: the parts of {shortened(name)} have shape {first.shape}: no part of it")

    parts = [tensor for copies in by_rank for tensor in copies]
    unchecked: list[str] = []

    def read() -> torch.Tensor:
        merged = split.merge([_read_copies(name, copies, folder) for copies in by_rank])
        unchecked.extend(reason for part in parts for reason in part.unchecked)
        return merged

    spans = tuple(span for part in parts for span in part.spans)
    return LazyTensor(shape, first.dtype, read, spans, unchecked)


def _read_copies(name: str, copies: Sequence[LazyTensor], folder: SourcePath) -> torch.Tensor:
    tensor = copies[0].read()
    for copy in copies[1:]:
        if tensor_bytes(copy.read()) != tensor_bytes(tensor):
            raise ConversionError(
                f"{folder}: {shortened(name)} differs between {copies[0].files[0].parent.name} and "
                f"{copy.files[0].parent.name}, which must hold copies; the checkpoint is damaged or mixed"
            )
    return tensor
