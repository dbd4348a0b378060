"""Converts a Hugging Face folder of Gengram into a Megatron checkpoint.

    python -m gengram.conversion_scripts.convert_hf_to_megatron HF_FOLDER OUTPUT [--format torch_dist|torch] ...

The way back of `convert_megatron_to_hf`, by the same table. Weights pass through memory tensor by tensor; the output
folder appears when it is whole, or not at all.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..support.errors import ConversionError
from ..support.whole_output import check_output_is_free
from ..support.work_folder import work_path
from .files.dtypes import dtype_name
from .files.partial_folder import PartialFolder
from .to_megatron.job import BackJob
from .to_megatron.options import Options
from .to_megatron.report import BackReport
from .to_megatron.write_checkpoint import write_checkpoint


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
    restart: bool = False,
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
        restart: Discard what another conversion into `output` left when it was killed.

    Raises:
        ConversionError: if the folder cannot be used, Megatron cannot express the model, the sizes cannot be cut as
            asked, or weights do not have their recorded hashes; nothing is left behind.
        InputError, FileExistsError: if the output cannot be written there.
        OSError: if reading or writing fails; nothing is left behind.
    """
    started = time.monotonic()
    source, output = Path(source), Path(os.path.abspath(output))
    options = Options(
        format,
        pipeline_parallel,
        tensor_parallel,
        first_stage_layers,
        last_stage_layers,
        name_prefix,
        dtype,
        iteration,
    )
    if not os.path.lexists(work_path(output)):
        check_output_is_free(output)
    job = BackJob(source, options)
    with PartialFolder(output, job.identity(), restart) as place:
        if not place.published:
            try:
                write_checkpoint(job, place, progress)
            except (ConversionError, OSError):
                job.check_unchanged()  # what is changed under the reader is not damaged
                raise
    return BackReport(
        source=source,
        output=output,
        format=format,
        iteration=options.folder,
        dtype=dtype_name(job.dtype),
        stages=len(job.stages),
        tensor_ranks=tensor_parallel,
        tensors=len(job.tensors),
        parameters=job.parameters,
        nbytes=job.nbytes,
        seconds=time.monotonic() - started,
        zeros=len(job.zeros),
        zero_bytes=sum(job.tensors[name].nbytes for name in job.zeros),
        prefix=job.arguments.prefix,
        recorded=job.arguments.recorded,
        contradiction=job.arguments.contradiction,
        unchecked=len(job.weights.unchecked),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`gengram convert to-megatron`, as `python -m gengram.conversion_scripts.convert_hf_to_megatron`."""
    from ..cli import main as gengram

    return gengram(["convert", "to-megatron", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
