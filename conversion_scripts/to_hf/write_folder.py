"""Writes the folder: weights as they are read, configuration, tokenizer, code, model card and record."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ...configuration.configuration_gengram import GengramConfig
from ...modeling_gengram.remote_code import write_remote_code
from ...tokenization import GengramTokenizer
from ..files.conversion_record import file_digests
from ..files.hf_folder import RECORD
from ..files.partial_folder import FinishedFile, FinishedPart, PartialFolder
from ..files.safetensors_writer import HashedTensor, TensorSpec, write_safetensors
from .expert_pieces import ExpertPieces, slices_there
from .job import ConversionJob
from .record import conversion_record
from .resume import intact_files, intact_parts, to_be_read
from .source_reader import SourceReader

MODEL_CARD = Path(__file__).parents[1] / "model_card.md"


def write_folder(job: ConversionJob, place: PartialFolder, limit: int, progress: bool, fetch: str) -> None:
    """Writes all files of the output into `place`, which becomes the output.

    Args:
        job: The conversion.
        place: Where the output grows, with what an interrupted conversion left there.
        limit: Largest bytes of a weight file.
        progress: Show progress bars on stderr.
        fetch: How files on the Hub are fetched.
    """
    digests, reader = _write_weights(job, place, limit, progress, fetch)
    folder = place.folder
    described = {path.name for path in folder.iterdir()}  # weights and their index, whose tensors are recorded
    write_remote_code(job.config, folder)
    generation_config(job.config).save_pretrained(folder)
    GengramTokenizer(model_max_length=job.config.max_position_embeddings).save_pretrained(folder)
    others = file_digests(folder, {path.name for path in folder.iterdir()} - described)
    job.config.save_pretrained(folder)
    shutil.copyfile(MODEL_CARD, folder / "README.md")
    record = conversion_record(job, digests, reader.source_digests, reader.unchecked, others)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    job.checkpoint.check_unchanged()
    place.publish()


def _write_weights(
    job: ConversionJob, place: PartialFolder, limit: int, progress: bool, fetch: str
) -> tuple[dict[str, str], SourceReader]:
    """Writes what is missing of the weight files; the hashes of what was written, and what is known of the sources."""
    shards = job.shards(limit)
    order = {name: job.sources(shard) for name, shard in shards.items()}
    kept = intact_files(job, place, shards, progress)
    started, parts = intact_parts(job, place, shards, progress)
    there = [spec for name in kept for spec in shards[name]]
    there_bytes = sum(spec.nbytes for spec in there) + sum(start.nbytes for start in started.values())
    place.begin(kept, parts, job.nbytes - there_bytes)
    uses = to_be_read(job, shards, kept, started)
    _fetch_files(job, fetch, list(dict.fromkeys(uses)), progress)
    done = len(there) + sum(len(start.tensors) for start in started.values())
    with WeightProgress(job.nbytes, there_bytes, len(job.specs), done, progress) as bar:
        with SourceReader(job, uses) as reader:
            notes: list[FinishedFile | FinishedPart] = [*kept.values(), *parts]
            for note in notes:
                reader.know(note.sources, note.unchecked)

            experts = ExpertPieces(job, reader, slices_there(shards, kept, started))

            def pieces(spec: TensorSpec, first: int) -> Iterator[torch.Tensor | HashedTensor]:
                yield from experts.of(spec, first)
                bar.tensors += 1

            def on_part(file: str, tensor: str, index: int | None, digest: str) -> None:
                sources = {source: reader.digest(source) for source in job.sources_of(tensor, index)}
                unchecked = {source: reader.unchecked[source] for source in sources if source in reader.unchecked}
                place.record_part(FinishedPart(file, tensor, index, digest, sources, unchecked))

            def on_shard(name: str, digests: dict[str, str]) -> None:
                sources = {source: reader.source_digests[source] for source in order[name]}
                unchecked = {source: reader.unchecked[source] for source in sources if source in reader.unchecked}
                place.record(FinishedFile(name, digests, sources, unchecked))

            finished = {name: entry.tensors for name, entry in kept.items()}
            digests = write_safetensors(
                place.folder, job.specs, pieces, limit, bar.update, finished, started, on_shard, on_part
            )
            reader.check_tied_copies()
    return digests, reader


def _fetch_files(job: ConversionJob, fetch: str, sources: Sequence[str], progress: bool) -> None:
    """Shows what is fetched from the Hub for these tensors, and fetches the files that come whole."""
    plan = job.fetch_plan(fetch, sources)
    if plan is None:
        return
    if progress:
        print(plan.summary(), file=sys.stderr, flush=True)
    for file in plan.files:
        if file.how == "whole":
            plan.repository.fetch_whole(str(PurePosixPath(plan.folder) / file.name), progress)


class WeightProgress:
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

    def __enter__(self) -> "WeightProgress":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()


def generation_config(config: GengramConfig) -> GenerationConfig:
    """Greedy by default; only A, C, G, T and N can be generated, since padding rows of the head are untrained."""
    letters = set(config.memory_token_ids)
    suppressed = [token for token in range(config.vocab_size) if token not in letters]
    return GenerationConfig(pad_token_id=config.pad_token_id, suppress_tokens=suppressed, do_sample=False)
