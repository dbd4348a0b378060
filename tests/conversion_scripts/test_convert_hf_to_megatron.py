"""The way back: what PyTorch alone reads from our files equals the authors' own, and round trips are bit-exact."""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_ranks import cut
from safetensors.torch import load_file, save_file
from shared_files import FIXTURES, needs_fixtures

from gengram.configuration import GengramConfig
from gengram.conversion_scripts.convert_hf_to_megatron import convert_to_megatron, main
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.conversion_scripts.inspect_checkpoint import inspect_checkpoint
from gengram.conversion_scripts.mapping.arguments import args_from_config, config_from_args, differing_fields
from gengram.conversion_scripts.megatron.torch_dist_reader import open_torch_dist_checkpoint
from gengram.conversion_scripts.to_megatron.stored_weights import StoredWeights
from gengram.modeling_gengram.modeling_gengram import GengramForCausalLM
from gengram.support.errors import ConversionError

SPLITS = [("torch_dist", 1, 1), *(("torch", stages, ranks) for stages in (1, 2, 3) for ranks in (1, 2))]


class Foreign:
    """Stands for a class of Megatron."""

    def __init__(self, *arguments):
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return Foreign if module.startswith("megatron") else super().find_class(module, name)


without_megatron = SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file: _Unpickler(file).load(), __name__="stand_in"
)


def read_dist(folder):
    """Every tensor of a `torch_dist` folder, read by PyTorch's own reader."""
    described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in described.items() if hasattr(entry, "size")}
    tensors = {name: value.to(described[name].properties.dtype) for name, value in tensors.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def read_torch(folder):
    """Each rank's file, read by `torch.load`."""
    result = {}
    for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, weights_only=True)
        assert isinstance(saved["args"], argparse.Namespace)
        result[path.parent.name] = saved
    return result


def canonical_of(source):
    """The authors' weights under Transformer Engine's names, memory of other layers zero."""
    weights = load_file(source.parent / "canonical_weights.safetensors")
    active = json.loads((source.parent / "config.json").read_text())["layer_ids"]
    for name, tensor in weights.items():
        if ".gengram." in name and int(name.split(".")[2]) + 1 not in active:
            weights[name] = torch.zeros_like(tensor)
    return weights


def check_both_ways(megatron, source, folder, weights, **options):
    convert_to_megatron(source, folder / "back", **options, progress=False)
    convert_to_hf(folder / "back", folder / "again", progress=False)
    megatron.assert_same(megatron.load_hf(folder / "again"), weights)


@pytest.mark.parametrize(("form", "stages", "ranks"), SPLITS)
def test_there_and_back(form, stages, ranks, tmp_path, megatron):
    shape = megatron.Shape(layers=6, active=(1, 3), experts=2)
    weights = megatron.canonical(shape)
    root = megatron.save_torch(tmp_path / "source", megatron.named_for(weights, shape, "te"), megatron.args(shape))
    convert_to_hf(root, tmp_path / "hf", progress=False)
    expected = megatron.expected_hf(weights, shape)
    options = dict(format=form, pipeline_parallel=stages, tensor_parallel=ranks)
    check_both_ways(megatron, tmp_path / "hf", tmp_path, expected, **options)


def test_every_checkpoint_of_the_authors_there_and_back(authors_checkpoint, tmp_path, megatron):
    convert_to_hf(authors_checkpoint, tmp_path / "hf", progress=False)
    expected = megatron.load_hf(tmp_path / "hf")
    first, second = tmp_path / "first", tmp_path / "second"
    check_both_ways(megatron, tmp_path / "hf", first, expected)
    check_both_ways(megatron, tmp_path / "hf", second, expected, format="torch", pipeline_parallel=2)
    config = [GengramConfig.from_pretrained(path) for path in (tmp_path / "hf", first / "again", second / "again")]
    assert config[0].to_dict() == config[1].to_dict() == config[2].to_dict()


