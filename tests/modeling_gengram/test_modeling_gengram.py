"""The models: invariances that must hold whatever the weights are, and what users ask of them."""

import copy
import inspect
import warnings

import pytest
import torch
from tiny_models import HEADS, random_ids, tiny_config, tiny_model
from tolerances import CHANGED_LOGITS, ROUTER_LOSSES_FP32, ROUTER_LOSSES_FP32_RELATIVE, SAME_FP32
from transformers import DynamicCache, MixtralForCausalLM, StaticCache

from gengram import (
    GengramConfig,
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramModel,
)
from gengram.motif_memory import MemoryState, plan_ngrams

VARIANTS = {
    "moe": {},
    "dense": {"num_local_experts": 0},
    "multi-query, wide heads": {"num_key_value_heads": 1, "head_dim": 20},
    "sizes out of order": {"memory_ngram_sizes": [3, 1, 2]},
    "no convolution": {"memory_conv_kernel": 0},
    "one tap": {"memory_conv_kernel": 1},
    "window of one": {"memory_window": 1, "memory_ngram_sizes": [1]},
    "nothing to remember": {"memory_window": 1, "memory_ngram_sizes": [1], "memory_conv_kernel": 0},
    "long convolution": {"memory_conv_kernel": 5, "memory_conv_dilation": 7},
    "no memory": {"memory_layers": []},
    "softmax before top-1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "as trained": {"memory_pooling": "as_trained"},
}
FP32 = dict(rtol=0, atol=SAME_FP32)


@pytest.fixture(params=list(VARIANTS), ids=str)
def variant(request):
    return VARIANTS[request.param]


@torch.no_grad()
def test_memory_matters_in_these_tests():
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 30)
    before = model(ids).logits
    model.model.layers[2].motif_memory.value_proj.weight.zero_()
    assert (model(ids).logits - before).abs().max() > 0.1


@torch.no_grad()
def test_cached_equals_full_whatever_the_chunks(variant):
    model, ids = tiny_model(GengramForCausalLM, **variant), random_ids(2, 40)
    full = model(ids).logits
    for chunks in ([40], [1] * 40, [7, 1, 1, 20, 11], [3, 37]):
        cache, parts = DynamicCache(config=model.config), []
        for piece in ids.split(chunks, dim=1):
            parts.append(model(piece, cache=cache).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), full, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("head", [GengramModel, GengramForCausalLM], ids=lambda head: head.__name__)
def test_a_cache_has_two_names(head):
    """`past_key_values`, and `cache` since Transformers 5.24; whatever the library is, both work."""
    model, ids = tiny_model(head), random_ids(1, 20)
    full = model(ids)[0]
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :13], **{name: cache})
        assert model(ids[:, 13:14], **{name: cache})[1] is cache
        torch.testing.assert_close(first[0], full[:, :13], **FP32)
        torch.testing.assert_close(model(ids[:, 14:], **{name: cache})[0], full[:, 14:], **FP32)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=cache, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_the_older_name_of_a_cache_is_deprecated_where_the_library_says_so(head):
    model, ids = tiny_model(head), random_ids(1, 9)
    if head is GengramForMaskedLM:
        pytest.skip("has no cache")
    is_renamed = "cache" in inspect.signature(MixtralForCausalLM.forward).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        first = model(ids, cache=DynamicCache(config=model.config))  # nor does a head use the older name inside
        if head is GengramForCausalLM:
            model.generate(ids, max_new_tokens=2, do_sample=False)
        if not is_renamed:
            second = model(ids, past_key_values=DynamicCache(config=model.config))
    if is_renamed:
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated .* Use `cache` instead"):
            second = model(ids, past_key_values=DynamicCache(config=model.config))
    assert torch.equal(first[0], second[0])


@torch.no_grad()
def test_a_cache_is_returned_only_if_it_is_used():
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 9)
    cache = DynamicCache(config=model.config)
    assert len(model(ids, cache=cache, use_cache=False).to_tuple()) == 1
    assert model(ids[:, :1], cache=cache)[1] is cache and cache.get_seq_length() == 10


