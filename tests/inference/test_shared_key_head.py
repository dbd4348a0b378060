"""Foreign models with one head of keys: where PyTorch would misread their masks, their attention is eager."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from misread_masks import misreading_attention

from gengram import DEFAULT_MODEL
from gengram.inference import shared_key_head
from gengram.inference.loaded_model import load_whole
from gengram.inference.shared_key_head import misreads_masks, shares_one_key_head

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.fixture(autouse=True)
def asked_anew():
    misreads_masks.cache_clear()
    yield
    misreads_masks.cache_clear()


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", misreading_attention)


@pytest.fixture
def gpu(monkeypatch):
    """A computer that says it has one, but computes on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shared_key_head, "misreads_masks", lambda device: misreads_masks(CPU))


def saved(folder, model) -> str:
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(DEFAULT_MODEL).save_pretrained(folder)
    return str(folder)


def llama(heads: int):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=heads))


def test_a_cpu_reads_masks_right():
    assert misreads_masks(CPU) is False


def test_the_fault_is_found(faulty):
    assert misreads_masks(CPU) is True


@pytest.mark.parametrize(("heads", "expected"), [(1, "eager"), (2, "sdpa"), (4, "sdpa")])
def test_foreign_models_go_around_it(heads, expected, faulty, gpu, tmp_path, caplog):
    model = load_whole(hf.AutoModelForCausalLM, saved(tmp_path, llama(heads)))
    assert model.config._attn_implementation == expected
    assert ("computed eagerly" in caplog.text) == (expected == "eager")


@pytest.mark.parametrize("what", ["no GPU", "no fault"])
def test_nothing_changes_where_masks_are_read_right(what, request, tmp_path, caplog):
    request.getfixturevalue("faulty" if what == "no GPU" else "gpu")
    model = load_whole(hf.AutoModelForCausalLM, saved(tmp_path, llama(1)))
    assert model.config._attn_implementation == "sdpa" and not caplog.text


def test_models_that_cannot_be_changed_are_named(faulty, gpu, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(hf.LlamaForCausalLM, "set_attn_implementation", lambda self, name: None)
    load_whole(hf.AutoModelForCausalLM, saved(tmp_path, llama(1)))
    assert "numbers of this model may be wrong there" in caplog.text


def test_gengram_keeps_its_own_attention(faulty, gpu):
    model = load_whole(hf.AutoModelForCausalLM, str(DEFAULT_MODEL))
    assert model.config.num_key_value_heads == 1 and model.config._attn_implementation == "sdpa"


def has_one(config, kind=hf.AutoModelForCausalLM) -> bool:
    return any(shares_one_key_head(module) for module in kind.from_config(config).modules())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(**SIZES, num_key_value_heads=1), True),
        (hf.LlamaConfig(**SIZES, num_key_value_heads=4), False),
        (hf.LlamaConfig(**SIZES | {"num_attention_heads": 1}), False),
        (hf.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8), True),
        (hf.GPTBigCodeConfig(vocab_size=16, n_embd=32, n_layer=1, n_head=4), True),
        (hf.GPTBigCodeConfig(vocab_size=16, n_embd=32, n_layer=1, n_head=4, multi_query=False), False),
        (hf.GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=4), False),
        (hf.MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_models_have_one(config, expected):
    assert has_one(config) is expected


def test_heads_that_differ_by_layer(faulty, gpu, tmp_path):
    if not hasattr(hf, "Gemma4TextConfig"):
        pytest.skip("this version of Transformers has none")
    few = {"num_key_value_heads": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    more = {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 16}
    config = hf.Gemma4TextConfig(**SIZES | layers, **few, **more)
    assert has_one(config)
    model = load_whole(hf.AutoModelForCausalLM, saved(tmp_path, hf.AutoModelForCausalLM.from_config(config)))
    assert model.config._attn_implementation == "eager"
