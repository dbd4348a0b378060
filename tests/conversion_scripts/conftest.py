"""Megatron checkpoints of any shape, and what they must become, written apart from the code under test.

Weights are named as Megatron's local layer specification names them ("canonical", as in the authors' fixtures);
`expected_hf` moves them row by row.
"""

import argparse
import io
import json
import pickle
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from shared_files import FIXTURES
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import gengram

DATA = Path(__file__).resolve().parents[1] / "data"
DEMO_DATA = Path(gengram.__file__).parent / "demo_data"
ALL_FIXTURES = sorted(path for path in FIXTURES.glob("model_*/torch*") if path.is_dir()) if FIXTURES.is_dir() else []


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters; `active` counts layers from 1, as Megatron does."""

    layers: int = 3
    hidden: int = 12
    heads: int = 4
    groups: int = 2
    head_dim: int = 6
    experts: int = 3
    top_k: int = 2
    width: int = 10
    vocab: int = 16
    sizes: tuple[int, ...] = (1, 2)
    dim: int = 3
    taps: int = 4
    active: tuple[int, ...] = (1, 3)
    window: int = 5
    tied: bool = False
    pre_softmax: bool = False
    prefix: str = "gengram"
    dtype: torch.dtype = torch.bfloat16


def make_args(shape: Shape, **changes) -> argparse.Namespace:
    args = dict(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        group_query_attention=shape.groups != shape.heads,
        num_query_groups=shape.groups if shape.groups != shape.heads else 1,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.width + (7 if shape.experts else 0),
        num_experts=shape.experts or None,
        moe_ffn_hidden_size=shape.width if shape.experts else None,
        moe_router_topk=shape.top_k,
        moe_router_pre_softmax=shape.pre_softmax,
        padded_vocab_size=shape.vocab,
        max_position_embeddings=64,
        seq_length=64,
        add_bias_linear=False,
        normalization="RMSNorm",
        norm_epsilon=2e-5,
        position_embedding_type="rope",
        rotary_base=50000,
        swiglu=True,
        untie_embeddings_and_output_weights=not shape.tied,
        init_method_std=0.01,
        attention_dropout=0.0,
        pipeline_model_parallel_size=1,
        tensor_model_parallel_size=1,
        params_dtype=shape.dtype,
        **{
            f"{shape.prefix}_{name}": value
            for name, value in dict(
                enabled=bool(shape.active),
                layer_ids=list(shape.active),
                ngram_sizes=list(shape.sizes),
                embed_dim_per_ngram=shape.dim,
                token_ids=[8, 5, 6, 7, 9],
                use_short_conv=shape.taps > 0,
                short_conv_kernel_size=shape.taps or 4,
                short_conv_dilation=None,
                window_size=shape.window,
            ).items()
        },
    )
    return argparse.Namespace(**{**args, **changes})


def canonical_weights(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights; every element differs from its neighbours, so that a swap cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def add(name: str, *size: int) -> None:
        weights[name] = torch.randn(size, generator=generator).to(shape.dtype)

    add("embedding.word_embeddings.weight", shape.vocab, shape.hidden)
    for i in range(shape.layers):
        layer = f"decoder.layers.{i}"
        add(f"{layer}.input_layernorm.weight", shape.hidden)
        add(
            f"{layer}.self_attention.linear_qkv.weight",
            (shape.heads + 2 * shape.groups) * shape.head_dim,
            shape.hidden,
        )
        add(f"{layer}.self_attention.linear_proj.weight", shape.hidden, shape.heads * shape.head_dim)
        add(f"{layer}.pre_mlp_layernorm.weight", shape.hidden)
        if shape.experts:
            add(f"{layer}.mlp.router.weight", shape.experts, shape.hidden)
            for e in range(shape.experts):
                add(f"{layer}.mlp.experts.local_experts.{e}.linear_fc1.weight", 2 * shape.width, shape.hidden)
                add(f"{layer}.mlp.experts.local_experts.{e}.linear_fc2.weight", shape.hidden, shape.width)
        else:
            add(f"{layer}.mlp.linear_fc1.weight", 2 * shape.width, shape.hidden)
            add(f"{layer}.mlp.linear_fc2.weight", shape.hidden, shape.width)
        if shape.active:
            for j, n in enumerate(shape.sizes):
                add(f"{layer}.gengram.embeddings.{j}.weight", 5**n, shape.dim)
            add(f"{layer}.gengram.key_proj.weight", shape.hidden, shape.dim * len(shape.sizes))
            add(f"{layer}.gengram.value_proj.weight", shape.hidden, shape.dim * len(shape.sizes))
            add(f"{layer}.gengram.norm_q.weight", shape.hidden)
            add(f"{layer}.gengram.norm_k.weight", shape.hidden)
            if shape.taps:
                add(f"{layer}.gengram.short_conv.conv.weight", shape.hidden, 1, shape.taps)
    add("decoder.final_layernorm.weight", shape.hidden)
    if not shape.tied:
        add("output_layer.weight", shape.vocab, shape.hidden)
    return weights


def expected_hf(canonical: dict[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """The Hugging Face weights, moved row by row."""
    result = {
        "model.embed_tokens.weight": canonical["embedding.word_embeddings.weight"],
        "model.norm.weight": canonical["decoder.final_layernorm.weight"],
    }
    if not shape.tied:
        result["lm_head.weight"] = canonical["output_layer.weight"]
    per_group = shape.heads // shape.groups
    for i in range(shape.layers):
        source, target = f"decoder.layers.{i}", f"model.layers.{i}"
        result[f"{target}.input_layernorm.weight"] = canonical[f"{source}.input_layernorm.weight"]
        result[f"{target}.post_attention_layernorm.weight"] = canonical[f"{source}.pre_mlp_layernorm.weight"]
        result[f"{target}.self_attn.o_proj.weight"] = canonical[f"{source}.self_attention.linear_proj.weight"]
        rows = {"q": [], "k": [], "v": []}
        row = 0
        for _ in range(shape.groups):
            for part, heads in (("q", per_group), ("k", 1), ("v", 1)):
                for _ in range(heads * shape.head_dim):
                    rows[part].append(canonical[f"{source}.self_attention.linear_qkv.weight"][row])
                    row += 1
        for part, values in rows.items():
            result[f"{target}.self_attn.{part}_proj.weight"] = torch.stack(values)
        if shape.experts:
            result[f"{target}.mlp.gate.weight"] = canonical[f"{source}.mlp.router.weight"]
            for number, name in ((1, "gate_up_proj"), (2, "down_proj")):
                experts = [
                    canonical[f"{source}.mlp.experts.local_experts.{e}.linear_fc{number}.weight"]
                    for e in range(shape.experts)
                ]
                result[f"{target}.mlp.experts.{name}"] = torch.stack(experts)
        else:
            fc1 = canonical[f"{source}.mlp.linear_fc1.weight"]
            result[f"{target}.mlp.gate_proj.weight"] = fc1[: shape.width]
            result[f"{target}.mlp.up_proj.weight"] = fc1[shape.width :]
            result[f"{target}.mlp.down_proj.weight"] = canonical[f"{source}.mlp.linear_fc2.weight"]
        if i + 1 in shape.active:
            for name, value in canonical.items():
                if name.startswith(f"{source}.gengram."):
                    result[f"{target}.motif_memory.{name.removeprefix(f'{source}.gengram.')}"] = value
    return result


def shape_of(fields: dict) -> Shape:
    """The shape of a fixture's `config.json`."""
    return Shape(
        layers=fields["num_layers"],
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        groups=fields["num_query_groups"],
        head_dim=fields["kv_channels_resolved"],
        experts=fields["num_experts"],
        width=fields["moe_ffn_hidden_size"],
        vocab=fields["padded_vocab_size"],
        sizes=tuple(fields["ngram_sizes"]),
        dim=fields["embed_dim_per_ngram"],
        active=tuple(fields["layer_ids"]),
    )


