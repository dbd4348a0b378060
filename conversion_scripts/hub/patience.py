"""Waiting for the Hub: every wait has an end, is shown if it is long, and stops when the conversion is stopped."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import parse_ratelimit_headers

from ...support.errors import FetchError, size_text
from ...support.printable import printable

RETRIES = 5
FIRST_WAIT = 1.0  # seconds before the first retry; doubles up to 8
MOST_ASKED = 300  # seconds; what the Hub counts requests over, so the longest that it has a reason to ask for
SHOWN_FROM = 5  # seconds
ANSWER_WITHIN = 120  # seconds, for calls that bring no file
LOOK_EVERY = 0.2  # seconds
GRACE = 1.0  # seconds for a call that is given up to tidy up
BUSY = (408, 429, 500, 502, 503, 504)

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Pace:
    """Whether bytes arrive fast enough.

    Args:
        received: How many have arrived so far.
        enough: How many must arrive in every `seconds`, by default `ANSWER_WITHIN`.
    """

    def __init__(self, received: Callable[[], int] = lambda: 0, enough: int = 1, seconds: float | None = None):
        self._received = received
        self._enough = enough
        self._seconds = ANSWER_WITHIN if seconds is None else seconds
        self.restart()

    def restart(self) -> None:
        """Counts from now on."""
        self._last, self._since = self._received(), time.monotonic()

    def check(self, what: str) -> None:
        """Raises `FetchError` if too few bytes of `what` arrived."""
        now, count = time.monotonic(), self._received()
        if count - self._last >= self._enough:
            self._last, self._since = count, now
        elif now - self._since > self._seconds:
            arrived = size_text(count - self._last) if self._enough > 1 else "nothing"
            raise FetchError(
                f"{what}: {arrived} arrived in {time_text(self._seconds)}; the Hub ({constants.ENDPOINT}) does not "
                "answer, or the connection is too slow: check it, then run the same command again"
            )


class Patience:
    """The calls to the Hub of one conversion; `stop()` ends all of them, in whichever thread they wait."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._changing = threading.Lock()
        self._busy_until = 0.0

    def stop(self) -> None:
        """Ends calls and pauses that are under way, which then raise."""
        self._stopped.set()

    def raise_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise FetchError("reading from the Hub was stopped")

    def call(self, function: Callable[[], _Result], what: str, pace: Pace | None = None) -> _Result:
        """The result of a call that may block for any time, given up when the pace is too slow or all is stopped.

        It runs in a thread that nobody waits for at the end of the process.
        """
        pace = pace or Pace()
        if self._busy_until > time.monotonic():
            self._sleep_until(self._busy_until)
            pace.restart()
        outcome: list[Callable[[], _Result]] = []

        def work() -> None:
            try:
                result = function()
                outcome.append(lambda: result)
            except BaseException as error:
                outcome.append(_raising(error))

        thread = threading.Thread(target=work, name="hub", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(LOOK_EVERY)
                self.raise_if_stopped()
                if thread.is_alive():
                    pace.check(what)
        except BaseException:
            self.stop()
            thread.join(GRACE)
            raise
        return outcome[0]()

    def retried(self, function: Callable[[], _Result], what: str, pace: Pace | None = None) -> _Result:
        """The result of a call, repeated from its start while the Hub is busy or the connection fails.

        Raises:
            FetchError: if that does not end, or the Hub asks for a longer wait than `MOST_ASKED`.
            HfHubHTTPError: if the Hub refuses.
        """
        for attempt in range(RETRIES + 1):
            asked = None
            try:
                return self.call(function, what, pace)
            except HfHubHTTPError as error:
                if error.response.status_code not in BUSY:
                    raise
                problem, asked = explained(error), asked_wait(error)
            except OfflineModeIsEnabled as error:
                raise FetchError(f"{what} is not in the cache, and HF_HUB_OFFLINE is set") from error
            except LocalEntryNotFoundError as error:  # what hf_hub_download makes of a server that does not answer
                problem = first_line(error.__cause__ or error)
            except HTTPError as error:
                problem = first_line(error)
            if attempt < RETRIES:
                self.pause(attempt + 1, problem, asked, what)
        raise FetchError(
            f"{what}: the Hub ({constants.ENDPOINT}) cannot be reached ({problem}); run the same command again later"
        )

    def pause(self, attempt: int, problem: str, asked: float | None, what: str) -> None:
        """Waits before the next try. If the server asks for it, all calls wait, the next one of this thread too.

        Args:
            attempt: The number of tries so far.
            problem: Why the last one failed.
            asked: Seconds that the server asks for, if it does.
            what: What is fetched.
        """
        seconds = max(min(FIRST_WAIT * 2 ** (attempt - 1), 8.0), asked or 0.0)
        if seconds > MOST_ASKED:
            raise FetchError(
                f"{what}: the Hub ({constants.ENDPOINT}) is busy and asks to wait {time_text(seconds)} ({problem}); "
                "run the same command again then"
            )
        end = time.monotonic() + seconds
        with self._changing:
            is_known = asked is not None and end < self._busy_until + 1  # another call was told the same
            self._busy_until = max(self._busy_until, end if asked is not None else 0.0)
        if seconds >= SHOWN_FROM and not is_known:
            logger.warning("%s: %s; waiting %s", printable(what), printable(problem), time_text(seconds))
        if asked is None:
            self._sleep_until(end)

    def _sleep_until(self, end: float) -> None:
        self._stopped.wait(max(end - time.monotonic(), 0.0))
        self.raise_if_stopped()


def _raising(error: BaseException) -> Callable[[], Any]:
    def throw() -> Any:
        raise error

    return throw


def asked_wait(error: HfHubHTTPError) -> float | None:
    """Seconds that a busy server asks to wait (`Retry-After`, or the Hub's `RateLimit`); `None` if it does not."""
    headers: Mapping[str, str] = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # no date either
        return max((parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    return None


def explained(error: HfHubHTTPError) -> str:
    """Why the Hub refused."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return "access is gated; ask for it on the repository's page, then log in with `hf auth login` or set HF_TOKEN"
    if status in (401, 403):
        return f"access is refused (status {status}); log in with `hf auth login` or set HF_TOKEN"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def time_text(seconds: float) -> str:
    """A duration in words: `40 s`, `7 min`, `2.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
