"""What a conversion of a checkpoint on the Hub fetches: which files, how much of each, how long that takes."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import constants

from ...support.errors import size_text
from .byte_range import Span, bytes_by_file
from .hub_path import HubPath, relative_name
from .patience import time_text
from .repository import HubRepository, cache_free

WHOLE_FROM = 0.9  # share of a file's bytes that are wanted from which "auto" fetches all of it
ASSUMED_RATE = 20 * 10**6  # bytes per second, where too little is fetched for a measurement
PROBE = 4 * 2**20
PROBE_FROM = 256 * 2**20  # bytes to be fetched from which measuring the rate first is worth it


@dataclass(frozen=True)
class PlannedFile:
    """A file of the checkpoint.

    Args:
        size: Its bytes.
        wanted: How many of them hold weights that are kept.
        how: `"ranges"`; `"whole"`, into the Hub's cache; `"cached"`, there already; or `"left"`, not fetched.
    """

    name: str
    size: int
    wanted: int
    how: str

    @property
    def fetched(self) -> int:
        """Bytes that will come over the network."""
        return {"ranges": self.wanted, "whole": self.size}.get(self.how, 0)


@dataclass(frozen=True)
class FetchPlan:
    """What will be fetched, before it is.

    Args:
        rate: Bytes per second, for the guess of the time.
        measured: Whether the rate was measured just now; else it is an assumption.
    """

    repository: HubRepository
    folder: str
    files: list[PlannedFile]
    rate: float
    measured: bool

    @property
    def fetched(self) -> int:
        return sum(file.fetched for file in self.files)

    @property
    def into_cache(self) -> int:
        return sum(file.size for file in self.files if file.how == "whole")

    @property
    def seconds(self) -> float:
        return self.fetched / self.rate

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "repo_id": self.repository.repo_id,
            "revision": self.repository.revision,
            "commit": self.repository.commit,
            "folder": self.folder,
            "bytes_fetched": self.fetched,
            "bytes_into_cache": self.into_cache,
            "cache": constants.HF_HUB_CACHE,
            "cache_free": cache_free(),
            "seconds": round(self.seconds, 1),
            "bytes_per_second": round(self.rate),
            "rate_is_measured": self.measured,
            "files": [{**asdict(file), "fetched": file.fetched} for file in self.files],
        }

    def summary(self) -> str:
        """The plan in a few lines for people."""
        repository = self.repository
        total = sum(file.size for file in self.files)
        lines = [
            f"{repository.repo_id} at {repository.revision} (commit {repository.commit[:12]})"
            f"{f', {self.folder}' if self.folder != '.' else ''}: fetches {size_text(self.fetched)} of "
            f"{size_text(total)}"
        ]
        words = {
            "ranges": "in part, only byte ranges that hold weights",
            "whole": f"whole, into the Hub's cache ({constants.HF_HUB_CACHE})",
            "cached": "not at all: already in the Hub's cache",
            "left": "not at all: no weights that are kept",
        }
        for how, text in words.items():
            files = [file for file in self.files if file.how == how]
            if files:
                of = size_text(sum(file.size for file in files))
                amount = f"{size_text(sum(file.fetched for file in files))} of {of}" if how == "ranges" else of
                lines.append(f"  {len(files)} file{'s' if len(files) > 1 else ''} {text} ({amount})")
        if self.into_cache:
            free = cache_free()
            lines.append(
                f"  the cache needs {size_text(self.into_cache)}{f', {size_text(free)} free' if free else ''}"
            )
        if self.fetched:
            source = "as measured just now" if self.measured else "an assumption"
            lines.append(f"  about {time_text(self.seconds)} at {size_text(round(self.rate))}/s, {source}")
        return "\n".join(lines)


def plan_fetch(folder: HubPath, files: Sequence[HubPath], spans: Sequence[Span], how: str = "auto") -> FetchPlan:
    """Decides how each file is fetched, and measures the rate if much is to be fetched.

    Args:
        folder: The checkpoint.
        files: Its files.
        spans: What will be read of them; the first one is where the rate is measured.
        how: `"ranges"` fetches nothing but the spans; `"files"` fetches the files that hold them; `"auto"` fetches a
            file whole if `WHOLE_FROM` of it is wanted and the cache has room for it.
    """
    repository = folder.repository
    wanted = bytes_by_file(spans)
    room = cache_free() or 0
    planned = []
    for path in sorted(files, key=str):
        size, part = path.file.size, wanted.get(path, 0)
        if repository.copy_in_cache(path.key) is not None:
            kind = "cached"
        elif not part:
            kind = "left"
        elif how == "files" or not repository.serves_ranges:
            kind = "whole"
        elif how == "auto" and part >= WHOLE_FROM * size and size < room:
            kind = "whole"
            room -= size
        else:
            kind = "ranges"
        planned.append(PlannedFile(relative_name(path, folder), size, part, kind))
    rate, measured = float(ASSUMED_RATE), False
    if sum(file.fetched for file in planned) >= PROBE_FROM and repository.serves_ranges:
        kinds = {file.name: file.how for file in planned}
        span = next(span for span in spans if kinds[relative_name(span.path, folder)] in ("ranges", "whole"))
        rate, measured = _measured_rate(span), True
    return FetchPlan(repository, str(folder.relative), planned, rate, measured)


def _measured_rate(span: Span) -> float:
    """Bytes per second of one short transfer, which is kept for the read that comes first."""
    assert isinstance(span.path, HubPath)
    length = min(PROBE, span.length)
    started = time.monotonic()
    span.path.repository.keep(span.path.key, span.start, length)
    return max(length / max(time.monotonic() - started, 1e-6), 1.0)
