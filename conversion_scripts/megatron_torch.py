"""Reader of Megatron's `torch` format: one `model_optim_rng.pt` per pipeline stage, layers counted within it."""

import re
from pathlib import Path
from typing import Any

from .errors import ConversionError, quoted, shortened
from .megatron_checkpoint import Dropped, MegatronCheckpoint, args_of, argument, is_plain, iteration_of, tensor_bytes
from .safe_pickle import TensorReference
from .torch_archive import TorchArchive

_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
_MODEL_FILE = "model_optim_rng.pt"

# What else may stand beside "model"; anything unknown there is reported the same way.
_NOT_WEIGHTS = {
    "optimizer": "optimizer state",
    "opt_param_scheduler": "learning-rate schedule",
    "rng_state": "random number states",
    "rerun_state_machine": "rerun state of the trainer",
}
_DESCRIPTION = ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "content_metadata")

# Stages of one checkpoint agree on these.
_COMMON_ARGS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("num_experts", "moe_ffn_hidden_size", "padded_vocab_size", "rotary_base", "norm_epsilon"),
    *("pipeline_model_parallel_size", "tensor_model_parallel_size", "expert_model_parallel_size"),
)


def open_torch_checkpoint(folder: Path) -> MegatronCheckpoint:
    """The checkpoint in the `mp_rank_*` folders of `folder`; only the zip directories and pickles are read.

    Raises:
        ConversionError: if a stage is missing, superfluous, damaged or from another checkpoint, or the model is split
            in a way that this reader does not merge (tensor, expert or interleaved pipeline parallelism).
    """
    names = sorted(child.name for child in folder.iterdir() if child.name.startswith("mp_rank_"))
    odd = [name for name in names if not _RANK.fullmatch(name)]
    if odd:
        raise ConversionError(f"{folder}: expected folders such as mp_rank_00 or mp_rank_00_001, got {quoted(odd)}")
    missing = [name for name in names if not (folder / name / _MODEL_FILE).is_file()]
    if missing:
        raise ConversionError(f"{folder}: {quoted(missing)} without {_MODEL_FILE}; fetch it again")

    first = TorchArchive(folder / names[0] / _MODEL_FILE)
    saved = first.load()
    args = args_of(saved, first.path)
    _check_split(args, folder)
    stages = argument(args, "pipeline_model_parallel_size", 1, most=4096)
    expected = [f"mp_rank_00_{stage:03d}" for stage in range(stages)] if stages > 1 else ["mp_rank_00"]
    if names != expected:
        absent = [name for name in expected if name not in names]
        extra = [name for name in names if name not in expected]
        parts = [f"missing {quoted(absent)}"] if absent else []
        parts += [f"superfluous {quoted(extra)}"] if extra else []
        raise ConversionError(
            f"{folder}: the checkpoint was saved by {stages} pipeline stage(s) without tensor parallelism, which are "
            f"{quoted(expected)}; {' and '.join(parts)}"
        )

    checkpoint = MegatronCheckpoint(folder, "torch", iteration_of(saved), args, {})
    checkpoint.layout = f"{stages} pipeline stage{'s' if stages > 1 else ''}"
    offset = 0
    for stage, name in enumerate(names):
        archive = first if stage == 0 else TorchArchive(folder / name / _MODEL_FILE)
        saved = saved if stage == 0 else archive.load()
        _check_same_checkpoint(checkpoint, saved, archive.path)
        checkpoint.files.append(archive.path)
        offset += _add_stage(checkpoint, saved, archive, offset)
        for child in sorted((folder / name).iterdir()):
            if child.name != _MODEL_FILE and child.is_file():
                kind = "optimizer state" if child.name == "distrib_optim.pt" else "file that is not part of the model"
                checkpoint.dropped.append(Dropped(f"{name}/{child.name}", kind, child.stat().st_size))
    layers = argument(args, "num_layers", 0)
    if offset != layers:
        raise ConversionError(
            f"{folder}: the stages hold {offset} layers together, but args.num_layers is {layers}; a stage is damaged "
            "or belongs to another checkpoint"
        )
    return checkpoint


def _check_split(args: dict[str, Any], folder: Path) -> None:
    for name in ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"):
        size = argument(args, name, 1)
        if size != 1:
            raise ConversionError(
                f"{folder}: args.{name} must be 1 for the torch format, got {size}: merging such parts is not "
                "supported yet; have Megatron save the checkpoint as torch_dist (--ckpt-convert-format torch_dist) "
                "and convert that"
            )
    stages = argument(args, "virtual_pipeline_model_parallel_size", 1)
    if stages != 1:
        raise ConversionError(
            f"{folder}: args.virtual_pipeline_model_parallel_size must be unset for the torch format, got {stages}: "
            "interleaved stages are not supported; have Megatron save the checkpoint as torch_dist and convert that"
        )


def _check_same_checkpoint(checkpoint: MegatronCheckpoint, saved: Any, source: Path) -> None:
    args = args_of(saved, source)
    for name in _COMMON_ARGS:
        here, first = args.get(name), checkpoint.args.get(name)
        if not (is_plain(here) and is_plain(first) and here == first):
            raise ConversionError(
                f"{source}: args.{name} is {shortened(here)}, but {shortened(first)} in the first stage; the stages "
                "belong to different checkpoints"
            )
    if iteration_of(saved) != checkpoint.iteration:
        raise ConversionError(
            f"{source}: saved at iteration {iteration_of(saved)}, the first stage at {checkpoint.iteration}; the "
            "stages belong to different checkpoints"
        )


def _add_stage(checkpoint: MegatronCheckpoint, saved: dict, archive: TorchArchive, offset: int) -> int:
    """Adds one stage's tensors under global names; returns how many layers it has."""
    if "model" not in saved:
        chunks = [key for key in saved if isinstance(key, str) and re.fullmatch(r"model\d+", key)]
        why = ": interleaved stages are not supported; have Megatron save it as torch_dist" if chunks else ""
        raise ConversionError(f"{archive.path}: expected weights under 'model', found {quoted(map(str, saved))}{why}")
    model = saved["model"]
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise ConversionError(f"{archive.path}: 'model' must be a dictionary of tensors, got {shortened(model)}")
    layers: set[int] = set()
    for name, value in model.items():
        match = _LAYER.fullmatch(name)
        if match:
            layers.add(int(match[1]))
            name = f"decoder.layers.{int(match[1]) + offset}.{match[2]}"
        if name.endswith("._extra_state"):
            checkpoint.dropped.append(Dropped(name, "_extra_state (FP8 scales, unused)", tensor_bytes(value)))
        elif not isinstance(value, TensorReference):
            raise ConversionError(f"{archive.path}: {shortened(name)} must be a tensor, got {shortened(value)}")
        elif name in checkpoint.tensors:
            raise ConversionError(f"{archive.path}: {shortened(name)} is also in an earlier stage")
        else:
            checkpoint.tensors[name] = archive.lazy(value)
    if layers != set(range(len(layers))):
        raise ConversionError(
            f"{archive.path}: the layers of a stage must be numbered 0..{len(layers) - 1}, got "
            f"{shortened(sorted(layers))}"
        )
    for key, value in saved.items():
        if key != "model" and key not in _DESCRIPTION:
            reason = _NOT_WEIGHTS.get(key, "entry that is not part of the model") if isinstance(key, str) else "entry"
            checkpoint.dropped.append(Dropped(f"{archive.path.parent.name}: {key}", reason, tensor_bytes(value)))
    return len(layers)
