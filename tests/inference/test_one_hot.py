import foreign_models
import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import (
    FINITE_DIFFERENCES,
    FINITE_DIFFERENCES_RELATIVE,
    LOG_LIKELIHOOD_FP32,
    SAME_FP32,
    SAME_HIDDEN_STATES_FP32,
    SAME_MODEL_FP32,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
    GengramTokenizer,
    OneHotModel,
)
from gengram.inference.likelihood import log_likelihoods
from gengram.sequences.alphabet import BASES, reverse_complement

SEQUENCES = ["ACGTTGCAAATTGACC", "TTNAGGCATNNACGTA"]


def one_hot(sequences, dtype=torch.float32) -> torch.Tensor:
    """(batch, 4, length); a column of zeros for N."""
    return torch.tensor([[[letter == base for letter in text] for base in BASES] for text in sequences]).to(dtype)


def gengram(model_class, **changes):
    return tiny_model(model_class, **changes), GengramTokenizer()


MODELS = {
    "gengram": lambda: gengram(GengramForCausalLM),
    # Without a router, whose softmax is rounded to float32.
    "dense": lambda: gengram(GengramForCausalLM, num_local_experts=0),
    "dense masked": lambda: gengram(GengramForMaskedLM, num_local_experts=0),
    "dense classifier": lambda: gengram(GengramForSequenceClassification, num_local_experts=0, num_labels=3),
    "gengram masked": lambda: gengram(GengramForMaskedLM),
    "gengram classifier": lambda: gengram(GengramForSequenceClassification, num_labels=3, classifier_pooling="mean"),
    "gengram labels": lambda: gengram(GengramForTokenClassification, num_labels=3),
    "gengram hidden": lambda: gengram(GengramModel),
    "llama": foreign_models.llama,
    "gpt2": foreign_models.gpt2,
    "bert": foreign_models.bert,
    "bert classifier": foreign_models.bert_classifier,
}


@pytest.fixture(params=MODELS)
def pair(request):
    return MODELS[request.param]()


def both_ways(model, sequences, dtype=torch.float32):
    """By plain tokens, and by mixtures, which a gradient needs."""
    inputs = one_hot(sequences, dtype)
    with torch.no_grad():
        plain = model(inputs)
    assert not plain.requires_grad
    mixed = model(inputs.requires_grad_())
    assert mixed.requires_grad
    return plain, mixed.detach()


@pytest.mark.parametrize("name", ["gengram", "llama", "gpt2"])
def test_log_likelihoods_are_those_of_the_sequences(name):
    model, tokenizer = MODELS[name]()
    sequences = [text.replace("N", "A") for text in SEQUENCES]
    for found in both_ways(OneHotModel(model, tokenizer), sequences):
        assert found.shape == (2, 1)
        np.testing.assert_allclose(
            found[:, 0], log_likelihoods(model, tokenizer, sequences), rtol=0, atol=LOG_LIKELIHOOD_FP32
        )


@pytest.mark.parametrize("name", ["gengram", "gengram masked", "llama", "gpt2", "bert"])
def test_log_probabilities_of_bases_against_direct_calls(name):
    model, tokenizer = MODELS[name]()
    before = 1 if name in ("gpt2", "bert") else 0
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in SEQUENCES])
    bases = tokenizer.convert_tokens_to_ids(list(BASES))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.double().log_softmax(-1)[..., bases]
    for found in both_ways(OneHotModel(model, tokenizer, "bases"), SEQUENCES):
        assert found.shape == (2, 4, 16)
        for place in range(16):
            token = before + place - (0 if "masked" in name or name == "bert" else 1)
            chances = torch.full((2, 4), 0.25).log() if token < 0 else expected[:, token].float()
            torch.testing.assert_close(found[:, :, place], chances, rtol=0, atol=SAME_FP32)


@pytest.mark.parametrize("name", ["gengram classifier", "bert classifier"])
def test_classes_are_the_logits_of_the_head(name):
    model, tokenizer = MODELS[name]()
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in SEQUENCES])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for found in both_ways(OneHotModel(model, tokenizer), SEQUENCES):
        torch.testing.assert_close(found, expected, rtol=0, atol=SAME_FP32)


def test_classes_of_every_base():
    model, tokenizer = MODELS["gengram labels"]()
    with torch.no_grad():
        expected = model(**tokenizer(SEQUENCES, return_tensors="pt")).logits
    for found in both_ways(OneHotModel(model, tokenizer), SEQUENCES):
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=SAME_FP32)


@pytest.mark.parametrize("name", ["gengram hidden", "gengram", "bert"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_embeddings_of_a_part(name, layer):
    model, tokenizer = MODELS[name]()
    before = 1 if name == "bert" else 0
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in SEQUENCES])
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][:, before:]
    options = dict(layer=layer, start=2, stop=9)
    for pooling, expected in (("mean", hidden[:, 2:9].mean(1)), ("last", hidden[:, 8]), ("centre", hidden[:, 5])):
        for found in both_ways(OneHotModel(model, tokenizer, "embedding", pooling=pooling, **options), SEQUENCES):
            torch.testing.assert_close(found, expected, rtol=0, atol=SAME_HIDDEN_STATES_FP32)


def test_a_part_of_a_likelihood_is_the_sum_over_its_bases():
    model, tokenizer = MODELS["gengram"]()
    x = one_hot([text.replace("N", "A") for text in SEQUENCES])
    logs = OneHotModel(model, tokenizer, "bases")(x)
    found = OneHotModel(model, tokenizer, start=3, stop=7)(x)
    torch.testing.assert_close(found[:, 0], (x * logs)[:, :, 3:7].sum((1, 2)), rtol=0, atol=SAME_FP32)


