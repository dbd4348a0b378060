"""Bytes of the files of a Hugging Face Hub repository at one commit.

Small files, and files that are wanted as a whole, come through the Hub's cache (`hf_hub_download`); of others only the
byte ranges that are asked for are fetched, into memory. Both go through huggingface_hub: its endpoint, token, session
and offline mode.
"""

import hashlib
import re
import shutil
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import get_hf_file_metadata
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from tqdm import tqdm

from ...support.errors import ConversionError, FetchError, shortened, size_text
from .patience import BUSY, RETRIES, Pace, Patience, asked_wait, explained, first_line

SMALL_FILE = 64 * 2**10  # up to here a file is fetched whole
HASHED_FILE = 128 * 2**20  # up to here a file that was fetched whole is compared with its hash in the listing
BLOCK = 8 * 2**10  # fetched at once where headers and directories of archives are read
BLOCKS_KEPT = 64
PART = 16 * 2**20  # larger reads are cut into parts that are fetched side by side
PARALLEL_PARTS = 4
FEWEST_BYTES = 64 * 2**10  # of a range that must arrive in `SLOWEST_RANGE` seconds, if there are so many left
SLOWEST_RANGE = 120
SLOWEST_FILE = 900  # seconds; huggingface_hub reports every 10 MB of a whole file


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
        self._patience = Patience()
        self._copies: dict[str, Path] = {}
        self._checked: set[str] = set()
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def place(self, name: str = "") -> str:
        """`hf://ORG/NAME@COMMIT/PATH`, which can be given as a source again."""
        place = f"hf://{self.repo_id}@{self.commit}"
        return f"{place}/{name}" if name else place

    def stop(self) -> None:
        """Ends transfers that are under way, which then raise."""
        self._patience.stop()

    def copy_in_cache(self, name: str) -> Path | None:
        """The file in the Hub's cache, if it is there."""
        if name not in self._copies:
            found = try_to_load_from_cache(self.repo_id, name, revision=self.commit)
            if not isinstance(found, str):
                return None
            self._copies[name] = self._right_size(name, Path(found))
        return self._copies[name]

    def local_copy(self, name: str) -> Path | None:
        """The file on this machine, if it is there or small enough to be fetched whole."""
        return self.fetch_whole(name) if self.files[name].size <= SMALL_FILE else self.copy_in_cache(name)

    def fetch_whole(self, name: str, progress: bool = False) -> Path:
        """The file in the Hub's cache, fetched if need be."""
        path = self.copy_in_cache(name)
        if path is not None:
            return path
        if not self.offline:
            _check_cache_space(self.files[name].size)
        bar, pace = self._measured_bar(progress)

        def download() -> str:
            return hf_hub_download(self.repo_id, name, revision=self.commit, tqdm_class=bar)

        try:
            found = self._patience.retried(download, self.place(name), pace)
        except HfHubHTTPError as error:
            raise FetchError(f"{self.place(name)} cannot be read: {explained(error)}") from error
        self._copies[name] = self._right_content(name, self._right_size(name, Path(found)))
        return self._copies[name]

    def _measured_bar(self, shown: bool) -> tuple[type[tqdm], Pace]:
        """A class of bars for huggingface_hub, which also stop a transfer, and the pace of what they count."""
        patience, received = self._patience, [0]

        class Bar(tqdm):
            def __init__(self, *values: Any, **named: Any):
                super().__init__(*values, **{**named, "disable": not shown})

            def update(self, n: float | None = 1) -> bool | None:
                patience.raise_if_stopped()
                received[0] += int(n or 0)
                return super().update(n)

        return Bar, Pace(lambda: received[0], seconds=SLOWEST_FILE)

    def _right_size(self, name: str, path: Path) -> Path:
        if path.stat().st_size != self.files[name].size:
            raise FetchError(
                f"{path} has {path.stat().st_size} bytes, on the Hub it has {self.files[name].size}; delete it from "
                "the cache and try again"
            )
        return path

    def _right_content(self, name: str, path: Path) -> Path:
        identity, size = self.files[name].identity, self.files[name].size
        if size <= HASHED_FILE and identity not in _hashes(path.read_bytes(), len(identity)):
            raise FetchError(
                f"{path} does not have the hash that the Hub lists for it ({shortened(identity)}); delete it from the "
                "cache and try again"
            )
        return path

    def read_into(self, name: str, offset: int, buffer: memoryview, limits: tuple[int, int]) -> int:
        """Reads from `offset` of a file, fetching nothing outside `limits`; returns how many bytes.

        What is asked for in small pieces is fetched in blocks, of which the last few are kept.
        """
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
                f"{self.place(name)}: the server does not send parts of files, and all of it "
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
                self.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _check_file(self, name: str) -> None:
        """Once per file: the Hub still describes it as it did in the listing."""
        if name in self._checked:
            return
        place, url = self.place(name), hf_hub_url(self.repo_id, name, revision=self.commit)
        try:
            found = self._patience.retried(lambda: get_hf_file_metadata(url), place)
        except HfHubHTTPError as error:
            raise FetchError(f"{place} cannot be read: {explained(error)}") from error
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
        place = self.place(name)
        transfer = _Transfer(self, name, offset, buffer)
        pace = Pace(lambda: transfer.done, FEWEST_BYTES, SLOWEST_RANGE)
        empty = short = 0  # tries in a row that brought nothing, and that brought little
        while transfer.done < len(buffer) and self.serves_ranges:
            before = transfer.done
            problem, asked = "the connection was closed early", None
            try:
                self._patience.call(transfer.run, place, pace)
            except HfHubHTTPError as error:
                problem, asked = explained(error), asked_wait(error)
                if error.response.status_code not in BUSY:
                    raise FetchError(f"{place} cannot be read: {problem}") from error
            except OfflineModeIsEnabled as error:
                raise FetchError(f"{place} is not in the cache, and HF_HUB_OFFLINE is set") from error
            except HTTPError as error:
                problem = first_line(error)
            arrived = transfer.done - before
            with self._lock:
                self.fetched_bytes += arrived
            if transfer.done == len(buffer) or not self.serves_ranges:
                break
            empty = 0 if arrived else empty + 1
            short = 0 if arrived >= FEWEST_BYTES else short + 1
            if empty > RETRIES:
                raise FetchError(
                    f"{place}: bytes {offset + transfer.done} to {offset + len(buffer)} could not be fetched in "
                    f"{RETRIES + 1} tries ({problem}); check the connection and try again"
                )
            pace.check(place)
            if short:
                self._patience.pause(short, problem, asked, place)
        while transfer.done < len(buffer):
            count = self._read_whole(name, offset + transfer.done, buffer[transfer.done :])
            if not count:
                raise FetchError(f"{place} ended while it was read")
            transfer.done += count


