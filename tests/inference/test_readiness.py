"""How early a model knows its prediction, beside what is computed position by position."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import LOG_LIKELIHOOD_FP32, SAME_FP32

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramTokenizer
from gengram.inference.likelihood import log_likelihoods
from gengram.inference.loaded_model import LoadedModel
from gengram.inference.readiness import Readiness, random_pieces, readiness

TEXTS = ["ACGTTGCAAATTGACC", "TTCAGGCATGGACGTA", "GGGACCCATTAGACAT"]


def test_divergence_is_summed_over_the_vocabulary_and_averaged_over_positions():
    model, tokenizer = tiny_model(GengramForCausalLM), GengramTokenizer()
    found = readiness(LoadedModel(model, tokenizer), TEXTS)
    assert found.divergence.shape == (3, 4) and (found.divergence > 0).all()
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        lens = model.lm_head(model.model.norm(outputs.hidden_states[2]))[0].softmax(-1).tolist()
    expected = 0.0
    for final, layer in zip(outputs.logits[0].softmax(-1).tolist(), lens, strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(final, layer, strict=True) if p > 0) / len(ids[0])
    assert found.divergence[1, 2] == pytest.approx(expected, abs=SAME_FP32)
    bits = -log_likelihoods(model, tokenizer, TEXTS) / math.log(2) / 15
    assert found.surprisal == pytest.approx(bits, abs=LOG_LIKELIHOOD_FP32)


def test_tokens_around_the_bases_do_not_count():
    """A first token gives the first base something to be predicted from; a last one is no base."""
    model, tokenizer = tiny_model(GengramForCausalLM), GengramTokenizer(add_bos_token=True, add_eos_token=True)
    found = readiness(LoadedModel(model, tokenizer), TEXTS)
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    assert len(ids[0]) == 18
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        lens = model.lm_head(model.model.norm(outputs.hidden_states[2]))[0, 1:17].log_softmax(-1)
    final = outputs.logits[0].log_softmax(-1)
    own = [float(final[place, ids[0, place + 1]]) for place in range(16)]
    assert found.surprisal[1] == pytest.approx(-sum(own) / 16 / math.log(2), abs=LOG_LIKELIHOOD_FP32)
    expected = (final[1:17].exp() * (final[1:17] - lens)).sum(-1).mean()
    assert found.divergence[1, 2] == pytest.approx(float(expected), abs=SAME_FP32)


def test_a_masked_model_has_no_bits_per_base():
    found = readiness(LoadedModel(tiny_model(GengramForMaskedLM), GengramTokenizer()), TEXTS)
    assert found.divergence.shape == (3, 4) and np.isnan(found.surprisal).all()
    assert set(found.summary()) == {"divergence"} == set(found.less(found))


def test_the_effect_of_a_memory_is_the_difference_over_the_same_texts():
    generator = np.random.default_rng(0)
    texts = generator.normal(0, 5, (40, 1))  # much between texts
    twin = Readiness(texts + 10, texts[:, 0] + 10)
    model = Readiness(texts + 9 + generator.normal(0, 0.01, (40, 1)), texts[:, 0] + 9)
    found = model.less(twin)
    mean, low, high = found["divergence"][0]
    assert low < -1 < high and low < mean < high and high - low < 0.02  # pairs: what texts differ by cancels out
    assert found["bits_per_base"][0] == pytest.approx(-1)
    other = Readiness(np.zeros((40, 3)), twin.surprisal)
    assert set(other.less(twin)) == {"bits_per_base"}


def test_random_pieces(tmp_path):
    generator = np.random.default_rng(1)
    text = "".join(generator.choice(list("ACGTacgt"), 5000))
    text = text[:1000] + "N" * 300 + text[1300:]
    (tmp_path / "x.fa").write_text(f">one\n{text}\n>short\nACGTACGTACGTACGTACGT\n>tiny\nACGT\n")
    found = random_pieces(tmp_path / "x.fa", 10, 100)
    assert len(found) == len(set(found)) == 10 and found == random_pieces(tmp_path / "x.fa", 10, 100)
    assert all(piece in text.upper() or piece == "ACGTACGTACGTACGTACGT" for piece in found)
    every = random_pieces(tmp_path / "x.fa", 1000, 100)
    assert len(every) == 50 - 3 + 1 and "ACGTACGTACGTACGTACGT" in every
    (tmp_path / "none.fa").write_text(">one\nNNNN\n")
    with pytest.raises(ValueError, match=r"two pieces or more of at least 16 bases of A, C, G and T .* got none"):
        random_pieces(tmp_path / "none.fa", 10, 100)
    (tmp_path / "one.fa").write_text(f">one\n{'ACGT' * 20}\n")
    with pytest.raises(ValueError, match=r"two pieces or more .* got 1"):
        random_pieces(tmp_path / "one.fa", 10, 100)
