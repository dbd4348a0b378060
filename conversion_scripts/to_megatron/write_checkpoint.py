"""Writes the checkpoint of a job, in either format, and the file that names its iteration."""

from pathlib import Path

from tqdm import tqdm

from ..files.partial_folder import PartialFolder
from ..megatron.checkpoint import TRACKER
from ..megatron.torch_dist_writer import write_torch_dist
from ..megatron.torch_writer import write_torch
from ..megatron.written_keys import Architecture
from .job import BackJob


def write_checkpoint(job: BackJob, place: PartialFolder, progress: bool) -> None:
    """Writes the root of a checkpoint into `place`, which becomes the output.

    Args:
        job: The conversion.
        place: Where the output grows; what an earlier run wrote to the end there is taken as it is.
        progress: Show a progress bar on stderr.
    """
    if not place.is_whole:
        place.begin({}, [], job.written_bytes)
        _write(job, place.folder, progress)
        job.check_unchanged()
        place.record_whole()
    place.publish()


def _write(job: BackJob, root: Path, progress: bool) -> None:
    options, config = job.options, job.config
    experts = config.num_local_experts if config.num_local_experts > 1 else 0
    architecture = Architecture(config.num_hidden_layers, experts)
    tensors, args, steps = job.tensors, job.arguments.namespace, job.iteration
    folder = root / options.folder
    folder.mkdir()
    with tqdm(total=job.written_bytes, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        if options.format == "torch_dist":
            stacked = job.arguments.layers_are_stacked
            write_torch_dist(folder, tensors, args, steps, architecture, stacked, bar.update)
        else:
            ranks = options.tensor_parallel
            write_torch(folder, tensors, args, steps, architecture, job.stages, ranks, bar.update)
    name = "release" if options.iteration is None else str(options.iteration)
    (root / TRACKER).write_text(name, encoding="ascii")
