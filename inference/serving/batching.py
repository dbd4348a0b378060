"""Work of many callers, done together by one thread."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


class QueueFullError(Exception):
    """More work waits than is allowed; it may be tried again later."""


class ClosedError(Exception):
    """No more work is taken."""


@dataclass(frozen=True)
class Work:
    """Something to be done.

    Args:
        key: only work of equal keys is done together.
        payload: what is done.
        tokens: how long it is; in a batch all are as long as the longest.
    """

    key: Hashable
    payload: Any
    tokens: int
    future: "Future[Any]" = field(default_factory=Future, compare=False)


class Batcher:
    """A queue, and a thread that does as much of it at once as fits: the oldest work, and what goes with it.

    While a batch is computed, others wait and become the next one; nobody waits for a batch to fill. If a batch fails,
    each of its works is done alone, so that one cannot spoil another.

    Args:
        compute: key and payloads -> a result of each.
        most_waiting: works in the queue.
        most_tokens: of a batch, shorter ones filled up; a longer work is done alone.
        on_batch: called with the number of works of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Hashable, list[Any]], Sequence[Any]],
        most_waiting: int,
        most_tokens: int,
        on_batch: Callable[[int], Any] = lambda works: None,
    ):
        self._compute, self._on_batch = compute, on_batch
        self._most_waiting, self._most_tokens = most_waiting, most_tokens
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many works are in the queue."""
        return len(self._waiting)

    def submit(self, works: Sequence[Work]) -> None:
        """Queue all of these, or none.

        Raises:
            QueueFullError: if they do not fit.
            ClosedError: after `close`.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError("no more work is taken")
            if len(self._waiting) + len(works) > self._most_waiting:
                raise QueueFullError(f"{len(self._waiting)} wait already, and at most {self._most_waiting} can")
            self._waiting.extend(works)
            self._changed.notify()

    def close(self) -> None:
        """Take no more work, finish what waits, and return when that is done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                batch = self._next_batch()
            batch = [work for work in batch if work.future.set_running_or_notify_cancel()]  # some callers went away
            if batch:
                self._do(batch)

    def _next_batch(self) -> list[Work]:
        batch, later = [self._waiting.popleft()], deque[Work]()
        longest = batch[0].tokens
        for work in self._waiting:
            high = max(longest, work.tokens)
            if work.key == batch[0].key and (len(batch) + 1) * high <= self._most_tokens:
                batch.append(work)
                longest = high
            else:
                later.append(work)
        self._waiting = later
        return batch

    def _do(self, batch: Sequence[Work]) -> None:
        self._on_batch(len(batch))
        try:
            results = self._compute(batch[0].key, [work.payload for work in batch])
        except Exception as error:  # it is the caller's, whatever it is
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for work in batch:
                self._do([work])
            return
        for work, result in zip(batch, results, strict=True):
            work.future.set_result(result)
