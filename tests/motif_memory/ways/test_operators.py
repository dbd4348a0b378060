"""The registered operators: values and gradients of the definition, and what PyTorch expects of an operator."""

from functools import partial

import pytest
import torch
from memory_cases import LETTERS, random_case
from tolerances import FINITE_DIFFERENCES, FINITE_DIFFERENCES_RELATIVE, GRADIENTS_FP32, TABLE_MAJOR_FP64
from torch.library import opcheck

from gengram.motif_memory import definition
from gengram.motif_memory.ways import bags, folded, operators
from gengram.motif_memory.ways.table_major import packed_rows, used_rows


def composed(case, key, value):
    """The definition's last step, differentiated by PyTorch itself."""
    return definition.gated_memory(case.hidden_states, key, value, case.plan, case.layer)[:2]


def by_definition(case):
    features = definition.window_features(case.tables, case.plan)
    return composed(case, features @ case.key_weight.T, features @ case.value_weight.T)


def token_major(case):
    features = operators.window_features(case.tables, case.plan)
    key, value = features @ case.key_weight.T, features @ case.value_weight.T
    return operators.gated_memory(case.hidden_states, key, value, case.plan, case.layer)[:2]


def by_bags(case):
    features = bags.features_by_bags(case.tables, case.plan)
    return composed(case, features @ case.key_weight.T, features @ case.value_weight.T)


def table_major(case, only_used=True, slab_width=None):
    used, top = used_rows(case.plan) if only_used else (None, None)
    rows = packed_rows(case.tables, case.key_weight, case.value_weight, case.plan, used, slab_width)
    return operators.folded_memory(case.hidden_states, rows, case.plan, case.layer, None, top)[:2]


def table_major_of_all_rows(case):
    return table_major(case, only_used=False)


def table_major_in_slabs(case):
    return table_major(case, slab_width=2)


def values_and_gradients(case, way):
    for weight in case.weights:
        weight.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    residual, gate = way(case)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in (residual, gate))
    gradients = torch.autograd.grad(loss, case.weights, materialize_grads=True)
    return [residual, gate, *gradients]


@pytest.mark.parametrize("way", [token_major, by_bags, table_major, table_major_of_all_rows, table_major_in_slabs])
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("chunk", [7, 256])
def test_values_and_gradients_equal_the_definition(way, seed, chunk, monkeypatch):
    monkeypatch.setattr(folded, "_positions_at_a_time", lambda device, hidden: chunk)
    monkeypatch.setattr(bags, "_TOKENS_AT_A_TIME", chunk)
    case = random_case(seed)
    case.history = None
    ours, truth = values_and_gradients(case, way), values_and_gradients(case, by_definition)
    for mine, theirs in zip(ours, truth, strict=True):
        scale = 1 + theirs.abs().max().item() if theirs.numel() else 1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TABLE_MAJOR_FP64 * scale)


def test_a_row_that_is_no_number_stays_in_the_windows_that_hold_it():
    """A window that is not full reads the first row of no table in its place."""
    case = random_case(2, largest=3, length=40)
    for table in case.tables:
        table[0] = torch.nan
    ours, truth = bags.features_by_bags(case.tables, case.plan), definition.window_features(case.tables, case.plan)
    assert torch.equal(ours.isnan(), truth.isnan()) and 0 < truth.isnan().sum() < truth.numel()


def test_bags_of_nothing_are_empty():
    case = random_case(4, length=0)
    found = bags.features_by_bags(case.tables, case.plan)
    assert found.shape == definition.window_features(case.tables, case.plan).shape


def test_gradients_are_those_of_finite_differences():
    case = next(
        c for c in map(lambda s: random_case(s, context=False, length=9), range(99)) if c.conv_weight is not None
    )

    def function(*weights):
        tables = len(case.tables)
        case.tables = list(weights[:tables])
        case.key_weight, case.value_weight, case.hidden_states, case.norm_weight, case.conv_weight = weights[tables:]
        return table_major(case)

    leaves = [weight.clone().requires_grad_() for weight in case.weights]
    assert torch.autograd.gradcheck(function, leaves, atol=FINITE_DIFFERENCES, rtol=FINITE_DIFFERENCES_RELATIVE)


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_operators_are_what_pytorch_expects(seed):
    case = random_case(seed, context=False, length=20)
    plan = case.plan
    for weight in case.weights:
        weight.requires_grad_()
    check = {name: partial(opcheck, operator) for name, operator in operators.OPERATORS.items()}
    codes = definition.letter_codes(case.tokens, LETTERS)
    check["ngram_rows_and_runs"]((codes, max(case.sizes), plan.behind, False))
    check["window_features"]((case.tables, *plan, False))
    features = definition.window_features(case.tables, plan).detach()
    key, value = ((features @ weight.T).detach().requires_grad_() for weight in (case.key_weight, case.value_weight))
    check["gated_memory"]((case.hidden_states, key, value, *plan, *case.layer, None, False))
    used, top = used_rows(plan)
    rows = packed_rows(case.tables, case.key_weight, case.value_weight, plan, used).rows.detach().requires_grad_()
    check["folded_memory"]((case.hidden_states, rows, 1.0, *plan, *case.layer, None, top, False))


def test_used_rows_are_those_that_occur():
    case = random_case(5, length=30)
    used, top = used_rows(case.plan)
    largest = max(case.sizes)
    valid = case.plan.runs >= largest
    assert set(case.plan.grams[valid].tolist()) | {0} == set(used.tolist())
    assert torch.equal(used[top[valid].long()], case.plan.grams[valid].long())


def test_float32_gradients_are_close_to_float64():
    case = random_case(12, context=False, hidden=32, width=16, length=200)
    exact = values_and_gradients(case, by_definition)
    case.tables = [table.detach().float() for table in case.tables]
    for name in ("key_weight", "value_weight", "hidden_states", "norm_weight", "conv_weight"):
        weight = getattr(case, name)
        setattr(case, name, None if weight is None else weight.detach().float())
    for way in (token_major, table_major):
        for mine, truth in zip(values_and_gradients(case, way), exact, strict=True):
            assert (mine.double() - truth).norm() <= GRADIENTS_FP32 * truth.norm()
