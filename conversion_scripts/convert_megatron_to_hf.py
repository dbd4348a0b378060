"""Converts a Megatron checkpoint of Gengram into a Hugging Face folder.

    python -m gengram.conversion_scripts.convert_megatron_to_hf SOURCE OUTPUT [--dtype float32|bfloat16]

SOURCE is a folder, or ORG/NAME on the Hugging Face Hub, of which only the bytes that hold weights are fetched.
Both of Megatron's formats are read (`torch`, `torch_dist`), without Megatron and without running anything from the
files. Weights pass through memory piece by piece; the output folder appears when it is whole, or not at all, and the
same command continues a conversion that was interrupted.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ..configuration.configuration_gengram import GengramConfig
from ..modeling_gengram.remote_code import write_remote_code
from ..support.errors import ConversionError, FetchError, size_text
from ..tokenization import GengramTokenizer
from .conversion_plan import ConversionPlan, PlannedSource, PlannedWeight
from .fetch_plan import FETCH, FetchPlan, plan_fetch
from .hub_path import HubPath, HubRepository, SourcePath, open_source, relative_name, size_of
from .megatron_checkpoint import Dropped, MegatronCheckpoint, open_checkpoint, summary_of_dropped
from .megatron_config import RecordedArgs, config_from_args
from .partial_folder import FinishedFile, FinishedPart, PartialFolder, check_output_is_free, leftover, partial_path
from .safetensors_writer import (
    DTYPE_NAMES,
    HashedTensor,
    StartedFile,
    TensorSpec,
    intact_start,
    plan_shards,
    shard_is_intact,
    shard_names,
    shard_size,
    tensor_digest,
    write_safetensors,
)
from .tensor_memory import reused_memory
from .weight_table import TABLE_VERSION, Move, Plan, Same, dropped_weights, match, parameters

RECORD = "conversion.json"
MODEL_CARD = Path(__file__).with_name("model_card.md")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_READ_AHEAD = 256 * 2**20  # bytes of a tensor that is read while the one before is written
READS_FROM_HUB = 4  # tensors that are fetched at once
OUTPUT_DTYPES = ("float32", "bfloat16")


@dataclass
class ConversionReport:
    """What a conversion did."""

    source: SourcePath
    output: Path
    format: str
    iteration: int | None
    dtype: str
    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    fetched: int | None = None  # bytes from the Hub, metadata included; None if the source was local
    dropped: list[Dropped] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        fields = {**vars(self), "source": str(self.source), "output": str(self.output)}
        fields["dropped"] = [{"name": d.name, "reason": d.reason, "bytes": d.nbytes} for d in self.dropped]
        return fields

    def summary(self) -> str:
        """The report in a few lines for people."""
        step = "" if self.iteration is None else f", iteration {self.iteration}"
        lines = [
            f"Converted {self.source} ({self.format}{step}) to {self.output} in {self.seconds:.1f} s.",
            f"Kept {self.tensors} tensors, {self.parameters:,} parameters, {size_text(self.nbytes)} in {self.dtype}.",
        ]
        if self.fetched is not None:
            lines.append(f"Fetched {size_text(self.fetched)}.")
        if self.dropped:
            lines.append("Left out:")
            lines += [f"  {line}" for line in summary_of_dropped(self.dropped)]
        return "\n".join(lines)


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

    Raises:
        ConversionError: if the checkpoint or the output cannot be used; nothing is left behind.
        FetchError, OSError: if fetching, reading or writing fails; finished weight files are kept for the next call.
    """
    started = time.monotonic()
    limit = shard_size(max_shard_size)
    output = Path(os.path.abspath(output))
    if not partial_path(output).exists():
        check_output_is_free(output)
    job = _prepare(source, dtype, revision, fetch)
    with PartialFolder(output, _identity(job, limit), restart, keep_parts=job.repository is not None) as place:
        if not place.published:
            check_output_is_free(output)
            _write_folder(job, place, limit, progress, fetch)
    return ConversionReport(
        source=job.checkpoint.path,
        output=output,
        format=job.checkpoint.format,
        iteration=job.checkpoint.iteration,
        dtype=_dtype_name(job.dtype),
        tensors=len(job.specs),
        parameters=parameters(job.plan),
        nbytes=job.nbytes,
        seconds=time.monotonic() - started,
        fetched=None if job.repository is None else job.repository.fetched_bytes,
        dropped=job.dropped,
    )


