"""Shares of k-mers beside brute force, what they sum to, and the authors' recorded numbers."""

import pytest
import torch
from graft_hosts import VOCABULARIES, grafted
from graft_hosts import random_ids as random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_files import FIXTURES, fixture_tensors, needs_fixtures
from shares_oracle import shares_of
from tiny_models import LETTERS, random_ids, tiny_model
from tolerances import LOGITS_FP32, MEMORY_FP32, PATH_INTEGRAL, SAME_FP32, SHARES_FP64
from transformers import AutoModelForCausalLM

import gengram
from gengram import GengramForCausalLM, GengramForMaskedLM, GengramForSequenceClassification, explain_memory
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.inference.explanation import explain_targets, residual_norms

TARGETS = ("gate_logit", "residual_norm", "base:actual", "base:G")


def sums_to_total(found, bound=SHARES_FP64) -> bool:
    shares = found.grid.shares
    assert bool((shares[~found.grid.is_there] == 0).all())
    scale = torch.maximum(found.total.abs(), shares.abs().amax((2, 3)))
    return bool(((shares.sum((2, 3)) - found.total).abs() <= bound * scale).all())


def oracle_rows(model, ids, layer, target, segments=None):
    """The table that brute force gives, of one row of ids."""
    memory, seen = model.model.layers[layer].motif_memory, []
    hook = memory.register_forward_hook(lambda _m, given, output: seen.append((given[0], output.residual)))
    with torch.no_grad():
        model(ids, use_cache=False) if segments is None else model(ids, position_ids=segments[1])
    hook.remove()
    hidden, residual = (part[0].double() for part in seen[0])
    weights = {name: value.double() for name, value in memory.state_dict().items()}
    config = memory.config
    if target == "residual_norm":
        target = residual / residual.norm(dim=-1, keepdim=True)
    rows = shares_of(
        hidden, ids[0].tolist(), weights, target, sizes=list(config.ngram_sizes), window=config.window,
        letters=LETTERS, dilation=config.conv_dilation, eps=config.norm_eps, centred=not model.config.is_causal,
        segments=None if segments is None else segments[0],
    )  # fmt: skip
    return {(t, config.ngram_sizes[index], start): share for (t, index, start), share in rows.items()}


def as_rows(found) -> dict:
    return {(row["position"], len(row["kmer"]), row["start"]): row["contribution"] for row in found.table.to_pylist()}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    length=st.integers(1, 30),
    sizes=st.sampled_from([[1, 2, 3], [2], [3, 1], [1, 4]]),
    window=st.integers(4, 10),
    taps=st.integers(0, 4),
    dilation=st.integers(1, 5),
    is_causal=st.booleans(),
    target=st.sampled_from(["gate_logit", "residual_norm"]),
)
def test_every_share_is_that_of_brute_force(seed, length, sizes, window, taps, dilation, is_causal, target):
    model_class = GengramForCausalLM if is_causal else GengramForMaskedLM
    sizes_of_model = dict(memory_ngram_sizes=sizes, memory_window=window, memory_conv_kernel=taps)
    model = tiny_model(model_class, seed, memory_conv_dilation=dilation, memory_layers=[0], **sizes_of_model).double()
    ids = random_ids(1, length, seed=seed, non_letters=0.1)
    found = explain_memory(model, ids, target=target)
    expected, rows = oracle_rows(model, ids, 0, target), as_rows(found)
    assert rows.keys() == expected.keys()
    assert all(rows[place] == pytest.approx(expected[place], abs=SHARES_FP64, rel=SHARES_FP64) for place in expected)
    assert sums_to_total(found)


def test_shares_stay_inside_the_sequences_of_a_packed_row():
    model = tiny_model(GengramForCausalLM, memory_layers=[1]).double()
    ids = random_ids(1, 30, seed=3)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    segments = [0] * 11 + [1] * 19
    found = explain_memory(model, ids, target="residual_norm", position_ids=positions)
    expected, rows = oracle_rows(model, ids, 1, "residual_norm", (segments, positions)), as_rows(found)
    assert rows.keys() == expected.keys()
    assert all(rows[place] == pytest.approx(expected[place], abs=SHARES_FP64) for place in expected)
    assert all(segments[start] == segments[position] for position, _, start in rows)


def test_the_last_base_of_a_packed_sequence_is_followed_by_none():
    model = tiny_model(GengramForCausalLM).eval()
    ids, lengths = random_ids(1, 30), (13, 17)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = explain_memory(model, ids, layer=2, target="base:actual", position_ids=positions).total[0]
    alone = [explain_memory(model, part, layer=2, target="base:actual").total[0] for part in ids.split(lengths, 1)]
    assert packed[12] == packed[29] == 0
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=SAME_FP32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shares_sum_to_the_whole_in_every_dtype(target, dtype):
    model = tiny_model(GengramForCausalLM).to(dtype)
    for layer in (0, 2):
        assert sums_to_total(explain_memory(model, random_ids(2, 70), layer=layer, target=target))


