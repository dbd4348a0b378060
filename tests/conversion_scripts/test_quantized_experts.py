"""`convert to-hf --experts [--attention]`: the folder is that of a model quantised after conversion."""

import json

import pytest
import torch

from gengram import GengramForCausalLM, GengramQuantizationConfig
from gengram.cli import main as gengram
from gengram.conversion_scripts.choices import QUANTISED
from gengram.conversion_scripts.convert_hf_to_megatron import convert_to_megatron
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf, plan_conversion
from gengram.conversion_scripts.diff_checkpoints import diff_checkpoints
from gengram.conversion_scripts.files.partial_folder import PartialFolder
from gengram.conversion_scripts.files.weight_hash import weight_digest
from gengram.conversion_scripts.inspect_checkpoint import inspect_checkpoint
from gengram.conversion_scripts.verify_conversion import verify_conversion
from gengram.modeling_gengram.quantized_experts import KINDS, dequantize
from gengram.support.errors import ConversionError

STOPPED = [("int8", None), ("int4", None), ("int8", "int4")]


def checkpoint(root, megatron, form="torch", layout="te", **changes):
    shape = megatron.Shape(**{"hidden": 32, "head_dim": 8, "width": 64, **changes})
    weights = megatron.named_for(megatron.canonical(shape), shape, layout)
    if form == "torch_dist":
        megatron.save_torch_dist(root, megatron.stacked(weights, shape), megatron.args(shape))
    else:
        megatron.save_torch(root, weights, megatron.args(shape))
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_choices_are_the_kinds_of_quantisation():
    assert QUANTISED == KINDS