def truth(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint folder of the authors' fixtures must become."""
    model = folder.parent if (folder.parent / "config.json").is_file() else DATA / "model_b"
    canonical = load_file(model / "canonical_weights.safetensors")
    return expected_hf(canonical, shape_of(json.loads((model / "config.json").read_text())))


def named_for(canonical: dict[str, torch.Tensor], shape: Shape, layout: str) -> dict[str, torch.Tensor]:
    """Canonical weights under the names of `layout`: "local", "te" (Transformer Engine) or "grouped" (legacy)."""
    result = {}
    for name, value in canonical.items():
        name = name.replace(".gengram.", f".{shape.prefix}.")
        if layout == "te":
            name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            if ".local_experts." in name:
                head, _, tail = name.partition(".local_experts.")
                expert, _, tail = tail.partition(".")
                name = f"{head}.{tail}{expert}"
            if not shape.experts:
                name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        if layout == "grouped" and ".local_experts." in name:
            continue
        result[name] = value
    if layout == "grouped":
        for i in range(shape.layers):
            for number in (1, 2):
                experts = [
                    canonical[f"decoder.layers.{i}.mlp.experts.local_experts.{e}.linear_fc{number}.weight"].T
                    for e in range(shape.experts)
                ]  # (inputs, outputs) each
                flat = torch.cat([expert.reshape(-1) for expert in experts])
                columns = shape.hidden if number == 2 else shape.experts * 2 * shape.width
                result[f"decoder.layers.{i}.mlp.experts.weight{number}"] = flat.reshape(-1, columns)
    return result


def save_torch(root: Path, weights: dict, args: argparse.Namespace, stages: tuple[int, ...] = (), **more) -> Path:
    """Writes format `torch`; `stages` is the number of layers per pipeline stage."""
    stages = stages or (args.num_layers,)
    args.pipeline_model_parallel_size = len(stages)
    folder = root / "iter_0000123"
    offset = 0
    for stage, layers in enumerate(stages):
        model = OrderedDict()
        for name, value in weights.items():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                if offset <= int(parts[2]) < offset + layers:
                    parts[2] = str(int(parts[2]) - offset)
                    model[".".join(parts)] = value
            elif stage == (0 if name.startswith("embedding") else len(stages) - 1):
                model[name] = value
        model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
        rank = folder / ("mp_rank_00" if len(stages) == 1 else f"mp_rank_00_{stage:03d}")
        rank.mkdir(parents=True)
        saved = {"args": args, "checkpoint_version": 3.0, "iteration": 123, "model": model, **more}
        torch.save(saved, rank / "model_optim_rng.pt")
        offset += layers
    (root / "latest_checkpointed_iteration.txt").write_text("123")
    return root


def stacked(weights: dict, shape: Shape, unstacked_layers: bool = False) -> dict[str, torch.Tensor]:
    """Names and shapes of format `torch_dist` for weights with Transformer Engine names."""
    result = {name: value for name, value in weights.items() if ".layers." not in name}
    for i in range(shape.layers):
        for name in [name for name in weights if name.startswith(f"decoder.layers.{i}.")]:
            tail = name.removeprefix(f"decoder.layers.{i}.")
            if tail.startswith("mlp.experts.linear"):
                if not tail.endswith(".weight0"):
                    continue
                tail = tail[:-1]
                value = torch.stack([weights[f"{name[:-1]}{e}"] for e in range(shape.experts)])
                tail = tail.replace("mlp.experts.", "mlp.experts.experts.")
            else:
                value = weights[name]
            if unstacked_layers:
                result[f"decoder.layers.{i}.{tail}"] = value
            else:
                result.setdefault(f"decoder.layers.{tail}", []).append(value)
    return {name: torch.stack(value) if isinstance(value, list) else value for name, value in result.items()}


def halves(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that cut the first and the last axis in two."""
    boxes = [((0,) * len(shape), tuple(shape))]
    for axis in {0, len(shape) - 1}:
        cut = []
        for offsets, sizes in boxes:
            first = sizes[axis] // 2
            for start, size in ((0, first), (first, sizes[axis] - first)):
                if size:
                    moved = (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :])
                    cut.append((moved, (*sizes[:axis], size, *sizes[axis + 1 :])))
        boxes = cut
    return boxes


def save_torch_dist(root: Path, tensors: dict, args: argparse.Namespace, boxes=None, edit=None) -> Path:
    """Writes format `torch_dist`; `boxes(shape)` cuts a tensor into chunks, `edit(metadata)` spoils the metadata."""
    folder = root / "iter_0000123"
    folder.mkdir(parents=True)
    described, storage = {}, {}
    files = [io.BytesIO(), io.BytesIO()]
    number = 0
    for name, tensor in tensors.items():
        chunks = []
        for offsets, sizes in (boxes or halves)(tuple(tensor.shape)):
            piece = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
            file = files[number % 2]
            number += 1
            start = file.tell()
            torch.save(piece, file)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            place = _StorageInfo(f"__0_{(number - 1) % 2}.distcp", start, file.tell() - start)
            storage[MetadataIndex(name, torch.Size(offsets), 0)] = place
        described[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    described["rng_state/shard_0.0_1.1"] = BytesStorageMetadata()
    storage[MetadataIndex("rng_state/shard_0.0_1.1")] = _StorageInfo("__0_0.distcp", 0, 10)
    metadata = Metadata(described, planner_data={}, storage_data=storage)
    if edit is not None:
        edit(metadata)
    for number, file in enumerate(files):
        (folder / f"__0_{number}.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(backend))
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 123}, folder / "common.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("123")
    return root


def load_hf(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="session")
def megatron():
    """The functions of this file."""
    return SimpleNamespace(
        Shape=Shape,
        DATA=DATA,
        replace=replace,
        args=make_args,
        canonical=canonical_weights,
        expected_hf=expected_hf,
        truth=truth,
        named_for=named_for,
        save_torch=save_torch,
        stacked=stacked,
        halves=halves,
        save_torch_dist=save_torch_dist,
        load_hf=load_hf,
        assert_same=assert_same,
    )


@pytest.fixture
def small_torch(tmp_path, megatron):
    """A checkpoint of format `torch` in two stages, and what it must become."""
    shape = Shape()
    weights = canonical_weights(shape)
    root = save_torch(tmp_path / "source", named_for(weights, shape, "te"), make_args(shape), stages=(1, 2))
    return SimpleNamespace(root=root, folder=root / "iter_0000123", shape=shape, expected=expected_hf(weights, shape))


@pytest.fixture
def small_torch_dist(tmp_path):
    """A checkpoint of format `torch_dist`, and what it must become."""
    shape = Shape()
    weights = canonical_weights(shape)
    tensors = stacked(named_for(weights, shape, "te"), shape)
    root = save_torch_dist(tmp_path / "source", tensors, make_args(shape))
    return SimpleNamespace(
        root=root, folder=root / "iter_0000123", shape=shape, tensors=tensors, expected=expected_hf(weights, shape)
    )


def pytest_generate_tests(metafunc):
    """`authors_checkpoint` runs over our copies of checkpoints and, where they are, over all of the fixtures."""
    if "authors_checkpoint" in metafunc.fixturenames:
        own = [DATA / "model_b" / "torch_te_fp32masters", DEMO_DATA / "tiny_checkpoint"]
        folders = own + ALL_FIXTURES
        names = [f"data-{path.name}" for path in own] + [f"{p.parent.name}-{p.name}" for p in ALL_FIXTURES]
        metafunc.parametrize("authors_checkpoint", folders, ids=names)