@needs_fixtures
@pytest.mark.parametrize(
    "source",
    ["model_a/torchdist_te_pp2", "model_b/torchdist_te_pp1", "model_b/torchdist_te_unstacked_layers"],
)
def test_torch_dist_equals_the_authors_file(source, tmp_path, megatron):
    source = FIXTURES / source
    convert_to_hf(source, tmp_path / "hf", progress=False)
    convert_to_megatron(tmp_path / "hf", tmp_path / "back", progress=False)
    ours = tmp_path / "back" / "release"
    described = dcp.FileSystemReader(ours).read_metadata()
    found = {
        name: [list(entry.size), str(entry.properties.dtype).removeprefix("torch."), len(entry.chunks)]
        if hasattr(entry, "size")
        else "bytes"
        for name, entry in described.state_dict_metadata.items()
    }
    expected = json.loads((source / "DIST_KEYS.json").read_text())
    assert found == {name: entry for name, entry in expected.items() if not name.startswith("rng_state")}

    authors = without_megatron.load(open(source / "iter_0024000" / ".metadata", "rb"))
    chunks = [
        {
            name: {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks}
            for name, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks")
        }
        for metadata in (authors, described)
    ]
    assert chunks[0] == chunks[1]

    shape = megatron.Shape(layers=len({n.split(".")[2] for n in canonical_of(source) if ".layers." in n}), experts=4)
    weights = megatron.named_for(canonical_of(source), shape, "te")
    megatron.assert_same(read_dist(ours), megatron.stacked(weights, shape, "unstacked" in source.name))
    for name, entry in described.storage_data.items():
        if "_extra_state" in name.fqn:
            blob = (ours / entry.relative_path).read_bytes()[entry.offset : entry.offset + entry.length]
            (tmp_path / "blob").write_bytes(blob)
            (state,) = torch.load(tmp_path / "blob", weights_only=True)
            assert state.dtype == torch.uint8 and not state.numel()

    original = torch.load(source / "iter_0024000" / "common.pt", weights_only=False, pickle_module=without_megatron)
    common = torch.load(ours / "common.pt", weights_only=False)
    assert set(common) == set(original) and common["checkpoint_version"] == 3.0 and common["iteration"] == 24000
    assert json.loads((ours / "metadata.json").read_text()) == json.loads(
        (source / "iter_0024000" / "metadata.json").read_text()
    )
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "release"
    kept, known = vars(common["args"]), vars(original["args"])
    for name in ("num_layers", "ffn_hidden_size", "moe_layer_freq", "gengram_layer_ids", "tokenizer_type"):
        assert kept[name] == known[name], name
    for name in set(kept) - {"ckpt_format", "no_save_optim", "no_save_rng", "pipeline_model_parallel_size"}:
        assert kept[name] == known.get(name) or not kept[name], name


@needs_fixtures
@pytest.mark.parametrize("source", ["model_a/torch_te_pp1", "model_a/torch_te_pp2"])
def test_torch_equals_the_authors_file(source, tmp_path, megatron):
    source = FIXTURES / source
    stages = 2 if source.name.endswith("pp2") else 1
    convert_to_hf(source, tmp_path / "hf", progress=False)
    convert_to_megatron(tmp_path / "hf", tmp_path / "back", format="torch", pipeline_parallel=stages, progress=False)
    weights = megatron.named_for(canonical_of(source), megatron.Shape(layers=6, experts=4), "te")
    ours = read_torch(tmp_path / "back" / "release")
    assert len(ours) == stages
    for stage, (folder, saved) in enumerate(ours.items()):
        keys = "MODULE_KEYS.json" if stages == 1 else f"MODULE_KEYS_pp{stage}.json"
        expected = json.loads((source / keys).read_text())
        model = saved["model"]
        assert {n: "None" if v is None else [list(v.shape), str(v.dtype)] for n, v in model.items()} == expected
        original = torch.load(
            source / "iter_0024000" / folder / "model_optim_rng.pt", weights_only=False, pickle_module=without_megatron
        )
        assert set(saved) == set(original) - {"rng_state"}
        assert saved["args"].pipeline_model_parallel_size == stages
        for name, value in model.items():
            if "_extra_state" not in name:
                start = 6 // stages * stage
                parts = name.split(".")
                if parts[1] == "layers":
                    parts[2] = str(int(parts[2]) + start)
                assert torch.equal(value, weights[".".join(parts)]), name
                if value.any():
                    assert torch.equal(value, original["model"][name]), name


