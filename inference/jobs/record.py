"""What an output says of how it was made."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...support.errors import InputError
from ...support.file_hash import sha256_of
from ...support.printable import printable
from ...support.versions import installed_version
from ..model_folder import adapters_in, model_files
from .job import Job, ModelOptions

_VERSIONS = ("gengram", "torch", "transformers")
_LONG = 2**28  # bytes from which on reading a file shows progress
# The same file may be named in another way; a job whose chunks depend on `batch_tokens` has it in its settings, too.
_WITHOUT_EFFECT = {"command", "path", "batch_tokens"}


def record_of(job: Job, progress: str | None = None) -> dict[str, Any]:
    """Command, model, settings, versions, and SHA-256 and size of every input: no times, so equal runs are equal.

    Raises:
        OSError: if an input cannot be read.
    """
    return {
        "job": job.name,
        "command": " ".join(["gengram", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("gengram", "__main__") else "",
        "model": _model_record(job.model, progress),
        "settings": job.settings(),
        "versions": {name: installed_version(name) for name in _VERSIONS},
        "inputs": {role: _file_record(path, progress) for role, path in job.inputs.items()},
    }


def _model_record(options: ModelOptions, progress: str | None) -> dict[str, Any]:
    """The model's options, and its commit on the Hub or the SHA-256 of the files in its folder."""
    if not Path(options.model).is_dir():
        return {**options.settings(), "commit": options.load_commit()}
    files = {name: _file_record(path, progress)["sha256"] for name, path in _files_of(options).items()}
    record = {**options.settings(), "files": files}
    if adapters_in(options.model) is not None:
        record |= {"peft": installed_version("peft"), "base_commit": options.load_commit()}
    return record


def _files_of(options: ModelOptions) -> dict[str, Path]:
    """The files in the model's folder; of a model on the Hub none, since its commit says which they are."""
    folder = Path(options.model)
    return model_files(folder) if folder.is_dir() else {}


def _file_record(path: Path, progress: str | None) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or device" if path.exists() else "does not exist"
        raise OSError(f"{path} {what}; expected a file, since it is read more than once.")
    size = path.stat().st_size
    name = f"reading {path.name}" if progress and size >= _LONG else None
    return {"path": str(path), "bytes": size, "sha256": sha256_of(path, name)}


class RunFiles:
    """The inputs of a run and the files of its model, to notice when one changes while the run still reads it.

    Args:
        job: whose files are looked at; make this before the record, which reads them.
    """

    def __init__(self, job: Job):
        self._inputs, self._model = job.inputs, _files_of(job.model)
        self._seen = {path: _state(path) for path in (*self._inputs.values(), *self._model.values())}

    def check(self, record: Mapping[str, Any]) -> None:
        """Refuse to go on with files that are no longer those of the record; only what was touched is read.

        Raises:
            InputError: if one has changed or is gone.
        """
        touched = [path for path, state in self._seen.items() if _state(path) != state]
        if not touched:
            return
        digests = {path: record["inputs"][role]["sha256"] for role, path in self._inputs.items()}
        digests |= {path: record["model"]["files"][name] for name, path in self._model.items()}
        for path in touched:
            state = _state(path)
            if state is None or _file_record(path, None)["sha256"] != digests[path]:
                raise InputError(
                    f"{printable(path)} has changed since this run began, so that results would not belong to it; "
                    "nothing was written. Put it back as it was to go on, or add --restart to begin anew."
                )
            self._seen[path] = state


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes with a file, whoever writes it; None if it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino


def record_json(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON."""
    return json.dumps(record, sort_keys=True)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> list[str]:
    """Where two records differ in what decides the result: names such as `settings.context`."""
    found = []
    for name in sorted({*one, *other} - _WITHOUT_EFFECT):
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += differences(mine, theirs, f"{above}{name}.")
        elif mine != theirs:
            found.append(f"{above}{name}")
    return found
