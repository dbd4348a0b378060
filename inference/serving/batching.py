"""Work of many callers, done together by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

# A batch gives way to others after so many seconds, if it has not ended.
_TURN = 0.1
# A batch of many steps has had so many seconds before another of the kind is begun: fewer, larger batches are faster.
_ALONE = 2.0
# Batches of many steps that are under way have so many times the tokens of one batch at most.
_UNDER_WAY = 4


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
        has_steps: whether it takes many steps, so that others should have their turn between them.
    """

    key: Hashable
    payload: Any
    tokens: int
    has_steps: bool = False
    future: "Future[Any]" = field(default_factory=Future, compare=False)
    given_up: threading.Event = field(default_factory=threading.Event, compare=False)

    def give_up(self) -> None:
        """Nobody wants the result any more: it is not begun, or ends with the step that is computed now."""
        self.given_up.set()
        self.future.cancel()


class _Batch:
    """Works that are done together, and how far they are."""

    def __init__(self, works: Sequence[Work], steps: Generator[None, None, Sequence[Any]]):
        self.works, self.steps = works, steps
        self.tokens = len(works) * max(work.tokens for work in works)
        self.seconds = 0.0  # that it has had


class Batcher:
    """A queue, and a thread that does as much of it at once as fits: the oldest work, and what goes with it.

    While a batch is computed, others wait and become the next one; nobody waits for a batch to fill. Batches of many
    steps take turns with each other and with all else, so that a long one keeps nobody waiting. If a batch fails, each
    of its works is done alone, so that one cannot spoil another.

    Args:
        compute: key and payloads -> a generator that stops between steps, and returns a result of each.
        most_waiting: works in the queue.
        most_tokens: of a batch, shorter ones filled up; a longer work is done alone.
        on_batch: called with the number of works of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Hashable, list[Any]], Generator[None, None, Sequence[Any]]],
        most_waiting: int,
        most_tokens: int,
        on_batch: Callable[[int], Any] = lambda works: None,
    ):
        self._compute, self._on_batch = compute, on_batch
        self._most_waiting, self._most_tokens = most_waiting, most_tokens
        self._waiting: deque[Work] = deque()
        self._under_way: deque[_Batch] = deque()
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
                self._changed.wait_for(lambda: self._waiting or self._under_way or self._is_closed)
                if not self._waiting and not self._under_way:
                    return
                works = self._next_works()
            works = [work for work in works if work.future.set_running_or_notify_cancel()]  # some callers went away
            if works:
                self._begin(works)
            if self._under_way:
                self._take_turn()

    def _next_works(self) -> list[Work]:
        """The oldest work that may begin now, and what goes with it; they no longer wait."""
        works: list[Work] = []
        later = deque[Work]()
        longest = 0
        for work in self._waiting:
            high = max(longest, work.tokens)
            if self._may_begin(work) if not works else self._fits(work, works[0].key, len(works) + 1, high):
                works.append(work)
                longest = high
            else:
                later.append(work)
        self._waiting = later
        return works

    def _fits(self, work: Work, key: Hashable, number: int, longest: int) -> bool:
        return work.key == key and number * longest <= self._most_tokens

    def _may_begin(self, work: Work) -> bool:
        if not work.has_steps or not self._under_way:
            return True
        tokens = sum(batch.tokens for batch in self._under_way)
        are_old = all(batch.seconds >= _ALONE for batch in self._under_way)
        return are_old and tokens + max(work.tokens, self._most_tokens) <= _UNDER_WAY * self._most_tokens

    def _begin(self, works: Sequence[Work]) -> None:
        """Do works of one step; put others beside those that take turns."""
        self._on_batch(len(works))
        batch = _Batch(works, self._compute(works[0].key, [work.payload for work in works]))
        if works[0].has_steps:
            self._under_way.append(batch)
        else:
            while not self._has_ended(batch):
                pass

    def _take_turn(self) -> None:
        """Steps of the batch that has waited longest, as long as nobody else waits, or for the time of its turn."""
        batch = self._under_way.popleft()
        start = time.monotonic()
        while not (has_ended := self._has_ended(batch)):
            if (self._waiting or self._under_way) and time.monotonic() - start > _TURN:
                break
        batch.seconds += time.monotonic() - start
        if not has_ended:
            self._under_way.append(batch)

    def _has_ended(self, batch: _Batch) -> bool:
        """Whether this step of it was the last."""
        if all(work.given_up.is_set() for work in batch.works):
            batch.steps.close()
            return True
        try:
            next(batch.steps)
            return False
        except StopIteration as end:
            for work, result in zip(batch.works, end.value, strict=True):
                work.future.set_result(result)
        except Exception as error:  # it is the caller's, whatever it is
            if len(batch.works) == 1:
                batch.works[0].future.set_exception(error)
            else:
                for work in batch.works:
                    self._begin([work])
        return True
