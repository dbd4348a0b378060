"""Tracks beside a brute force in float64 that reads one window at a time, and where they have no values."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tolerances import FLOAT32_RELATIVE, SAME_FP32
from transformers import GPT2Config, GPT2LMHeadModel

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramTokenizer
from gengram.inference.base_tokens import BaseTokens
from gengram.inference.tracks import VALUES, TrackModel, base_entropy, tracks_of
from gengram.sequences.alphabet import reverse_complement

CONTEXT, OVERLAP = 24, 9
TOKENIZER = GengramTokenizer()
TOKENS = BaseTokens.of(TOKENIZER)
MODELS = {
    "causal": tiny_model(GengramForCausalLM),
    "masked": tiny_model(GengramForMaskedLM, is_causal=False),
    "no memory": tiny_model(GengramForCausalLM, memory_layers=[]),
}
LAYERS = (0, 2)


def random_text(length, seed=0, letters="ACGT"):
    return "".join(random.Random(seed).choices(letters, k=length))


@functools.cache
def in_float64(kind):
    return tiny_model(type(MODELS[kind]), memory_layers=MODELS[kind].config.memory_layers).double()


def track_model(kind, model=None, **options):
    values = VALUES if MODELS[kind].config.memory_layers else VALUES[:2]
    fields = dict(is_masked=kind == "masked", values=values, context=CONTEXT, overlap=OVERLAP)
    return TrackModel(model or MODELS[kind], TOKENS, **{**fields, **options})


def window_of(base, length, both_sides):
    """Of all windows that hold a base the one that shows the model most, as `long_sequences` puts it."""
    starts = [0]
    while starts[-1] + CONTEXT < length:
        starts.append(min(len(starts) * (CONTEXT - OVERLAP), max(0, length - CONTEXT)))
    holding = [start for start in starts if start <= base < start + CONTEXT]
    distance = (lambda start: abs(start + (CONTEXT - 1) / 2 - base)) if both_sides else (lambda start: start)
    return min(holding, key=distance)


@torch.no_grad()
def by_brute_force(kind, text):
    """The same numbers base by base: a pass over one window for each."""
    model, is_masked = in_float64(kind), kind == "masked"
    found = {track.name: np.full(len(text), np.nan) for track in tracks_of(VALUES, "both", LAYERS)}
    for strand in ("forward", "reverse"):
        read = text if strand == "forward" else reverse_complement(text)
        for base in range(len(read)):
            place = base if strand == "forward" else len(read) - 1 - base
            if read[base] not in "ACGT":
                continue
            start = window_of(base, len(read), is_masked)
            ids = TOKENIZER(read[start : start + CONTEXT], return_tensors="pt")["input_ids"]
            outputs = model(input_ids=ids, output_memory_gates=True, output_memory_residual_norms=True)
            at, predicted = base - start, outputs.logits
            for layer, gate, norm in zip(LAYERS, outputs.memory_gates, outputs.memory_residual_norms, strict=True):
                found[f"gate.layer{layer}.{strand}"][place] = gate[0, at]
                found[f"residual.layer{layer}.{strand}"][place] = norm[0, at]
            if is_masked:
                masked = ids.clone()
                for other in range(ids.shape[1]):
                    other_place = start + other if strand == "forward" else len(read) - 1 - start - other
                    if other_place % 8 == place % 8:
                        masked[0, other] = TOKENIZER.mask_token_id
                logits = model(input_ids=masked).logits[0, at]
            elif at == 0:
                continue
            else:
                logits = predicted[0, at - 1]
            p = logits.softmax(-1)
            found[f"surprisal.{strand}"][place] = -math.log2(p[TOKENIZER.convert_tokens_to_ids(read[base])])
            of_bases = p[TOKENIZER.convert_tokens_to_ids(list("ACGT"))]
            of_bases = (of_bases / of_bases.sum()).tolist()
            found[f"entropy.{strand}"][place] = -sum(share * math.log2(share) for share in of_bases)
    return found


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("length", [1, 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 50])
def test_values_are_those_of_a_brute_force(kind, length):
    text = random_text(length, letters="ACGTACGTN")
    expected = by_brute_force(kind, text)
    exact = track_model(kind, in_float64(kind)).of_sequence(text)
    rounded = track_model(kind).of_sequence(text)
    assert set(exact) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(exact[name], values, rtol=FLOAT32_RELATIVE, atol=FLOAT32_RELATIVE, err_msg=name)
        np.testing.assert_allclose(rounded[name], values, rtol=SAME_FP32, atol=SAME_FP32, err_msg=name)


LONG = random_text(120, seed=1, letters="ACGTN" * 3 + "acgtRY")


@functools.cache
def of_long_text(kind):
    return track_model(kind).of_sequence(LONG)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 119), st.integers(1, 120), st.integers(1, 120))
def test_values_depend_neither_on_the_part_that_is_asked_for_nor_on_the_batch(kind, start, size, batch_tokens):
    end = min(start + size, len(LONG))
    part = track_model(kind, batch_tokens=batch_tokens).of_part(lambda a, b: LONG[a:b], len(LONG), start, end)
    for name, values in of_long_text(kind).items():
        np.testing.assert_allclose(part[name], values[start:end], rtol=SAME_FP32, atol=SAME_FP32, err_msg=name)


def test_bases_have_values_and_nothing_else_does():
    is_base = np.array([letter in "ACGTacgt" for letter in LONG])
    for name, values in of_long_text("causal").items():
        expected = is_base.copy()
        if name.startswith(("surprisal", "entropy")):  # nothing is known before the first base of a strand
            expected[0 if name.endswith("forward") else -1] = False
        np.testing.assert_array_equal(~np.isnan(values), expected, err_msg=name)
    assert all(np.array_equal(~np.isnan(values), is_base) for values in of_long_text("masked").values())


def test_strands_are_those_of_the_reverse_complement():
    forward, reverse = (of_long_text("causal") for _ in range(2))
    turned = track_model("causal").of_sequence(reverse_complement(LONG))
    for name, values in reverse.items():
        if name.endswith("reverse"):
            expected = turned[name.replace("reverse", "forward")][::-1]
            np.testing.assert_array_equal(values, expected)
    one = track_model("causal", strands="reverse", values=("gate",)).of_sequence(LONG)
    assert list(one) == ["gate.layer0.reverse", "gate.layer2.reverse"]
    np.testing.assert_allclose(one["gate.layer2.reverse"], forward["gate.layer2.reverse"], atol=SAME_FP32)


def test_without_overlap_a_base_may_have_nothing_before_it():
    values = track_model("causal", overlap=0).of_sequence(random_text(3 * CONTEXT))["surprisal.forward"]
    assert np.flatnonzero(np.isnan(values)).tolist() == [0, CONTEXT, 2 * CONTEXT]


def test_progress_adds_up_to_the_bases():
    told = []
    model = track_model("causal", batch_tokens=2 * CONTEXT)
    model.of_part(lambda a, b: LONG[a:b], len(LONG), 10, 110, told.append)
    assert sum(told) == 100 and len(told) > 5 and min(told) > 0


def test_windows_of_nothing_but_n_are_not_read():
    model = track_model("causal")
    read = []
    hook = model.model.register_forward_pre_hook(lambda *_args: read.append(1))
    values = model.of_sequence("N" * 500)
    hook.remove()
    assert not read and all(np.isnan(track).all() for track in values.values())
    assert all(len(track) == 0 for track in model.of_sequence("").values())


def test_other_models_and_special_tokens_around():
    config = GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    tokens = BaseTokens(TOKENS.bases, TOKENS.other, before=(1, 2), after=(3,))
    text = random_text(20)
    values = TrackModel(model, tokens, strands="forward", context=61).of_sequence(text)
    ids = torch.tensor([[1, 2, *TOKENIZER(text)["input_ids"], 3]])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    expected = [-log_p[at - 1, ids[0, at]] / math.log(2) for at in range(3, 22)]
    assert np.isnan(values["surprisal.forward"][0])
    np.testing.assert_allclose(values["surprisal.forward"][1:], expected, rtol=SAME_FP32)


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0, 0, 0], [0, 0, -math.inf, -100], [50, -50, -50, -50]])
    np.testing.assert_allclose(base_entropy(logits), [2, 1, 0], atol=SAME_FP32)
