import re

import foreign_models
import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import MEAN_OF_EVEN_DRAWS, SAMPLED_SHARE
from transformers.modeling_outputs import CausalLMOutput

from gengram import GengramConfig, GengramForCausalLM, GengramTokenizer
from gengram.inference import shared_prefix
from gengram.inference.generation import BaseGenerator, Sampling, all_but_bases, random_draws
from gengram.inference.loaded_model import load_model

BASES = "ACGT"


def test_only_bases_are_generated(tiny_folder):
    loaded = load_model(str(tiny_folder), "causal", device="cpu")
    prompt = loaded.tokenizer("ACGT", return_tensors="pt")
    others = all_but_bases(loaded.tokenizer, loaded.model.config)
    assert sorted(others + loaded.tokenizer.nucleotide_ids[:4]) == list(range(loaded.model.config.vocab_size))
    torch.manual_seed(0)
    found = loaded.model.generate(**prompt, max_new_tokens=40, do_sample=True, suppress_tokens=others)
    assert set(loaded.tokenizer.decode(found[0])) == set("ACGT") and found.shape[1] == 44


def test_letters_are_chosen_and_have_to_be_tokens():
    config = GengramConfig()
    others = all_but_bases(GengramTokenizer(), config, "ACGTN")
    assert others == [token for token in range(config.vocab_size) if token not in config.memory_token_ids]
    with pytest.raises(ValueError, match="it lacks X"):
        all_but_bases(GengramTokenizer(), config, "ACX")


def chances(logits, temperature=1.0, top_k=4, top_p=1.0) -> dict[str, float]:
    """What each base is drawn with, by the definition."""
    powers = {base: float(np.exp(logit / temperature)) for base, logit in zip(BASES, logits, strict=True)}
    ranked = sorted(powers, key=lambda base: -powers[base])[:top_k]
    kept, reached = [], 0.0
    for base in ranked:
        if reached < top_p:
            kept.append(base)
        reached += powers[base] / sum(powers.values())
    return {base: powers[base] / sum(powers[other] for other in kept) if base in kept else 0 for base in BASES}


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 3}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}],
)
def test_bases_are_drawn_with_their_probabilities(options):
    logits = np.array([0.3, -0.4, 1.1, 0.2])
    draws = (np.arange(10000) + 0.5) / 10000
    chosen, margin = Sampling(**options).choose(np.tile(logits, (10000, 1)), draws)
    expected = chances(logits, **options)
    for digit, base in enumerate(BASES):
        assert (chosen == digit).mean() == pytest.approx(expected[base], abs=SAMPLED_SHARE)
    changes = np.flatnonzero(np.diff(chosen))
    assert (margin[changes] < 1e-4).all() and margin.max() > 1e-3