def test_tensor_parallel_parts_are_those_of_megatron(small_torch_dist, tmp_path, megatron):
    shape = small_torch_dist.shape
    convert_to_hf(small_torch_dist.root, tmp_path / "hf", progress=False)
    convert_to_megatron(tmp_path / "hf", tmp_path / "back", format="torch", tensor_parallel=2, progress=False)
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    ours = read_torch(tmp_path / "back" / "release")
    assert list(ours) == ["mp_rank_00", "mp_rank_01"]
    for rank, saved in enumerate(ours.values()):
        assert saved["args"].tensor_model_parallel_size == 2
        assert saved["args"].make_vocab_size_divisible_by * 2 == shape.vocab
        for name, value in weights.items():
            if f"{shape.prefix}." not in name or ".layers.1." not in name:
                assert torch.equal(saved["model"][name], cut(name, value, shape, rank, 2)), name


SHAPES = st.builds(
    dict,
    layers=st.integers(1, 4),
    heads_groups=st.sampled_from([(4, 1), (4, 2), (4, 4), (2, 2), (6, 3)]),
    head_dim=st.sampled_from([2, 6, 10]),
    hidden=st.sampled_from([4, 12]),
    experts=st.sampled_from([0, 2, 3]),
    width=st.sampled_from([2, 10]),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3, unique=True).map(tuple),
    taps=st.sampled_from([0, 1, 4]),
    active=st.sets(st.integers(1, 4), max_size=3),
    tied=st.booleans(),
    pre_softmax=st.booleans(),
    prefix=st.sampled_from(["gengram", "engram_dna"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)


@settings(deadline=None, max_examples=15)
@given(fields=SHAPES, splits=st.data())
def test_models_of_all_shapes_there_and_back(fields, splits, megatron):
    heads, groups = fields.pop("heads_groups")
    layers = fields["layers"]
    active = tuple(sorted(layer for layer in fields.pop("active") if layer <= layers))
    shape = megatron.Shape(heads=heads, groups=groups, active=active, **fields)
    weights = megatron.canonical(shape, seed=layers)
    stages = splits.draw(st.integers(1, layers))
    first = last = None
    if layers % stages:
        first, last = layers - stages + 1, None
        if stages > 1 and splits.draw(st.booleans()):
            first, last = None, first
    ranks = 2 if groups % 2 == 0 else 1
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tensors = megatron.stacked(megatron.named_for(weights, shape, "te"), shape)
        megatron.save_torch_dist(root / "source", tensors, megatron.args(shape))
        convert_to_hf(root / "source", root / "hf", progress=False)
        expected = megatron.expected_hf(weights, shape)
        check_both_ways(megatron, root / "hf", root / "a", expected)
        options = dict(pipeline_parallel=stages, tensor_parallel=ranks)
        options |= dict(first_stage_layers=first, last_stage_layers=last)
        check_both_ways(megatron, root / "hf", root / "b", expected, format="torch", **options)
        ours = read_torch(root / "b" / "back" / "release")
        assert len(ours) == stages * ranks
        zeroed = {
            name: value if layer is None or layer + 1 in active else torch.zeros_like(value)
            for name, value in megatron.named_for(weights, shape, "te").items()
            for layer in [int(name.split(".")[2]) if f".{shape.prefix}." in name else None]
        }
        megatron.assert_same(read_dist(root / "a" / "back" / "release"), megatron.stacked(zeroed, shape))
        config = GengramConfig.from_pretrained(root / "hf")
        assert not differing_fields(config, GengramConfig.from_pretrained(root / "b" / "again"))


CONFIGS = st.fixed_dictionaries(
    dict(
        num_hidden_layers=st.integers(1, 6),
        hidden_size=st.sampled_from([8, 24]),
        intermediate_size=st.integers(1, 99),
        num_attention_heads=st.sampled_from([4, 8]),
        num_key_value_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([2, 8, 32]),
        max_position_embeddings=st.integers(1, 40000),
        vocab_size=st.integers(10, 300),
        rms_norm_eps=st.sampled_from([1e-6, 1e-5]),
        initializer_range=st.floats(0, 1),
        attention_dropout=st.floats(0, 1),
        tie_word_embeddings=st.booleans(),
        num_local_experts=st.sampled_from([0, 1, 2, 8]),
        num_experts_per_tok=st.integers(1, 2),
        norm_topk_prob=st.booleans(),
        router_aux_loss_coef=st.floats(0, 1),
        router_z_loss_coef=st.floats(0, 1),
        router_jitter_noise=st.floats(0, 1),
        memory_layers=st.lists(st.just(0), max_size=1),
        memory_ngram_sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True),
        memory_conv_kernel=st.integers(0, 5),
        memory_conv_dilation=st.integers(1, 9),
        memory_window=st.integers(6, 99),
        rope_parameters=st.sampled_from(
            [
                {"rope_type": "default", "rope_theta": 1e4},
                {"rope_type": "linear", "rope_theta": 123.5, "factor": 4.0},
                {
                    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0},
                    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
                },
            ]
        ),
    )
)


