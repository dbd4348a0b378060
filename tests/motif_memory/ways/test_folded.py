"""Folded tables against the exact definition, which is itself judged by brute force."""

import pytest
import torch
from memory_cases import LETTERS, random_case
from tolerances import FOLDED_FP64

from gengram.motif_memory.definition import MemoryLayer, gated_memory, letter_codes, plan_windows, window_features
from gengram.motif_memory.ways import folded as folding
from gengram.motif_memory.ways.folded import folded_key_value, folded_memory
from gengram.motif_memory.ways.packed_tables import pack_tables, project_tables, table_sections


def by_definition(plan, tables, key_weight, value_weight):
    features = window_features(tables, plan)
    return features @ key_weight.T, features @ value_weight.T


@pytest.mark.parametrize("seed", range(60))
def test_key_and_value_equal_the_definition(seed):
    case = random_case(seed, largest=4)
    slab_width = [None, 2, 4][seed % 3]
    folded = pack_tables(
        case.tables, case.key_weight, case.value_weight, case.sizes, case.plan.window, torch.float64, slab_width
    )
    ours = folded_key_value(folded, case.plan)
    truth = by_definition(case.plan, case.tables, case.key_weight, case.value_weight)
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=FOLDED_FP64)


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize("seed", range(30))
def test_the_whole_memory_equals_the_definition_in_any_chunks(seed, chunk, monkeypatch):
    monkeypatch.setattr(folding, "_positions_at_a_time", lambda device, hidden: chunk)
    case = random_case(seed)
    plan = case.plan
    folded = pack_tables(case.tables, case.key_weight, case.value_weight, case.sizes, plan.window, torch.float64)
    ours = folded_memory(case.hidden_states, folded, plan, case.layer, case.history)
    key, value = by_definition(plan, case.tables, case.key_weight, case.value_weight)
    truth = gated_memory(case.hidden_states, key, value, plan, case.layer, case.history)
    for mine, theirs in zip(ours[:3], truth[:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=FOLDED_FP64)


def test_sections_cover_the_packed_tables():
    tables = [torch.randn(5**n, 2) for n in (1, 2, 4)]
    weights = torch.randn(2, 3, 6)
    assert project_tables(tables, *weights, [1, 2, 4], 9).shape == (1, 5**4 + 5**3 + 5**2 + 5 + 5**3, 6)
    assert table_sections(4) == ((0, 775, 750, 625, 0), 780, 905)
    assert project_tables(tables[:1], *weights[..., :2], [1], 9).shape[1] == table_sections(1).rows == 5


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_float16_tables_are_scaled_and_do_not_overflow(size):
    generator = torch.Generator().manual_seed(0)
    sizes, window = [1, 2, 3], 21
    tables = [torch.randn(5**n, 8, generator=generator) * size for n in sizes]
    key_weight, value_weight = torch.randn(2, 16, 24, generator=generator)
    folded = pack_tables(tables, key_weight, value_weight, sizes, window)
    tokens = torch.tensor(LETTERS)[torch.randint(5, (1, 500), generator=generator)]
    tokens[0, :200] = 8  # the same row over and over: the largest sums there are
    plan = plan_windows(letter_codes(tokens, LETTERS), sizes, window)
    exact = by_definition(plan, [t.double() for t in tables], key_weight.double(), value_weight.double())
    for mine, theirs in zip(folded_key_value(folded, plan), exact, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine.double() - theirs).norm() / theirs.norm() < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [32, 512])
def test_decoding_gives_the_bits_of_prefill(hidden, dtype):
    """Step by step, and in pieces of any length, with history: the same bits as all at once."""
    generator = torch.Generator().manual_seed(1)
    sizes, window, reach = [1, 2, 3, 4], 9, 6
    tables = [torch.randn(5**n, 8, generator=generator) for n in sizes]
    weights = torch.randn(2, hidden, 32, generator=generator)
    folded = pack_tables(tables, *weights, sizes, window, dtype)
    tokens = torch.tensor(LETTERS)[torch.randint(5, (2, 120), generator=generator)]
    tokens[0, 50] = 3
    codes = letter_codes(tokens, LETTERS)
    hidden_states = torch.randn(2, 120, hidden, generator=generator)
    layer = MemoryLayer(torch.ones(hidden), 1e-5, torch.randn(hidden, 4, generator=generator), 2, reach)
    whole = folded_memory(hidden_states, folded, plan_windows(codes, sizes, window), layer).residual
    history, parts, start = torch.zeros(2, reach, hidden), [], 0
    padded = torch.nn.functional.pad(codes, (window - 1, 0))
    for length in [3, 1, 1, 60, *[1] * 30, 25]:
        plan = plan_windows(padded[:, start : start + window - 1 + length], sizes, window, context=window - 1)
        part = folded_memory(hidden_states[:, start : start + length], folded, plan, layer, history)
        history = torch.cat([history, part.gated], dim=1)[:, -reach:]
        parts.append(part.residual)
        start += length
    assert torch.equal(torch.cat(parts, dim=1), whole)