def plan_conversion(
    source: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    fetch: str = "auto",
) -> ConversionPlan:
    """What `convert_to_hf` with these arguments would do; weights are not read and nothing is written.

    Of a checkpoint on the Hub, metadata is fetched, and a few megabytes to measure the rate.

    Raises:
        ConversionError: if the checkpoint or the output cannot be used.
    """
    limit = shard_size(max_shard_size)
    output = Path(os.path.abspath(output))
    check_output_is_free(output)
    job = _prepare(source, dtype, revision, fetch, metadata_only=True)
    tensors = job.checkpoint.tensors
    shards = job.shards(limit)
    file_of = {spec.name: name for name, shard in shards.items() for spec in shard}
    weights = []
    for spec in sorted(job.specs, key=lambda spec: spec.name):
        sources = []
        for name in dict.fromkeys(move.source for move, _ in job.outputs[spec.name].parts):
            files = tuple(sorted(job.relative_name(file) for file in tensors[name].files))
            dtype_name = _dtype_name(tensors[name].dtype)
            sources.append(PlannedSource(name, tuple(tensors[name].shape), dtype_name, tensors[name].nbytes, files))
        weights.append(
            PlannedWeight(
                spec.name, spec.shape, _dtype_name(spec.dtype), spec.nbytes, file_of[spec.name], tuple(sources)
            )
        )
    return ConversionPlan(
        source=str(job.checkpoint.path),
        output=str(output),
        format=job.checkpoint.format,
        iteration=job.checkpoint.iteration,
        dtype=_dtype_name(job.dtype),
        parameters=parameters(job.plan),
        bytes_written=job.nbytes,
        bytes_read=sum(tensors[move.source].nbytes for move in job.plan.moves),
        disk_free=shutil.disk_usage(output.parent).free if output.parent.is_dir() else None,
        files={name: sum(spec.nbytes for spec in shard) for name, shard in shards.items()},
        weights=weights,
        dropped=job.dropped,
        fetch=job.fetch_plan(fetch, job.sources(list(chain.from_iterable(shards.values())))),
    )


class _Job:
    """A conversion that is decided on."""

    def __init__(self, checkpoint: MegatronCheckpoint, dtype: str | None):
        self.checkpoint = checkpoint
        self.arguments = RecordedArgs(checkpoint.args)
        self.config = config_from_args(self.arguments)
        self.plan = match({name: tensor.shape for name, tensor in checkpoint.tensors.items()}, self.config)
        self.dtype = DTYPES[dtype] if dtype else _common_dtype(checkpoint, self.plan)
        self.config.dtype = _dtype_name(self.dtype)
        self.outputs = {out.name: out for out in self.plan.outputs}
        self.specs = [TensorSpec(out.name, out.shape, self.dtype) for out in self.plan.outputs]
        self.nbytes = sum(spec.nbytes for spec in self.specs)
        self.dropped = dropped_weights(self.plan, checkpoint.tensors) + checkpoint.dropped
        self.repository = checkpoint.path.repository if isinstance(checkpoint.path, HubPath) else None

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


def _prepare(
    source: str | Path, dtype: str | None, revision: str | None, fetch: str, metadata_only: bool = False
) -> _Job:
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(OUTPUT_DTYPES)}, or None to keep it, got {dtype!r}")
    if fetch not in FETCH:
        raise ConversionError(f"fetch must be one of {', '.join(FETCH)}, got {fetch!r}")
    folder = open_source(source, revision)
    if isinstance(folder, HubPath):
        folder.repository.may_fetch_files = not metadata_only
    return _Job(open_checkpoint(folder), dtype)


def _identity(job: _Job, limit: int) -> dict[str, Any]:
    """What decides the bytes of the output: an unfinished conversion is continued only if all of it is the same."""
    return {
        "source": str(job.checkpoint.path.resolve()),
        "source files": [_fingerprint(file) for file in job.checkpoint.files],
        "dtype": _dtype_name(job.dtype),
        "max_shard_size": limit,
        "version of gengram": version("gengram"),
        "table_version": TABLE_VERSION,
    }


def _fingerprint(file: SourcePath) -> list[str | int]:
    if isinstance(file, HubPath):
        return [str(file), file.file.size, file.file.identity]
    return [str(file), file.stat().st_size, file.stat().st_mtime_ns]


