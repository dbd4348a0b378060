"""What `gengram info --memory` computes, beside the bytes of real weights, caches and folds."""

import json
import weakref

import pytest
import torch
from tiny_models import random_ids, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gengram import GengramForCausalLM, GengramQuantizationConfig
from gengram.cli import main
from gengram.inference.memory_needs import memory_needs


def bytes_of(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at once, without the model's weights."""

    def __init__(self, model):
        super().__init__()
        self.known = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def freed(self, key, nbytes):
        self.known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_and_folds_have_the_bytes_of_real_ones(experts, dtype):
    model = tiny_model(GengramForCausalLM, num_local_experts=experts).to(dtype)
    needs = memory_needs(model.config, dtype, batch=2, length=60)
    assert needs.weights == bytes_of(model.parameters())
    outputs = model(random_ids(2, 60), use_cache=True)
    cache = outputs["cache" if "cache" in outputs else "past_key_values"]
    held = []
    for layer in cache.layers:
        states = [vars(layer).get(name) for name in ("keys", "values", "conv_states")]
        held += [t for t in tree_leaves(states) if isinstance(t, torch.Tensor)]
    assert needs.cache == sum(t.numel() * t.element_size() for t in held)
    model.to(torch.bfloat16).fold_memory()
    folds = [m.kept_fold.fold.tables.rows for m in model.modules() if getattr(m, "kept_fold", None) is not None]
    assert needs.folds == sum(rows.numel() * rows.element_size() for rows in folds)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_have_the_bytes_of_real_ones(kind, tmp_path):
    tiny_model(GengramForCausalLM, intermediate_size=64).save_pretrained(tmp_path)
    for attention in (None, "int8"):
        quantization = GengramQuantizationConfig(experts=kind, attention=attention)
        model = GengramForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=quantization)
        needs = memory_needs(model.config, torch.bfloat16, 1, 10)
        computed = needs.weights_by_both if attention else needs.weights_by_experts
        assert computed[kind] == bytes_of(model.parameters())


@pytest.mark.parametrize("experts", [0, 8])
def test_activations_are_near_the_most_that_a_prompt_holds(experts):
    model = tiny_model(
        GengramForCausalLM, hidden_size=64, intermediate_size=128, num_local_experts=experts, head_dim=16
    )
    needs = memory_needs(model.config, torch.float32, 2, 200)
    ids = random_ids(2, 200)
    with torch.no_grad(), Peak(model) as peak:
        model(ids, use_cache=False)
    assert 0.7 < needs.activations / peak.most < 1.3  # 5.18 keeps a little more than 5.24


def test_the_command_computes_and_loads_nothing(tmp_path, capsys):
    tiny_config(intermediate_size=64).save_pretrained(tmp_path)  # a configuration and no weights
    assert main(["info", str(tmp_path), "--memory", "--dtype", "float32", "--length", "100"]) == 0
    shown = capsys.readouterr().out
    assert "computed, not measured" in shown and "with experts in int4" in shown
    assert main(["info", str(tmp_path), "--memory", "--json", "--batch", "3"]) == 0
    needs = json.loads(capsys.readouterr().out)
    assert needs["batch"] == 3 and needs["dtype"] == "bfloat16" and needs["length"] == 8192
    assert main(["info", str(tmp_path), "--memory", "--batch", "0"]) == 1
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err
