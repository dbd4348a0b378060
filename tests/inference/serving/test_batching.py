"""Works of many callers: which are done together, and that each gets its own answer."""

import threading
import time
from concurrent.futures import CancelledError

import pytest

from gengram.inference.serving import batching
from gengram.inference.serving.batching import Batcher, ClosedError, QueueFullError, Work


class Gate:
    """Computes lengths of texts when it is opened, and keeps which batches it was given."""

    def __init__(self):
        self.open, self.begun, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, key, payloads, is_wanted):
        self.begun.set()
        assert self.open.wait(30)
        self.batches.append((key, list(payloads)))
        if "bad" in payloads:
            raise ValueError("a bad one")
        yield [(place, len(payload)) for place, payload in enumerate(payloads)]


def held(gate, most_waiting=100, most_tokens=20):
    """A batcher whose thread is busy with a work of its own, so that all else waits."""
    batcher = Batcher(gate, most_waiting, most_tokens)
    batcher.submit([Work("first", "", 1)])
    assert gate.begun.wait(30)
    return batcher


def test_works_of_a_key_that_fit_are_done_together():
    gate = Gate()
    batcher = held(gate)
    works = [Work(key, text, len(text)) for key, text in [("a", "12345"), ("b", "1"), ("a", "123"), ("a", "1234567")]]
    works += [Work("a", "1" * 30, 30)]
    batcher.submit(works)
    assert batcher.waiting == 5
    gate.open.set()
    assert [work.future.result(30) for work in works] == [5, 1, 3, 7, 30]
    batcher.close()
    # 3 works of at most 7 tokens are 21, which is more than 20
    assert gate.batches[1:] == [("a", ["12345", "123"]), ("b", ["1"]), ("a", ["1234567"]), ("a", ["1" * 30])]


def test_a_work_that_fails_does_not_spoil_those_beside_it():
    gate = Gate()
    batcher = held(gate)
    works = [Work("a", text, 1) for text in ("one", "bad", "two!")]
    batcher.submit(works)
    gate.open.set()
    assert works[0].future.result(30) == 3 and works[2].future.result(30) == 4
    with pytest.raises(ValueError, match="a bad one"):
        works[1].future.result(30)
    batcher.close()


def test_what_was_given_up_is_not_done():
    gate = Gate()
    batcher = held(gate)
    given_up, other = Work("a", "1", 1), Work("a", "22", 2)
    batcher.submit([given_up, other])
    assert given_up.future.cancel()
    gate.open.set()
    assert other.future.result(30) == 2
    with pytest.raises(CancelledError):
        given_up.future.result(30)
    batcher.close()
    assert gate.batches[1:] == [("a", ["22"])]


def test_a_queue_takes_all_works_of_a_caller_or_none():
    gate = Gate()
    batcher = held(gate, most_waiting=3)
    batcher.submit([Work("a", "1", 1), Work("a", "1", 1)])
    with pytest.raises(QueueFullError, match="2 wait already, and at most 3 can"):
        batcher.submit([Work("a", "1", 1), Work("a", "1", 1)])
    assert batcher.waiting == 2
    gate.open.set()
    batcher.close()


def test_closing_finishes_what_waits_and_takes_no_more():
    gate = Gate()
    batcher = held(gate)
    work = Work("a", "123", 3)
    batcher.submit([work])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gate.open.set()
    closing.join(30)
    assert work.future.result(0) == 3
    with pytest.raises(ClosedError):
        batcher.submit([Work("a", "1", 1)])


class Steps:
    """Goes on with a payload, an event, until it is set; keeps what was begun, and whether it was closed."""

    def __init__(self):
        self.begun, self.closed, self.left = [], threading.Event(), set()

    def __call__(self, key, payloads, is_wanted):
        self.begun.append((key, list(payloads)))
        places = set(range(len(payloads)))
        try:
            while places:
                self.left |= {payloads[place] for place in places if not is_wanted(place)}
                ended = {place for place in places if payloads[place].is_set()}
                if ended and key == "bad" and len(payloads) > 1:
                    raise ValueError("a bad one")
                yield [(place, key) for place in ended]
                places -= ended
        finally:
            self.closed.set()


def unending(key="long", tokens=5):
    return Work(key, threading.Event(), tokens, has_steps=True)


def quick(key="quick"):
    work = Work(key, threading.Event(), 5)
    work.payload.set()
    return work


