"""Chunks computed by actors of Ray Data, which restarts actors that die and repeats what they had in hand."""

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ...support.errors import MissingExtraError
from .job import Job, JobChunk

_AT_ONCE = 1024  # chunks handed to Ray together, so that an input of any length fits


def results_on_ray(job: Job, chunks: Iterator[tuple[int, JobChunk]]) -> Iterator[tuple[int, int, pa.Table]]:
    """Index, size and result of each chunk, in whatever order they are finished.

    A cluster that is running is used (`RAY_ADDRESS`), or one is started on this machine: an actor for each GPU, or for
    each processor if there is none.

    Raises:
        MissingExtraError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("the engine ray needs Ray: pip install 'gengram[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = gpus or int(ray.cluster_resources().get("CPU", 1))
    while batch := list(itertools.islice(chunks, _AT_ONCE)):
        rows = [{"index": index, "size": chunk.size, "content": pickle.dumps(chunk.content)} for index, chunk in batch]
        computed = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(job, job.model.device or ("cuda" if gpus else "cpu")),
            batch_size=1,
            concurrency=(1, min(actors, len(rows))),
            num_gpus=1 if gpus else 0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        for row in computed.iter_rows():
            yield row["index"], row["size"], pa.ipc.open_stream(row["result"]).read_all()


class _Actor:
    """Holds the model of one GPU or processor."""

    def __init__(self, job: Job, device: str):
        self.worker = job.worker(device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = []
        for content in batch["content"]:
            result = self.worker(pickle.loads(content))
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, result.schema) as writer:
                writer.write_table(result)
            results.append(sink.getvalue().to_pybytes())
        return {"index": batch["index"], "size": batch["size"], "result": results}
