"""Files and folders of a Hugging Face Hub repository as paths, and what a user names as a source."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...support.errors import ConversionError, shortened
from .listing import open_repository
from .repository import HubFile, HubRepository

_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_SOURCE = re.compile(rf"(?:hf://)?({_REPOSITORY})(?:@([^/\s]+))?((?:/[^/\s][^/]*)*)/?", re.ASCII)


@dataclass(frozen=True)
class HubPath:
    """A file or folder of a repository: as much of `pathlib.Path` as the readers of checkpoints use."""

    repository: HubRepository
    relative: PurePosixPath

    @property
    def name(self) -> str:
        return self.relative.name

    @property
    def suffix(self) -> str:
        return self.relative.suffix

    @property
    def parent(self) -> "HubPath":
        return HubPath(self.repository, self.relative.parent)

    def __truediv__(self, name: str) -> "HubPath":
        return HubPath(self.repository, self.relative / name)

    def __str__(self) -> str:
        """`hf://ORG/NAME@COMMIT/PATH`, which can be given as a source again."""
        return self.repository.place(self.key)

    @property
    def key(self) -> str:
        """Its path in the repository; empty for the uppermost folder."""
        return "/".join(self.relative.parts)

    def is_file(self) -> bool:
        return self.key in self.repository.files

    def is_dir(self) -> bool:
        return self.key in self.repository.children

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["HubPath"]:
        yield from (self / name for name in sorted(self.repository.children[self.key]))

    def resolve(self) -> "HubPath":
        return self

    @property
    def file(self) -> HubFile:
        """What the Hub says of this file."""
        return self.repository.files[self.key]

    def local_copy(self) -> Path | None:
        """The file on this machine, if it is there or small enough to be fetched whole."""
        return self.repository.local_copy(self.key)

    def open(self, mode: str) -> Any:
        """The whole file, fetched into the cache."""
        return open(self.repository.fetch_whole(self.key), mode)

    def read_bytes(self) -> bytes:
        """The whole file, fetched into the cache."""
        return self.repository.fetch_whole(self.key).read_bytes()


SourcePath = Path | HubPath


def size_of(path: SourcePath) -> int:
    """Bytes of a file."""
    return path.file.size if isinstance(path, HubPath) else path.stat().st_size


def fetch_now(path: SourcePath) -> None:
    """Fetches a file on the Hub whole, so that it is read from the cache."""
    if isinstance(path, HubPath):
        path.repository.fetch_whole(path.key)


def relative_name(path: SourcePath, folder: SourcePath) -> str:
    """The name of a file inside a folder that holds it."""
    inside = path.relative if isinstance(path, HubPath) else path
    return str(inside.relative_to(folder.relative if isinstance(folder, HubPath) else folder))


def open_source(source: str | Path | HubPath, revision: str | None = None) -> SourcePath:
    """The folder that a user named: a local one, or else `ORG/NAME[/FOLDER]` on the Hub.

    `hf://ORG/NAME[@REVISION][/FOLDER]` is always on the Hub, a `Path` is always local. Of a repository, the list of
    files is fetched.

    Raises:
        ConversionError: if the repository or revision does not exist or is not accessible.
        FetchError: if the Hub cannot be reached.
    """
    if isinstance(source, HubPath):
        return source
    match = None
    if isinstance(source, str) and (source.startswith("hf://") or not Path(source).exists()):
        match = _SOURCE.fullmatch(source)
        if match is None and source.startswith("hf://"):
            raise ConversionError(f"expected hf://ORG/NAME or hf://ORG/NAME@REVISION/FOLDER, got {shortened(source)}")
    if match is None:
        if revision is not None:
            raise ConversionError(f"--revision is for repositories on the Hub; {source} is a local path")
        return Path(source)
    repo_id, named, folder = match[1], match[2], match[3]
    if named and revision and named != revision:
        raise ConversionError(f"{source} names revision {named}, --revision {revision}; give one of them")
    repository = open_repository(repo_id, revision or named)
    path = HubPath(repository, PurePosixPath(folder.strip("/")))
    if not path.is_dir():
        raise ConversionError(f"{repo_id} has no folder {shortened(folder.strip('/'))} at {repository.revision}")
    return path
