"""Files of a Hugging Face Hub repository at one commit, read where they are.

Small files, and files that are wanted as a whole, come through the Hub's cache (`hf_hub_download`); of others only the
byte ranges that are asked for are fetched, into memory. Both go through huggingface_hub: its endpoint, token, session,
retries and offline mode.
"""

import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)

from ...support.errors import ConversionError, FetchError, shortened, size_text

SMALL_FILE = 64 * 2**10  # up to here a file is fetched whole
BLOCK = 8 * 2**10  # fetched at once where headers and directories of archives are read
BLOCKS_KEPT = 64
PART = 16 * 2**20  # larger reads are cut into parts that are fetched side by side
PARALLEL_PARTS = 4
RETRIES = 5  # without a byte received in between
FIRST_WAIT = 1.0  # seconds before the first retry; doubles up to 8
_RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_SOURCE = re.compile(rf"(?:hf://)?({_REPOSITORY})(?:@([^/\s]+))?((?:/[^/\s][^/]*)*)/?", re.ASCII)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubFile:
    """Size of a file on the Hub, and its identity: SHA-256 of a large (LFS) file, git's hash of a small one."""

    size: int
    identity: str


class HubRepository:
    """The files of one commit of a model repository.

    Args:
        repo_id: `ORG/NAME`.
        revision: What was asked for.
        commit: The commit that it means; everything is read at it, so that a push meanwhile changes nothing.
        files: What the commit holds, by path.
        offline: Whether only files in the cache are there to be read.
    """

    def __init__(self, repo_id: str, revision: str, commit: str, files: dict[str, HubFile], offline: bool = False):
        self.repo_id = repo_id
        self.revision = revision
        self.commit = commit
        self.files = files
        self.offline = offline
        self.fetched_bytes = 0  # by ranges
        self.serves_ranges = True
        self.may_fetch_files = True
        self.children: dict[str, set[str]] = {"": set()}
        for name in files:
            parts = PurePosixPath(name).parts
            for depth in range(len(parts)):
                self.children.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
        self._copies: dict[str, Path] = {}
        self._checked: set[str] = set()
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    @property
    def root(self) -> "HubPath":
        """The repository's uppermost folder."""
        return HubPath(self, PurePosixPath())

    def copy_in_cache(self, name: str) -> Path | None:
        """The file in the Hub's cache, if it is there."""
        if name not in self._copies:
            found = try_to_load_from_cache(self.repo_id, name, revision=self.commit)
            if not isinstance(found, str):
                return None
            self._copies[name] = self._right_size(name, Path(found))
        return self._copies[name]

    def fetch_whole(self, name: str, progress: bool = False) -> Path:
        """The file in the Hub's cache, fetched if need be."""
        path = self.copy_in_cache(name)
        if path is not None:
            return path
        if not self.offline:
            _check_cache_space(self.files[name].size)
        place = str(self.root / name)
        silenced = not progress and not are_progress_bars_disabled()
        if silenced:
            disable_progress_bars()
        try:
            found = _retried(lambda: hf_hub_download(self.repo_id, name, revision=self.commit), place, self._wait)
        except HfHubHTTPError as error:
            raise FetchError(f"{place} cannot be read: {_explained(error)}") from error
        finally:
            if silenced:
                enable_progress_bars()
        self._copies[name] = self._right_size(name, Path(found))
        return self._copies[name]

    def _right_size(self, name: str, path: Path) -> Path:
        if path.stat().st_size != self.files[name].size:
            raise FetchError(
                f"{path} has {path.stat().st_size} bytes, on the Hub it has {self.files[name].size}; delete it from "
                "the cache and try again"
            )
        return path

    def read_into(self, path: "HubPath", offset: int, buffer: memoryview, limits: tuple[int, int]) -> int:
        """Reads from `offset` of a file, fetching nothing outside `limits`; returns how many bytes.

        What is asked for in small pieces is fetched in blocks, of which the last few are kept.
        """
        name = str(path.relative)
        kept = self._kept(name, offset, buffer)
        if kept:
            return kept
        if not self.serves_ranges:
            return self._read_whole(name, offset, buffer)
        if len(buffer) > BLOCK // 2:
            self._fetch_parts(name, offset, buffer)
            return len(buffer)
        start = max(limits[1] - BLOCK, limits[0]) if offset >= limits[1] - BLOCK else offset
        self.keep(name, start, min(BLOCK, limits[1] - start))
        return self._kept(name, offset, buffer)

    def keep(self, name: str, start: int, length: int) -> None:
        """Fetches a block that a later read will find in memory."""
        block = bytearray(length)
        self._fetch_parts(name, start, memoryview(block))
        with self._lock:
            self._blocks[name, start] = bytes(block)
            while len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)

    def _kept(self, name: str, offset: int, buffer: memoryview) -> int:
        with self._lock:
            for (file, start), block in self._blocks.items():
                if file == name and start <= offset < start + len(block):
                    count = min(len(buffer), start + len(block) - offset)
                    buffer[:count] = block[offset - start : offset - start + count]
                    return count
        return 0

    def _read_whole(self, name: str, offset: int, buffer: memoryview) -> int:
        if not self.may_fetch_files and self.copy_in_cache(name) is None:
            raise ConversionError(
                f"{self.root / name}: the server does not send parts of files, and all of it "
                f"({size_text(self.files[name].size)}) would have to be fetched to look inside; fetch it with "
                "`hf download`, then run this again"
            )
        with open(self.fetch_whole(name), "rb", buffering=0) as file:
            file.seek(offset)
            return file.readinto(buffer) or 0

    def _fetch_parts(self, name: str, offset: int, buffer: memoryview) -> None:
        self._check_file(name)
        starts = range(0, len(buffer), PART)
        if len(starts) == 1 or not self.serves_ranges:
            self._fetch(name, offset, buffer)
            return
        with ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="fetch") as pool:
            parts = [pool.submit(self._fetch, name, offset + i, buffer[i : i + PART]) for i in starts]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _check_file(self, name: str) -> None:
        """Once per file: the Hub still describes it as it did in the listing."""
        if name in self._checked:
            return
        place = self.root / name
        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        try:
            found = _retried(lambda: get_hf_file_metadata(url), str(place), self._wait)
        except HfHubHTTPError as error:
            raise FetchError(f"{place} cannot be read: {_explained(error)}") from error
        expected = self.files[name]
        comparable = len(found.etag or "") == len(expected.identity)  # not a SHA-256 with a hash of git
        for what, listed, here in (
            ("size", expected.size, found.size),
            ("identity (ETag)", expected.identity, found.etag if comparable else None),
            ("commit", self.commit, found.commit_hash),
        ):
            if here is not None and here != listed:
                raise FetchError(
                    f"{place}: the Hub now says that its {what} is {shortened(here)}, but listed {shortened(listed)}; "
                    "the repository changed, or a proxy answers for it: try again"
                )
        self._checked.add(name)

    def _fetch(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fills the buffer from one range of a file; where a connection is cut, the next one goes on."""
        place = self.root / name
        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        end = offset + len(buffer)
        done, failures = 0, 0
        while done < len(buffer):
            before = done
            problem = "the connection was closed early"
            headers = {
                **build_hf_headers(),
                "Range": f"bytes={offset + done}-{end - 1}",
                "Accept-Encoding": "identity",  # compressed, the bytes would not be those of the range
            }
            try:
                with http_stream_backoff(
                    "GET",
                    url,
                    headers=headers,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    base_wait_time=FIRST_WAIT,
                    retry_on_exceptions=(),
                    retry_on_status_codes=_RETRIED_STATUS,
                ) as response:
                    hf_raise_for_status(response)
                    if response.status_code == 200 and (offset + done, end) != (0, self.files[name].size):
                        self.serves_ranges = False
                        break
                    _check_content_range(response, offset + done, self.files[name].size, place)
                    for chunk in response.iter_raw():
                        self._raise_if_stopped()
                        if done + len(chunk) > len(buffer):
                            raise FetchError(f"{place}: the server sent more than the bytes that were asked for")
                        buffer[done : done + len(chunk)] = chunk
                        done += len(chunk)
            except HfHubHTTPError as error:
                raise FetchError(f"{place} cannot be read: {_explained(error)}") from error
            except OfflineModeIsEnabled as error:
                raise FetchError(f"{place} is not in the cache, and HF_HUB_OFFLINE is set") from error
            except HTTPError as error:
                problem = str(error) or type(error).__name__
            with self._lock:
                self.fetched_bytes += done - before
            if done < len(buffer):
                failures = 0 if done > before else failures + 1
                if failures > RETRIES:
                    raise FetchError(
                        f"{place}: bytes {offset + done} to {end} could not be fetched in {RETRIES + 1} tries "
                        f"({problem}); check the connection and try again"
                    )
                if failures:
                    self._wait(min(FIRST_WAIT * 2 ** (failures - 1), 8.0))
        if done < len(buffer):
            self._fill_from_whole(name, offset, buffer)

    def _fill_from_whole(self, name: str, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._read_whole(name, offset + done, buffer[done:])
            if not count:
                raise FetchError(f"{self.root / name} ended while it was read")
            done += count

    def stop(self) -> None:
        """Ends transfers that are under way, which then raise."""
        self._stopped.set()

    def _wait(self, seconds: float) -> None:
        self._stopped.wait(seconds)
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise FetchError(f"reading {self.repo_id} was stopped")


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
        name = f"hf://{self.repository.repo_id}@{self.repository.commit}"
        return f"{name}/{self.relative}" if self.relative.parts else name

    @property
    def _key(self) -> str:
        return "/".join(self.relative.parts)

    def is_file(self) -> bool:
        return self._key in self.repository.files

    def is_dir(self) -> bool:
        return self._key in self.repository.children

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["HubPath"]:
        yield from (self / name for name in sorted(self.repository.children[self._key]))

    def resolve(self) -> "HubPath":
        return self

    @property
    def file(self) -> HubFile:
        """What the Hub says of this file."""
        return self.repository.files[self._key]

    def local_copy(self) -> Path | None:
        """The file on this machine, if it is there or small enough to be fetched whole."""
        if self.file.size <= SMALL_FILE:
            return self.repository.fetch_whole(self._key)
        return self.repository.copy_in_cache(self._key)

    def open(self, mode: str) -> Any:
        """The whole file, fetched into the cache."""
        return open(self.repository.fetch_whole(self._key), mode)

    def read_bytes(self) -> bytes:
        """The whole file, fetched into the cache."""
        return self.repository.fetch_whole(self._key).read_bytes()


SourcePath = Path | HubPath


def size_of(path: SourcePath) -> int:
    """Bytes of a file."""
    return path.file.size if isinstance(path, HubPath) else path.stat().st_size


def fetch_now(path: SourcePath) -> None:
    """Fetches a file on the Hub whole, so that it is read from the cache."""
    if isinstance(path, HubPath):
        path.repository.fetch_whole(str(path.relative))


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
    path = repository.root
    for name in filter(None, folder.split("/")):
        path = path / name
    if not path.is_dir():
        raise ConversionError(f"{repo_id} has no folder {folder.strip('/')!r} at {repository.revision}")
    return path


def open_repository(repo_id: str, revision: str | None = None) -> HubRepository:
    """The repository at a branch, tag or commit (its main branch by default)."""
    asked = revision or constants.DEFAULT_REVISION
    if constants.is_offline_mode():
        return _cached_repository(repo_id, asked)
    api = HfApi()
    here = f"{repo_id} is no folder here, and on the Hub ({constants.ENDPOINT})"
    wait = time.sleep
    try:
        info = _retried(lambda: api.model_info(repo_id, revision=asked, files_metadata=True), repo_id, wait)
        if info.sha is None:
            raise FetchError(f"{repo_id}: the Hub did not say which commit {asked} is; try again")
        commit = info.sha
        entries: list[Any] = list(info.siblings or ())
        if any(entry.size is None for entry in entries):
            tree = _retried(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)), repo_id, wait)
            entries = [entry for entry in tree if isinstance(entry, RepoFile)]
        files = {
            entry.rfilename: HubFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id or "")
            for entry in entries
        }
    except GatedRepoError as error:
        raise ConversionError(
            f"{repo_id} is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{repo_id} has no revision {asked!r}; name a branch, tag or commit of it") from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"{here} no such repository can be seen; check the name, or log in with `hf auth login` or set HF_TOKEN "
            "if it is private"
        ) from error
    except HFValidationError as error:
        raise ConversionError(f"{repo_id} is no folder here and no name of a repository ({error})") from error
    except HfHubHTTPError as error:
        raise FetchError(f"{here} it cannot be read: {_explained(error)}") from error
    except ValueError as error:  # not JSON
        raise FetchError(f"{here} the answer is not the Hub's ({_first_line(error)}); is there a proxy?") from error
    _remember_revision(repo_id, asked, commit)
    return HubRepository(repo_id, asked, commit, files)


def _cached_repository(repo_id: str, revision: str) -> HubRepository:
    """What the cache has of a repository."""
    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    reference = place / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = place / "snapshots" / commit
    if not snapshot.is_dir():
        raise ConversionError(
            f"{repo_id} is no folder here, and its revision {revision!r} is not in the Hub's cache ({place}); "
            "HF_HUB_OFFLINE is set, so nothing is fetched"
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


def _check_cache_space(needed: int) -> None:
    free = cache_free()
    if free is not None and free < needed:
        raise ConversionError(
            f"the Hub's cache {constants.HF_HUB_CACHE} has {size_text(free)} free, {size_text(needed)} are to be "
            "fetched into it; free some space, or set HF_HOME to a place on another disk"
        )


def cache_free() -> int | None:
    """Free bytes where the Hub's cache is or will be; `None` if that cannot be told."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next((path for path in (cache, *cache.parents) if path.is_dir()), None)
    return shutil.disk_usage(there).free if there is not None else None


def _check_content_range(response: Any, start: int, size: int, place: HubPath) -> None:
    if response.status_code == 200:  # the whole file, which was asked for
        return
    got = response.headers.get("Content-Range", "")
    if not re.fullmatch(rf"bytes {start}-\d+/({size}|\*)", got):
        raise FetchError(
            f"{place}: asked for bytes from {start} of {size}, the server sent {shortened(got)}; the file changed, or "
            "a proxy answers for it: try again"
        )


def _retried(call: Callable[[], _Result], what: str, wait: Callable[[float], Any]) -> _Result:
    """The result of a call to the Hub, repeated while the server is busy or the connection fails."""
    for attempt in range(RETRIES + 1):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _RETRIED_STATUS:
                raise
            problem = _explained(error)
        except OfflineModeIsEnabled as error:
            raise FetchError(f"{what} is not in the cache, and HF_HUB_OFFLINE is set") from error
        except LocalEntryNotFoundError as error:  # what hf_hub_download makes of a server that does not answer
            problem = _first_line(error.__cause__ or error)
        except HTTPError as error:
            problem = str(error) or type(error).__name__
        if attempt < RETRIES:
            wait(min(FIRST_WAIT * 2**attempt, 8.0))
    raise FetchError(f"{what}: the Hub ({constants.ENDPOINT}) cannot be reached ({problem}); try again later")


def _explained(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return "access is gated; ask for it on the repository's page, then log in with `hf auth login` or set HF_TOKEN"
    if status in (401, 403):
        return f"access is refused (status {status}); log in with `hf auth login` or set HF_TOKEN"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