def test_padding_has_no_shares():
    model = tiny_model(GengramForCausalLM, memory_layers=[2]).double()
    ids = random_ids(1, 25, seed=5)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    plain = as_rows(explain_memory(model, ids, target="residual_norm"))
    moved = as_rows(explain_memory(model, padded, target="residual_norm", attention_mask=mask))
    expected = {(t + 6, k, start + 6): share for (t, k, start), share in plain.items()}
    assert moved == pytest.approx(expected, rel=0, abs=SAME_FP32)  # rotary angles are float32


@needs_fixtures
@pytest.mark.parametrize(
    ("folder", "layers"), [("model_a/torch_te_pp1", (1, 3, 4)), ("model_b/torchdist_local_pp1", (0, 2))]
)
def test_totals_are_the_authors_recorded_residuals(folder, layers, tmp_path):
    convert_to_hf(FIXTURES / folder, tmp_path / "hf", progress=False)
    references = fixture_tensors(folder.split("/")[0], "reference_fp32.safetensors")
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype)
        for case in ("len5", "len30", "len40_special_mid"):
            ids = references[f"{case}/input_ids"]
            for layer in layers:
                recorded = references[f"{case}/gengram_residual.{layer}"].double()
                recorded = recorded.transpose(0, 1) if recorded.shape[:2] != ids.shape else recorded
                found = explain_memory(model, ids, layer=layer, target="residual_norm")
                norms = recorded.norm(dim=-1)
                assert ((found.total - norms).abs() <= LOGITS_FP32 * (1 + norms)).all(), (case, layer)
                for target in TARGETS:
                    assert sums_to_total(explain_memory(model, ids, layer=layer, target=target)), (case, layer, target)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("host", ["llama", "gpt_neox", "bert"])
def test_grafts_on_any_vocabulary_sum_to_what_they_add(host, vocabulary):
    letters = VOCABULARIES[vocabulary]
    model = grafted(host, letters)
    ids = random_tokens(letters, length=20)
    residuals: list = []
    memory = list(gengram.attached_memories(model).values())[1]
    hook = memory.register_forward_hook(lambda _m, _i, output: residuals.append(output.residual.double()))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    found = explain_memory(model, ids, layer=3, target="residual_norm")
    assert sums_to_total(found)
    torch.testing.assert_close(found.total, residuals[0].norm(dim=-1), rtol=MEMORY_FP32, atol=MEMORY_FP32)
    spelled = ["".join(letters[token] for token in row) for row in ids.tolist()]
    rows = found.table.to_pylist()
    assert rows
    for row in rows:
        assert spelled[row["sequence"]][row["start"] :].startswith(row["kmer"])


@pytest.mark.parametrize("host", ["llama", "gpt_neox"])
def test_a_base_by_the_lens_is_the_difference_that_the_memory_makes_to_its_logits(host):
    model = grafted(host)
    ids = random_tokens(length=15)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    found = explain_memory(model, ids, layer="layers.3", target=direction)
    assert sums_to_total(found)
    last = explain_memory(model, ids, layer=3, target="base:G")
    assert sums_to_total(last)
    # Through the held norm the head is linear: the bases' contrasts sum to 0.
    others = [explain_memory(model, ids, layer=3, target=f"base:{base}").total for base in "ACGT"]
    torch.testing.assert_close(sum(others), torch.zeros_like(last.total), rtol=0, atol=SHARES_FP64)


def test_the_lens_is_norm_and_head_of_the_hidden_state():
    """With the memory on the last layer and that layer silenced, the lens is the model's own prediction."""
    model = tiny_model(GengramForCausalLM, memory_layers=[3], num_local_experts=0).double()
    layer = model.model.layers[3]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    ids, seen = random_ids(1, 20, non_letters=0), []
    hook = layer.motif_memory.register_forward_hook(lambda _m, given, output: seen.append((given[0], output.residual)))
    with torch.no_grad():
        logits = model(ids).logits[..., LETTERS[:4]]
    hook.remove()
    hidden, residual = seen[0]
    found = explain_memory(model, ids, target="base:C")
    of_hidden = logits[..., 1] - logits[..., [0, 2, 3]].mean(-1) - found.total
    rms = ((hidden + residual).square().mean(-1) + model.config.rms_norm_eps).sqrt()
    weight = model.model.norm.weight * (model.lm_head.weight[5] - model.lm_head.weight[[8, 6, 7]].mean(0))
    torch.testing.assert_close(of_hidden, (hidden * weight).sum(-1) / rms, rtol=0, atol=SAME_FP32)
    actual = explain_memory(model, ids, target="base:actual").total[0]
    by_base = {base: explain_memory(model, ids, target=f"base:{base}").total[0] for base in "ACGT"}
    letter = {8: "A", 5: "C", 6: "G", 7: "T"}
    for place, token in enumerate(ids[0, 1:].tolist()):
        if token in letter:  # N has no log-odds
            assert actual[place] == pytest.approx(by_base[letter[token]][place].item(), abs=SHARES_FP64)
    assert actual[-1] == 0  # nothing follows


