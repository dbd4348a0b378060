"""What an output says of how it was made."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...support.progress import progress_bar
from ...support.versions import installed_version
from ..model_folder import model_files
from .job import Job, ModelOptions

_VERSIONS = ("gengram", "torch", "transformers")
_PIECE = 2**22
_LONG = 2**28  # bytes from which on reading a file shows progress
_WITHOUT_EFFECT = {"command", "path"}  # the same file may be named in another way


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
    folder = Path(options.model)
    if not folder.is_dir():
        return {**options.settings(), "commit": getattr(options.load_config(), "_commit_hash", None)}
    files = {name: _file_record(path, progress)["sha256"] for name, path in model_files(folder).items()}
    return {**options.settings(), "files": files}


def _file_record(path: Path, progress: str | None) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or device" if path.exists() else "does not exist"
        raise OSError(f"{path} {what}; expected a file, since it is read more than once.")
    digest, size = hashlib.sha256(), path.stat().st_size
    name = f"reading {path.name}" if progress and size >= _LONG else None
    with path.open("rb") as file, progress_bar(name, "B", total=size) as bar:
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}


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