@settings(deadline=None, max_examples=60)
@given(fields=CONFIGS, prefix=st.sampled_from(["gengram", "engram_dna"]))
def test_arguments_describe_the_configuration(fields, prefix):
    config = GengramConfig(**fields)
    args = args_from_config(config, prefix)
    assert not differing_fields(config, config_from_args(args))
    assert bool(args[f"{prefix}_enabled"]) is bool(config.memory_layers)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(is_causal=False), "is_causal"),
        (dict(memory_norm_eps=1e-6), "memory_norm_eps"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope_parameters"),
    ],
)
def test_models_that_megatron_cannot_express(changes, field):
    with pytest.raises(ConversionError, match=f"no argument for this model's {field}="):
        args_from_config(GengramConfig(**changes))


@pytest.fixture
def folder(small_torch, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "hf", progress=False)
    return tmp_path / "hf"


def saved_model(folder, **changes):
    """A model that was never a Megatron checkpoint."""
    fields = dict(hidden_size=12, intermediate_size=10, num_hidden_layers=3, num_attention_heads=4, head_dim=6)
    fields |= dict(num_key_value_heads=2, num_local_experts=3, vocab_size=16, memory_layers=[0, 2], memory_window=5)
    fields |= dict(memory_ngram_sizes=[2, 1], memory_embedding_dim=3)
    model = GengramForCausalLM(GengramConfig(**{**fields, **changes})).to(torch.float32)
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_model_without_record(form, tmp_path, megatron):
    weights = saved_model(tmp_path / "hf")
    report = convert_to_megatron(tmp_path / "hf", tmp_path / "back", format=form, progress=False)
    assert not report.recorded and report.zeros == 7 and report.prefix == "gengram"
    assert "config.json" in report.summary() and "zeros" in report.summary()
    convert_to_hf(tmp_path / "back", tmp_path / "again", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "again"), weights)
    first, second = (GengramConfig.from_pretrained(tmp_path / name) for name in ("hf", "again"))
    assert not differing_fields(first, second)