def _write_folder(job: _Job, place: PartialFolder, limit: int, progress: bool, fetch: str) -> None:
    shards = job.shards(limit)
    order = {name: job.sources(shard) for name, shard in shards.items()}
    kept = _intact_files(place, shards, progress)
    started, parts = _intact_parts(place, shards, progress)
    there = [spec for name in kept for spec in shards[name]]
    there_bytes = sum(spec.nbytes for spec in there) + sum(start.nbytes for start in started.values())
    place.begin(kept, parts, job.nbytes - there_bytes)
    uses = _to_be_read(job, shards, kept, started)
    _fetch_files(job, fetch, list(dict.fromkeys(uses)), progress)
    done = len(there) + sum(len(start.tensors) for start in started.values())
    with _Progress(job.nbytes, there_bytes, len(job.specs), done, progress) as bar:
        with _PlanReader(job, uses) as reader:
            for sources in (*(entry.sources for entry in kept.values()), *(part.sources for part in parts)):
                reader.source_digests.update(sources)

            def pieces(spec: TensorSpec, first: int) -> Iterator[torch.Tensor | HashedTensor]:
                yield from reader.pieces(spec, first)
                bar.tensors += 1

            def on_part(file: str, tensor: str, index: int | None, digest: str) -> None:
                sources = {source: reader.digest(source) for source in job.sources_of(tensor, index)}
                place.record_part(FinishedPart(file, tensor, index, digest, sources))

            def on_shard(name: str, digests: dict[str, str]) -> None:
                sources = {source: reader.source_digests[source] for source in order[name]}
                place.record(FinishedFile(name, digests, sources))

            finished = {name: entry.tensors for name, entry in kept.items()}
            digests = write_safetensors(
                place.folder, job.specs, pieces, limit, bar.update, finished, started, on_shard, on_part
            )
            reader.check_tied_copies()
    folder = place.folder
    write_remote_code(job.config, folder)
    job.config.save_pretrained(folder)
    generation_config(job.config).save_pretrained(folder)
    GengramTokenizer(model_max_length=job.config.max_position_embeddings).save_pretrained(folder)
    shutil.copyfile(MODEL_CARD, folder / "README.md")
    record = _record(job, digests, reader.source_digests)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    place.publish()


def _fetch_files(job: _Job, fetch: str, sources: Sequence[str], progress: bool) -> None:
    """Shows what is fetched from the Hub for these tensors, and fetches the files that come whole."""
    plan = job.fetch_plan(fetch, sources)
    if plan is None:
        return
    if progress:
        print(plan.summary(), file=sys.stderr, flush=True)
    for file in plan.files:
        if file.how == "whole":
            plan.repository.fetch_whole(str(PurePosixPath(plan.folder) / file.name), progress)


def _intact_files(
    place: PartialFolder, shards: dict[str, list[TensorSpec]], progress: bool
) -> dict[str, FinishedFile]:
    """The weight files of an earlier run whose bytes have the hashes in its journal."""
    entries = {name: entry for name, entry in place.finished.items() if name in shards}
    total = sum(spec.nbytes for name in entries for spec in shards[name])
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=not (progress and entries)) as bar:
        return {
            name: entry
            for name, entry in entries.items()
            if shard_is_intact(place.folder / name, shards[name], entry.tensors, bar.update)
        }


def _intact_parts(
    place: PartialFolder, shards: dict[str, list[TensorSpec]], progress: bool
) -> tuple[dict[str, StartedFile], list[FinishedPart]]:
    """How far the weight file that an earlier run was writing is right, and the notes of these parts."""
    name = place.parts[0].file if place.parts else ""
    if name not in shards:
        return {}, []
    tensors = {part.tensor: part.sha256 for part in place.parts if part.index is None}
    slices: dict[str, list[str]] = {}
    for part in place.parts:
        if part.index is not None and part.index == len(slices.setdefault(part.tensor, [])):
            slices[part.tensor].append(part.sha256)
    with tqdm(unit="B", unit_scale=True, desc="checking", disable=not progress) as bar:
        start = intact_start(place.folder / name, shards[name], tensors, slices, bar.update)
    if not start.nbytes:
        return {}, []
    following = shards[name][len(start.tensors)].name if len(start.tensors) < len(shards[name]) else ""
    parts = [
        part
        for part in place.parts
        if part.tensor in start.tensors
        or (part.tensor == following and part.index is not None and part.index < len(start.slices))
    ]
    return {name: start}, parts


def _to_be_read(
    job: _Job, shards: dict[str, list[TensorSpec]], kept: Container[str], started: dict[str, StartedFile]
) -> list[str]:
    """The tensors of the source that what is still to be written needs, in the order of their use, once for each."""
    names: list[str] = []
    for name, shard in shards.items():
        if name not in kept:
            start = started.get(name, StartedFile())
            names += job.sources(shard[len(start.tensors) :])[len(start.slices) :]
    return names


