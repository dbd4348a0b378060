"""Foreign models with one head of keys: where PyTorch would misread their masks, their attention is eager."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from gengram import DEFAULT_MODEL
from gengram.inference import loaded_model, shared_key_head
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
    """Attention as PyTorch 2.11 computes it on a GPU: pytorch/pytorch issue 191937."""
    original = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **options):
        if attn_mask is not None and query.shape[2] % 32 == 1 and key.stride(1) == value.stride(1) == 0:
            attn_mask = attn_mask.clone()
            attn_mask[..., -1, :] = attn_mask[..., 0, :]
        return original(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def saved(folder, heads: int) -> str:
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=heads)).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(DEFAULT_MODEL).save_pretrained(folder)
    return str(folder)


def test_a_cpu_reads_masks_right():
    assert misreads_masks(CPU) is False


def test_the_fault_is_found(faulty):
    assert misreads_masks(CPU) is True


@pytest.mark.parametrize(("heads", "expected"), [(1, "eager"), (2, "sdpa")])
def test_foreign_models_go_around_it(heads, expected, faulty, tmp_path, caplog):
    loaded = loaded_model.load_model(saved(tmp_path, heads), "causal", device="cpu")
    assert loaded.model.config._attn_implementation == expected
    assert ("reads masks wrong on cpu" in caplog.text) == (expected == "eager")


def test_nothing_changes_where_masks_are_read_right(tmp_path, caplog):
    loaded = loaded_model.load_model(saved(tmp_path, 1), "causal", device="cpu")
    assert loaded.model.config._attn_implementation == "sdpa" and not caplog.text


def test_gengram_keeps_its_own_attention(monkeypatch):
    monkeypatch.setattr(shared_key_head, "misreads_masks", lambda device: pytest.fail("asked"))
    assert loaded_model.load_model(DEFAULT_MODEL, "causal", device="cpu").model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(**SIZES, num_key_value_heads=1), True),
        (hf.LlamaConfig(**SIZES, num_key_value_heads=4), False),
        (hf.GPTBigCodeConfig(), True),
        (hf.GPTBigCodeConfig(multi_query=False), False),
        (hf.FalconConfig(), True),
        (hf.FalconConfig(new_decoder_architecture=True, num_kv_heads=8), False),
        (hf.BertConfig(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_names_that_say_so(config, expected):
    assert shares_one_key_head(config) is expected
