"""Attention takes its own way where PyTorch's kernel would misread a mask, and gives Mixtral's numbers there."""

from importlib import resources

import pytest
import torch
import torch.nn.functional as F
from misread_masks import misreading_attention
from tiny_models import random_ids, tiny_model
from tolerances import SAME_FP32, SAME_MODEL_FP32

from gengram import GengramForCausalLM
from gengram.cli import main
from gengram.modeling_gengram import attention
from gengram.modeling_gengram.attention import GengramAttention


def few_heads(heads: int) -> GengramForCausalLM:
    return tiny_model(GengramForCausalLM, num_attention_heads=4, num_key_value_heads=heads, head_dim=8)


def padded(length: int) -> dict:
    ids = random_ids(2, length)
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 33, 40])
def test_the_own_way_is_mixtrals(heads, length, monkeypatch):
    model = few_heads(heads)
    before, now = padded(24), padded(24 + length)
    found = []
    for is_misread in (False, True):
        monkeypatch.setattr(GengramAttention, "_may_be_misread", lambda *given, it=is_misread: it)
        first = model(**before, use_cache=True)
        arguments = {"attention_mask": now["attention_mask"], "past_key_values": first.past_key_values}
        found.append(model(now["input_ids"][:, 24:], **arguments).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=SAME_FP32)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 7, 39])
def test_long_masks_are_read_in_parts(rows, monkeypatch):
    model, given = few_heads(2), padded(40)
    expected = model(**given).logits
    monkeypatch.setattr(GengramAttention, "_may_be_misread", lambda *given: True)
    monkeypatch.setattr(attention, "_MOST_OF_A_MASK", 48 * rows + 5)
    torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=SAME_FP32)


@torch.no_grad()
def test_values_of_several_heads_are_never_one_memory(monkeypatch):
    """The kernel misreads masks where both keys and values are repeated without a copy."""
    strides = []
    original = F.scaled_dot_product_attention

    def seen(query, key, value, **options):
        strides.append((key.shape[1], key.stride(1), value.stride(1)))
        return original(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    model = few_heads(1)
    model(**padded(33))
    assert all(heads == 4 and key == value == 0 for heads, key, value in strides)  # what the library does
    del strides[:]
    monkeypatch.setattr(GengramAttention, "_may_be_misread", lambda *given: True)
    model(**padded(33))
    assert strides and all(heads == 4 and value > 0 for heads, _, value in strides)


@pytest.mark.parametrize(
    ("misread", "heads", "length", "options"),
    [
        (True, 1, 33, {}),
        (False, 1, 1, {}),
        (True, 1, 1, {"packs": False}),
        (True, 1, 257, {}),
        (False, 1, 34, {}),
        (False, 2, 33, {}),
        (True, 2, 40, {"most": 1919}),
        (False, 2, 40, {"most": 1920}),  # 40 rows of 40 keys, padded to 48
        (False, 1, 33, {"device": "cpu"}),
        (False, 1, 33, {"attention": "eager"}),
    ],
)
def test_where_the_own_way_is_taken(misread, heads, length, options, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_OF_A_MASK", options.get("most", 2**32))
    monkeypatch.setattr(attention, "_PACKS_HEADS", options.get("packs", True))
    layer = few_heads(heads).model.layers[0].self_attn
    layer.config._attn_implementation = options.get("attention", "sdpa")

    class States:  # of a device that need not be there
        is_cuda = options.get("device") != "cpu"
        shape = (2, length, 32)

    assert layer._may_be_misread(States(), torch.ones(2, 1, length, length)) is misread


def test_scores_are_those_of_masks_that_are_read_right(monkeypatch, tmp_path):
    """The divergence of an indel, whose last places are compared with their neighbours."""
    pytest.importorskip("pysam")
    data = resources.files("gengram") / "demo_data"

    def divergence(name: str) -> float:
        output = tmp_path / f"{name}.tsv"
        files = [str(data / "region.vcf.gz"), "--fasta", str(data / "region.fa.gz"), "--output", str(output)]
        assert main(["score", *files, "--device", "cpu", "--quiet"]) in (None, 0)
        names, *rows = (line.split("\t") for line in output.read_text().splitlines())
        (row,) = (row for row in rows if row[1:4] == ["316", "CA", "C"])
        return float(row[names.index("jsd")])

    right = divergence("right")
    monkeypatch.setattr(F, "scaled_dot_product_attention", misreading_attention)
    # recorded on an NVIDIA H200, PyTorch 2.11, before the attention went around it
    assert divergence("misread") == pytest.approx(0.1902933, abs=SAME_MODEL_FP32)
    monkeypatch.setattr(GengramAttention, "_may_be_misread", lambda self, states, mask: states.shape[1] % 32 == 1)
    assert divergence("mended") == pytest.approx(right, abs=SAME_MODEL_FP32)
    assert right == pytest.approx(0.05322246, abs=SAME_MODEL_FP32)