@torch.no_grad()
def test_static_cache_equals_full(variant):
    model, ids = tiny_model(GengramForCausalLM, **variant), random_ids(2, 24)
    cache = StaticCache(config=model.config, max_cache_len=32)
    parts = [model(ids[:, :10], cache=cache).logits]
    parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(10, 24)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **FP32)


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[r, where], mask[r, where] = row, 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", [GengramForCausalLM, GengramForMaskedLM])
@pytest.mark.parametrize("pad_token", [0, 8])  # 8 is the letter A: what is masked must not be read as a letter
def test_ragged_batch_equals_one_by_one(head, side, pad_token, variant):
    if head is GengramForMaskedLM and variant.get("memory_pooling") == "as_trained":
        pytest.skip("as_trained repeats the original, which is causal")
    model = tiny_model(head, **variant)
    rows = [random_ids(1, length, seed=length)[0] for length in (31, 5, 18, 1)]
    ids, mask = pad(rows, side)
    ids = torch.where(mask == 0, pad_token, ids)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = model(ids, attention_mask=mask, position_ids=positions).logits
    for r, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(batch[r][mask[r].bool()], alone, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["last", "centre", "mean", "max"])
def test_sequence_classification_reads_what_its_pooling_says(pooling, is_causal, side):
    model = tiny_model(GengramForSequenceClassification, classifier_pooling=pooling, is_causal=is_causal, num_labels=3)
    rows = [random_ids(1, length, seed=length)[0] for length in (31, 6, 18, 1)]
    expected = []
    for row in rows:
        hidden = model.model(row[None]).last_hidden_state[0].double()
        vector = {
            "last": hidden[-1],
            "centre": hidden[(len(row) - 1) // 2],
            "mean": sum(hidden) / len(row),
            "max": torch.stack([max(column) for column in hidden.T]),
        }[pooling]
        expected.append(model.score.weight.double() @ vector)
    ids, mask = pad(rows, side)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    labels = torch.tensor([0, 2, 1, 1])
    found = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
    torch.testing.assert_close(found.logits.double(), torch.stack(expected), **FP32)
    loss = torch.stack([-row.log_softmax(0)[label] for row, label in zip(expected, labels, strict=True)]).mean()
    torch.testing.assert_close(found.loss.double(), loss, **FP32)
    if side == "right" and is_causal:  # what is padding is known from the ids too
        torch.testing.assert_close(model(ids).logits, found.logits, **FP32)
    (alone,) = model(inputs_embeds=model.model.embed_tokens(rows[0][None]), return_dict=False)[:1]
    assert alone.shape == (1, 3)


def test_a_pooling_that_is_not_known_or_cannot_be_done_is_an_error():
    with pytest.raises(ValueError, match=r"classifier_pooling must be one of mean, max, last, centre, got 'middle'"):
        tiny_config(classifier_pooling="middle")
    model = tiny_model(GengramForSequenceClassification, classifier_pooling="mean")
    with pytest.raises(ValueError, match=r"needs an attention_mask of \(batch, length\), got \(1, 1, 5, 5\)"):
        model(random_ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))


@torch.no_grad()
def test_left_padding_without_position_ids_does_not_reach_the_memory():
    model = tiny_model(GengramForCausalLM)
    row = random_ids(1, 20)[0]
    ids, mask = pad([row, random_ids(1, 29)[0]], "left")
    gates = model(ids, attention_mask=mask, output_memory_gates=True).memory_gates[0]
    alone = model(row[None], output_memory_gates=True).memory_gates[0]
    torch.testing.assert_close(gates[0, 9:], alone[0], **FP32)  # layer 0: before attention turns by position


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_sequences_do_not_see_each_other(implementation, variant):
    if variant.get("memory_pooling") == "as_trained":
        pytest.skip("as_trained repeats the original, which does not separate packed sequences")
    model = tiny_model(GengramForCausalLM, **variant)
    model.set_attn_implementation(implementation)
    rows = [random_ids(1, length, seed=length) for length in (13, 4, 22)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(row).logits for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, **FP32)


@torch.no_grad()
def test_without_position_ids_documents_share_a_window_as_in_the_original():
    """The authors separate documents by a token that is no letter: no k-mer spans it, but windows look past it."""
    model = tiny_model(GengramForCausalLM)
    left, right = random_ids(1, 12, non_letters=0), random_ids(1, 12, seed=1, non_letters=0)
    row = torch.cat([left, torch.tensor([[12]]), right], dim=1)
    gates = model(row, output_memory_gates=True).memory_gates[0][:, 13:]
    assert not torch.allclose(gates, model(right, output_memory_gates=True).memory_gates[0])


@torch.no_grad()
def test_causal_model_does_not_look_ahead_and_bidirectional_does():
    ids = random_ids(1, 30)
    changed = ids.clone()
    changed[0, 20] = 5 if ids[0, 20] != 5 else 6
    causal = tiny_model(GengramForCausalLM)
    torch.testing.assert_close(causal(ids).logits[:, :20], causal(changed).logits[:, :20], **FP32)
    both = tiny_model(GengramForMaskedLM)
    assert not torch.allclose(both(ids).logits[:, :20], both(changed).logits[:, :20])
    assert not torch.allclose(both(ids).logits[:, 25:], both(changed).logits[:, 25:])


