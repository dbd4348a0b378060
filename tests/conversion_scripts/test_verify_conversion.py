"""`gengram verify` finds what is wrong with a converted folder."""

import json
import shutil

import pytest
import torch

from gengram.cli import main as gengram
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.conversion_scripts.files.hf_folder import stored_tensors
from gengram.conversion_scripts.verify_conversion import verify_conversion
from gengram.modeling_gengram.modeling_gengram import GengramForCausalLM
from gengram.support.errors import ConversionError


@pytest.fixture
def converted(small_torch, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "out", max_shard_size="4KB", progress=False)
    return tmp_path / "out"


def test_a_good_folder(converted):
    report = verify_conversion(converted)
    assert len(report.checks) == 6 and not report.skipped
    assert "is verified" in report.summary()


def test_the_authors_checkpoints(authors_checkpoint, tmp_path):
    convert_to_hf(authors_checkpoint, tmp_path / "out", progress=False)
    assert len(verify_conversion(tmp_path / "out").checks) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(dtype, tmp_path, megatron):
    shape = megatron.Shape(dtype=torch.float32)
    source = megatron.save_torch(
        tmp_path / "source", megatron.named_for(megatron.canonical(shape), shape, "local"), megatron.args(shape)
    )
    convert_to_hf(source, tmp_path / "out", dtype=dtype, progress=False)
    report = verify_conversion(tmp_path / "out")
    assert any("rounded" in reason for reason in report.skipped) == (dtype == "bfloat16")


def test_tied_and_grouped(tmp_path, megatron):
    shape = megatron.Shape(tied=True)
    weights = megatron.named_for(megatron.canonical(shape), shape, "grouped")
    source = megatron.save_torch(tmp_path / "source", weights, megatron.args(shape))
    convert_to_hf(source, tmp_path / "out", progress=False)
    assert len(verify_conversion(tmp_path / "out").checks) == 6


def test_a_flipped_bit_names_the_tensor(converted):
    name = "model.layers.1.mlp.experts.down_proj"
    stored = stored_tensors(converted)[name]
    data = bytearray(stored.path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    place = 8 + header + json.loads(data[8 : 8 + header])[name]["data_offsets"][0] + 100
    data[place] ^= 1
    stored.path.write_bytes(data)
    with pytest.raises(ConversionError, match=rf"the bytes of 1 tensors .* '{name}'"):
        verify_conversion(converted)


def test_files_that_are_missing_superfluous_or_damaged(converted, tmp_path):
    files = sorted(converted.glob("*.safetensors"))
    extra = converted / "model-00099-of-00099.safetensors"
    shutil.copy(files[0], extra)
    with pytest.raises(ConversionError, match="another set of weights"):
        verify_conversion(converted)
    extra.unlink()
    data = files[0].read_bytes()
    files[0].write_bytes(data[:-3])
    with pytest.raises(ConversionError, match="not a readable safetensors file"):
        verify_conversion(converted)
    files[0].write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(ConversionError, match="not a readable safetensors file"):
        verify_conversion(converted)
    files[0].unlink()
    with pytest.raises(ConversionError, match="missing"):
        verify_conversion(converted)


def test_records_that_are_wrong(converted):
    path = converted / "conversion.json"
    record = json.loads(path.read_text())

    def write(**changes):
        path.write_text(json.dumps({**record, **changes}))

    write(table_version=99)
    with pytest.raises(ConversionError, match="version 99"):
        verify_conversion(converted)
    write(weights={})
    with pytest.raises(ConversionError, match=r"not in conversion\.json"):
        verify_conversion(converted)
    write(weights={**record["weights"], "more": record["weights"]["lm_head.weight"]})
    with pytest.raises(ConversionError, match="missing 'more'"):
        verify_conversion(converted)
    for wrong in ("{", "[]", "{}", '{"table_version": 1, "source": {"tensors": [1]}, "weights": {}}'):
        path.write_text(wrong)
        with pytest.raises(ConversionError, match=r"conversion\.json"):
            verify_conversion(converted)
    path.unlink()
    with pytest.raises(ConversionError, match=r"conversion\.json is missing"):
        verify_conversion(converted)


def test_weights_that_are_not_the_source_s(converted):
    """Swapped experts with a record to match: only the way back to the source shows it."""
    path = converted / "conversion.json"
    record = json.loads(path.read_text())
    sources = record["source"]["tensors"]
    a, b = (sources[f"decoder.layers.0.mlp.experts.linear_fc2.weight{e}"] for e in (0, 1))
    a["sha256"], b["sha256"] = b["sha256"], a["sha256"]
    path.write_text(json.dumps(record))
    with pytest.raises(ConversionError, match=r"2 tensors are not the source's.*fc2\.weight0.*fc2\.weight1"):
        verify_conversion(converted)


def test_a_configuration_that_was_changed(converted):
    path = converted / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}))
    with pytest.raises(ConversionError, match="num_attention_heads is 2, not 4"):
        verify_conversion(converted)
    path.write_text(json.dumps({**config, "memory_layers": [99]}))
    with pytest.raises(ConversionError, match=r"config\.json is not valid"):
        verify_conversion(converted)