class _Progress:
    """A bar on stderr: bytes, rate, tensors."""

    def __init__(self, total: int, initial: int, tensors: int, done: int, shown: bool):
        self.tensors = done
        self._count = tensors
        self._bar = tqdm(
            total=total, initial=initial, unit="B", unit_scale=True, desc="weights", disable=not shown, miniters=1
        )

    def update(self, count: int) -> None:
        self._bar.set_postfix_str(f"{self.tensors} of {self._count} tensors", refresh=False)
        self._bar.update(count)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()


class _PlanReader:
    """Reads each source tensor at its first use, some ahead, hashes it once, and keeps it until its last use.

    Args:
        uses: The tensors in the order of their use, once for each.
    """

    def __init__(self, job: _Job, uses: Sequence[str]):
        self.checkpoint = job.checkpoint
        self.plan = job.plan
        self.source_digests: dict[str, str] = {}
        self._outputs = job.outputs
        self._uses = Counter(uses)
        self._held: dict[str, list[torch.Tensor]] = {}
        self._order: Iterator[str] = iter(dict.fromkeys(uses))
        self._next: str | None = next(self._order, None)
        self._ahead: dict[str, Future[torch.Tensor]] = {}
        self._hashes: dict[str, Future[str]] = {}
        self._most_ahead = 1 if job.repository is None else READS_FROM_HUB
        self._reading = ThreadPoolExecutor(self._most_ahead, thread_name_prefix="read")
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")

    def __enter__(self) -> "_PlanReader":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None and isinstance(self.checkpoint.path, HubPath):
            self.checkpoint.path.repository.stop()
        self._reading.shutdown(cancel_futures=True)
        self._hashing.shutdown(cancel_futures=True)

    def pieces(self, spec: TensorSpec, first: int = 0) -> Iterator[torch.Tensor | HashedTensor]:
        for move, which in self._outputs[spec.name].parts[first:]:
            values = self._parts(move)[which]
            # Moved as a whole: what is written has the hash of what was read.
            whole = isinstance(move.entry.layout, Same)
            yield HashedTensor(values, partial(self.digest, move.source)) if whole else values
            del values
            self.digest(move.source)  # at most one tensor is written and hashed while the next is read

    def digest(self, source: str) -> str:
        """The SHA-256 of a source tensor that was read."""
        if source not in self.source_digests:
            self.source_digests[source] = self._hashes.pop(source).result()
        return self.source_digests[source]

    def _parts(self, move: Move) -> list[torch.Tensor]:
        # Queries, keys and values come from one tensor; in a file, other weights are between them.
        parts = self._held.pop(move.source, None) or move.entry.layout.to_hf(self._read(move.source))
        self._uses[move.source] -= 1
        if self._uses[move.source]:
            self._held[move.source] = parts
        return parts

    def _read(self, source: str) -> torch.Tensor:
        if source not in self._ahead:
            assert self._next == source, "the writer's order is not the one told"
            self._start()
        tensor = self._ahead.pop(source).result()
        if source not in self.source_digests:
            self._hashes[source] = self._hashing.submit(tensor_digest, [tensor])
        tensors = self.checkpoint.tensors
        while self._next is not None and len(self._ahead) < self._most_ahead:
            if sum(tensors[name].nbytes for name in (*self._ahead, self._next)) > MOST_READ_AHEAD:
                break
            self._start()
        return tensor

    def _start(self) -> None:
        assert self._next is not None
        self._ahead[self._next] = self._reading.submit(self.checkpoint.tensors[self._next].read)
        self._next = next(self._order, None)

    def check_tied_copies(self) -> None:
        """A head that a tied model stores beside its embedding must equal it before it is left out."""
        for move in self.plan.dropped:
            if move.source == "output_layer.weight":
                digest = tensor_digest([self.checkpoint.tensors[move.source].read()])
                if digest != self.source_digests["embedding.word_embeddings.weight"]:
                    raise ConversionError(
                        "output_layer.weight differs from embedding.word_embeddings.weight, but "
                        "args.untie_embeddings_and_output_weights is False; expected equal weights"
                    )


