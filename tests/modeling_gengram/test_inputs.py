"""What the models are given: masks that decide, inputs that do not fit, and numbers that are none."""

import pytest
import torch
from tiny_models import HEADS, random_ids, tiny_config, tiny_model
from tolerances import SAME_FP32
from transformers import DynamicCache, StaticCache

from gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramModel,
)
from gengram.modeling_gengram.inputs import pool_hidden_states
from gengram.motif_memory import memory_path

FP32 = dict(rtol=0, atol=SAME_FP32)
WAYS = ("token_major", "table_major", "folded")
IDS = random_ids(2, 12)

each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
each_way = pytest.mark.parametrize("way", WAYS)


# The mask decides what is padding


def padded(side: str, padding: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows one by one; together with their mask and positions, padded with the id `padding`."""
    rows = [random_ids(1, length, seed=length)[0] for length in (31, 6, 18)]
    ids, mask = torch.full((3, 31), padding), torch.zeros(3, 31, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(31 - len(row), 31) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return rows, ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 8, 12])  # [PAD], the letter A, <EOD>
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["last", "centre", "mean", "max"])
def test_the_mask_decides_what_is_pooled(pooling, is_causal, side, padding):
    model = tiny_model(GengramForSequenceClassification, classifier_pooling=pooling, is_causal=is_causal)
    rows, ids, mask, positions = padded(side, padding)
    alone = torch.cat([model(row[None]).logits for row in rows])
    arguments = dict(attention_mask=mask, position_ids=positions)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(ids, **arguments).logits, alone, **FP32)
    torch.testing.assert_close(model(inputs_embeds=embeds, memory_input_ids=ids, **arguments).logits, alone, **FP32)
    torch.testing.assert_close(model(inputs_embeds=embeds, **arguments).logits, alone, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["last", "centre", "mean", "max"])
def test_without_a_mask_ids_and_embeddings_have_the_same_padding(pooling):
    model = tiny_model(GengramForSequenceClassification, classifier_pooling=pooling)
    rows, ids, _, _ = padded("right", 0)
    alone = torch.cat([model(row[None]).logits for row in rows])
    torch.testing.assert_close(model(ids).logits, alone, **FP32)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, alone, **FP32)
    model.config.pad_token_id = None  # then every token counts
    assert not torch.allclose(model(ids).logits, alone, atol=SAME_FP32)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["last", "centre", "mean", "max"])
def test_a_sequence_of_padding_is_zero_and_leaves_others_alone(pooling):
    model = tiny_model(GengramForSequenceClassification, classifier_pooling=pooling)
    mask = torch.tensor([[1] * 12, [0] * 12])
    logits = model(IDS, attention_mask=mask).logits
    assert not logits[1].any()
    torch.testing.assert_close(logits[0], model(IDS[:1]).logits[0], **FP32)


def test_means_of_half_precision_do_not_overflow():
    hidden = torch.full((1, 4000, 2), 100.0, dtype=torch.float16)
    pooled = pool_hidden_states(hidden, torch.ones(1, 4000), "mean")
    assert pooled.dtype == torch.float16 and (pooled == 100).all()


def test_a_mask_that_is_not_of_tokens_is_refused_by_every_pooling():
    for pooling in ("last", "centre", "mean", "max"):
        model = tiny_model(GengramForSequenceClassification, classifier_pooling=pooling)
        with pytest.raises(ValueError, match=r"needs an attention_mask of \(batch, length\), got \(2, 1, 12, 12\)"):
            model(IDS, attention_mask=torch.ones(2, 1, 12, 12))


# What does not fit together


@each_head
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(input_ids=IDS[:, :0]), r"at least one sequence with one token, got \(batch, length\) = \(2, 0\)"),
        (dict(input_ids=IDS[:0]), r"at least one sequence with one token, got \(batch, length\) = \(0, 12\)"),
        (dict(input_ids=IDS[0]), r"input_ids must be \(batch, length\), got \(12,\)"),
        (dict(input_ids=IDS.float()), "input_ids must be integers, got torch.float32"),
        (dict(input_ids=IDS + 125), r"input_ids must lie in 0..127 .*, got 1\d\d..134"),
        (dict(input_ids=IDS - 100), r"input_ids must lie in 0..127 .*, got -\d\d..-91"),
        (dict(input_ids=IDS.tolist()), "input_ids must be a tensor, got a list"),
        (
            dict(inputs_embeds=torch.zeros(2, 12, 31)),
            r"inputs_embeds must be \(batch, length, 32\), got \(2, 12, 31\)",
        ),
        (dict(inputs_embeds=torch.zeros(12, 32)), r"inputs_embeds must be \(batch, length, 32\), got \(12, 32\)"),
        (
            dict(input_ids=IDS, attention_mask=torch.ones(2, 10)),
            r"attention_mask must be \(batch, past \+ length\) = \(2, 12\), .*, got \(2, 10\)",
        ),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 15)), r"= \(2, 12\), .*, got \(2, 15\)"),
        (dict(input_ids=IDS, attention_mask=torch.ones(1, 12)), r"= \(2, 12\), .*, got \(1, 12\)"),
        (dict(input_ids=IDS, attention_mask=torch.ones(12)), r"= \(2, 12\), .*, got \(12,\)"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 12, 12)), r"= \(2, 12\), .*, got \(2, 12, 12\)"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 9, 12)), r"past \+ length\), got \(2, 1, 9, 12\)"),
        (dict(input_ids=IDS, attention_mask=[[1] * 12] * 2), "attention_mask must be a tensor, got a list"),
        (
            dict(input_ids=IDS, attention_mask=torch.zeros(2, 12).masked_fill(torch.arange(12) > 8, -1e9)),
            r"1 for tokens and 0 for padding, got values from -1e\+09 to 0",
        ),
        (dict(input_ids=IDS, position_ids=torch.arange(12)), r"position_ids must be .*, got \(12,\)"),
        (dict(input_ids=IDS, position_ids=torch.arange(10)[None]), r"position_ids must be .*, got \(1, 10\)"),
        (dict(input_ids=IDS, position_ids=torch.arange(12.0)[None]), "position_ids must be a tensor of integers"),
        (dict(input_ids=IDS, memory_input_ids=IDS[:1]), r"memory_input_ids must be .* = \(2, 12\), .*, got \(1, 12\)"),
    ],
    ids=range(21),
)
def test_what_does_not_fit_is_said_in_the_same_words_everywhere(head, given, message):
    model = tiny_model(head, num_hidden_layers=1, memory_layers=[0])
    for way in WAYS:
        with torch.no_grad(), memory_path(way), pytest.raises(ValueError, match=message):
            model(**given)


def test_a_mask_covers_the_cache_too():
    model = tiny_model(GengramForCausalLM)
    full = model(IDS, attention_mask=torch.ones(2, 12)).logits[:, 9:]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        model(IDS[:, :9], cache=cache, attention_mask=torch.ones(2, 9))
        found = model(IDS[:, 9:], cache=cache, attention_mask=torch.ones(2, 12)).logits
        torch.testing.assert_close(found, full, **FP32)
    cache = DynamicCache(config=model.config)
    model(IDS[:, :9], cache=cache)
    with pytest.raises(ValueError, match=r"= \(2, 12\), 1 for tokens and 0 for padding, got \(2, 3\)"):
        model(IDS[:, 9:], cache=cache, attention_mask=torch.ones(2, 3))


@torch.no_grad()
@each_head
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_any_integer_dtype(head, dtype):
    model = tiny_model(head)
    assert torch.equal(model(IDS.to(dtype))[0], model(IDS)[0])
    assert torch.equal(model(IDS, memory_input_ids=IDS.to(dtype))[0], model(IDS)[0])
    if head is not GengramModel:
        labels = IDS % 2 if head is not GengramForSequenceClassification else torch.tensor([0, 1])
        assert torch.equal(model(IDS, labels=labels.to(dtype)).loss, model(IDS, labels=labels).loss)


# Several sequences in one row


def packed(lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rows = [random_ids(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return rows, torch.cat(rows, dim=1), positions


@torch.no_grad()
@each_head
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"attention_mask": torch.ones(1, 39)}], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_sequences_of_one_row_do_not_see_each_other(head, implementation, arguments, is_causal):
    if head in (GengramForSequenceClassification, GengramForCausalLM) and not is_causal:
        pytest.skip("one vector for all, or causal only")
    model = tiny_model(head, **({} if head is GengramForMaskedLM else {"is_causal": is_causal}))
    model.set_attn_implementation(implementation)
    rows, ids, positions = packed((13, 4, 22))
    if head is GengramForSequenceClassification:
        last = model(ids, position_ids=positions, **arguments).logits
        torch.testing.assert_close(last, model(rows[-1]).logits, **FP32)
        return
    found = model(ids, position_ids=positions, **arguments)[0]
    torch.testing.assert_close(found, torch.cat([model(row)[0] for row in rows], dim=1), **FP32)


@torch.no_grad()
def test_packed_rows_may_be_padded_and_need_not_start_at_zero():
    model = tiny_model(GengramForMaskedLM)
    rows, ids, positions = packed((13, 4, 22))
    padding = torch.zeros(1, 6, dtype=torch.long)
    ids, positions = torch.cat([padding, ids], dim=1), torch.cat([padding, positions + 5], dim=1)
    mask = torch.tensor([[0] * 6 + [1] * 39])
    found = model(ids, position_ids=positions, attention_mask=mask).logits[:, 6:]
    torch.testing.assert_close(found, torch.cat([model(row).logits for row in rows], dim=1), **FP32)


def test_several_sequences_have_no_cache():
    model = tiny_model(GengramForCausalLM)
    _, ids, positions = packed((13, 4, 22))
    assert model(ids, position_ids=positions).past_key_values is None
    with pytest.raises(ValueError, match="several sequences, which no cache can continue"):
        model(ids, position_ids=positions, cache=DynamicCache(config=model.config))


@torch.no_grad()
def test_masks_of_the_callers_own_may_go_with_any_positions():
    """A tree of drafts: two tokens that both follow the eighth, and do not see each other."""
    model, ids = tiny_model(GengramForCausalLM, memory_layers=[]), IDS[:1, :10]
    expected = [model(torch.cat([ids[:, :8], ids[:, last : last + 1]], dim=1)).logits[:, -1] for last in (8, 9)]
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], cache=cache)
    mask = torch.ones(1, 1, 2, 10, dtype=torch.bool)
    mask[..., 0, 9] = mask[..., 1, 8] = False
    found = model(ids[:, 8:], cache=cache, position_ids=torch.tensor([[8, 8]]), attention_mask=mask).logits
    torch.testing.assert_close(found, torch.stack(expected, dim=1), **FP32)


def test_left_padding_is_not_taken_for_several_sequences():
    model = tiny_model(GengramForCausalLM)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, disable_compile=True)
    expected = model.generate(IDS, use_cache=False, **options)
    for how in ({}, {"cache_implementation": "static"}, {"num_beams": 1, "prefill_chunk_size": 4}):
        assert torch.equal(model.generate(IDS, **how, **options), expected)


def test_as_trained_pooling_says_that_it_reads_across_sequences(caplog):
    model = tiny_model(GengramForCausalLM, memory_pooling="as_trained")
    _, ids, positions = packed((13, 4, 22))
    model(ids[:, :20], position_ids=torch.arange(20)[None])
    assert not caplog.messages
    model(ids, position_ids=positions)
    assert ["reads across" in message for message in caplog.messages] == [True]


# Numbers that are none


@torch.no_grad()
@each_way
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_is_no_number_stays_in_its_row(way, experts, implementation):
    model = tiny_model(GengramForCausalLM)
    model.set_attn_implementation(implementation)
    model.set_experts_implementation(experts)
    embeds = model.get_input_embeddings()(random_ids(3, 30))
    clean = model(inputs_embeds=embeds).logits
    embeds[1, 7] = float("nan")
    with memory_path(way):
        found = model(inputs_embeds=embeds).logits
    assert found[1].isnan().any()
    torch.testing.assert_close(found[::2], clean[::2], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("place", [(0, 0), (1, 7), (2, 0), (2, 57)], ids=str)  # of a table, and of its rows
def test_weights_that_are_no_numbers_are_the_same_in_every_way(place, is_causal):
    model = tiny_model(GengramModel, memory_layers=[0], num_hidden_layers=1, is_causal=is_causal)
    table, row = place
    model.layers[0].motif_memory.embeddings[table].weight[row, 1] = float("nan")
    ids = random_ids(3, 40)
    ids[0, 3:12] = 8  # a run of A holds row 0 of every table
    ids[1, 20:23] = torch.tensor([6, 5, 6])  # row 57
    rows = torch.zeros(3, 40, dtype=torch.bool)  # where the k-mer of that row ends
    digits = {8: 0, 5: 1, 6: 2, 7: 3, 9: 4}
    for r, sequence in enumerate(ids.tolist()):
        for end in range(table, 40):
            kmer = [digits.get(token) for token in sequence[end - table : end + 1]]
            if None not in kmer:
                rows[r, end] = sum(digit * 5 ** (table - i) for i, digit in enumerate(kmer)) == row
    expected = torch.zeros(3, 40, dtype=torch.bool)
    for t in range(40):
        first, last = (t - 8, t) if is_causal else (t - 4, t + 4)
        expected[:, t] = rows[:, max(first + table, 0) : last + 1].any(1)
    assert expected.any() and not expected.all()
    for way in WAYS:
        with memory_path(way):
            gates = model(ids, output_memory_gates=True).memory_gates[0]
        assert torch.equal(gates.isnan(), expected), way


@torch.no_grad()
@each_way
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_window_is_never_longer_than_the_sequence(way, is_causal):
    """A window of 65,536 bases costs what one of the sequence's length does, and gives the same."""
    heads = GengramForCausalLM if is_causal else GengramForMaskedLM
    ids = random_ids(2, 20)
    found = []
    for window in (64, 2**16):
        model = tiny_model(heads, memory_window=window)
        with memory_path(way):
            found.append(model(ids).logits)
            if is_causal:
                cache = DynamicCache(config=model.config)
                parts = [model(part, cache=cache).logits for part in ids.split([11, 1, 8], dim=1)]
                torch.testing.assert_close(torch.cat(parts, dim=1), found[-1], **FP32)
    torch.testing.assert_close(*found, **FP32)


def test_a_long_window_trains():
    ids, gradients = random_ids(2, 20), []
    for window in (64, 2**16):
        for way in ("token_major", "table_major"):
            model = tiny_model(GengramForCausalLM, memory_window=window).train()
            with memory_path(way):
                model(ids, labels=ids).loss.backward()
            gradients.append(model.model.layers[2].motif_memory.embeddings[1].weight.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], **FP32)


def test_an_activation_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"hidden_act must be one of .*silu.*, got 'sliu'"):
        GengramModel(tiny_config(hidden_act="sliu"))
