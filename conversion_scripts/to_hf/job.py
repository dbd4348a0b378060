"""A conversion to Hugging Face that is decided on: what is read, what becomes of it, and into which files it goes."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ...modeling_gengram.quantization import GengramQuantizationConfig
from ...support.errors import ConversionError
from ..choices import FETCH, OUTPUT_DTYPES, QUANTISED
from ..files.dtypes import DTYPES, dtype_name
from ..files.safetensors_writer import TensorSpec, plan_shards, shard_names
from ..hub.fetch_plan import FetchPlan, plan_fetch
from ..hub.hub_path import HubPath, SourcePath, open_source, relative_name
from ..mapping.arguments import RecordedArgs, config_from_args
from ..mapping.match import WeightPlan, match
from ..mapping.quantized import Kinds, numbers_name, stored_specs
from ..megatron.checkpoint import MegatronCheckpoint
from ..megatron.open_checkpoint import open_checkpoint


class ConversionJob:
    """A conversion that is decided on.

    Args:
        checkpoint: What is converted.
        dtype: Of the weights; `None` keeps the checkpoint's.
        kinds: How experts and attention are quantised.
    """

    def __init__(self, checkpoint: MegatronCheckpoint, dtype: str | None, kinds: Kinds = Kinds()):  # noqa: B008
        self.checkpoint = checkpoint
        self.arguments = RecordedArgs(checkpoint.args)
        self.config = config_from_args(self.arguments)
        self.plan = match(checkpoint.shapes, self.config)
        self.dtype = DTYPES[dtype] if dtype else _checkpoint_dtype(checkpoint, self.plan)
        self.config.dtype = dtype_name(self.dtype)
        self.kinds = kinds
        if kinds.experts is not None:
            if self.config.num_local_experts <= 1:
                raise ConversionError(f"the model has no experts that --experts {kinds.experts} could quantise")
            self.config.quantization_config = GengramQuantizationConfig(kinds.experts, kinds.attention).to_dict()
        outputs = {out.name: out for out in self.plan.outputs}
        self.specs = list(stored_specs(self.plan.outputs, kinds, self.dtype))
        self.outputs = {spec.name: outputs[numbers_name(spec.name) or spec.name] for spec in self.specs}
        self.nbytes = sum(spec.nbytes for spec in self.specs)
        self.dropped = checkpoint.left_out(self.plan)
        self.repository = checkpoint.path.repository if isinstance(checkpoint.path, HubPath) else None

    @property
    def dtypes(self) -> str:
        """What the weights are written in, in words."""
        return ", ".join(part for part in (dtype_name(self.dtype), self.kinds.in_words()) if part)

    def shards(self, limit: int) -> dict[str, list[TensorSpec]]:
        """The weight files and their tensors, in the order of writing."""
        shards = plan_shards(self.specs, limit)
        return dict(zip(shard_names(len(shards)), shards, strict=True))

    def sources(self, specs: Sequence[TensorSpec]) -> list[str]:
        """The tensors that are read for some outputs, in the order of their use, once for each."""
        return [move.source for spec in specs for move, _ in self.outputs[spec.name].parts]

    def sources_of(self, tensor: str, index: int | None) -> list[str]:
        """The tensors that an output, or a slice of it, is made of."""
        parts = self.outputs[tensor].parts
        return [move.source for move, _ in (parts if index is None else parts[index : index + 1])]

    def relative_name(self, file: SourcePath) -> str:
        """A file's name inside the checkpoint."""
        return relative_name(file, self.checkpoint.path)

    def fetch_plan(self, how: str, sources: Sequence[str]) -> FetchPlan | None:
        """What is fetched for these tensors; `None` if the checkpoint is local."""
        folder, files = self.checkpoint.path, [file for file in self.checkpoint.files if isinstance(file, HubPath)]
        if not isinstance(folder, HubPath):
            return None
        return plan_fetch(
            folder, files, [span for name in sources for span in self.checkpoint.tensors[name].spans], how
        )


def prepare_job(
    source: str | Path,
    dtype: str | None,
    revision: str | None,
    fetch: str,
    kinds: Kinds = Kinds(),  # noqa: B008
    metadata_only: bool = False,
) -> ConversionJob:
    """Opens the source and decides how it is converted.

    Raises:
        ConversionError: if an option is not known, or the checkpoint cannot be used.
    """
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(OUTPUT_DTYPES)}, or None to keep it, got {dtype!r}")
    if fetch not in FETCH:
        raise ConversionError(f"fetch must be one of {', '.join(FETCH)}, got {fetch!r}")
    for name, kind in kinds._asdict().items():
        if kind is not None and kind not in QUANTISED:
            raise ConversionError(f"{name} must be one of {', '.join(QUANTISED)}, or None to keep them, got {kind!r}")
    if kinds.attention is not None and kinds.experts is None:
        raise ConversionError("attention is quantised together with the experts: give experts (--experts) too")
    folder = open_source(source, revision)
    if isinstance(folder, HubPath):
        folder.repository.may_fetch_files = not metadata_only
    return ConversionJob(open_checkpoint(folder), dtype, kinds)


def _checkpoint_dtype(checkpoint: MegatronCheckpoint, plan: WeightPlan) -> torch.dtype:
    found = sorted({str(checkpoint.tensors[move.source].dtype) for move in plan.moves})
    if len(found) != 1 or found[0].removeprefix("torch.") not in DTYPES:
        raise ConversionError(
            f"the checkpoint's weights have dtypes {', '.join(found)}; expected one of {', '.join(DTYPES)} "
            "throughout: say --dtype float32 or --dtype bfloat16"
        )
    return DTYPES[found[0].removeprefix("torch.")]
