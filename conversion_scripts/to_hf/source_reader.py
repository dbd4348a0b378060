"""Reads the tensors of a checkpoint in the order in which they are written."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from ...support.errors import ConversionError
from ..files.safetensors_writer import HashedTensor, TensorSpec
from ..files.weight_hash import tensor_digest
from ..hub.hub_path import HubPath
from ..mapping.layouts import Same
from ..mapping.match import Move
from .job import ConversionJob

MOST_READ_AHEAD = 256 * 2**20  # bytes of a tensor that is read while the one before is written
READS_FROM_HUB = 4  # tensors that are fetched at once


class SourceReader:
    """Reads each source tensor at its first use, some ahead, hashes it once, and keeps it until its last use.

    Args:
        uses: The tensors in the order of their use, once for each.
    """

    def __init__(self, job: ConversionJob, uses: Sequence[str]):
        self.checkpoint = job.checkpoint
        self.plan = job.plan
        self.source_digests: dict[str, str] = {}
        self.unchecked: dict[str, str] = {}  # why bytes of a source could not be compared with a checksum
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

    def __enter__(self) -> "SourceReader":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None and isinstance(self.checkpoint.path, HubPath):
            self.checkpoint.path.repository.stop()
        self._reading.shutdown(cancel_futures=True)
        self._hashing.shutdown(cancel_futures=True)

    def know(self, digests: Mapping[str, str], unchecked: Mapping[str, str]) -> None:
        """Takes over what an earlier run found of sources that need not be read again."""
        self.source_digests.update(digests)
        self.unchecked.update(unchecked)

    def pieces(self, spec: TensorSpec, first: int = 0) -> Iterator[torch.Tensor | HashedTensor]:
        """What makes an output, piece by piece along its first axis, without the first so many."""
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
        if self.checkpoint.tensors[source].unchecked:
            self.unchecked[source] = self.checkpoint.tensors[source].unchecked[0]
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