@pytest.fixture
def short_turns(monkeypatch):
    monkeypatch.setattr(batching, "_TURN", 0.0)
    monkeypatch.setattr(batching, "_ALONE", 0.0)


def test_a_work_of_many_steps_keeps_nobody_waiting(short_turns):
    batcher, long, other = Batcher(Steps(), 100, 20), unending(), unending("other")
    batcher.submit([long])
    for _ in range(3):
        batcher.submit([work := quick()])
        assert work.future.result(30) == "quick" and not long.future.done()
    batcher.submit([other])
    other.payload.set()
    assert other.future.result(30) == "other" and not long.future.done()
    long.payload.set()
    assert long.future.result(30) == "long"
    batcher.close()


def test_a_second_work_of_many_steps_waits_until_the_first_has_had_its_time(short_turns, monkeypatch):
    monkeypatch.setattr(batching, "_ALONE", 1e9)
    steps = Steps()
    batcher, first, second = Batcher(steps, 100, 20), unending(), unending("other")
    batcher.submit([first])
    batcher.submit([second])
    second.payload.set()
    batcher.submit([work := quick()])
    assert work.future.result(30) == "quick" and batcher.waiting == 1 and not second.future.done()
    first.payload.set()
    assert second.future.result(30) == "other"
    batcher.close()
    assert [works for _, works in steps.begun] == [[first.payload], [work.payload], [second.payload]]


def test_works_of_many_steps_that_are_under_way_have_a_limit(short_turns):
    steps = Steps()
    batcher = Batcher(steps, 100, 5)  # one work a batch
    works = [unending(number) for number in range(5)]
    for work in works:
        batcher.submit([work])
    works[-1].payload.set()
    batcher.submit([work := quick()])
    assert work.future.result(30) == "quick"
    while len(steps.begun) < 5:  # four, and the quick one
        pass
    for _ in range(20):
        batcher.submit([work := quick()])
        work.future.result(30)
    assert batcher.waiting == 1 and not works[-1].future.done()
    works[2].payload.set()
    assert works[-1].future.result(30) == 4
    for work in works:
        work.payload.set()
    batcher.close()


def test_a_work_of_many_steps_that_nobody_wants_ends():
    steps = Steps()
    batcher, work, beside = Batcher(steps, 100, 20), unending(), unending()
    batcher.submit([work, beside])
    while not steps.begun:
        pass
    work.give_up()
    beside.give_up()
    assert steps.closed.wait(30)
    batcher.close()


def test_works_of_many_steps_are_done_alone_if_their_batch_fails():
    steps = Steps()
    batcher, works = Batcher(steps, 100, 20), [unending("bad"), unending("bad")]
    batcher.submit(works)
    for work in works:
        work.payload.set()
    assert [work.future.result(30) for work in works] == ["bad", "bad"]
    batcher.close()
    assert [len(payloads) for _, payloads in steps.begun] == [2, 1, 1]


