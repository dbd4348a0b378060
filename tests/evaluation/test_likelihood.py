import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tolerances import LOG_LIKELIHOOD_FP32

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.evaluation.likelihood import bits_of_examples, bits_per_base, causal_likelihood, places_of
from gengram.inference.loaded_model import LoadedModel

TEXTS = ["ACGTTGCAAATTGAC<EOD>ACNT", "GGCTA", "TTT"]


def examples() -> Dataset:
    return Dataset.from_dict({"input_ids": [GengramTokenizer()(text)["input_ids"] for text in TEXTS]})


def test_bits_are_those_of_bases_alone(tiny_folder):
    model = GengramForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    bits, bases = bits_of_examples(model, examples(), batch_size=2)
    for text, found, count in zip(TEXTS, bits, bases, strict=True):
        ids = GengramTokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            probabilities = model(ids).logits[0].double().log_softmax(-1)
        expected = [
            -float(probabilities[i, token]) / math.log(2)
            for i, token in enumerate(ids[0, 1:])
            if token in (5, 6, 7, 8)
        ]
        assert count == len(expected)
        assert found == pytest.approx(sum(expected), abs=LOG_LIKELIHOOD_FP32)


def test_the_interval_is_around_the_weighted_mean():
    bases = np.array([10, 1000, 1000])
    found = bits_per_base(np.array([1.9, 1.8, 1.6]) * bases, bases)
    assert found.value == pytest.approx((19 + 1800 + 1600) / 2010)
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="examples with bases behind their first token, got none"):
        bits_per_base(np.zeros(2), np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="finite bits, got others for 1 of 2 examples"):
        bits_per_base(np.array([np.nan, 1]), np.ones(2, dtype=int))


def test_both_strands_of_the_same_bases_are_drawn_together():
    """The interval of examples and their reverse complements is that of the examples."""
    generator = np.random.default_rng(0)
    bits, bases = generator.uniform(150, 200, 40), np.full(40, 100)
    origins = [[f"chr:{i % 20}:{1000 * i}-{1000 * i + 100}({strand})"] for i in range(40) for strand in "+-"]
    ids = {"input_ids": [[5]] * 80}
    places = places_of(Dataset.from_dict({**ids, "origin": origins}))
    assert places.tolist() == np.repeat(np.arange(40), 2).tolist()
    found = bits_per_base(bits.repeat(2), bases.repeat(2), places)
    alone = bits_per_base(bits, bases)
    assert found.numbers() == pytest.approx(alone.numbers())
    apart = bits_per_base(bits.repeat(2), bases.repeat(2))
    assert apart.high - apart.low < 0.8 * (alone.high - alone.low)
    forward = [[origin[0].replace("(-)", "(+)")] for origin in origins]
    assert places_of(Dataset.from_dict({**ids, "origin": forward})) is None
    assert places_of(Dataset.from_dict(ids)) is None
    packed = [
        [f"a:{start}-{start + 90}({strand})", "b:0-10(+)"] for start, strand in ((0, "+"), (37, "-"), (400, "+"))
    ]
    assert places_of(Dataset.from_dict({"input_ids": [[5]] * 3, "origin": packed})).tolist() == [0, 0, 1]


class RotatedTokenizer:
    """One token per base, but not those of Gengram."""

    tokenizer = GengramTokenizer()
    unk_token_id, mask_token_id, pad_token_id = tokenizer.unk_token_id, None, tokenizer.pad_token_id

    def __call__(self, text):
        return self.tokenizer(text.translate(str.maketrans("ACGT", "CGTA")))

    def __len__(self):
        return len(self.tokenizer)

    def get_vocab(self):
        return self.tokenizer.get_vocab()


def test_a_model_with_other_tokens_is_refused():
    """Its likelihoods would be those of other bases."""

    class Model:
        name, causal = "other", LoadedModel(None, RotatedTokenizer())

    with pytest.raises(
        ValueError, match=r"tokens are those of `gengram prepare`, got one that reads A, C, G and T as"
    ):
        causal_likelihood(Model(), {"test": examples()}, progress=False)