def _common_dtype(checkpoint: MegatronCheckpoint, plan: Plan) -> torch.dtype:
    found = sorted({str(checkpoint.tensors[move.source].dtype) for move in plan.moves})
    names = [_dtype_name(dtype) for dtype in DTYPE_NAMES]
    if len(found) != 1 or found[0].removeprefix("torch.") not in names:
        raise ConversionError(
            f"the checkpoint's weights have dtypes {', '.join(found)}; expected one of {', '.join(names)} throughout: "
            "say --dtype float32 or --dtype bfloat16"
        )
    return DTYPES[found[0].removeprefix("torch.")]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def generation_config(config: GengramConfig) -> GenerationConfig:
    """Greedy by default; only A, C, G, T and N can be generated, since padding rows of the head are untrained."""
    letters = set(config.memory_token_ids)
    suppressed = [token for token in range(config.vocab_size) if token not in letters]
    return GenerationConfig(pad_token_id=config.pad_token_id, suppress_tokens=suppressed, do_sample=False)


def _record(job: _Job, digests: dict[str, str], source_digests: dict[str, str]) -> dict[str, Any]:
    """What `conversion.json` says: where each tensor came from, with hashes of its bytes on both sides."""
    checkpoint, plan = job.checkpoint, job.plan
    return {
        "table_version": TABLE_VERSION,
        "gengram_version": version("gengram"),
        "source": {
            "path": str(checkpoint.path.resolve()),
            "format": checkpoint.format,
            "iteration": checkpoint.iteration,
            **({} if job.repository is None else {"hub": _hub_record(job.repository)}),
            "files": [{"name": job.relative_name(file), "bytes": size_of(file)} for file in checkpoint.files],
            "args": job.arguments.as_json(),
            "tensors": {
                move.source: {
                    "sha256": source_digests[move.source],
                    "dtype": _dtype_name(checkpoint.tensors[move.source].dtype),
                    "shape": list(move.entry.shape),
                }
                for move in plan.moves
            },
        },
        "weights": {
            output.name: {
                "sha256": digests[output.name],
                "dtype": _dtype_name(job.dtype),
                "shape": list(output.shape),
                "sources": [move.source for move, _ in output.parts],
            }
            for output in plan.outputs
        },
        "dropped": [{"name": entry.name, "reason": entry.reason, "bytes": entry.nbytes} for entry in job.dropped],
    }


def _hub_record(repository: HubRepository) -> dict[str, str]:
    return {"repo_id": repository.repo_id, "revision": repository.revision, "commit": repository.commit}


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram convert to-hf`."""
    parser.add_argument(
        "source", metavar="SOURCE", help="Megatron checkpoint: a folder, or ORG/NAME[/FOLDER] on the Hub"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; new or empty")
    parser.add_argument("--dtype", choices=OUTPUT_DTYPES, help="dtype of the weights; the checkpoint's own by default")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; its main branch by default")
    parser.add_argument(
        "--fetch",
        choices=FETCH,
        default="auto",
        help="from the Hub: only byte ranges that hold weights, or whole files into its cache (default: whole those "
        "files of which nearly all is wanted)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    parser.add_argument("--restart", action="store_true", help="discard what an interrupted conversion left")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    how.add_argument("--json", action="store_true", help="no progress bar; the report, plan or error as JSON")


def run_convert(arguments: argparse.Namespace) -> int:
    """Runs `gengram convert to-hf`; returns the exit code."""

    def run() -> int:
        options = {name: getattr(arguments, name) for name in ("dtype", "max_shard_size", "revision", "fetch")}
        done: ConversionPlan | ConversionReport
        if arguments.dry_run:
            done = plan_conversion(arguments.source, arguments.output, **options)
        else:
            shown = not (arguments.quiet or arguments.json)
            done = convert_to_hf(
                arguments.source, arguments.output, **options, progress=shown, restart=arguments.restart
            )
        if arguments.json:
            print(json.dumps(done.as_json(), indent=1))
        elif not arguments.quiet:
            print(done.summary())
        return 0

    _give_memory_back()
    try:
        return with_clear_errors(run, as_json=arguments.json)
    finally:
        kept = leftover(arguments.output)
        if kept and not arguments.dry_run:
            print(kept, file=sys.stderr)


def _give_memory_back() -> None:
    """Has glibc return every freed megabyte; by itself it keeps blocks of up to 32 MiB, and peaks would add up."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            m_mmap_threshold = -3
            ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)


def with_clear_errors(run: Callable[[], int], as_json: bool = False) -> int:
    """Runs a command; what the user can mend is printed in one message, without a traceback, and exits with 1."""
    try:
        return run()
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConversionError, FetchError, OSError) as error:
        if as_json:
            print(json.dumps({"error": str(error)}))
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m gengram.conversion_scripts.convert_megatron_to_hf`."""
    parser = argparse.ArgumentParser(
        prog="python -m gengram.conversion_scripts.convert_megatron_to_hf", description=__doc__.partition("\n")[0]
    )
    add_convert_arguments(parser)
    return run_convert(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