def test_the_other_strand_is_that_of_the_reverse_complement(pair):
    model, tokenizer = pair
    x, reverse = one_hot(SEQUENCES), one_hot(map(reverse_complement, SEQUENCES))
    for output in {OneHotModel(model, tokenizer).output, "embedding"}:
        options = {"start": 1, "stop": 5} if output in ("embedding", "log_likelihood") else {}
        turned = {"start": 11, "stop": 15} if options else {}
        with torch.no_grad():
            ours = OneHotModel(model, tokenizer, output, strands="reverse", **options)(x)
            theirs = OneHotModel(model, tokenizer, output, **turned)(reverse)
            forward = OneHotModel(model, tokenizer, output, **options)(x)
            both = OneHotModel(model, tokenizer, output, strands="both", **options)(x)
        if output == "bases":
            theirs = theirs.flip(1, 2)
        elif theirs.dim() == 3:
            theirs = theirs.flip(2)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=SAME_FP32)
        torch.testing.assert_close(both, (forward + ours) / 2, rtol=0, atol=SAME_FP32)


@pytest.mark.parametrize("name", ["dense", "dense masked", "dense classifier", "gpt2", "bert"])
@pytest.mark.parametrize("kind", ["one-hot", "towards N", "towards another base", "any"])
def test_gradients_against_finite_differences(name, kind):
    model, tokenizer = MODELS[name]()
    model = OneHotModel(model.double(), tokenizer, strands="both")
    generator = torch.Generator().manual_seed(0)
    x = one_hot(["ACGNTT"], torch.float64)
    if kind == "towards N":
        x = 0.6 * x
    elif kind == "towards another base":
        x = 0.6 * x + 0.4 * x.roll(1, 2)
    elif kind == "any":
        x = torch.rand(x.shape, generator=generator, dtype=torch.float64) / 3
    steps = 1e-6 * torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape[1:])
    pull = torch.randn(model(x)[0].shape, generator=generator, dtype=torch.float64)
    ahead, behind = (model(x + sign * steps).mul(pull).flatten(1).sum(1) for sign in (1, -1))
    (gradient,) = torch.autograd.grad((model(x.requires_grad_()) * pull).sum(), x)
    torch.testing.assert_close(
        gradient.flatten(),
        (ahead - behind).detach() / 2e-6,
        atol=FINITE_DIFFERENCES,
        rtol=FINITE_DIFFERENCES_RELATIVE,
    )


def test_mixtures_differ_from_both_ends_and_approach_them():
    model, tokenizer = MODELS["dense"]()
    model = OneHotModel(model.double(), tokenizer)
    x = one_hot(SEQUENCES[:1], torch.float64)
    ends = model(x), model(0 * x)
    assert (model(0.5 * x) - ends[0]).abs() > SAME_FP32 and (model(0.5 * x) - ends[1]).abs() > SAME_FP32
    torch.testing.assert_close(model((1 - 1e-9) * x), ends[0], rtol=0, atol=SAME_FP32)
    torch.testing.assert_close(model(1e-9 * x), ends[1], rtol=0, atol=SAME_FP32)


def test_the_memory_of_a_folder_with_code_of_its_own_is_read_too(tiny_folder):
    own = get_class_from_dynamic_module("modeling_gengram.GengramForCausalLM", tiny_folder)
    assert own.__module__.startswith("transformers_modules")
    gradients = []
    for model_class in (GengramForCausalLM, own):
        x = (0.7 * one_hot(SEQUENCES)).requires_grad_()
        model = OneHotModel(model_class.from_pretrained(tiny_folder), GengramTokenizer())
        gradients += torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(*gradients, rtol=0, atol=SAME_MODEL_FP32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float16, torch.float64])
def test_inputs_of_any_dtype(dtype):
    model = OneHotModel(*MODELS["gengram"]())
    found = model(one_hot(SEQUENCES).to(dtype)).float()
    torch.testing.assert_close(found, model(one_hot(SEQUENCES)), rtol=0, atol=LOG_LIKELIHOOD_FP32)


def test_half_precision_models_give_float32():
    model, tokenizer = MODELS["gengram"]()
    for found in both_ways(OneHotModel(model.bfloat16(), tokenizer), SEQUENCES):
        assert found.dtype == torch.float32 and found.isfinite().all()


def test_what_cannot_be_read_is_refused():
    model = OneHotModel(*MODELS["llama"]())
    for shape in [(4, 10), (1, 5, 10), (1, 4, 0), (1, 4, 65)]:
        with pytest.raises(ValueError, match=r"expected one-hot sequences of \(batch, 4, length\) with 1 to 64 bases"):
            model(torch.zeros(shape))
    assert OneHotModel(*MODELS["bert"]()).context == 62


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gengram", {"output": "likelihood"}, "output: expected log_likelihood, bases, classes, embedding"),
        ("gengram", {"strands": "plus"}, "strands: expected"),
        ("gengram", {"pooling": "median"}, "pooling: expected"),
        ("bert", {"output": "log_likelihood"}, "a masked model, BertForMaskedLM, has no likelihood"),
        ("gengram", {"output": "classes"}, "the head of GengramForCausalLM does not give"),
        ("gengram hidden", {"output": "bases"}, "the head of GengramModel does not give"),
        ("gengram", {"start": 5, "stop": 5}, "expected 0 <= start < stop <= 16"),
        ("gengram", {"stop": 17}, "expected 0 <= start < stop <= 16"),
        ("gengram", {"output": "embedding", "layer": 5}, "layer: expected 0 to 4"),
    ],
)
def test_what_a_model_does_not_give_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        OneHotModel(*MODELS[name](), **options)(one_hot(SEQUENCES))