@pytest.mark.parametrize(
    ("experts", "attention"), [("int8", None), ("int4", None), ("int4", "int8"), ("int8", "int4")]
)
@pytest.mark.parametrize(("form", "layout"), [("torch", "te"), ("torch", "grouped"), ("torch_dist", "te")])
def test_the_folder_is_that_of_the_model_quantised_after_conversion(
    form, layout, experts, attention, tmp_path, megatron
):
    root = checkpoint(tmp_path / "source", megatron, form, layout)
    convert_to_hf(root, tmp_path / "plain", progress=False)
    config = GengramQuantizationConfig(experts=experts, attention=attention)
    model = GengramForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto", quantization_config=config)
    model.save_pretrained(tmp_path / "expected")
    convert_to_hf(root, tmp_path / "out", progress=False, experts=experts, attention=attention)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.load_hf(tmp_path / "expected"))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = {"quant_method": "gengram_experts", "experts": experts, "attention": attention}
    assert fields["quantization_config"] == kept
    loaded, notes = GengramForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(notes.values())
    ids = torch.tensor([[8, 5, 6, 7, 9, 5, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("size", "kinds", "step"),
    [
        ("9000", ("int8", "int8"), 4),
        *(pytest.param(size, kinds, 1, marks=pytest.mark.slow) for size in ("5GB", "9000") for kinds in STOPPED),
    ],
)
def test_stopped_after_any_part_it_is_continued_to_the_same_bytes(size, kinds, step, tmp_path, megatron, monkeypatch):
    root = checkpoint(tmp_path / "source", megatron, "torch_dist", layers=1, active=(1,))
    options = {"max_shard_size": size, "experts": kinds[0], "attention": kinds[1], "progress": False}
    convert_to_hf(root, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    count, record_part, record = 0, PartialFolder.record_part, PartialFolder.record

    def stop():
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialFolder, "record_part", lambda self, part: (record_part(self, part), stop()))
    monkeypatch.setattr(PartialFolder, "record", lambda self, entry: (record(self, entry), stop()))
    monkeypatch.setattr(PartialFolder, "_discard", lambda self: None)  # as after a kill
    for parts in range(1, 80, step):
        count = parts
        out = tmp_path / f"out{parts}"
        try:
            convert_to_hf(root, out, **options)
            break
        except KeyboardInterrupt:
            assert not out.exists()
        convert_to_hf(root, out, **options)
        assert contents(out) == expected, parts
    assert 20 < parts < 76


@pytest.mark.parametrize("experts", QUANTISED)
def test_verify_quantises_the_source_again(experts, tmp_path, megatron, capsys):
    root = checkpoint(tmp_path / "source", megatron)
    out = tmp_path / "out"
    assert gengram(["convert", "to-hf", str(root), str(out), "--experts", experts]) == 0
    assert f"in bfloat16, experts in {experts}" in capsys.readouterr().out
    report = verify_conversion(out)
    assert f"quantising it again (experts in {experts}) gives the tensors on disk" in report.checks
    assert any(f"which were quantised (experts in {experts})" in reason for reason in report.skipped)
    assert any("two loads are identical" in check for check in report.checks)


def test_verify_finds_numbers_that_the_source_does_not_give(tmp_path, megatron):
    root = checkpoint(tmp_path / "source", megatron)
    convert_to_hf(root, tmp_path / "out", progress=False, experts="int8")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="not those that were written"):
        verify_conversion(tmp_path / "out")
    other = checkpoint(tmp_path / "other", megatron, vocab=17)
    convert_to_hf(other, tmp_path / "out2", progress=False, experts="int8")
    record = json.loads((tmp_path / "out2" / "conversion.json").read_text())
    weights = GengramForCausalLM.from_pretrained(tmp_path / "out2", dtype="auto")
    with torch.no_grad():
        weights.model.layers[0].mlp.experts.down_proj_scale[0, 0] *= 2
    weights.save_pretrained(tmp_path / "out2")
    name = "model.layers.0.mlp.experts.down_proj_scale"
    scale = weights.model.layers[0].mlp.experts.down_proj_scale
    record["weights"][name]["sha256"] = weight_digest(tuple(scale.shape), scale.dtype, [scale])
    (tmp_path / "out2" / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(ConversionError, match=f"not what quantising the source gives: .{name}"):
        verify_conversion(tmp_path / "out2")


@pytest.mark.parametrize("experts", QUANTISED)
def test_diff_compares_the_weights_that_the_numbers_stand_for(experts, tmp_path, megatron):
    root = checkpoint(tmp_path / "source", megatron)
    convert_to_hf(root, tmp_path / "plain", progress=False)
    convert_to_hf(root, tmp_path / "out", progress=False, experts=experts)
    found = diff_checkpoints(tmp_path / "plain", tmp_path / "out", progress=False)
    assert found.config == {"quantization_config.experts": (None, experts)}
    assert not found.only_in_first and not found.only_in_second
    plain, stored = megatron.load_hf(tmp_path / "plain"), megatron.load_hf(tmp_path / "out")
    differing = {difference.name: difference for difference in found.differing}
    assert set(differing) == {name for name in plain if ".experts." in name}
    for name, difference in differing.items():
        weights = dequantize(stored[name], stored[f"{name}_scale"], torch.float32)
        assert difference.largest == float((weights.double() - plain[name].double()).abs().max())
        assert (difference.first, difference.second) == ("bfloat16", experts)
    from_source = diff_checkpoints(root, tmp_path / "out", progress=False)
    assert {difference.name: difference for difference in from_source.differing} == differing
    assert diff_checkpoints(tmp_path / "out", tmp_path / "out", progress=False).same


def test_attention_is_verified_compared_and_told_of_like_the_experts(tmp_path, megatron, capsys):
    root, out = checkpoint(tmp_path / "source", megatron), tmp_path / "out"
    assert gengram(["convert", "to-hf", str(root), str(out), "--experts", "int8", "--attention", "int4"]) == 0
    words = "experts in int8, attention in int4"
    assert f"in bfloat16, {words}" in capsys.readouterr().out
    report = verify_conversion(out)
    assert f"quantising it again ({words}) gives the tensors on disk" in report.checks
    assert any(f"which were quantised ({words})" in reason for reason in report.skipped)
    convert_to_hf(root, tmp_path / "plain", progress=False)
    found = diff_checkpoints(tmp_path / "plain", out, progress=False)
    assert found.config == {
        "quantization_config.experts": (None, "int8"),
        "quantization_config.attention": (None, "int4"),
    }
    plain, stored = megatron.load_hf(tmp_path / "plain"), megatron.load_hf(out)
    differing = {difference.name: difference for difference in found.differing}
    attention = {name for name in plain if ".self_attn." in name}
    assert set(differing) == attention | {name for name in plain if ".experts." in name}
    for name in attention:
        weights = dequantize(stored[name], stored[f"{name}_scale"], torch.float32)
        assert differing[name].largest == float((weights.double() - plain[name].double()).abs().max())
    info = inspect_checkpoint(out)
    assert info.parameters == inspect_checkpoint(tmp_path / "plain").parameters
    assert info.model["attention"].endswith("kept in int4") and info.model["feed-forward"].endswith("kept in int8")


def test_info_counts_weights_and_not_bytes(tmp_path, megatron):
    root = checkpoint(tmp_path / "source", megatron)
    convert_to_hf(root, tmp_path / "plain", progress=False)
    for experts in QUANTISED:
        convert_to_hf(root, tmp_path / experts, progress=False, experts=experts)
        info = inspect_checkpoint(tmp_path / experts)
        assert info.parameters == inspect_checkpoint(tmp_path / "plain").parameters
        assert info.model["feed-forward"].endswith(f"kept in {experts}")


def test_the_way_back_to_megatron_is_refused_with_the_reason(tmp_path, megatron):
    root = checkpoint(tmp_path / "source", megatron)
    convert_to_hf(root, tmp_path / "out", progress=False, experts="int8")
    with pytest.raises(ConversionError, match=r"quantised .*, Megatron's checkpoints hold floats"):
        convert_to_megatron(tmp_path / "out", tmp_path / "back", progress=False)


def test_the_plan_has_the_sizes_that_are_written(tmp_path, megatron):
    root = checkpoint(tmp_path / "source", megatron)
    plan = plan_conversion(root, tmp_path / "out", experts="int4")
    report = convert_to_hf(root, tmp_path / "out", progress=False, experts="int4")
    stored = megatron.load_hf(tmp_path / "out")
    assert plan.bytes_written == report.nbytes == sum(t.nbytes for t in stored.values())
    assert {weight.name for weight in plan.weights} == set(stored)


def test_what_cannot_be_quantised_is_refused_before_anything_is_written(tmp_path, megatron):
    dense = checkpoint(tmp_path / "dense", megatron, experts=0)
    with pytest.raises(ConversionError, match="no experts that --experts int8 could quantise"):
        convert_to_hf(dense, tmp_path / "out", progress=False, experts="int8")
    narrow = checkpoint(tmp_path / "narrow", megatron, width=40)
    with pytest.raises(ConversionError, match=r"down_proj: .* multiple of 32 .* got 40; use .int8"):
        convert_to_hf(narrow, tmp_path / "out", progress=False, experts="int4")
    with pytest.raises(ConversionError, match="give experts"):
        convert_to_hf(narrow, tmp_path / "out", progress=False, attention="int8")
    with pytest.raises(ConversionError, match="one of int8, int4"):
        convert_to_hf(narrow, tmp_path / "out", progress=False, experts="int2")
    assert not (tmp_path / "out").exists()
