"""Work of many callers, done together by one thread."""

import contextlib
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

# A batch gives way to others after so many seconds, if it has not ended.
_TURN = 0.1
# A batch of many steps has had so many seconds before another of the kind is begun: fewer, larger batches are faster.
_ALONE = 0.5
# Works of many steps are short up to this share of the tokens of a batch.
_SHORT = 1 / 8
# Batches of many steps that are under way have so many times the tokens of one batch at most, by their kind. Half of
# that is the most that one caller has.
_UNDER_WAY = {"short": 2, "long": 4}

Results = list[tuple[int, Any]]  # of some of a batch's works, by their places in it
Compute = Callable[[Hashable, list[Any], Callable[[int], bool]], Generator[Results, None, None]]


class QueueFullError(Exception):
    """More work waits than is allowed; it may be tried again later."""


class ClosedError(Exception):
    """No more work is taken."""


@dataclass(eq=False)
class _Caller:
    """Whose works were submitted together, and when the last of these was begun, or they were submitted."""

    turn: int


@dataclass(eq=False)
class Work:
    """Something to be done.

    Args:
        key: only work of equal keys is done together.
        payload: what is done.
        tokens: how long it is; in a batch all are as long as the longest.
        has_steps: whether it takes many steps, so that others should have their turn between them.

    `caller` is who submitted it.
    """

    key: Hashable
    payload: Any
    tokens: int
    has_steps: bool = False
    future: "Future[Any]" = field(default_factory=Future)
    given_up: threading.Event = field(default_factory=threading.Event)
    caller: _Caller = field(default_factory=lambda: _Caller(0), init=False)

    @property
    def is_wanted(self) -> bool:
        """Whether it is still to be done."""
        return not self.given_up.is_set() and not self.future.done()

    def give_up(self) -> None:
        """Nobody wants the result any more: it is not begun, or ends with the step that is computed now."""
        self.given_up.set()
        self.future.cancel()


class _Batch:
    """Works that are done together, and how far they are."""

    def __init__(self, kind: str, works: Sequence[Work], steps: Generator[None, None, None]):
        self.kind, self.works, self.steps = kind, works, steps
        self.seconds = 0.0  # that it has had

    def tokens(self) -> Counter[_Caller]:
        """Of what is still to be done, by caller."""
        longest = max(work.tokens for work in self.works)
        found = Counter[_Caller]()
        for work in self.works:
            if work.is_wanted:
                found[work.caller] += longest
        return found


