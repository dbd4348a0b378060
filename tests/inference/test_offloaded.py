"""Shares of a model whose layers come from the disk one after another, beside those of the same model in memory."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from graft_hosts import grafted
from graft_hosts import random_ids as random_tokens
from tiny_models import random_ids, tiny_model
from tolerances import SHARES_FP64

import gengram
from gengram import GengramForCausalLM, GengramForSequenceClassification, explain_memory
from gengram.inference.offloaded import input_device, weight_at_hand

TARGETS = ("gate_logit", "residual_norm", "base:actual", "base:G")


def places(model) -> set[str]:
    return {weight.device.type for weight in model.parameters()}


def same(found, expected) -> bool:
    found, expected = found.table, expected.table
    assert found.drop(["contribution"]) == expected.drop(["contribution"])
    one, other = (torch.tensor(table["contribution"].to_numpy()) for table in (found, expected))
    return torch.allclose(one, other, rtol=SHARES_FP64, atol=SHARES_FP64)


def test_half_of_a_model_on_the_disk(tmp_path):
    model, ids = tiny_model(GengramForCausalLM).double(), random_ids(2, 30)
    model.save_pretrained(tmp_path / "model")
    most = sum(weight.numel() * weight.element_size() for weight in model.parameters()) // 2
    loaded = GengramForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float64,
        device_map="auto",
        max_memory={"cpu": most},
        offload_folder=tmp_path / "weights",
    ).eval()
    assert places(loaded) == {"cpu", "meta"} and loaded.model.layers[2].motif_memory.key_proj.weight.is_meta
    for layer in (0, 2):
        for target in TARGETS:
            expected = explain_memory(model, ids, layer=layer, target=target)
            assert same(explain_memory(loaded, ids, layer=layer, target=target), expected)
    assert places(loaded) == {"cpu", "meta"}


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_class_of_a_model_with_no_weight_in_memory(where, tmp_path):
    model, ids = tiny_model(GengramForSequenceClassification, num_labels=3).double(), random_ids(2, 20)
    asked = [("class:2", False), ("class:2", True), ("residual_norm", False)]
    expected = [explain_memory(model, ids, layer=0, target=name, through_layers=way, steps=2) for name, way in asked]
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, torch.device("cpu"))
    for (name, way), each in zip(asked, expected, strict=True):
        assert same(explain_memory(model, ids, layer=0, target=name, through_layers=way, steps=2), each)
    assert places(model) == {"meta"} and input_device(model) == torch.device("cpu")
    memory = model.model.layers[0].motif_memory
    with weight_at_hand(memory.embeddings[1]) as table:
        assert not table.is_meta
    assert memory.embeddings[1].weight.is_meta


def test_a_graft_with_no_weight_in_memory(tmp_path):
    model, ids = grafted("llama").double(), random_tokens(length=20)
    expected = {target: explain_memory(model, ids, layer=3, target=target) for target in ("base:G", "residual_norm")}
    disk_offload(model, tmp_path, torch.device("cpu"))
    for target, each in expected.items():
        assert same(explain_memory(model, ids, layer=3, target=target), each)


def test_weights_that_were_never_loaded_are_named():
    with torch.device("meta"):
        model = gengram.MotifMemory(gengram.MotifMemoryConfig(ngram_sizes=(1, 2), embedding_dim=4, window=3), 8)
    with pytest.raises(ValueError, match="Embedding is on the meta device; load"), weight_at_hand(model.embeddings[0]):
        pass