OTHER_MODELS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "rms_norm_eps": 0.25,
    "memory_window": 7,
    "memory_token_ids": [5, 8, 6, 7, 9],
    "memory_pooling": "as_trained",
    "norm_topk_prob": False,
    "num_experts_per_tok": 1,
    "is_causal": False,
    "architectures": ["GengramForMaskedLM"],
}


@pytest.mark.parametrize("field", OTHER_MODELS)
def test_a_configuration_of_another_model_with_the_same_weights(field, converted):
    path = converted / "config.json"
    config = json.loads(path.read_text())
    assert config[field] != OTHER_MODELS[field]
    path.write_text(json.dumps({**config, field: OTHER_MODELS[field]}))
    with pytest.raises(ConversionError, match=rf"another model than the arguments in conversion\.json: {field} is "):
        verify_conversion(converted, load=False)
    record = json.loads((converted / "conversion.json").read_text())
    del record["source"]["args"]
    (converted / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(ConversionError, match=rf"another model than the arguments of .*source.*: {field} is "):
        verify_conversion(converted, load=False)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "modeling_gengram.py"])
def test_other_files_that_are_gone_or_changed(name, converted):
    path = converted / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ConversionError, match=f"'{name}' are not as the conversion wrote them"):
        verify_conversion(converted, load=False)
    path.unlink()
    with pytest.raises(ConversionError, match=f"missing '{name}'"):
        verify_conversion(converted, load=False)


def test_a_record_of_an_older_version_without_hashes_of_other_files(converted):
    path = converted / "conversion.json"
    record = json.loads(path.read_text())
    del record["files"]
    path.write_text(json.dumps(record))
    (reason,) = verify_conversion(converted, load=False).skipped[:-1]
    assert "tokenizer" in reason


def test_the_source(converted, small_torch, tmp_path, megatron):
    moved = tmp_path / "moved"
    small_torch.root.rename(moved)
    report = verify_conversion(converted)
    assert len(report.checks) == 5 and "no longer at" in report.skipped[0]
    assert len(verify_conversion(converted, source=moved).checks) == 6
    with pytest.raises(ConversionError, match="does not exist"):
        verify_conversion(converted, source=tmp_path / "nowhere")
    other = megatron.named_for(megatron.canonical(small_torch.shape, seed=1), small_torch.shape, "te")
    megatron.save_torch(tmp_path / "other", other, megatron.args(small_torch.shape))
    with pytest.raises(ConversionError, match="tensors differ from those that were converted"):
        verify_conversion(converted, source=tmp_path / "other")


def test_not_finite(tmp_path, megatron):
    shape = megatron.Shape()
    weights = megatron.canonical(shape)
    weights["decoder.final_layernorm.weight"][0] = float("nan")
    source = megatron.save_torch(tmp_path / "source", megatron.named_for(weights, shape, "te"), megatron.args(shape))
    convert_to_hf(source, tmp_path / "out", progress=False)
    with pytest.raises(ConversionError, match="not finite"):
        verify_conversion(tmp_path / "out")
    assert len(verify_conversion(tmp_path / "out", load=False).checks) == 5


def test_loads_that_differ(converted, monkeypatch):
    original = GengramForCausalLM.from_pretrained.__func__

    def shaky(cls, *args, **kwargs):
        model, notes = original(cls, *args, **kwargs)
        with torch.no_grad():
            model.model.norm.weight[0] = torch.rand(())
        return model, notes

    monkeypatch.setattr(GengramForCausalLM, "from_pretrained", classmethod(shaky))
    with pytest.raises(ConversionError, match=r"two loads differ in 'model\.norm\.weight'"):
        verify_conversion(converted)


def test_command(converted, capsys):
    assert gengram(["verify", str(converted), "--no-load"]) == 0
    assert "ok: " in capsys.readouterr().out
    assert gengram(["verify", str(converted / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
