"""Folded tables against the exact definition, and a folded model against the same model unfolded."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache

from gengram import GengramForCausalLM, GengramForMaskedLM
from gengram.operators.folded_memory import fold_tables, folded_key_value
from gengram.operators.motif_memory import letter_codes, plan_ngrams, window_mean

LETTERS = [8, 5, 6, 7, 9]


def by_definition(plan, tables, key_weight, value_weight):
    features = torch.cat([window_mean(table[plan.rows[i]], plan, i) for i, table in enumerate(tables)], dim=-1)
    return features @ key_weight.T, features @ value_weight.T


@settings(deadline=None, max_examples=80)
@given(
    length=st.integers(0, 40),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    extra=st.integers(0, 9),
    context=st.booleans(),
    is_causal=st.booleans(),
    segmented=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_folded_key_and_value_equal_the_definition(length, sizes, extra, context, is_causal, segmented, seed):
    generator = torch.Generator().manual_seed(seed)
    window = max(sizes) + extra
    before = window - 1 if context and is_causal else 0
    total = before + length
    letters = torch.tensor(LETTERS)[torch.randint(5, (2, total), generator=generator)]
    tokens = torch.where(torch.rand(2, total, generator=generator) < 0.03, 3, letters)
    behind = ahead = None
    if segmented:
        behind = (torch.arange(total) % 17).expand(2, -1)
        ahead = (16 - behind).minimum(torch.arange(total).flip(0))
    plan = plan_ngrams(
        letter_codes(tokens, LETTERS),
        sizes,
        window,
        context=before,
        is_causal=is_causal,
        behind=behind,
        ahead=None if is_causal else ahead,
    )
    tables = [torch.randn(5**n, 3, generator=generator, dtype=torch.float64) for n in sizes]
    key_weight, value_weight = torch.randn(2, 5, 3 * len(sizes), generator=generator, dtype=torch.float64)
    folded = fold_tables(tables, key_weight, value_weight, sizes, window, torch.float64)
    ours = folded_key_value(folded, plan, tables, key_weight, value_weight)
    truth = by_definition(plan, tables, key_weight, value_weight)
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_float16_tables_are_scaled_and_do_not_overflow(size):
    generator = torch.Generator().manual_seed(0)
    sizes, window = [1, 2, 3], 21
    tables = [torch.randn(5**n, 8, generator=generator) * size for n in sizes]
    key_weight, value_weight = torch.randn(2, 16, 24, generator=generator)
    folded = fold_tables(tables, key_weight, value_weight, sizes, window)
    tokens = torch.tensor(LETTERS)[torch.randint(5, (1, 500), generator=generator)]
    tokens[0, :200] = 8  # the same row over and over: the largest sums there are
    plan = plan_ngrams(letter_codes(tokens, LETTERS), sizes, window)
    exact = by_definition(plan, [t.double() for t in tables], key_weight.double(), value_weight.double())
    ours = folded_key_value(folded, plan, tables, key_weight, value_weight)
    for mine, theirs in zip(ours, exact, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine.double() - theirs).norm() / theirs.norm() < 2 * torch.finfo(torch.float16).eps
    with pytest.raises(ValueError, match="not finite"):
        fold_tables([table / 0 for table in tables], key_weight, value_weight, sizes, window)


@torch.no_grad()
@pytest.mark.parametrize("head", [GengramForCausalLM, GengramForMaskedLM])
def test_folded_model_equals_unfolded(head):
    model, ids = tiny_model(head), random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = model(ids, attention_mask=mask).logits
    folded = model.fold_memory(torch.float32)(ids, attention_mask=mask).logits
    assert folded is not expected and all(m._folded for m in memories(model))
    torch.testing.assert_close(folded[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    assert torch.equal(model.unfold_memory()(ids, attention_mask=mask).logits, expected)


def memories(model):
    return [layer.motif_memory for layer in model.model.layers if layer.motif_memory is not None]


@torch.no_grad()
def test_folded_decoding_equals_folded_prefill():
    model, ids = tiny_model(GengramForCausalLM).fold_memory(), random_ids(2, 40)
    full, cache = model(ids).logits, DynamicCache(config=model.config)
    parts = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 1, 20, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)


def test_folding_follows_the_weights_and_is_never_saved(tmp_path):
    model, ids = tiny_model(GengramForCausalLM).fold_memory(torch.float32), random_ids(1, 40)
    with torch.no_grad():
        model.model.layers[0].motif_memory.key_proj.weight.mul_(-1)
        changed = model(ids).logits
        torch.testing.assert_close(model.unfold_memory()(ids).logits, changed, rtol=0, atol=1e-5)
    model.fold_memory()
    assert all(m._folded is None for m in memories(copy.deepcopy(model)))
    assert not any("folded" in name for name in model.state_dict())
    model.double()
    assert all(m._folded is None for m in memories(model))
    model.fold_memory().train()
    assert all(m._folded is None for m in memories(model))
    with pytest.raises(ValueError, match=r"model\.eval"):
        model.fold_memory()


def test_gradients_take_the_unfolded_weights():
    model, ids = tiny_model(GengramForCausalLM).fold_memory(), random_ids(1, 20)
    model(ids, labels=ids).loss.backward()
    assert all(m.embeddings[0].weight.grad.abs().sum() > 0 for m in memories(model))


def test_what_cannot_be_folded_is_an_error():
    with pytest.raises(ValueError, match="as_trained"):
        tiny_model(GengramForCausalLM, memory_pooling="as_trained").fold_memory()
    model = tiny_model(GengramForCausalLM)
    memories(model)[0].key_proj = torch.nn.Sequential(memories(model)[0].key_proj)
    with pytest.raises(ValueError, match="adapters"):
        model.fold_memory()
    with torch.device("meta"):
        offloaded = GengramForCausalLM(model.config).eval()
    with pytest.raises(ValueError, match="offloaded"):
        offloaded.fold_memory()