class Batcher:
    """A queue, and a thread that does as much of it at once as fits: the next work, and what goes with it.

    Next is the oldest work of the caller who has waited longest since a work of theirs was begun. While a batch is
    computed, others wait and become the next one; nobody waits for a batch to fill. If a batch fails, its works are
    done one after another, so that one cannot spoil another.

    Batches of many steps take turns with each other and with all else, so that a long one keeps nobody waiting. Short
    and long works of many steps are not in one batch, and each kind has room of its own; where there is none for a
    work, those of its kind behind it wait too, unless its caller alone has too much under way.

    Args:
        compute: key, payloads, and whether the one at a place is still wanted -> a generator that stops between steps,
            and gives at each stop the results that are there: places and results.
        most_waiting: works in the queue.
        most_tokens: of a batch, shorter ones filled up; a longer work is done alone.
        on_batch: called with the number of works of each batch.
    """

    def __init__(
        self,
        compute: Compute,
        most_waiting: int,
        most_tokens: int,
        on_batch: Callable[[int], Any] = lambda works: None,
    ):
        self._compute, self._on_batch = compute, on_batch
        self._most_waiting, self._most_tokens = most_waiting, most_tokens
        self._waiting: deque[Work] = deque()
        self._under_way: deque[_Batch] = deque()
        self._changed = threading.Condition()
        self._turns = itertools.count()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many works are in the queue."""
        with self._changed:
            return len(self._wanted_ones())

    def submit(self, works: Sequence[Work]) -> None:
        """Queue all of these, or none. They are of one caller.

        Raises:
            QueueFullError: if they do not fit.
            ClosedError: after `close`.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError("no more work is taken")
            waiting = self._wanted_ones()
            if len(waiting) + len(works) > self._most_waiting:
                raise QueueFullError(f"{len(waiting)} wait already, and at most {self._most_waiting} can")
            caller = _Caller(next(self._turns))
            for work in works:
                work.caller = caller
            waiting.extend(works)
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

    def _wanted_ones(self) -> deque[Work]:
        """The queue, without what nobody wants any more."""
        if not all(work.is_wanted for work in self._waiting):
            self._waiting = deque(work for work in self._waiting if work.is_wanted)
        return self._waiting

    def _next_works(self) -> list[Work]:
        """The next work that may begin now, and what goes with it; they no longer wait."""
        room = _Room(self._under_way, self._most_tokens)
        works: list[Work] = []
        later = deque[Work]()
        kind, longest, blocked = "", 0, set[str]()
        for work in sorted(self._wanted_ones(), key=lambda work: work.caller.turn):
            own, high = self._kind(work), max(longest, work.tokens)
            if not room.has_share(own, work):
                fits = False
            elif works:
                fits = (own, work.key) == (kind, works[0].key) and (len(works) + 1) * high <= room.of_a_batch(kind)
            else:
                fits = own not in blocked and room.may_begin(own, work)
                if not fits:
                    blocked.add(own)
            if fits:
                works.append(work)
                kind, longest = own, high
            else:
                later.append(work)
        self._waiting = later
        for work in works:
            work.caller.turn = next(self._turns)
        return works

    def _kind(self, work: Work) -> str:
        if not work.has_steps:
            return "of one step"
        return "short" if work.tokens <= _SHORT * self._most_tokens else "long"

    def _begin(self, works: Sequence[Work]) -> None:
        """Do works of one step; put others beside those that take turns."""
        self._on_batch(len(works))
        steps = _done(self._compute, works)
        if works[0].has_steps:
            self._under_way.append(_Batch(self._kind(works[0]), works, steps))
        else:
            for _ in steps:
                pass

    def _take_turn(self) -> None:
        """Steps of the batch that has waited longest, as long as nobody else waits, or for the time of its turn."""
        batch = self._under_way.popleft()
        start = time.monotonic()
        for _ in batch.steps:
            if (self._waiting or self._under_way) and time.monotonic() - start > _TURN:
                batch.seconds += time.monotonic() - start
                self._under_way.append(batch)
                return


class _Room:
    """What may be begun beside the batches that are under way."""

    def __init__(self, under_way: Sequence[_Batch], most_tokens: int):
        self._most_tokens = most_tokens
        self._tokens = dict.fromkeys(_UNDER_WAY, 0)
        self._of_callers: dict[str, Counter[_Caller]] = {kind: Counter() for kind in _UNDER_WAY}
        self._have_young = {batch.kind for batch in under_way if batch.seconds < _ALONE}
        for batch in under_way:
            tokens = batch.tokens()
            self._tokens[batch.kind] += tokens.total()
            self._of_callers[batch.kind].update(tokens)

    def has_share(self, kind: str, work: Work) -> bool:
        """Whether its caller may have another work under way; one in any case."""
        own = self._of_callers[kind][work.caller] if kind in _UNDER_WAY else 0
        return not own or own + max(work.tokens, self._most_tokens) <= _UNDER_WAY[kind] * self._most_tokens / 2

    def may_begin(self, kind: str, work: Work) -> bool:
        """Whether there is room for it; there is if nothing of its kind is under way."""
        if not self._tokens.get(kind):
            return True
        return kind not in self._have_young and work.tokens <= self.of_a_batch(kind)

    def of_a_batch(self, kind: str) -> int:
        """Most tokens of a batch that is begun now."""
        if kind not in _UNDER_WAY:
            return self._most_tokens
        return min(self._most_tokens, _UNDER_WAY[kind] * self._most_tokens - self._tokens[kind])


def _done(compute: Compute, works: Sequence[Work]) -> Generator[None, None, None]:
    """Do works together, or one after another if that fails; stops between steps. Each gets its result or error."""
    failed: Exception | None = None
    try:
        steps = compute(works[0].key, [work.payload for work in works], lambda place: works[place].is_wanted)
        with contextlib.closing(steps):
            while any(work.is_wanted for work in works):
                for place, result in next(steps):
                    works[place].future.set_result(result)
                yield
    except StopIteration:
        failed = RuntimeError(f"there is no result of {works[0].key}")
    except Exception as error:  # it is the caller's, whatever it is
        failed = error
    if failed is None:
        return
    if len(works) > 1:
        for work in works:
            if work.is_wanted:
                yield from _done(compute, [work])
    elif works[0].is_wanted:
        works[0].future.set_exception(failed)
