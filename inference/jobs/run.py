"""Runs a job: checks first, computes what is missing, writes the output whole."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...support.printable import printable
from ...support.progress import progress_bar
from .finished_chunks import FinishedChunks
from .job import Job, JobChunk
from .processes import Share, device_of_process, launched_process
from .record import RunFiles, record_of

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class JobSummary:
    """What a run did; `items` and `computed` are in the job's unit."""

    output: Path
    items: int
    computed: int  # in this run: the others were finished before, or by other processes
    is_written: bool  # false in a process that leaves the writing to process 0
    record: dict[str, Any]


def run_job(
    job: Job,
    output: str | Path,
    *,
    engine: str = "local",
    shard: Share | None = None,
    restart: bool = False,
    progress: bool = False,
) -> JobSummary:
    """Compute a job into `output`, which appears whole or not at all.

    A run that is stopped, however, keeps its finished chunks in `.OUTPUT.chunks`; the same call goes on from there and
    gives the same bytes. Processes that torchrun or accelerate launches begin together and share the chunks; process 0
    writes.

    Args:
        job: what to do.
        output: file or folder to make; must not exist, nor what the job writes beside it.
        engine: "local", or "ray" for Ray's actors, one per GPU (or per processor).
        shard: compute only this part and write only its part of the output.
        restart: discard what an earlier run left.
        progress: whether to show progress on stderr.

    Raises:
        ValueError: if the input, an option or what an earlier run left cannot be used, or a file that was read has
            changed since.
        OSError: if a file cannot be read or written; or the output, or what stands beside it, exists.
    """
    output = Path(output)
    if engine not in ENGINES:
        raise ValueError(f"engine: expected {' or '.join(ENGINES)}, got {engine!r}.")
    places = [output, *job.beside(output)]
    _check_free(places)
    files = RunFiles(job)
    record = record_of(job, job.name if progress else None)
    sizes, starts = _sizes_and_starts(job)  # finds what is wrong with the input
    wanted = (shard or Share()).consecutive(len(sizes), starts)
    if shard is not None:
        record["shard"] = f"{shard.index + 1}/{shard.count}"
    process = launched_process()
    finished = FinishedChunks(output, record, process, restart)
    try:
        missing = finished.missing(process.spread(wanted))
        total = sum(sizes[index] for index in process.spread(wanted))
        done_before = total - sum(sizes[index] for index in missing)
        with progress_bar(job.name if progress else None, job.unit, total=total, initial=done_before) as bar:
            compute = _computed_on_ray if engine == "ray" else _computed_here
            try:
                for index, result in compute(job, _chosen(job, missing), bar.update):
                    files.check(record)  # so that what is kept is of the files in the record
                    finished.save(index, result)
                files.check(record)
            except BaseException as error:
                finished.fail(error)
                if process.count == 1 and len(finished.missing(wanted)) == len(wanted):
                    finished.remove()
                else:
                    _say_what_is_kept(error, finished, wanted)
                raise
        is_writer = process.index == 0
        if is_writer:
            for _ in finished.wait_for(wanted):
                pass

            def write(path: Path) -> None:
                try:
                    job.write(finished.results(wanted), path, record)
                finally:  # what it reads again may have changed, which is then why it failed
                    files.check(record)

            _publish(places, finished.folder / "output", write)
            finished.remove()
    finally:
        finished.close()
    items, computed = sum(sizes[index] for index in wanted), sum(sizes[index] for index in missing)
    return JobSummary(output, items, computed, is_writer, record)


def _sizes_and_starts(job: Job) -> tuple[list[int], list[int]]:
    """The size of each chunk, and which chunks continue none before them."""
    sizes, starts = [], []
    for index, chunk in enumerate(job.chunks()):
        sizes.append(chunk.size)
        if not chunk.continues:
            starts.append(index)
    return sizes, starts


def _chosen(job: Job, indices: list[int]) -> Iterator[tuple[int, JobChunk]]:
    if not indices:
        return
    chosen = set(indices)
    for index, chunk in enumerate(job.chunks()):
        if index in chosen:
            yield index, chunk
        if index >= indices[-1]:
            return


def _computed_here(
    job: Job, chunks: Iterator[tuple[int, JobChunk]], advance: Callable[[int], Any]
) -> Iterator[tuple[int, pa.Table]]:
    """Index and result of each chunk."""
    worker = None
    for index, chunk in chunks:
        worker = worker or job.worker(device_of_process(job.model.device))
        progress = _ChunkProgress(chunk.size, advance)
        if hasattr(worker, "advance"):
            worker.advance = progress
        yield index, worker(chunk.content)
        progress.finish()


class _ChunkProgress:
    """Progress within a chunk, which adds up to its size whatever is said."""

    def __init__(self, size: int, advance: Callable[[int], Any]):
        self._left, self._advance = size, advance

    def __call__(self, units: int) -> None:
        units = max(0, min(units, self._left))
        self._left -= units
        self._advance(units)

    def finish(self) -> None:
        self(self._left)


def _computed_on_ray(
    job: Job, chunks: Iterator[tuple[int, JobChunk]], advance: Callable[[int], Any]
) -> Iterator[tuple[int, pa.Table]]:
    """The same in whatever order they are finished."""
    from .on_ray import results_on_ray

    for index, size, result in results_on_ray(job, chunks):
        yield index, result
        advance(size)


def _say_what_is_kept(error: BaseException, finished: FinishedChunks, wanted: range) -> None:
    kept = len(wanted) - len(finished.missing(wanted))
    if kept:
        words = (
            f"{kept} of {len(wanted)} parts are finished and kept in {finished.folder}; repeat the command to go on."
        )
        error.__notes__ = [*getattr(error, "__notes__", ()), words]  # `add_note`, which Python 3.10 lacks


def _check_free(places: list[Path]) -> None:
    for place in places:
        if os.path.lexists(place):
            raise FileExistsError(f"{printable(place)} exists already; choose another output or remove it first.")


def _publish(places: list[Path], folder: Path, write: Callable[[Path], None]) -> None:
    """Write the first of some places and those beside it inside `folder`, then give what was written its name."""
    folder.mkdir()
    write(folder / places[0].name)  # writers choose by the name's end
    _check_free(places)  # once more: hours have passed
    for place in reversed(places):  # an index before its file
        if (folder / place.name).exists():
            os.replace(folder / place.name, place)
