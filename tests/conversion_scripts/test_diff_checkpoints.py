"""Two checkpoints of any kind, compared."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from gengram.conversion_scripts.convert_hf_to_megatron import convert_to_megatron
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.conversion_scripts.diff_checkpoints import diff_checkpoints
from gengram.support.errors import ConversionError


@pytest.fixture
def kinds(small_torch, tmp_path, megatron):
    """One model in every form: source, Hugging Face folder, and back in both formats."""
    convert_to_hf(small_torch.root, tmp_path / "hf", progress=False)
    convert_to_megatron(tmp_path / "hf", tmp_path / "dist", progress=False)
    options = dict(format="torch", pipeline_parallel=3, tensor_parallel=2)
    convert_to_megatron(tmp_path / "hf", tmp_path / "torch", **options, progress=False)
    shape, weights = small_torch.shape, megatron.canonical(small_torch.shape)
    args = megatron.args(shape)
    megatron.save_torch(tmp_path / "grouped", megatron.named_for(weights, shape, "grouped"), args)
    return [small_torch.root, *(tmp_path / name for name in ("hf", "dist", "torch", "grouped"))]


def test_all_kinds_are_the_same(kinds, small_torch):
    for second in kinds:
        report = diff_checkpoints(kinds[0], second, progress=False)
        assert report.same and report.equal == len(small_torch.expected), report.summary()
        assert "the same model" in report.summary()


def change(folder, **tensors):
    weights = load_file(folder / "model.safetensors") | tensors
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def test_differences_are_named(kinds):
    root, folder = kinds[:2]
    weights = load_file(folder / "model.safetensors")
    expert = weights["model.layers.1.mlp.experts.gate_up_proj"].clone()
    expert[2, 3, 4] += 2.0
    expert[0, 0, 0] += 0.5
    key = weights["model.layers.0.self_attn.k_proj.weight"].clone()
    key[0, 0], key[1, 1] = math.nan, math.inf
    change(
        folder,
        **{
            "model.layers.1.mlp.experts.gate_up_proj": expert,
            "model.layers.0.self_attn.k_proj.weight": key,
            "model.norm.weight": weights["model.norm.weight"].float(),
            "lm_head.weight": weights["lm_head.weight"][:-1],
            "more.weight": torch.ones(2),
        },
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    report = diff_checkpoints(root, folder, progress=False)
    found = {difference.name: difference for difference in report.differing}
    assert set(found) == {
        *("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.self_attn.k_proj.weight"),
        *("model.norm.weight", "lm_head.weight"),
    }
    values = found["model.layers.1.mlp.experts.gate_up_proj"]
    moved = (expert.double() - weights["model.layers.1.mlp.experts.gate_up_proj"].double()).abs()
    assert (values.kind, values.elements, values.largest) == ("values", int((moved > 0).sum()), moved.max().item())
    unlike = found["model.layers.0.self_attn.k_proj.weight"]
    assert unlike.kind == "values" and unlike.elements == 2 and unlike.largest is None
    assert found["model.norm.weight"].kind == "dtype" and found["lm_head.weight"].kind == "shape"
    assert report.only_in_second == ["more.weight"] and report.only_in_first == []
    assert report.config == {"rms_norm_eps": (2e-5, 0.5)}
    text = report.summary()
    assert "not the same model" in text and "bfloat16 and float32" in text and "[15, 12]" in text
    back = diff_checkpoints(folder, root, progress=False)
    assert back.only_in_first == ["more.weight"] and back.equal == report.equal


def test_nan_equals_nan_and_zero_equals_minus_zero(kinds):
    folder = kinds[1]
    (folder / "conversion.json").unlink()  # it does not describe what follows
    strange = torch.tensor([math.nan, 0.0, -math.inf] + [1.0] * 9).bfloat16()
    change(folder, **{"model.norm.weight": strange})
    convert_to_megatron(folder, folder.parent / "again", progress=False)
    assert diff_checkpoints(folder, folder.parent / "again", progress=False).same
    change(folder, **{"model.norm.weight": torch.where(strange == 0, -strange, strange)})
    assert diff_checkpoints(folder, folder.parent / "again", progress=False).same


def test_fields_that_only_folders_have_are_compared_between_folders(kinds, tmp_path):
    root, folder = kinds[:2]
    config = json.loads((folder / "config.json").read_text())
    convert_to_hf(root, tmp_path / "other", progress=False)
    (folder / "config.json").write_text(json.dumps(config | {"memory_pooling": "as_trained"}))
    assert list(diff_checkpoints(folder, tmp_path / "other", progress=False).config) == ["memory_pooling"]
    assert diff_checkpoints(folder, root, progress=False).same


def test_stacked_experts_are_read_one_by_one(kinds, monkeypatch):
    from gengram.conversion_scripts.files.hf_folder import StoredTensor

    read = StoredTensor.read

    def watched(self, index=None):
        assert index is not None or ".experts." not in self.name
        return read(self, index)

    monkeypatch.setattr(StoredTensor, "read", watched)
    assert diff_checkpoints(kinds[1], kinds[2], progress=False).same


def test_sources_are_read_once(kinds, monkeypatch):
    from gengram.conversion_scripts.megatron.torch_dist_reader import ChunkedTensor

    reads = []
    read = ChunkedTensor.read
    monkeypatch.setattr(
        ChunkedTensor,
        "read",
        lambda self, index, *rest: reads.append((self.name, index)) or read(self, index, *rest),
    )
    diff_checkpoints(kinds[1], kinds[2], progress=False)
    assert len(reads) == len(set(reads))


def test_command_line(kinds, tmp_path, capsys):
    from gengram.cli import main

    root, folder = map(str, kinds[:2])
    assert main(["diff", root, folder, "--quiet"]) == 0
    assert "the same model" in capsys.readouterr().out
    weights = load_file(kinds[1] / "model.safetensors")
    change(kinds[1], **{"model.norm.weight": weights["model.norm.weight"] + math.inf})
    assert main(["diff", root, folder, "--json"]) == 1

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["same"] is False and report["differing"][0]["largest"] is None
    assert main(["diff", root, str(tmp_path / "nothing"), "--json"]) == 2
    streams = capsys.readouterr()
    assert "error" in json.loads(streams.out) and "does not exist" in streams.err


def test_damaged_checkpoints(kinds):
    (kinds[1] / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConversionError, match="model_type 'llama'"):
        diff_checkpoints(kinds[0], kinds[1], progress=False)
    (kinds[2] / "release" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ConversionError, match="truncated"):
        diff_checkpoints(kinds[0], kinds[2], progress=False)