@pytest.mark.parametrize("pooling", ["last", "mean", "centre"])
def test_a_class_by_the_lens_and_through_all_layers(pooling):
    model = tiny_model(GengramForSequenceClassification, num_local_experts=0, num_labels=3, classifier_pooling=pooling)
    model, ids = model.double(), random_ids(2, 20, non_letters=0)
    lens = explain_memory(model, ids, layer=2, target="class:LABEL_1")
    assert sums_to_total(lens) and lens.effect is None
    if pooling == "last":
        assert (lens.total[:, :-1] == 0).all() and (lens.total[:, -1] != 0).all()
    found = explain_memory(model, ids, layer=2, target="class:1", through_layers=True, steps=3)
    assert sums_to_total(found)
    memory = model.model.layers[2].motif_memory
    with torch.no_grad():
        before = model(ids).logits[:, 1]
        hook = memory.register_forward_hook(lambda _m, _i, output: output._replace(residual=output.residual * 0))
        silent = model(ids).logits[:, 1]
        hook.remove()
    torch.testing.assert_close(found.effect, before - silent, rtol=0, atol=SAME_FP32)


def test_integrated_gradients_of_the_last_memory_approach_its_effect():
    options = dict(num_local_experts=0, num_labels=2, classifier_pooling="mean", memory_layers=[3])
    model = tiny_model(GengramForSequenceClassification, **options).double()
    found = explain_memory(model, random_ids(3, 24), target="class:1", through_layers=True, steps=64)
    torch.testing.assert_close(found.total.sum(1), found.effect, rtol=0, atol=PATH_INTEGRAL)


def test_weights_keep_their_gradients_and_hooks_are_gone():
    model = tiny_model(GengramForSequenceClassification, num_labels=2)
    explain_memory(model, random_ids(1, 9), layer=0, target="class:0", through_layers=True, steps=2)
    explain_memory(model, random_ids(1, 9), layer=0, target="class:0")
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, r"layer: expected one with a memory \('0', '2'\), got 1"),
        ({}, "got None"),
        ({"layer": 0, "target": "gate"}, "target: expected one of gate_logit"),
        ({"layer": 0, "target": "base:N"}, "expected base:A"),
        ({"layer": 0, "target": "class:x"}, "is no classifier"),
        ({"layer": 0, "target": "gate_logit", "through_layers": True}, "through_layers: expected a target"),
    ],
)
def test_what_is_wrong_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        explain_memory(tiny_model(GengramForCausalLM), random_ids(1, 9), **options)


def test_a_model_in_training_or_without_memory_is_refused():
    with pytest.raises(ValueError, match=r"eval\(\)"):
        explain_memory(tiny_model(GengramForCausalLM).train(), random_ids(1, 9), layer=0)
    with pytest.raises(ValueError, match="no motif memory"):
        explain_memory(tiny_model(GengramForCausalLM, memory_layers=[]), random_ids(1, 9))
    with pytest.raises(ValueError, match="no last norm"):
        explain_memory(grafted("bert"), random_tokens(), layer=1, target="base:A")


@pytest.mark.parametrize("is_causal", [True, False])
def test_without_its_window_a_memory_reads_the_kmers_that_end_at_a_base(is_causal):
    """A window as long as the k-mer holds this k-mer alone, so a memory of one size needs no other window for it."""
    sizes = dict(memory_ngram_sizes=[3], memory_layers=[1])
    model_class = GengramForCausalLM if is_causal else GengramForMaskedLM
    model, ids = tiny_model(model_class, memory_window=3, **sizes).double(), random_ids(2, 30, non_letters=0.1)
    alone = residual_norms(model, ids)
    assert (alone > 0).float().mean() > 0.5
    if is_causal:  # a centred window ends ahead of its base
        torch.testing.assert_close(residual_norms(model, ids, has_window=False), alone, rtol=SHARES_FP64, atol=0)
    wide = tiny_model(model_class, memory_window=9, **sizes).double()
    assert not torch.allclose(residual_norms(wide, ids), residual_norms(wide, ids, has_window=False))
    expected = explain_memory(wide, ids, target="residual_norm").total
    torch.testing.assert_close(residual_norms(wide, ids), expected, rtol=SHARES_FP64, atol=0)


def test_several_targets_are_those_that_are_asked_for_alone():
    model, ids = tiny_model(GengramForCausalLM), random_ids(2, 20)
    for target, found in zip(TARGETS, explain_targets(model, ids, TARGETS, layer=2), strict=True):
        alone = explain_memory(model, ids, layer=2, target=target)
        assert found.target == target and found.rules == alone.rules and found.table == alone.table
