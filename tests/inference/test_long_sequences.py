import random

import pytest
from embedding_oracle import best_windows
from hypothesis import given
from hypothesis import strategies as st

from gengram.inference.long_sequences import Window, stretches, windows_of
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.pieces import SequencePiece, whole_records


def taken_from(windows):
    return [(base, window[:2]) for window in windows for base in range(window.keep_start, window.keep_end)]


sizes = st.integers(1, 30).flatmap(lambda context: st.tuples(st.just(context), st.integers(0, context - 1)))


@given(st.integers(0, 120), sizes, st.booleans(), st.data())
def test_each_base_is_taken_once_from_where_the_model_sees_most(length, size, both_sides, data):
    context, overlap = size
    expected = list(enumerate(best_windows(length, context, overlap, both_sides)))
    assert taken_from(windows_of(length, context, overlap, both_sides=both_sides)) == expected
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, length))
    part = list(windows_of(length, context, overlap, both_sides=both_sides, start=start, end=end))
    assert taken_from(part) == expected[start:end]
    for window in part:
        assert window.end - window.start == min(context, length)
        if not both_sides:
            assert all(base - window.start >= min(base, overlap) for base in range(window.keep_start, window.keep_end))


@given(st.integers(0, 120), sizes, st.booleans(), st.data())
def test_the_reverse_strand_is_read_as_a_sequence_of_its_own(length, size, both_sides, data):
    context, overlap = size
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, length))
    text = "".join(random.Random(length).choices("ACGT", k=length))
    turned = reverse_complement(text)
    onwards = windows_of(length, context, overlap, both_sides=both_sides, start=length - end, end=length - start)
    backwards = windows_of(length, context, overlap, strand="-", both_sides=both_sides, start=start, end=end)
    for own, window in zip(onwards, backwards, strict=True):
        read = reverse_complement(text[window.start : window.end])
        assert read == turned[own.start : own.end]
        assert (
            read[window.kept("-")] == turned[own.start : own.end][own.kept()] == turned[own.keep_start : own.keep_end]
        )
        assert read[window.kept("-")] == reverse_complement(text[window.keep_start : window.keep_end])


def test_half_the_context_overlaps_by_default():
    assert list(windows_of(11, 4)) == [
        Window(0, 4, 0, 4),
        Window(2, 6, 4, 6),
        Window(4, 8, 6, 8),
        Window(6, 10, 8, 10),
        Window(7, 11, 10, 11),
    ]
    assert list(windows_of(4, 4)) == [Window(0, 4, 0, 4)] and list(windows_of(0, 4)) == []


def test_a_part_of_a_long_sequence_costs_no_walk_from_its_start():
    (window,) = windows_of(10**15, 1024, start=10**14, end=10**14 + 1)
    assert window.keep_start == 10**14


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((10, 0), {}, "a context of at least 1"),
        ((10, 4, 4), {}, r"an overlap of 0 to 3 \(less than the context\), got 4"),
        ((10, 4, -1), {}, "got -1"),
        ((10, 4), {"end": 11}, "start <= end <= length, got 0, 11 and 10"),
        ((10, 4), {"start": 5, "end": 4}, "got 5, 4 and 10"),
        ((10, 4), {"strand": "."}, r"the strand \+ or -, got '\.'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments, named, message):
    with pytest.raises(ValueError, match=message):
        list(windows_of(*arguments, **named))


@st.composite
def records_in_pieces(draw):
    pieces = []
    for number in range(draw(st.integers(1, 3))):
        texts = draw(st.lists(st.text("ACGT", min_size=1, max_size=20), max_size=6)) or [""]
        start = 0
        for place, text in enumerate(texts):
            pieces.append(SequencePiece(f"record{number}", start, text, place == len(texts) - 1))
            start += len(text)
    return pieces


@given(records_in_pieces(), st.integers(1, 12), st.integers(0, 15))
def test_stretches_are_the_sequence_with_all_that_windows_need(pieces, size, margin):
    records = list(whole_records(pieces))
    found = list(stretches(pieces, size, margin))
    joined = whole_records(
        SequencePiece(part.name, part.start, part.read(part.start, part.end), part.is_last) for part in found
    )
    assert list(joined) == records
    sequence = iter(records)
    name, text = next(sequence)
    for number, part in enumerate(found):
        assert part.name == name and part.text == text[part.offset : part.offset + len(part.text)]
        assert part.offset == max(0, part.start - margin)
        assert part.offset + len(part.text) == min(len(text), part.end + margin)
        assert part.end - part.start == size or part.is_last
        if part.is_last and number + 1 < len(found):
            name, text = next(sequence)


def test_memory_of_stretches_does_not_grow_with_the_sequence():
    held = []

    def pieces():
        for number in range(2000):
            held.append(number)
            yield SequencePiece("long", number * 1000, "ACGT" * 250, number == 1999)

    for part in stretches(pieces(), 4096, 512):
        assert len(part.text) <= 4096 + 2 * 512
        assert held[-1] * 1000 <= part.end + 512 + 4096 + 1000