def test_prefix_dtype_and_iteration(folder, tmp_path, megatron):
    options = dict(name_prefix="engram_dna", dtype="float32", iteration=77)
    report = convert_to_megatron(folder, tmp_path / "back", **options, progress=False)
    assert report.dtype == "float32" and report.iteration == "iter_0000077"
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "77"
    checkpoint = open_torch_dist_checkpoint(tmp_path / "back" / "iter_0000077")
    assert not [name for name in checkpoint.tensors if ".gengram." in name]
    assert not [name for name in checkpoint.args if name.startswith("gengram_")]
    assert checkpoint.args["engram_dna_layer_ids"] == [1, 3] and checkpoint.args["bf16"] is False
    assert checkpoint.iteration == 77
    convert_to_hf(tmp_path / "back", tmp_path / "again", dtype="bfloat16", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "again"), megatron.load_hf(folder))
    convert_to_megatron(tmp_path / "again", tmp_path / "back2", progress=False)
    assert "engram_dna_layer_ids" in open_torch_dist_checkpoint(tmp_path / "back2" / "release").args


def test_recorded_arguments_that_no_longer_hold_are_not_used(folder, tmp_path):
    report = convert_to_megatron(folder, tmp_path / "a", progress=False)
    assert report.recorded
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 123.0
    (folder / "config.json").write_text(json.dumps(config))
    report = convert_to_megatron(folder, tmp_path / "b", progress=False)
    assert not report.recorded and "rope_parameters" in report.summary()
    assert open_torch_dist_checkpoint(tmp_path / "b" / "release").args["rotary_base"] == 123


def test_a_tied_head_is_copied_to_the_last_stage(tmp_path, megatron):
    weights = saved_model(tmp_path / "hf", tie_word_embeddings=True)
    convert_to_megatron(tmp_path / "hf", tmp_path / "a", format="torch", pipeline_parallel=3, progress=False)
    ours = read_torch(tmp_path / "a" / "release")
    assert torch.equal(ours["mp_rank_00_002"]["model"]["output_layer.weight"], weights["lm_head.weight"])
    assert "output_layer.weight" not in ours["mp_rank_00_000"]["model"]
    convert_to_megatron(tmp_path / "hf", tmp_path / "b", progress=False)
    assert "output_layer.weight" not in read_dist(tmp_path / "b" / "release")


