"""The motif memory's operations against brute force."""

import memory_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import MEMORY_FP64, WINDOW_MEAN_FP32

from gengram.motif_memory.as_trained import running_sum
from gengram.motif_memory.definition import (
    dilated_taps,
    letter_codes,
    memory_gate,
    ngram_rows_and_runs,
    plan_windows,
    window_mean,
    window_sum,
)
from gengram.motif_memory.ways.one_token import letter_codes_of_few, rows_and_runs_of_few

LETTERS = [8, 5, 6, 7, 9]


def test_letter_codes_follow_the_order_of_the_token_ids():
    assert letter_codes(torch.tensor([[8, 5, 6, 7, 9, 4, 0, 127]]), LETTERS).tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert letter_codes(torch.tensor([[1, 2]]), [2, 1, 3, 4, 5]).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("window", "size", "is_causal", "expected"),
    [
        (21, 1, True, (-20, 0)),
        (21, 6, True, (-15, 0)),
        (21, 1, False, (-10, 10)),
        (8, 1, False, (-4, 3)),
        (6, 6, False, (2, 2)),
    ],
)
def test_span_of_a_window(window, size, is_causal, expected):
    codes = torch.ones(1, 30, dtype=torch.int64)
    assert plan_windows(codes, [size], window, is_causal=is_causal).span(0) == expected


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(-30, 10), st.integers(0, 12), st.integers(0, 2**31))
def test_window_sum_is_the_sum_over_the_span(length, first, last, seed):
    first = min(first, last)
    x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(length):
        for j in range(max(t + first, 0), min(t + last, length - 1) + 1):
            expected[:, t] += x[:, j]
    torch.testing.assert_close(window_sum(x, (first, last)), expected, rtol=0, atol=MEMORY_FP64)


def test_window_sum_adds_in_the_same_order_whatever_the_chunk():
    x = torch.randn(1, 300, 4)
    whole = window_sum(x, (-15, 0))
    for start in (16, 37, 290):
        assert torch.equal(window_sum(x[:, start - 15 :], (-15, 0))[:, 15:], whole[:, start:])


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(0, 30),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    extra=st.integers(0, 9),
    centred=st.booleans(),
    segmented=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_window_means_equal_brute_force(length, sizes, extra, centred, segmented, seed):
    generator = torch.Generator().manual_seed(seed)
    window = max(sizes) + extra
    tokens = torch.tensor([*LETTERS, 3])[torch.randint(6, (length,), generator=generator)]
    tables = [torch.randn(5**n, 2, generator=generator, dtype=torch.float64) for n in sizes]
    starts = torch.rand(length, generator=generator) < 0.15
    segments = starts.long().cumsum(0) if segmented else torch.zeros(length, dtype=torch.long)
    behind = ahead = None
    if segmented:
        behind = torch.tensor([[int((segments[:t] == segments[t]).sum()) for t in range(length)]]).view(1, length)
        ahead = torch.tensor([[int((segments[t + 1 :] == segments[t]).sum()) for t in range(length)]]).view(1, length)
    plan = plan_windows(
        letter_codes(tokens[None], LETTERS), sizes, window, is_causal=not centred, behind=behind, ahead=ahead
    )
    ours = torch.cat([window_mean(table[plan.rows(j)], plan, j) for j, table in enumerate(tables)], dim=-1)[0]
    truth = memory_oracle.window_features(
        tokens.tolist(), tables, sizes, window, LETTERS, centred=centred, segments=segments.tolist()
    )
    torch.testing.assert_close(ours, truth, rtol=0, atol=MEMORY_FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_window_mean_of_half_precision_rows_is_taken_in_float32(dtype):
    tokens = torch.tensor(LETTERS)[torch.randint(5, (1, 5000), generator=torch.Generator().manual_seed(1))]
    table = torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    plan = plan_windows(letter_codes(tokens, LETTERS), [1], 21)
    ours = window_mean(table[plan.rows(0)], plan, 0)
    exact = window_mean(table.double()[plan.rows(0)], plan, 0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=WINDOW_MEAN_FP32)


def test_history_in_front_gives_the_same_plan():
    codes = letter_codes(torch.tensor(LETTERS)[torch.randint(5, (2, 50))], LETTERS)
    whole = plan_windows(codes, [1, 3], 9)
    step = plan_windows(codes[:, 32:], [1, 3], 9, context=8)
    for index in range(2):
        assert torch.equal(step.rows(index)[:, 8:], whole.rows(index)[:, 40:])
        assert torch.equal(step.counts(index), whole.counts(index)[:, 40:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_sum_rounds_every_partial_sum(dtype):
    x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, total = [], torch.zeros(2, 3, dtype=dtype)
    for t in range(40):
        total = (total.float() + x[:, t].float()).to(dtype)
        expected.append(total)
    assert torch.equal(running_sum(x), torch.stack(expected, dim=1))
    continued = running_sum(x[:, 25:], initial=running_sum(x[:, :25])[:, -1])
    assert torch.equal(continued, torch.stack(expected, dim=1)[:, 25:])


def test_running_sum_of_nothing_is_nothing():
    assert running_sum(torch.zeros(2, 0, 3, dtype=torch.bfloat16)).shape == (2, 0, 3)


def test_gate_is_a_half_where_query_and_key_are_orthogonal():
    query = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [-2.0, 0.0]]])
    key = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [2.0, 0.0]]])
    g = 4 / 2**0.5
    expected = torch.tensor([[0.0, g**0.5, -(g**0.5)]]).sigmoid()
    torch.testing.assert_close(memory_gate(query, key), expected)


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_taps_equal_a_depthwise_convolution(dilation, taps):
    x = torch.randn(2, 17, 5, dtype=torch.float64)
    weight = torch.randn(5, 1, taps, dtype=torch.float64)
    reach = (taps - 1) * dilation
    padded = torch.nn.functional.pad(x, (0, 0, reach, 0))
    expected = torch.nn.functional.conv1d(padded.transpose(1, 2), weight, dilation=dilation, groups=5).transpose(1, 2)
    torch.testing.assert_close(dilated_taps(padded, weight[:, 0], dilation, reach), expected)


@pytest.mark.parametrize("seed", range(20))
def test_a_few_tokens_are_read_in_python_alike(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 10, (seed % 3, 1 + seed), generator=generator)
    codes = letter_codes(tokens, LETTERS)
    assert torch.equal(letter_codes_of_few(tokens, LETTERS), codes)
    behind = None
    if seed % 2:
        behind = torch.randint(-1, 9, codes.shape, generator=generator).to(torch.int32)
    for largest in (1, 3, 6):
        expected = ngram_rows_and_runs(codes, largest, behind)
        found = rows_and_runs_of_few(codes, largest, behind)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