def test_no_temperature_is_the_most_likely_base():
    logits = np.array([[0.0, 2.0, 1.0, 1.9999], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    chosen, margin = Sampling(temperature=0).choose(logits, np.zeros(3))
    assert chosen.tolist() == [1, 0, 3]
    assert margin[0] < 1e-4 and margin[1] == 0 and margin[2] > 0.9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_k": 0}, "top_k: expected 1 to 4, got 0"),
        ({"top_p": 1.1}, "top_p: expected more than 0 and at most 1, got 1.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_random_numbers_belong_to_seed_name_and_sample():
    first = random_draws(0, "chr1", 1, 1000)
    assert np.array_equal(first[:10], random_draws(0, "chr1", 1, 10))
    others = [random_draws(1, "chr1", 1, 1000), random_draws(0, "chr2", 1, 1000), random_draws(0, "chr1", 2, 1000)]
    assert all(abs(np.corrcoef(first, other)[0, 1]) < 0.2 for other in others)
    assert 0 <= first.min() and first.max() < 1 and first.mean() == pytest.approx(0.5, abs=MEAN_OF_EVEN_DRAWS)
    assert first[:2].tolist() == [0.3143407057143862, 0.5818469597971326]  # whatever the version of NumPy


def one_by_one(model, tokenizer, prompt, draws, context) -> str:
    """The definition, without a cache or a batch: the new bases."""
    before = len(tokenizer("")["input_ids"])
    text = re.sub("[^ACGT]", "N", prompt.upper().replace("U", "T"))
    half = (context - before) // 2
    ids = tokenizer.convert_tokens_to_ids(list(BASES))
    for draw in draws:
        place = len(text)
        if place + before == 0:
            text += BASES[int(4 * draw)]
            continue
        seen = text[max(0, (place // half - 1) * half) :]
        with torch.no_grad():
            logits = model(**tokenizer(seen, return_tensors="pt")).logits[0, -1, ids]
        ends = logits.double().softmax(0).cumsum(0)
        text += BASES[int((draw >= ends[:3]).sum())]
    return text[len(prompt) :]


def gengram():
    tokenizer = GengramTokenizer(model_max_length=24)
    return tiny_model(GengramForCausalLM, max_position_embeddings=24, num_local_experts=0), tokenizer, 24


MODELS = {
    "gengram": gengram,
    "llama": lambda: (*foreign_models.llama(), 64),
    "gpt2": lambda: (*foreign_models.gpt2(), 64),
}
PROMPTS = ["ACGTTGCAA", "", "GATTNacguRYACGTTGCAAATTGACCAGT", "C"]


@pytest.mark.parametrize("name", MODELS)
def test_new_bases_are_those_drawn_one_by_one(name):
    """Also beyond the context, of prompts of any length side by side, from nothing, and without a cache."""
    model, tokenizer, context = MODELS[name]()
    draws = np.stack([random_draws(3, prompt, 1, 40) for prompt in PROMPTS])
    generator = BaseGenerator(model, tokenizer, Sampling())
    assert generator.reader.can_continue
    found = generator.continued(PROMPTS, draws)
    assert found == [one_by_one(model, tokenizer, *pair, context) for pair in zip(PROMPTS, draws, strict=True)]
    assert len(set(found)) == 4 and set("".join(found)) == set(BASES)
    assert generator.continued(PROMPTS[:1], draws[:1]) == found[:1]
    assert generator.reader.padding == ("masked, with positions" if name == "gpt2" else "masked")
    some = generator.continued(PROMPTS, draws, [7, 12, 1, 40])  # the first two and the third fit into a window
    assert some == [bases[:new] for bases, new in zip(found, [7, 12, 1, 40], strict=True)]
    generator.reader._can_continue = False
    assert generator.continued(PROMPTS, draws) == found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("worth", [1, 20, 10_000])
def test_short_prompts_come_in_later(name, worth, monkeypatch):
    """However many passes read the prompts, and whatever their order: in the last column a row begins, too."""
    model, tokenizer, _ = MODELS[name]()
    prompts = ["GATTACAG", "C", "ACGTTGCAAGTCCAGTA", "TTGNCA", "C", "GATTACAGCATTACGA", "GG"]
    draws = np.stack([random_draws(3, prompt, 1, 6) for prompt in prompts])
    generator = BaseGenerator(model, tokenizer, Sampling())
    alone = [generator.continued([prompt], own[None])[0] for prompt, own in zip(prompts, draws, strict=True)]
    read = []
    real = generator.reader.read
    assert generator.reader.padding
    monkeypatch.setattr(shared_prefix, "_PASS", worth)
    monkeypatch.setattr(
        generator.reader, "read", lambda ids, *rest, **named: (read.append(ids.numel()), real(ids, *rest, **named))[1]
    )
    assert generator.continued(prompts, draws) == alone
    passes, bases = {1: (6, 67), 20: (2, 83), 10_000: (1, 7 * 17)}[worth]  # by hand, a row of padding included
    assert sum(read[:passes]) == bases + len(prompts) * len(generator.tokens.before)


class RoundsInBatches(torch.nn.Module):
    """Four equal chances, but for a rounding that depends on the batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = GengramConfig()

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 128)
        logits[..., 8] += 1e-6 * (1 if len(input_ids) > 1 else -1)
        return CausalLMOutput(logits=logits)


def test_rounding_in_a_batch_changes_no_base():
    generator = BaseGenerator(RoundsInBatches(), GengramTokenizer(), Sampling())
    draws = np.full((3, 5), 0.25)
    assert generator.continued(["A"] * 3, draws) == generator.continued(["A"], draws[:1]) * 3 == ["CCCCC"] * 3


def random_prompt(length: int) -> str:
    return "".join(np.random.default_rng(length).choice(list(BASES), length))


@pytest.mark.parametrize(
    "lengths, new, most",
    [
        ((30, 200), (5, 5), 10),
        ((0, 200), (5, 5), 10),
        ((30, 200), (5, 300), 305),  # the first would not be long, the second would wait for nothing
        ((30, 200), (300, 5), 305),
        ((30, 32), (5, 5), 7),
    ],
)
def test_prompts_that_end_far_apart_do_not_wait_for_one_another(lengths, new, most):
    model, tokenizer, _ = gengram()
    prompts = [random_prompt(length) for length in lengths]
    draws = np.stack([random_draws(3, prompt, 1, max(new)) for prompt in prompts])
    generator = BaseGenerator(model, tokenizer, Sampling())
    steps = list(generator.steps(prompts, draws, new))
    assert len(steps) == most
    alone = [
        generator.continued([prompt], own[None], [own_new])[0]
        for prompt, own, own_new in zip(prompts, draws, new, strict=True)
    ]
    assert [text for _, text in sorted(whole for step in steps for whole in step)] == alone


@pytest.mark.parametrize("length", [4, 40], ids=["padded", "in windows"])
def test_sequences_are_given_when_they_are_whole_and_leave_when_nobody_wants_them(length, monkeypatch):
    model, tokenizer, _ = gengram()
    prompts, new = [random_prompt(length + row) for row in range(3)], [10, 3, 10]
    draws = np.stack([random_draws(3, prompt, 1, 10) for prompt in prompts])
    generator = BaseGenerator(model, tokenizer, Sampling())
    expected = generator.continued(prompts, draws, new)
    wanted, batches = {0, 1, 2}, []
    real = generator.reader.read
    steps = generator.steps(prompts, draws, new, lambda row: row in wanted)
    next(steps)
    monkeypatch.setattr(
        generator.reader, "read", lambda ids, *rest, **named: (batches.append(len(ids)), real(ids, *rest, **named))[1]
    )
    given = []
    for whole in steps:
        given.append(whole)
        if whole == [(1, expected[1])]:
            break
    assert given.index([(1, expected[1])]) <= 3 and not any(given[:-1])
    wanted.remove(2)
    batches.clear()
    (last,) = [whole for whole in steps if whole]
    assert last == [(0, expected[0])] and set(batches) == {1}


@pytest.mark.parametrize("temperature", [1e-300, 1e-308, 5e-324])
def test_a_tiny_temperature_is_the_most_likely_base(temperature):
    logits = np.array([[0.0, 20.0, 10.0, 1.9], [-30.0, -1.0, -1.5, -2.0], [0.0, 0.0, 0.0, 9.0]])
    chosen, _ = Sampling(temperature=temperature).choose(logits, np.array([0.1, 0.5, 0.9]))
    assert chosen.tolist() == [1, 1, 3]