def test_files_do_not_grow_without_bound(folder, tmp_path, monkeypatch, megatron):
    from gengram.conversion_scripts.megatron import torch_dist_writer

    monkeypatch.setattr(torch_dist_writer, "MOST_BYTES", 20_000)
    convert_to_megatron(folder, tmp_path / "back", progress=False)
    files = sorted(path.name for path in (tmp_path / "back" / "release").glob("*.distcp"))
    assert len(files) > 2 and files[:2] == ["__0_0.distcp", "__0_1.distcp"]
    convert_to_hf(tmp_path / "back", tmp_path / "again", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "again"), megatron.load_hf(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(format="zarr"), "format must be one of"),
        (dict(pipeline_parallel=2), "are for format torch"),
        (dict(tensor_parallel=2), "are for format torch"),
        (dict(format="torch", pipeline_parallel=2), "3 layers .* cannot be divided evenly over 2"),
        (dict(format="torch", pipeline_parallel=4), "cannot be divided"),
        (dict(format="torch", pipeline_parallel=3, first_stage_layers=2), "cannot be divided"),
        (dict(format="torch", pipeline_parallel=2, first_stage_layers=0), "cannot be divided"),
        (dict(format="torch", tensor_parallel=4), "num_key_value_heads must be a multiple .* got 2 and 4"),
        (dict(format="torch", tensor_parallel=3), "num_attention_heads must be a multiple"),
        (dict(format="torch", tensor_parallel=0), "tensor_parallel in 1..99"),
        (dict(dtype="int8"), "dtype must be one of"),
        (dict(name_prefix="memory"), "name_prefix must be one of"),
        (dict(iteration=-1), "iteration must lie in"),
    ],
)
def test_what_cannot_be_asked_for(options, message, folder, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert_to_megatron(folder, tmp_path / "back", **options, progress=False)
    assert not (tmp_path / "back").exists()


def test_vocabulary_and_width_must_be_divisible(tmp_path):
    for name, changes in (("vocab_size", dict(vocab_size=15)), ("intermediate_size", dict(intermediate_size=9))):
        saved_model(tmp_path / name, **changes)
        with pytest.raises(ConversionError, match=f"{name} must be a multiple"):
            convert_to_megatron(tmp_path / name, tmp_path / "back", format="torch", tensor_parallel=2, progress=False)


def test_folders_that_cannot_be_used(folder, tmp_path):
    def check(message, **options):
        with pytest.raises(ConversionError, match=message):
            convert_to_megatron(folder, tmp_path / "back", **options, progress=False)
        assert not (tmp_path / "back").exists()

    with pytest.raises(ConversionError, match="is not a folder"):
        convert_to_megatron(tmp_path / "nothing", tmp_path / "back", progress=False)
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_megatron(folder, folder, progress=False)

    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "score.weight": torch.ones(2, 12)}, folder / "model.safetensors")
    check("dtypes torch.bfloat16, torch.float32")
    check(r"has 1 others: 'score.weight'", dtype="float32")
    save_file({n: t for n, t in weights.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    check(r"lacks 1: 'lm_head.weight'")
    save_file({**weights, "model.norm.weight": torch.ones(13).bfloat16()}, folder / "model.safetensors")
    check(r"model.norm.weight: expected shape \(12,\)")
    save_file(weights, folder / "model.safetensors")
    (folder / "conversion.json").write_text("[]")
    check("not the record of a conversion")
    (folder / "conversion.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check("model_type 'llama', expected 'gengram'")
    shutil.rmtree(folder)


def test_nothing_is_left_behind_when_writing_fails(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for form in ("torch", "torch_dist"):
        with pytest.raises(OSError, match="back was not written: no space is left"):
            convert_to_megatron(folder, tmp_path / "back", format=form, progress=False)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "source"}


def test_one_tensor_at_a_time(folder, tmp_path, monkeypatch):
    """At most one weight of the folder is alive while the next one is read."""
    import weakref

    alive: list[weakref.ref] = []
    made = StoredWeights._made

    def watched(*arguments):
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = made(*arguments)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredWeights, "_made", watched)
    for form in ("torch", "torch_dist"):
        convert_to_megatron(folder, tmp_path / form, format=form, progress=False)
    assert len(alive) > 40


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        convert_to_megatron(folder, tmp_path / name, format="torch", progress=False)
        convert_to_megatron(folder, tmp_path / f"{name}_dist", progress=False)
    for kind in ("", "_dist"):
        trees = [
            {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            for root in (tmp_path / f"a{kind}", tmp_path / f"b{kind}")
        ]
        assert trees[0] == trees[1]


def test_command_line(folder, tmp_path, capsys):
    assert main([str(folder), str(tmp_path / "back"), "--format", "torch", "--pipeline-parallel", "3"]) == 0
    assert "3 pipeline stage(s)" in capsys.readouterr().out
    info = inspect_checkpoint(tmp_path / "back")
    assert info.layout == "3 pipeline stages" and not info.problem
    assert main([str(folder), str(tmp_path / "back"), "--quiet"]) == 1
    assert "exists already" in capsys.readouterr().err
    command = [sys.executable, "-m", "gengram.conversion_scripts.convert_hf_to_megatron", "--help"]
    assert "--name-prefix" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


KILLED = """
import os, signal, sys
from gengram.conversion_scripts import convert_hf_to_megatron as back
from gengram.conversion_scripts.to_megatron.stored_weights import StoredWeights
made, left = StoredWeights._made, int(sys.argv[1])
def count(*words):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return made(*words)
StoredWeights._made = count
sys.exit(back.main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_what_a_killed_conversion_left_is_taken_away_or_named(form, folder, tmp_path, megatron, capsys):
    out = tmp_path / "back"
    command = [sys.executable, "-c", KILLED, "9", str(folder), str(out), "--format", form, "--quiet"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("source", "hf")]
    assert left == [".back.partial"]
    other = "torch" if form == "torch_dist" else "torch_dist"
    assert main([str(folder), str(out), "--format", other, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert ".back.partial holds an unfinished conversion of" in error and "differs from this one in format" in error
    assert "--restart to discard it" in error and not out.exists()
    more = ["--format", other, "--restart"] if form == "torch" else ["--format", form]
    assert main([str(folder), str(out), *more, "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "source"]
    convert_to_hf(out, tmp_path / "again", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "again"), megatron.load_hf(folder))


def test_a_whole_checkpoint_is_kept_if_its_place_was_taken_meanwhile(folder, tmp_path, monkeypatch, megatron):
    out, made = tmp_path / "back", StoredWeights._made

    def taken(*words):
        (out / "mine").mkdir(parents=True, exist_ok=True)
        return made(*words)

    with monkeypatch.context() as patch:
        patch.setattr(StoredWeights, "_made", taken)
        with pytest.raises(FileExistsError, match="exists already") as caught:
            convert_to_megatron(folder, out, progress=False)
    assert "the whole output is kept in" in caught.value.__notes__[0]
    shutil.rmtree(out)
    monkeypatch.setattr(StoredWeights, "_made", lambda *words: pytest.fail("it was made again"))
    convert_to_megatron(folder, out, progress=False)
    convert_to_hf(out, tmp_path / "again", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "again"), megatron.load_hf(folder))
    assert not (tmp_path / ".back.partial").exists()


@pytest.mark.parametrize("options", [{}, dict(format="torch"), dict(format="torch", tensor_parallel=2)])
def test_every_flipped_bit_of_the_folder_is_noticed(options, folder, tmp_path):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + header])
    names = [name for name in entries if name != "__metadata__"]
    generator = random.Random(3)
    experts = [name for name in names if ".experts." in name]
    for name in generator.sample(names, 15) + experts:
        start, end = entries[name]["data_offsets"]
        place = 8 + header + generator.randrange(start, end)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :])
        with pytest.raises(ConversionError, match=rf"the bytes of {name} are not those that the conversion wrote"):
            convert_to_megatron(folder, tmp_path / "back", **options, progress=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]
    path.write_bytes(data)
    assert convert_to_megatron(folder, tmp_path / "back", **options, progress=False).unchecked == 0


def test_weights_without_recorded_hashes_are_reported(folder, tmp_path):
    record = json.loads((folder / "conversion.json").read_text())
    (folder / "conversion.json").write_text(json.dumps({**record, "table_version": 0}))
    report = convert_to_megatron(folder, tmp_path / "a", progress=False)
    assert report.unchecked == len(record["weights"]) and report.recorded
    (folder / "conversion.json").unlink()
    report = convert_to_megatron(folder, tmp_path / "b", progress=False)
    assert report.unchecked == len(record["weights"])
    assert f"Not compared with hashes: {report.unchecked} tensors" in report.summary()


@pytest.mark.parametrize("when", [1, 9])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "conversion.json"])
def test_a_folder_that_changes_in_the_middle_is_not_mixed(name, when, folder, tmp_path, monkeypatch):
    calls, made = [], StoredWeights._made

    def changing(*words):
        calls.append(words)
        if len(calls) == when:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:-1] + b" ")
        return made(*words)

    monkeypatch.setattr(StoredWeights, "_made", changing)
    with pytest.raises(ConversionError, match=rf"files were changed while they were read: '{name}'"):
        convert_to_megatron(folder, tmp_path / "back", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]