class _Transfer:
    """A range of a file on its way into a buffer; `done` bytes of it are there."""

    def __init__(self, repository: HubRepository, name: str, offset: int, buffer: memoryview):
        self.repository = repository
        self.name = name
        self.offset = offset
        self.buffer = buffer
        self.done = 0

    def run(self) -> None:
        """Asks for what is missing, once; whatever arrives is kept."""
        repository, size = self.repository, self.repository.files[self.name].size
        place = repository.place(self.name)
        start, end = self.offset + self.done, self.offset + len(self.buffer)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",  # compressed, the bytes would not be those of the range
        }
        with http_stream_backoff(
            "GET",
            hf_hub_url(repository.repo_id, self.name, revision=repository.commit),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            retry_on_status_codes=(),
        ) as response:
            hf_raise_for_status(response)
            if response.status_code == 200 and (start, end) != (0, size):
                repository.serves_ranges = False
                return
            _check_content_range(response, start, size, place)
            for chunk in response.iter_raw():
                repository._patience.raise_if_stopped()
                if self.done + len(chunk) > len(self.buffer):
                    raise FetchError(f"{place}: the server sent more than the bytes that were asked for")
                self.buffer[self.done : self.done + len(chunk)] = chunk
                self.done += len(chunk)


def _hashes(data: bytes, digits: int) -> tuple[str, ...]:
    """What the identity of a file with these bytes may be, if it has so many digits."""
    if digits == 64:
        return (hashlib.sha256(data).hexdigest(),)
    if digits == 40:
        return (hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest(),)
    return ()


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


def _check_content_range(response: Any, start: int, size: int, place: str) -> None:
    if response.status_code == 200:  # the whole file, which was asked for
        return
    got = response.headers.get("Content-Range", "")
    if not re.fullmatch(rf"bytes {start}-\d+/({size}|\*)", got):
        raise FetchError(
            f"{place}: asked for bytes from {start} of {size}, the server sent {shortened(got)}; the file changed, or "
            "a proxy answers for it: try again"
        )
