"""The file of each run: named by all that its result depends on, and read again only if it is as it was written."""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..inference.model_folder import model_files
from ..support.errors import InputError
from ..support.file_hash import sha256_of
from ..support.input_file import shown_name
from ..support.whole_output import write_whole
from .classification import FINE_TUNING
from .evaluated_model import EvaluatedModel
from .suite import ClassificationTask, LikelihoodTask, Task, VariantTask

_FORMAT = 4  # counts up when the same run gives another result; runs of before are then done again


def run_path(output: Path, task: Task, protocol: str, model: EvaluatedModel | None, seed: int, data: Path) -> Path:
    """Where a run's result is: a name that changes with the task, its data, the protocol, the model and the seed.

    Args:
        output: folder of the results.
        task, protocol, model, seed: the run.
        data: folder that the task's paths are relative to.
    """
    unused = {"protocols"} | (set() if protocol in FINE_TUNING else {"fine_tuning"})
    if protocol in FINE_TUNING or not isinstance(task, ClassificationTask):
        unused.add("metric")  # nothing is chosen by it
    described = {
        "format": _FORMAT,
        "task": {name: value for name, value in asdict(task).items() if name not in unused},
        "data": [_content(path) for path in data_files(task, data)],
        "protocol": protocol,
        "model": None if model is None else [model.name, str(model.dtype), model.loading, _content_of(model)],
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return output / "runs" / f"{re.sub('[^A-Za-z0-9._-]', '_', task.name)[:80]}-{protocol}-{digest}.json"


def write_run(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its checksum. What is not finite must be None before; see `without_nan`."""
    write_whole(path, json_text({**result, "checksum": _checksum(result)}))


def read_run(path: Path) -> dict[str, Any] | None:
    """The result that a run has left; `None` if it has left none.

    Raises:
        InputError: if the file is not as `write_run` wrote it.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
        if isinstance(found, dict) and found.pop("checksum", None) == _checksum(found):
            return found
    except (ValueError, RecursionError):
        pass
    raise InputError(
        f"{shown_name(path)}: expected the result of a run as `gengram bench` wrote it, got another or changed file; "
        "remove it to have the run done again."
    )


def json_text(value: Any) -> str:
    """Indented JSON that every reader takes: what is not finite is an error here; see `without_nan`."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Dictionaries and lists with None for numbers that are not finite: what is not defined is null in JSON."""
    if isinstance(value, Mapping):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_files(task: Task, data: Path) -> Iterator[Path]:
    """The files that a task reads, as far as they are on this machine."""
    if isinstance(task, ClassificationTask):
        for source in (task.train, task.test):
            if isinstance(source, Mapping) and "repo" not in source:
                yield from (data / path for path in source.values())
            elif isinstance(source, str):
                yield data / source
    elif isinstance(task, VariantTask):
        yield from (data / task.variants, data / task.fasta)
    elif isinstance(task, LikelihoodTask):
        yield from sorted((data / task.dataset).glob("data/*.parquet"))


def _content(path: Path) -> list[Any]:
    """Size and hash of a file, which tell it from another under the same name; nothing if it is not there."""
    if not path.is_file():
        return []
    stat = path.stat()
    return [stat.st_size, _hash(path, stat.st_size, stat.st_mtime_ns)]


@functools.lru_cache
def _hash(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def _content_of(model: EvaluatedModel) -> list[Any] | None:
    """What tells a model from others under the same name: the files of its folder, or its commit on the Hub."""
    folder = Path(model.name)
    if not folder.is_dir():
        return [model.commit]
    files = [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in model_files(folder).items()]
    return files if model.commit is None else [*files, [model.commit]]  # the folder of adapters of a model on the Hub


def _checksum(result: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