@torch.no_grad()
def test_bidirectional_use_of_any_head_is_a_config_field():
    ids = random_ids(2, 20)
    masked = tiny_model(GengramForMaskedLM)
    assert masked.config.is_causal is False
    base = GengramModel(masked.config).eval()
    base.load_state_dict(masked.model.state_dict())
    hidden = base(ids).last_hidden_state
    torch.testing.assert_close(masked.lm_head(hidden), masked(ids).logits, **FP32)
    assert base(ids, use_cache=True).past_key_values is None
    causal = base(ids, is_causal=True).last_hidden_state
    assert base.config.is_causal is False and not torch.allclose(causal, hidden)


def test_masked_model_leaves_the_callers_config_alone():
    config = tiny_config()
    assert GengramForMaskedLM(config).config.is_causal is False
    assert config.is_causal is True


def test_uses_that_contradict_each_other_are_errors():
    with pytest.raises(ValueError, match="predicts from the past alone"):
        GengramForCausalLM(tiny_config(is_causal=False))
    with pytest.raises(ValueError, match="as_trained"):
        GengramForMaskedLM(tiny_config(memory_pooling="as_trained"))
    with pytest.raises(ValueError, match="as_trained"):
        tiny_model(GengramModel, memory_pooling="as_trained")(random_ids(1, 5), is_causal=False)


@torch.no_grad()
def test_masked_base_does_not_leak_into_its_own_prediction():
    """Two sequences that differ in one base are the same once it is masked; no k-mer of it is read."""
    model = tiny_model(GengramForMaskedLM)
    ids = random_ids(1, 30, non_letters=0)
    ids[0, 15] = 4
    gates = model(ids, output_memory_gates=True).memory_gates
    plan = plan_ngrams(model.model._letter_codes(ids, None), model.config.memory, is_causal=False)
    for index, size in enumerate(model.config.memory_ngram_sizes):
        assert not plan.valid(index)[0, 15 : 15 + size].any()
    assert len(gates) == 2


@torch.no_grad()
def test_cache_of_another_kind_is_a_clear_error():
    model = tiny_model(GengramForCausalLM)
    other = StaticCache(config=tiny_config(memory_layers=[]), max_cache_len=8)
    with pytest.raises(ValueError, match=r"no room for the memory of layer 0: .* DynamicCache\(config=model.config\)"):
        model(random_ids(1, 5), cache=other)
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 5), cache=cache)
    with pytest.raises(ValueError, match="is_causal=False"):
        model(random_ids(1, 5), cache=cache, is_causal=False)


@torch.no_grad()
@pytest.mark.parametrize("head", [GengramForCausalLM, GengramForMaskedLM])
def test_embeddings_of_letters_are_read_as_letters(head):
    model, ids = tiny_model(head), random_ids(2, 25)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, **FP32)
    soft = embeds + 0.01
    no_letters = torch.full_like(ids, 3)
    torch.testing.assert_close(
        model(inputs_embeds=soft).logits, model(inputs_embeds=soft, memory_input_ids=no_letters).logits, **FP32
    )
    assert not torch.allclose(
        model(inputs_embeds=soft).logits, model(inputs_embeds=soft, memory_input_ids=ids).logits, atol=CHANGED_LOGITS
    )


@torch.no_grad()
def test_outputs_tell_what_the_memory_did():
    model, ids = tiny_model(GengramForCausalLM), random_ids(2, 25)
    seen = []
    for layer in model.config.memory_layers:
        model.model.layers[layer].motif_memory.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    outputs = model(ids, output_memory_gates=True, output_memory_residual_norms=True)
    assert len(outputs.memory_gates) == len(outputs.memory_residual_norms) == 2
    for gate, norm, residual in zip(outputs.memory_gates, outputs.memory_residual_norms, seen, strict=True):
        assert gate.shape == (2, 25) and (gate > 0).all() and (gate < 1).all()
        torch.testing.assert_close(norm, residual.norm(dim=-1))
    plain = model(ids)
    assert plain.memory_gates is None and plain.memory_residual_norms is None


def test_expert_parallelism_finds_the_number_of_experts():
    """Transformers' hooks for expert parallelism read it from the router (seen in 5.18)."""
    routers = [layer.mlp.gate for layer in tiny_model(GengramForCausalLM).model.layers]
    assert [router.num_experts for router in routers] == [4, 4, 4, 4]