def until(is_so):
    """Wait for what another thread does."""
    for _ in range(3000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 30 seconds")


def end(batcher, *works):
    for work in works:
        work.payload.set()
    batcher.close()


def test_a_work_has_its_result_before_the_batch_ends():
    batcher, works = Batcher(Steps(), 100, 20), [unending(), unending()]
    batcher.submit(works)
    works[1].payload.set()
    assert works[1].future.result(30) == "long" and not works[0].future.done()
    end(batcher, *works)
    assert works[0].future.result(30) == "long"


def test_a_batch_is_told_which_of_its_works_nobody_wants():
    steps = Steps()
    batcher, works = Batcher(steps, 100, 20), [unending(), unending()]
    batcher.submit(works)
    until(lambda: steps.begun)
    works[0].give_up()
    until(lambda: steps.left)
    assert steps.left == {works[0].payload} and not steps.closed.is_set()
    end(batcher, *works)


def test_short_works_have_room_of_their_own(short_turns, monkeypatch):
    """However many long ones there are, and also while the last of these is too young for another beside it."""
    steps = Steps()
    batcher = Batcher(steps, 100, 16)
    long = [unending(number, 16) for number in range(5)]
    for work in long:
        batcher.submit([work])
    until(lambda: len(steps.begun) == 4)
    monkeypatch.setattr(batching, "_ALONE", 1e9)
    short = unending("short", 2)
    short.payload.set()
    batcher.submit([short])
    assert short.future.result(30) == "short" and not any(work.future.done() for work in long)
    end(batcher, *long)


def test_short_and_long_works_are_in_batches_of_their_own():
    steps = Steps()
    batcher, busy = Batcher(steps, 100, 100), unending("busy")
    batcher.submit([busy])
    until(lambda: steps.begun)
    works = [unending(tokens=tokens) for tokens in (40, 2, 40, 2)]
    batcher.submit(works)
    end(batcher, busy, *works)
    batches = [{work.tokens for work in works if work.payload in payloads} for _, payloads in steps.begun[1:]]
    assert sorted(batches, key=min) == [{2}, {40}]


def test_no_caller_has_more_than_half_of_the_room(short_turns):
    steps = Steps()
    batcher = Batcher(steps, 100, 16)
    long = [unending(number, 16) for number in range(5)]
    batcher.submit(long)
    until(lambda: len(steps.begun) == 2)
    other = unending("other", 16)
    batcher.submit([other])
    until(lambda: len(steps.begun) == 3)
    assert steps.begun[-1][0] == "other" and batcher.waiting == 3
    short = [unending(f"short {number}", 2) for number in range(9)]  # a batch of 8, and one that waits for it
    batcher.submit([Work("short", work.payload, 2, has_steps=True) for work in short])
    until(lambda: len(steps.begun) == 4)
    last = unending("last", 2)
    last.payload.set()
    batcher.submit([last])
    assert last.future.result(30) == "last" and batcher.waiting == 4
    end(batcher, *long, other, *short)


def test_a_large_work_is_not_overtaken_for_ever(short_turns):
    steps = Steps()
    batcher = Batcher(steps, 100, 16)
    first, large, small = unending("first", 10), unending("large", 100), unending("small", 10)
    batcher.submit([first])
    until(lambda: steps.begun)
    for work in (large, small):
        batcher.submit([work])
    batcher.submit([work := quick()])
    assert work.future.result(30) == "quick" and batcher.waiting == 2
    first.payload.set()
    until(lambda: len(steps.begun) == 3)
    assert steps.begun[-1][0] == "large" and batcher.waiting == 1
    end(batcher, large, small)
    assert small.future.result(30) == "small"


def test_what_nobody_wants_any_more_takes_no_place_in_the_queue():
    gate = Gate()
    batcher = held(gate, most_waiting=3)
    gone = [Work("a", "1", 1) for _ in range(3)]
    batcher.submit(gone)
    for work in gone:
        work.give_up()
    assert batcher.waiting == 0
    batcher.submit(others := [Work("a", "22", 2) for _ in range(3)])
    gate.open.set()
    assert [work.future.result(30) for work in others] == [2, 2, 2]
    batcher.close()


def test_works_whose_batch_failed_are_done_one_after_another(short_turns):
    steps = Steps()
    batcher, works = Batcher(steps, 100, 20), [unending("bad") for _ in range(4)]
    batcher.submit(works)
    works[2].payload.set()
    until(lambda: len(steps.begun) == 2)
    for _ in range(5):
        batcher.submit([work := quick()])
        assert work.future.result(30) == "quick"
    begun = [payloads for key, payloads in steps.begun if key == "bad"]
    assert begun == [[work.payload for work in works], [works[0].payload]]
    end(batcher, *works)
    assert [work.future.result(0) for work in works] == ["bad"] * 4


@pytest.mark.parametrize("has_steps", [False, True])
@pytest.mark.parametrize(
    "given, said", [([], "no result of"), ([(5, "a")], "out of range"), ([(0, "a"), (0, "b")], None)]
)
def test_results_that_are_not_those_of_the_works_end_nothing_else(given, said, has_steps):
    def compute(key, payloads, is_wanted):
        yield given if key == "wrong" else [(0, "right")]

    batcher = Batcher(compute, 100, 20)
    works = [Work("wrong", "", 1, has_steps) for _ in range(2)]
    batcher.submit(works)
    for work in works:
        error = work.future.exception(30)
        assert work.future.result() == "a" if said is None else said in str(error)
    batcher.submit([work := Work("other", "", 1)])
    assert work.future.result(30) == "right"
    batcher.close()


def test_callers_take_turns():
    """Whoever asks for little does not wait for all of a large request, nor that for ever for those who ask later."""
    gate = Gate()
    batcher = held(gate)
    one, other = ([Work(key, key * 20, 20) for _ in range(3)] for key in "ab")
    for works in (one, other, [Work("c", "c", 1)]):
        batcher.submit(works)
    gate.open.set()
    batcher.close()
    assert "".join(key for key, _ in gate.batches[1:]) == "abcabab"
