"""`gengram info` says what something is."""

import json

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import HEADS, tiny_config

from gengram.cli import main as gengram
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.conversion_scripts.inspect_checkpoint import inspect_checkpoint
from gengram.support.errors import ConversionError


def test_megatron_and_converted_folders_agree(small_torch, small_torch_dist_b, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    first = inspect_checkpoint(small_torch.root)
    second = inspect_checkpoint(small_torch_dist_b)
    third = inspect_checkpoint(tmp_path / "out")
    assert [info.kind for info in (first, second, third)] == ["megatron torch", "megatron torch_dist", "hugging face"]
    assert first.parameters == second.parameters == third.parameters
    assert first.iteration == second.iteration == third.iteration == 123
    assert {**first.model, "rotary": ""} == {**second.model, "rotary": ""} == {**third.model, "rotary": ""}
    assert "layers [0, 2] (from 0)" in first.model["memory"]
    assert any("dead" in line for line in first.left_out)
    assert str(small_torch.folder) in third.converted_from
    assert "nothing is missing" in first.summary() and "iteration 123" in third.summary()


@pytest.fixture
def small_torch_dist_b(tmp_path, megatron):
    shape = megatron.Shape()
    tensors = megatron.stacked(megatron.named_for(megatron.canonical(shape), shape, "te"), shape)
    return megatron.save_torch_dist(tmp_path / "dist", tensors, megatron.args(shape))


def test_the_authors_checkpoints(authors_checkpoint):
    info = inspect_checkpoint(authors_checkpoint)
    assert info.iteration == 24000 and info.dtypes == ["bfloat16"] and not info.problem


def test_a_checkpoint_that_cannot_be_converted_is_described(tmp_path, megatron):
    shape = megatron.Shape()
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    megatron.save_torch(tmp_path / "source", weights, megatron.args(shape, qk_layernorm=True))
    info = inspect_checkpoint(tmp_path / "source")
    assert "args.qk_layernorm" in info.problem and info.kind == "megatron torch"
    assert "PROBLEM" in info.summary()


def test_other_folders(tmp_path):
    with pytest.raises(ConversionError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConversionError, match="model_type 'llama', expected 'gengram'"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConversionError, match="not valid JSON"):
        inspect_checkpoint(tmp_path)


@pytest.fixture
def folder(small_torch, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "folder", progress=False)
    return tmp_path / "folder"


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def test_a_folder_whose_tensors_are_missing_or_of_another_shape(folder, capsys):
    weights = load_file(folder / "model.safetensors")
    norm, router = "model.norm.weight", "model.layers.1.mlp.gate.weight"
    save_file({name: value for name, value in weights.items() if name != norm}, folder / "model.safetensors")
    assert f"1 are missing: '{norm}';" in inspect_checkpoint(folder).problem
    save_file({**weights, router: weights[router].T.contiguous()}, folder / "model.safetensors")
    assert f"1 are of another kind: {router} is bfloat16 of shape" in inspect_checkpoint(folder).problem
    save_file({**weights, "model.layers.9.mlp.gate.weight": weights[router].clone()}, folder / "model.safetensors")
    assert "1 are of another model: 'model.layers.9.mlp.gate.weight'" in inspect_checkpoint(folder).problem
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    assert gengram(["info", str(folder)]) == 1
    assert "PROBLEM: the weights are not those that config.json describes" in capsys.readouterr().out
    edit_config(folder, architectures=["GengramForSequenceClassification"])
    assert not inspect_checkpoint(folder).problem


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_a_quantised_folder_whose_configuration_lost_the_quantisation(experts, tmp_path, megatron):
    shape = megatron.Shape(hidden=32, heads=4, groups=2, width=32)
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    source = megatron.save_torch(tmp_path / "source", weights, megatron.args(shape))
    convert_to_hf(source, tmp_path / "out", progress=False, experts=experts)
    assert not inspect_checkpoint(tmp_path / "out").problem
    edit_config(tmp_path / "out", quantization_config=None)
    problem = inspect_checkpoint(tmp_path / "out").problem
    assert "down_proj_scale'" in problem and "expected floats" in problem


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fields", [{}, dict(tie_word_embeddings=True), dict(num_local_experts=0, memory_layers=[])])
def test_folders_of_other_heads_miss_nothing(head, fields, tmp_path):
    head(tiny_config(**fields)).save_pretrained(tmp_path)
    assert not inspect_checkpoint(tmp_path).problem


def test_command(small_torch, tmp_path, capsys):
    assert gengram(["info", str(small_torch.root)]) == 0
    assert "megatron torch, iteration 123" in capsys.readouterr().out
    assert gengram(["info", str(small_torch.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["layers"] == 3
    assert gengram(["info", str(tmp_path / "nowhere")]) == 1
    assert "error: " in capsys.readouterr().err