def test_router_losses_follow_their_formulas():
    model, ids = tiny_model(GengramForCausalLM), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    outputs = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    logits = torch.stack([layer.double() for layer in outputs.router_logits])[:, mask.flatten().bool()]
    z_loss = torch.log(torch.exp(logits).sum(-1)).square().mean()
    probabilities = torch.softmax(logits, dim=-1).flatten(0, 1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
    aux_loss = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
    near = dict(rtol=ROUTER_LOSSES_FP32_RELATIVE, atol=ROUTER_LOSSES_FP32)
    torch.testing.assert_close(outputs.z_loss.double(), z_loss, **near)
    torch.testing.assert_close(outputs.aux_loss.double(), aux_loss, **near)
    plain = model(ids, attention_mask=mask, labels=ids).loss
    expected = plain + 0.001 * outputs.aux_loss + 0.001 * outputs.z_loss
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_changes_nothing(head):
    ids = random_ids(2, 20)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(head).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        outputs = model(ids)
        outputs[0].float().square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("motif_memory" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_autocast_is_close_to_float32(head):
    model, ids = tiny_model(head), random_ids(2, 20)
    exact = model(ids)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids)[0]
    outputs.float().square().mean().backward()
    assert torch.isfinite(outputs).all()
    # single experts may flip, so only most values must be near
    assert ((outputs - exact).abs() < 0.1 * exact.std()).float().mean() > 0.9
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_expert_implementations_agree(experts):
    model, ids = tiny_model(GengramForCausalLM), random_ids(2, 20)
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    model.set_experts_implementation(experts)
    torch.testing.assert_close(model(ids).logits, expected, **FP32)
    assert model.double()(ids).logits.dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_expert_widths_that_grouped_products_do_not_take(dtype):
    model, ids = tiny_model(GengramForCausalLM, hidden_size=18, intermediate_size=14).to(dtype), random_ids(1, 20)
    logits = model(ids).logits
    model.set_experts_implementation("eager")
    assert torch.equal(logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", [GengramForCausalLM, GengramForMaskedLM])
def test_attention_implementations_agree(head, implementation):
    model = tiny_model(head, head_dim=16)
    ids, mask = pad([random_ids(1, 24)[0], random_ids(1, 17)[0]], "right")
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], **FP32)


def save(model, folder) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_save_load_save_is_byte_identical(head, tmp_path):
    model, ids = tiny_model(head), random_ids(1, 20)
    first = save(model, tmp_path / "first")
    loaded, again = head.from_pretrained(tmp_path / "first"), head.from_pretrained(tmp_path / "first")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
        assert torch.equal(again.state_dict()[name], weight), name
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0], **FP32)
    assert save(loaded, tmp_path / "second") == first


def test_causal_weights_as_masked_model_warn_once_in_plain_words(tmp_path, caplog):
    tiny_model(GengramForCausalLM).save_pretrained(tmp_path / "causal")
    for _ in range(2):
        model = GengramForMaskedLM.from_pretrained(tmp_path / "causal")
    warnings = [record for record in caplog.records if "next base, not masked ones" in record.getMessage()]
    assert len(warnings) == 1
    caplog.clear()
    model.save_pretrained(tmp_path / "masked")
    reloaded = GengramForMaskedLM.from_pretrained(tmp_path / "masked")
    assert reloaded.config.is_causal is False
    assert not [record for record in caplog.records if "masked ones" in record.getMessage()]


@torch.no_grad()
def test_lengths_down_to_one():
    model = tiny_model(GengramForCausalLM)
    for length in range(1, 12):
        assert torch.isfinite(model(random_ids(1, length)).logits).all()


@torch.no_grad()
def test_compiled_forward_equals_eager():
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 20)
    model.set_experts_implementation("batched_mm")
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **FP32)


# Generation


GENERATION = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)


@torch.no_grad()
def greedy_by_hand(model, row: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], dim=1)
    return row


def test_greedy_generation_of_a_left_padded_batch_equals_recomputation(variant):
    model = tiny_model(GengramForCausalLM, **variant)
    rows = [random_ids(1, length, seed=length) for length in (9, 17, 3)]
    ids, mask = pad([row[0] for row in rows], "left")
    generated = model.generate(ids, attention_mask=mask, **GENERATION)
    for r, row in enumerate(rows):
        assert torch.equal(generated[r, -12:], greedy_by_hand(model, row, 12)[0, -12:])


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=3),
        dict(num_beams=3, num_return_sequences=2),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=4),
    ],
    ids=str,
)
def test_ways_of_generation_agree_with_no_cache(how):
    model, ids = tiny_model(GengramForCausalLM), random_ids(2, 14)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATION, **how, disable_compile=True)
    how = {name: value for name, value in how.items() if name not in ("cache_implementation", "prefill_chunk_size")}
    assert torch.equal(cached, model.generate(ids, use_cache=False, **GENERATION, **how))


