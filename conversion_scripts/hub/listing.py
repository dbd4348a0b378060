"""Which files a repository on the Hub holds at a commit, and which commit a branch or tag is."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile

from ...support.errors import ConversionError, FetchError, shortened
from .patience import ANSWER_WITHIN, Patience, explained, first_line
from .repository import HubFile, HubRepository


def open_repository(repo_id: str, revision: str | None = None) -> HubRepository:
    """The repository at a branch, tag or commit (its main branch by default).

    Raises:
        ConversionError: if the repository or revision does not exist or is not accessible.
        FetchError: if the Hub cannot be reached, or what answers is not the Hub.
    """
    asked = revision or constants.DEFAULT_REVISION
    if not _is_plain(asked):
        raise ConversionError(f"{shortened(asked)} is not the name of a branch, tag or commit")
    if constants.is_offline_mode():
        return _cached_repository(repo_id, asked)
    here = f"{repo_id} is no folder here, and on the Hub ({constants.ENDPOINT})"
    try:
        commit, files = _listing(repo_id, asked)
    except GatedRepoError as error:
        raise ConversionError(
            f"{repo_id} is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(
            f"{repo_id} has no revision {shortened(asked)}; name a branch, tag or commit of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"{here} no such repository can be seen; check the name, or log in with `hf auth login` or set HF_TOKEN "
            "if it is private"
        ) from error
    except HFValidationError as error:
        raise ConversionError(f"{repo_id} is no folder here and no name of a repository ({error})") from error
    except HfHubHTTPError as error:
        raise FetchError(f"{here} it cannot be read: {explained(error)}") from error
    except _NOT_THE_HUB as error:
        raise FetchError(
            f"{here} the answer is not the Hub's ({shortened(first_line(error))}); is there a proxy?"
        ) from error
    _remember_revision(repo_id, asked, commit)
    return HubRepository(repo_id, asked, commit, files)


# What huggingface_hub raises for an answer that is not JSON, or JSON of another kind.
_NOT_THE_HUB = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)


def _listing(repo_id: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """The commit that a revision is, and its files."""
    api, patience = HfApi(), Patience()
    info = patience.retried(
        lambda: api.model_info(repo_id, revision=revision, files_metadata=True, timeout=ANSWER_WITHIN), repo_id
    )
    commit = _text(info.sha, "commit")
    if not re.fullmatch(r"\w[\w-]*", commit, re.ASCII):  # it becomes the name of a folder in the cache
        raise TypeError(f"the commit is {shortened(commit)}")
    entries: Iterable[Any] = info.siblings or ()
    if any(entry.size is None for entry in entries):
        tree = patience.retried(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)), repo_id)
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    files = {}
    for entry in entries:
        name, size = _text(entry.rfilename, "name of a file"), entry.size
        if type(size) is not int or not 0 <= size < 2**62:
            raise TypeError(f"the size of {shortened(name)} is {shortened(size)}")
        if _is_plain(name):
            identity = entry.lfs.sha256 if entry.lfs else entry.blob_id or ""
            files[name] = HubFile(size, _text(identity, "hash of a file"))
    return commit, files


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the {what} is {shortened(value)}")
    return value


def _is_plain(name: str) -> bool:
    """Whether a file's name stays inside its folder, and can be shown; no file of a checkpoint has another one."""
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and ".." not in path.parts and str(path) == name


def _cached_repository(repo_id: str, revision: str) -> HubRepository:
    """What the cache has of a repository."""
    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    reference = place / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = place / "snapshots" / commit
    if not snapshot.is_dir():
        raise ConversionError(
            f"{repo_id} is no folder here, and its revision {shortened(revision)} is not in the Hub's cache "
            f"({place}); HF_HUB_OFFLINE is set, so nothing is fetched"
        )
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    files = {
        path.relative_to(snapshot).as_posix(): HubFile(path.stat().st_size, path.resolve().name) for path in paths
    }
    return HubRepository(repo_id, revision, commit, files, offline=True)


def _remember_revision(repo_id: str, revision: str, commit: str) -> None:
    """Notes in the cache which commit a branch or tag is, as `hf_hub_download` does, for use without a network."""
    if revision == commit:
        return
    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "refs" / revision
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        fresh = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
        fresh.write_text(commit)
        fresh.replace(reference)
    except OSError:  # a cache that cannot be written is of no use offline, but of no harm here
        return
