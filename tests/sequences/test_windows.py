import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengram.sequences.windows import runs_between_gaps, window_bounds


@given(st.text("AN", max_size=60), st.integers(0, 4))
def test_runs_between_gaps_are_what_is_left_without_long_runs_of_n(sequence, longest_gap):
    runs = list(runs_between_gaps(sequence, longest_gap))
    covered = [i for start, end in runs for i in range(start, end)]
    assert covered == sorted(set(covered))
    for start, end in runs:
        assert sequence[start] == sequence[end - 1] == "A"
        assert "N" * (longest_gap + 1) not in sequence[start:end]
    assert {i for i, letter in enumerate(sequence) if letter == "A"} <= set(covered)


@given(st.integers(0, 50), st.integers(1, 80), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_windows_reach_to_the_end_and_are_long_enough(start, size, length, stride, shortest):
    windows = list(window_bounds(start, start + size, length, stride, shortest))
    for left, right in windows:
        assert (left - start) % stride == 0
        assert right == min(left + length, start + size)
        assert right - left >= min(shortest, length)
    if stride <= length and size >= length and shortest <= length:
        covered = {i for left, right in windows for i in range(left, right)}
        assert covered >= set(range(start, start + size - shortest + 1))


@pytest.mark.parametrize(
    "size, expected", [(10, [(0, 4), (4, 8), (8, 10)]), (8, [(0, 4), (4, 8)]), (9, [(0, 4), (4, 8)])]
)
def test_a_short_last_window(size, expected):
    assert list(window_bounds(0, size, 4, 4, 2)) == expected
