"""Converts a Megatron checkpoint of Gengram into a Hugging Face folder.

    python -m gengram.conversion_scripts.convert_megatron_to_hf SOURCE OUTPUT [--dtype float32|bfloat16]

SOURCE is a folder, or ORG/NAME on the Hugging Face Hub, of which only the bytes that hold weights are fetched.
Both of Megatron's formats are read (`torch`, `torch_dist`), without Megatron and without running anything from the
files. Weights pass through memory piece by piece; the output folder appears when it is whole, or not at all, and the
same command continues a conversion that was interrupted.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..support.errors import ConversionError
from ..support.whole_output import check_output_is_free
from ..support.work_folder import work_path
from .files.conversion_record import needed_record
from .files.partial_folder import PartialFolder
from .files.safetensors_writer import shard_size
from .files.tensor_memory import reused_memory
from .mapping.match import parameters
from .mapping.quantized import Kinds
from .to_hf.dry_run import ConversionPlan, planned
from .to_hf.job import prepare_job
from .to_hf.report import ConversionReport
from .to_hf.resume import identity_of
from .to_hf.write_folder import write_folder


@reused_memory()
def convert_to_hf(
    source: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    progress: bool = True,
    restart: bool = False,
    revision: str | None = None,
    fetch: str = "auto",
    experts: str | None = None,
    attention: str | None = None,
) -> ConversionReport:
    """Converts the Megatron checkpoint `source` into the new folder `output` for Transformers.

    An earlier call with the same arguments that was interrupted, killed or ran out of disk space is continued: its
    finished weight files, in `.OUTPUT.partial`, are checked by hash and kept.

    Args:
        source: A checkpoint's root or the folder of one iteration, format `torch` or `torch_dist`; or `ORG/NAME` or
            `ORG/NAME/FOLDER` on the Hub, if no local folder has that name.
        output: A folder that does not exist or is empty. It appears when everything is written.
        dtype: `"float32"` or `"bfloat16"`; `None` keeps the checkpoint's, bit for bit.
        max_shard_size: Largest size of one safetensors file.
        progress: Show a progress bar on stderr.
        restart: Discard what an interrupted conversion into `output` left.
        revision: Branch, tag or commit on the Hub; its main branch by default.
        fetch: How files on the Hub are fetched: `"ranges"`, only the bytes that hold weights; `"files"`, whole, into
            the Hub's cache; `"auto"`, whole if nearly all of a file is wanted.
        experts: `"int8"` or `"int4"` quantises the experts on the way; `None` keeps them.
        attention: The same for attention, together with the experts.

    Raises:
        ConversionError: if the checkpoint cannot be used; nothing is left behind.
        InputError, FileExistsError: if the output cannot be written there.
        FetchError, OSError: if fetching, reading or writing fails; finished weight files are kept for the next call.
    """
    started = time.monotonic()
    limit = shard_size(max_shard_size)
    output = Path(os.path.abspath(output))
    if not os.path.lexists(work_path(output)):
        check_output_is_free(output)
    job = prepare_job(source, dtype, revision, fetch, Kinds(experts, attention))
    with PartialFolder(output, identity_of(job, limit), restart, keep_parts=job.repository is not None) as place:
        if not place.published:
            try:
                write_folder(job, place, limit, progress, fetch)
            except (ConversionError, OSError):
                job.checkpoint.check_unchanged()  # what is changed under the reader is not damaged
                raise
    sources = needed_record(output).sources
    return ConversionReport(
        source=job.checkpoint.path,
        output=output,
        format=job.checkpoint.format,
        iteration=job.checkpoint.iteration,
        dtype=job.dtypes,
        tensors=len(job.specs),
        parameters=parameters(job.plan),
        nbytes=job.nbytes,
        seconds=time.monotonic() - started,
        fetched=None if job.repository is None else job.repository.fetched_bytes,
        unchecked={name: tensor.unchecked for name, tensor in sources.items() if tensor.unchecked},
        dropped=job.dropped,
    )


def plan_conversion(
    source: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    fetch: str = "auto",
    experts: str | None = None,
    attention: str | None = None,
) -> ConversionPlan:
    """What `convert_to_hf` with these arguments would do; weights are not read and nothing is written.

    Of a checkpoint on the Hub, metadata is fetched, and a few megabytes to measure the rate.

    Raises:
        ConversionError, FileExistsError: if the checkpoint or the output cannot be used.
    """
    limit = shard_size(max_shard_size)
    output = Path(os.path.abspath(output))
    check_output_is_free(output)
    job = prepare_job(source, dtype, revision, fetch, Kinds(experts, attention), metadata_only=True)
    return planned(job, output, limit, fetch)


def main(argv: Sequence[str] | None = None) -> int:
    """`gengram convert to-hf`, as `python -m gengram.conversion_scripts.convert_megatron_to_hf`."""
    from ..cli import main as gengram

    return gengram(["convert", "to-hf", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
