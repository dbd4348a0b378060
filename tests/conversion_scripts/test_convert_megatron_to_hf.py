"""Whole conversions: bit-exact weights, complete folders, and nothing left behind when something fails."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from saved_sources import SAVED_SOURCES
from transformers import GenerationConfig

from gengram.configuration import GengramConfig
from gengram.conversion_scripts import convert_megatron_to_hf as convert
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf, main
from gengram.conversion_scripts.to_hf import write_folder
from gengram.conversion_scripts.to_hf.source_reader import SourceReader
from gengram.modeling_gengram.modeling_gengram import GengramForCausalLM
from gengram.support.errors import ConversionError
from gengram.tokenization import GengramTokenizer


def test_every_checkpoint_of_the_authors_is_converted_bit_for_bit(authors_checkpoint, tmp_path, megatron):
    report = convert_to_hf(authors_checkpoint, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.truth(authors_checkpoint))
    assert report.iteration == 24000
    reasons = [entry.reason for entry in report.dropped]
    assert any("dead" in reason for reason in reasons)
    if "optim" in str(authors_checkpoint):
        assert "optimizer state" in reasons


VARIANTS = {
    "multi_query": dict(groups=1),
    "multi_head": dict(groups=4),
    "wide_heads": dict(head_dim=10),
    "no_convolution": dict(taps=0),
    "sizes_out_of_order": dict(sizes=(3, 1, 2)),
    "top_1_pre_softmax": dict(top_k=1, pre_softmax=True),
    "dense": dict(experts=0),
    "tied": dict(tied=True),
    "released_prefix": dict(prefix="engram_dna"),
    "float32": dict(dtype=torch.float32),
    "no_memory": dict(active=()),
    "dense_tied_float16": dict(experts=0, tied=True, dtype=torch.float16),
}


@pytest.mark.parametrize("form", ["torch_te", "torch_local", "torch_grouped", "torch_dist", "torch_dist_unstacked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, form, tmp_path, megatron):
    shape = megatron.Shape(**VARIANTS[variant])
    if form == "torch_grouped" and not shape.experts:
        pytest.skip("grouped experts need experts")
    weights = megatron.canonical(shape)
    args = megatron.args(shape)
    if form.startswith("torch_dist"):
        tensors = megatron.named_for(weights, shape, "te")
        tensors = megatron.stacked(tensors, shape, unstacked_layers=form.endswith("unstacked"))
        root = megatron.save_torch_dist(tmp_path / "source", tensors, args)
    else:
        layout = form.removeprefix("torch_")
        root = megatron.save_torch(tmp_path / "source", megatron.named_for(weights, shape, layout), args)
    convert_to_hf(root, tmp_path / "out", progress=False)
    found = megatron.load_hf(tmp_path / "out")
    megatron.assert_same(found, megatron.expected_hf(weights, shape))

    config = GengramConfig.from_pretrained(tmp_path / "out")
    assert config.num_key_value_heads == shape.groups and config.head_dim == shape.head_dim
    assert config.norm_topk_prob is not shape.pre_softmax
    assert config.memory_layers == [layer - 1 for layer in shape.active]
    assert str(config.dtype) == str(shape.dtype)
    with torch.device("meta"):
        model = GengramForCausalLM(config)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if shape.tied:
        wanted.pop("lm_head.weight")
    assert {name: tuple(t.shape) for name, t in found.items()} == wanted


@pytest.mark.parametrize("stages", [(3,), (1, 2), (2, 1), (1, 1, 1)])
def test_pipeline_splits(stages, tmp_path, megatron):
    shape = megatron.Shape()
    weights = megatron.canonical(shape)
    root = megatron.save_torch(
        tmp_path / "source", megatron.named_for(weights, shape, "te"), megatron.args(shape), stages=stages
    )
    convert_to_hf(root, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.expected_hf(weights, shape))


def test_tied_head_is_left_out_only_if_it_equals_the_embedding(tmp_path, megatron):
    shape = megatron.Shape(tied=True)
    weights = megatron.canonical(shape)
    weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"].clone()
    megatron.save_torch(tmp_path / "a", megatron.named_for(weights, shape, "te"), megatron.args(shape), stages=(1, 2))
    report = convert_to_hf(tmp_path / "a", tmp_path / "out", progress=False)
    assert "output_layer.weight" in [entry.name for entry in report.dropped]

    weights["output_layer.weight"][3, 2] += 1
    megatron.save_torch(tmp_path / "b", megatron.named_for(weights, shape, "te"), megatron.args(shape), stages=(1, 2))
    with pytest.raises(ConversionError, match=r"output_layer\.weight differs"):
        convert_to_hf(tmp_path / "b", tmp_path / "out_b", progress=False)
    assert not (tmp_path / "out_b").exists()


def test_the_folder_is_complete(small_torch, tmp_path):
    out = tmp_path / "out"
    report = convert_to_hf(small_torch.root, out, progress=False)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "conversion.json"),
        *("tokenizer.json", "tokenizer_config.json"),
        *SAVED_SOURCES,
    }
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["GengramForCausalLM"] and config["dtype"] == "bfloat16"
    generation = GenerationConfig.from_pretrained(out)
    assert generation.pad_token_id == 0 and not generation.do_sample
    assert set(range(16)) - set(generation.suppress_tokens) == {5, 6, 7, 8, 9}
    assert GengramTokenizer.from_pretrained(out)("ACGTN")["input_ids"] == [8, 5, 6, 7, 9]
    record = json.loads((out / "conversion.json").read_text())
    assert record["table_version"] == 1 and record["source"]["format"] == "torch"
    assert record["source"]["args"]["num_layers"] == 3
    assert record["source"]["args"]["norm_epsilon"] == 2e-5
    assert record["weights"]["model.layers.0.self_attn.q_proj.weight"]["sources"] == [
        "decoder.layers.0.self_attention.linear_qkv.weight"
    ]
    assert any("dead" in entry["reason"] and entry["bytes"] for entry in record["dropped"])
    text = report.summary()
    assert "iteration 123" in text and "dead weights" in text and "_extra_state" in text


def test_the_converted_model_runs(small_torch, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    model = GengramForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    generated = model.generate(torch.tensor([[8, 5, 6, 7]]), max_new_tokens=6)
    assert set(generated[0].tolist()) <= {5, 6, 7, 8, 9}


def test_both_formats_of_the_same_weights_give_the_same_bytes(small_torch, megatron, tmp_path):
    weights = megatron.canonical(small_torch.shape)
    tensors = megatron.stacked(megatron.named_for(weights, small_torch.shape, "te"), small_torch.shape)
    megatron.save_torch_dist(tmp_path / "dist", tensors, megatron.args(small_torch.shape))
    convert_to_hf(small_torch.root, tmp_path / "a", progress=False)
    convert_to_hf(tmp_path / "dist", tmp_path / "b", progress=False)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    sources = [json.loads((tmp_path / x / "conversion.json").read_text())["source"]["tensors"] for x in "ab"]
    assert sources[0] == sources[1]


def test_dtype(small_torch, megatron, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "wide", dtype="float32", progress=False)
    wide = {name: value.float() for name, value in small_torch.expected.items()}
    megatron.assert_same(megatron.load_hf(tmp_path / "wide"), wide)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"

    shape = megatron.Shape(dtype=torch.float32)
    weights = megatron.canonical(shape)
    megatron.save_torch(tmp_path / "fp32", megatron.named_for(weights, shape, "te"), megatron.args(shape))
    convert_to_hf(tmp_path / "fp32", tmp_path / "narrow", dtype="bfloat16", progress=False)
    narrow = {name: value.bfloat16() for name, value in megatron.expected_hf(weights, shape).items()}
    megatron.assert_same(megatron.load_hf(tmp_path / "narrow"), narrow)

    with pytest.raises(ConversionError, match="dtype must be one of float32, bfloat16"):
        convert_to_hf(small_torch.root, tmp_path / "x", dtype="int8", progress=False)


def test_mixed_dtypes_need_a_decision(tmp_path, megatron):
    shape = megatron.Shape()
    weights = megatron.canonical(shape)
    weights["decoder.layers.1.mlp.router.weight"] = weights["decoder.layers.1.mlp.router.weight"].float()
    megatron.save_torch(tmp_path / "source", megatron.named_for(weights, shape, "te"), megatron.args(shape))
    with pytest.raises(ConversionError, match=r"torch\.bfloat16, torch\.float32.*--dtype"):
        convert_to_hf(tmp_path / "source", tmp_path / "out", progress=False)
    convert_to_hf(tmp_path / "source", tmp_path / "out", dtype="float32", progress=False)


def test_shards(small_torch, megatron, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "out", max_shard_size="2KB", progress=False)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), small_torch.expected)
    model = GengramForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, small_torch.expected["lm_head.weight"])


def test_output_must_be_free(small_torch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_hf(small_torch.root, out, progress=False)
    assert (out / "mine.txt").read_text() == "keep"
    file = tmp_path / "file"
    file.write_text("keep")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_hf(small_torch.root, file, progress=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    convert_to_hf(small_torch.root, empty, progress=False)
    assert (empty / "config.json").is_file()


def nothing_left(tmp_path, *expected):
    return sorted(path.name for path in tmp_path.iterdir()) == sorted(["source", *expected])


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(1), RuntimeError("x")]
)
def test_a_failure_in_the_middle_leaves_nothing(error, small_torch, tmp_path, monkeypatch):
    calls = []
    original = SourceReader._parts

    def failing(self, move):
        calls.append(move)
        if len(calls) == 20:
            raise error
        return original(self, move)

    monkeypatch.setattr(SourceReader, "_parts", failing)
    with pytest.raises(type(error)):
        convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    assert len(calls) == 20 and nothing_left(tmp_path)


def test_a_failure_at_the_end_keeps_the_weights_for_the_next_time(small_torch, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(write_folder, "MODEL_CARD", tmp_path / "nowhere.md")
        with pytest.raises(OSError, match=r"nowhere\.md"):
            convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    assert nothing_left(tmp_path, ".out.partial")
    monkeypatch.setattr(SourceReader, "_parts", None)  # nothing is read again
    convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    assert nothing_left(tmp_path, "out")


def test_disk_space_is_checked_first(small_torch, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConversionError, match="1 B free"):
        convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    assert nothing_left(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_leaves_nothing(small_torch, tmp_path, monkeypatch, capsys):
    import gengram.conversion_scripts.files.safetensors_writer as writer

    monkeypatch.setattr(writer, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    assert main([str(small_torch.root), str(tmp_path / "out"), "--quiet"]) == 1
    assert "out was not written: no space is left on the disk; free some" in capsys.readouterr().err
    assert nothing_left(tmp_path)


def test_command_line(small_torch, tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", convert.__name__, str(small_torch.root)]
    done = subprocess.run([*command, str(tmp_path / "out"), "--dtype", "float32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Converted" in done.stdout and "Left out" in done.stdout
    again = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ") and "exists already" in again.stderr and "Traceback" not in again.stderr


def test_conversion_imports_no_megatron(small_torch_dist, tmp_path):
    convert_to_hf(small_torch_dist.root, tmp_path / "out", progress=False)
    assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "transformer_engine")]


def whole(shape):
    """One chunk for all layers and experts, so that each of them is read as a part of it."""
    return [((0,) * len(shape), shape)]


@pytest.mark.parametrize("layout", ["one chunk per tensor", "chunks that cut rows", "torch", "shared storages"])
def test_every_flipped_bit_of_a_weight_is_noticed(layout, tmp_path, megatron):
    shape = megatron.Shape(layers=2, active=(1,))
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    if layout == "torch":
        megatron.save_torch(tmp_path / "source", weights, megatron.args(shape))
    elif layout == "shared storages":
        flat = torch.cat([value.reshape(-1) for value in weights.values()])
        ends = torch.tensor([value.numel() for value in weights.values()]).cumsum(0).tolist()
        parts = {
            name: flat[end - value.numel() : end].view(value.shape)
            for (name, value), end in zip(weights.items(), ends, strict=True)
        }
        megatron.save_torch(tmp_path / "source", parts, megatron.args(shape))
    else:
        boxes = whole if layout == "one chunk per tensor" else None
        tensors = megatron.stacked(weights, shape)
        megatron.save_torch_dist(tmp_path / "source", tensors, megatron.args(shape), boxes)
    convert_to_hf(tmp_path / "source", tmp_path / "sound", progress=False)
    generator = random.Random(layout)
    kept = sorted(name for name in weights if not name.startswith("decoder.layers.1.gengram."))
    flipped = 0
    for path in sorted((tmp_path / "source").rglob("*.pt")) + sorted((tmp_path / "source").rglob("*.distcp")):
        data = path.read_bytes()
        starts = [data.find(weights[name].flatten()[:4].view(torch.uint8).numpy().tobytes()) for name in kept]
        there = [start for start in starts if start >= 0]
        for start in generator.sample(there, min(len(there), 8)):
            place, bit = start + generator.randrange(8), 1 << generator.randrange(8)
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(ConversionError, match="do not have the checksum"):
                convert_to_hf(tmp_path / "source", tmp_path / "out", progress=False)
            flipped += 1
        path.write_bytes(data)
    assert flipped >= 8 and not (tmp_path / "out").exists()


def test_what_could_not_be_checked_is_reported_and_recorded(tmp_path, megatron, capsys):
    shape = megatron.Shape()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        weights = megatron.named_for(megatron.canonical(shape), shape, "te")
        megatron.save_torch(tmp_path / "source", weights, megatron.args(shape))
    finally:
        torch.serialization.set_crc32_options(before)
    assert main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["tensors"]
    assert f"Not compared with checksums: {len(record)} tensors, because their file was written without" in said
    assert all(entry["unchecked"] == "their file was written without checksums" for entry in record.values())


def at_the_source_tensor(number, act, monkeypatch):
    """Does something when the conversion asks for its n-th source tensor."""
    calls = []
    original = SourceReader._parts

    def parts(self, move):
        calls.append(move)
        if len(calls) == number:
            act()
        return original(self, move)

    monkeypatch.setattr(SourceReader, "_parts", parts)


def overwrite(path, content):
    path.write_bytes(content)


def replace_and_keep_the_time(path, content):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)
    os.utime(path, ns=times)


@pytest.mark.parametrize("how", [overwrite, replace_and_keep_the_time])
@pytest.mark.parametrize("when", [1, 20, "after the last tensor", "after opening"])
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_source_that_changes_in_the_middle_is_not_mixed(form, when, how, tmp_path, megatron, monkeypatch):
    shape = megatron.Shape()
    for seed, name in enumerate(("source", "later")):
        weights = megatron.named_for(megatron.canonical(shape, seed=seed), shape, "te")
        if form == "torch":
            megatron.save_torch(tmp_path / name, weights, megatron.args(shape))
        else:
            megatron.save_torch_dist(tmp_path / name, megatron.stacked(weights, shape), megatron.args(shape))

    def train_on():
        for path in sorted(path for path in (tmp_path / "source").rglob("*") if path.is_file()):
            how(path, (tmp_path / "later" / path.relative_to(tmp_path / "source")).read_bytes())

    if when == "after the last tensor":
        original = SourceReader.check_tied_copies
        monkeypatch.setattr(SourceReader, "check_tied_copies", lambda self: original(self) or train_on())
    elif when == "after opening":
        prepare = convert.prepare_job

        def prepared(*words):
            job = prepare(*words)
            train_on()
            return job

        monkeypatch.setattr(convert, "prepare_job", prepared)
    else:
        at_the_source_tensor(when, train_on, monkeypatch)
    with pytest.raises(
        ConversionError, match=r"files were changed while they were read: '.*run the same command again"
    ):
        convert_to_hf(tmp_path / "source", tmp_path / "out", max_shard_size="1500", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "later"}
    monkeypatch.undo()
    convert_to_hf(tmp_path / "source", tmp_path / "out", progress=False)
    expected = megatron.expected_hf(megatron.canonical(shape, seed=1), shape)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), expected)


def test_a_source_that_goes_away_in_the_middle_can_come_back(small_torch, tmp_path, megatron, monkeypatch):
    away = tmp_path / "away"
    at_the_source_tensor(20, lambda: small_torch.root.rename(away), monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"files were removed while they were read: .*; put them back"):
        convert_to_hf(small_torch.root, tmp_path / "out", max_shard_size="1500", progress=False)
    monkeypatch.undo()
    away.rename(small_torch.root)
    convert_to_hf(small_torch.root, tmp_path / "out", max_shard_size="1500", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), small_torch.expected)