def test_assisted_decoding_rolls_the_memory_back():
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 14)
    assistant = tiny_model(GengramForCausalLM, seed=3)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GENERATION), model.generate(ids, **GENERATION))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_first_layers_draft_what_all_layers_check(layers):
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 14)
    expected = model.generate(ids, **GENERATION)
    assert torch.equal(model.generate(ids, assistant_early_exit=layers, **GENERATION), expected)
    assert torch.equal(model.generate(ids, **GENERATION), expected)


def test_a_failed_draft_leaves_no_trace(monkeypatch):
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 14)
    expected = model.generate(ids, **GENERATION)
    for layers in (0, -1, 5):
        with pytest.raises(ValueError, match=f"assistant_early_exit must lie in 1..4 .*, got {layers}"):
            model.generate(ids, assistant_early_exit=layers, **GENERATION)
    layer, forward = model.model.layers[0], model.model.layers[0].forward

    def fail(*args, **kwargs):
        if model.config.num_hidden_layers == 1:
            raise RuntimeError("in the middle of a draft")
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.generate(ids, assistant_early_exit=1, **GENERATION)
    monkeypatch.undo()
    assert torch.equal(model.generate(ids, **GENERATION), expected)


@torch.no_grad()
def test_a_cache_that_is_offloaded_keeps_the_memorys_states_in_place():
    """A layer's memory reads them before its attention, for which alone such a cache brings a layer back."""
    model = tiny_model(GengramForCausalLM)
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 20), cache=cache, use_cache=True)

    class MovedError(Exception):
        pass

    class Fixed:
        device = "elsewhere"

        def to(self, *place, **how):
            raise MovedError

    layer = cache.layers[model.config.memory_layers[0]]
    layer.conv_states = [Fixed() for _ in layer.conv_states]
    with pytest.raises(MovedError):
        layer.offload()
    cache.offloading = True  # as of a GPU's cache
    MemoryState.of(cache, model.config.memory, model.config.memory_layers)
    layer.offload()
    layer.prefetch()
    layer.keys = Fixed()
    with pytest.raises(MovedError):
        layer.offload()


@torch.no_grad()
def test_cache_can_be_cropped_and_reordered():
    model, ids = tiny_model(GengramForCausalLM), random_ids(3, 20)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording() if hasattr(cache, "activate_past_recording") else None
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
    model(ids, cache=cache)
    cache.crop(-6)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    ours = model(ids[order][:, 14:], cache=cache).logits
    torch.testing.assert_close(ours, model(ids[order]).logits[:, 14:], **FP32)


def test_sampling_can_be_kept_to_bases():
    model, ids = tiny_model(GengramForCausalLM), random_ids(4, 10)
    others = [token for token in range(128) if token not in (8, 5, 6, 7)]
    torch.manual_seed(0)
    free = model.generate(ids, max_new_tokens=40, do_sample=True, pad_token_id=0)
    kept = model.generate(ids, max_new_tokens=40, do_sample=True, pad_token_id=0, suppress_tokens=others)
    assert not set(free[:, 10:].flatten().tolist()) <= {5, 6, 7, 8}
    assert set(kept[:, 10:].flatten().tolist()) <= {5, 6, 7, 8}


# Configuration of the models


def test_vocabulary_can_be_resized_below_the_letters():
    """A toy, but the library's own tests do it: a model can then be built from the resized configuration."""
    model = tiny_model(GengramForCausalLM)
    model.resize_token_embeddings(4)
    for head in (GengramForCausalLM, GengramForMaskedLM):
        assert head(model.config).get_input_embeddings().num_embeddings == 4


def test_masked_model_keeps_other_fields():
    config = tiny_config(num_labels=5)
    masked = GengramForMaskedLM(config)
    expected = copy.deepcopy(config).to_dict() | {"is_causal": False}
    ours = masked.config.to_dict()
    assert {name: ours[name] for name in expected} == expected


@pytest.mark.parametrize("head", HEADS)
def test_dtypes(head):
    ids = random_ids(1, 9)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model = tiny_model(head).to(dtype)
        with torch.no_grad():
            outputs = model(ids)[0]
        assert outputs.dtype == dtype and torch.isfinite(outputs).all()


def test_default_configuration_has_the_size_of_the_released_model():
    with torch.device("meta"):
        model = GengramForCausalLM(GengramConfig(head_dim=256))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 10.48
