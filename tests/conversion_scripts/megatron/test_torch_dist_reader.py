"""Checkpoints of format `torch_dist`: chunks in any cut, and files and metadata that are wrong."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.conversion_scripts.megatron.open_checkpoint import open_checkpoint
from gengram.support.errors import ConversionError

ROUTER = "decoder.layers.mlp.router.weight"


def edit_metadata(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def whole(shape):
    return [((0,) * len(shape), shape)]


def per_layer(shape):
    return [((i, *(0,) * (len(shape) - 1)), (1, *shape[1:])) for i in range(shape[0])]


@pytest.mark.parametrize("boxes", [whole, per_layer, None])
def test_any_cut_gives_the_same_weights(boxes, tmp_path, megatron):
    shape = megatron.Shape()
    weights = megatron.canonical(shape)
    tensors = megatron.stacked(megatron.named_for(weights, shape, "te"), shape)
    root = megatron.save_torch_dist(tmp_path / "source", tensors, megatron.args(shape), boxes=boxes)
    convert_to_hf(root, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.expected_hf(weights, shape))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_written_by_torch_itself(tmp_path, megatron):
    shape = megatron.Shape()
    weights = megatron.canonical(shape)
    tensors = megatron.stacked(megatron.named_for(weights, shape, "te"), shape)
    root = megatron.save_torch_dist(tmp_path / "source", tensors, megatron.args(shape))
    folder = root / "iter_0000123"
    for file in folder.glob("*.distcp"):
        file.unlink()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    convert_to_hf(root, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.expected_hf(weights, shape))


def test_opening_reads_no_weights(small_torch_dist):
    for file in small_torch_dist.folder.glob("*.distcp"):
        file.write_bytes(b"\0" * file.stat().st_size)
    checkpoint = open_checkpoint(small_torch_dist.root)
    assert checkpoint.tensors["decoder.layers.2.mlp.experts.linear_fc2.weight1"].shape == (12, 10)
    assert checkpoint.layout == "2 .distcp files, layers stacked"
    with pytest.raises(ConversionError, match="zip archive"):
        checkpoint.tensors["decoder.layers.2.mlp.experts.linear_fc2.weight1"].read()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_missing_descriptions(name, small_torch_dist):
    (small_torch_dist.folder / name).unlink()
    with pytest.raises(ConversionError, match=name):
        open_checkpoint(small_torch_dist.root)


@pytest.mark.parametrize("text", ['{"sharded_backend": "zarr"}', "[]", "nonsense", '{"sharded_backend": {}}'])
def test_other_backends(text, small_torch_dist):
    (small_torch_dist.folder / "metadata.json").write_text(text)
    with pytest.raises(ConversionError, match=r"metadata\.json"):
        open_checkpoint(small_torch_dist.root)


def test_missing_truncated_and_extra_files(small_torch_dist, tmp_path):
    file = small_torch_dist.folder / "__0_1.distcp"
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(ConversionError, match=r"missing '__0_1\.distcp'"):
        open_checkpoint(small_torch_dist.root)
    file.write_bytes(data[:-1])
    with pytest.raises(ConversionError, match=r"__0_1\.distcp.*truncated"):
        open_checkpoint(small_torch_dist.root)
    file.write_bytes(data)
    (small_torch_dist.folder / "__7_0.distcp").write_bytes(b"x")
    with pytest.raises(ConversionError, match=r"'__7_0\.distcp' belong to no tensor"):
        open_checkpoint(small_torch_dist.root)
    (small_torch_dist.folder / "__7_0.distcp").write_bytes(b"")  # a rank that had nothing to write
    open_checkpoint(small_torch_dist.root)


def test_a_missing_file_of_optimizer_state_does_not_matter(small_torch_dist, tmp_path):
    def elsewhere(metadata):
        index = next(index for index in metadata.storage_data if index.fqn.startswith("rng_state"))
        metadata.storage_data[index].relative_path = "__9_0.distcp"

    edit_metadata(small_torch_dist.folder, elsewhere)
    convert_to_hf(small_torch_dist.root, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "path", ["../x.distcp", "/etc/x.distcp", "a/b.distcp", "..", "common.pt", "x.distcp\n", "", 3]
)
def test_chunks_stay_in_the_folder(path, small_torch_dist):
    def leave(metadata):
        next(iter(metadata.storage_data.values())).relative_path = path

    edit_metadata(small_torch_dist.folder, leave)
    with pytest.raises(ConversionError, match=r"must lie in a .distcp file of this folder"):
        open_checkpoint(small_torch_dist.root)


def drop_chunk(metadata):
    entry = metadata.state_dict_metadata[ROUTER]
    chunk = entry.chunks.pop()
    del metadata.storage_data[MetadataIndex(ROUTER, chunk.offsets)]


def lose_place(metadata):
    del metadata.storage_data[MetadataIndex(ROUTER, metadata.state_dict_metadata[ROUTER].chunks[0].offsets)]


def overlap(metadata):
    entry = metadata.state_dict_metadata[ROUTER]
    first = entry.chunks[0]
    entry.chunks[0] = ChunkStorageMetadata(
        first.offsets, torch.Size([s + (a == 0) for a, s in enumerate(first.sizes)])
    )


def leave_tensor(metadata):
    metadata.state_dict_metadata[ROUTER].size = torch.Size([3, 3, 7])


def fewer_axes(metadata):
    metadata.state_dict_metadata[ROUTER].size = torch.Size([3, 36])


def no_chunks(metadata):
    metadata.state_dict_metadata[ROUTER].chunks = []


def wrong_layers(metadata):
    metadata.state_dict_metadata[ROUTER].size = torch.Size([4, 3, 12])


def huge_layers(metadata):
    entry = metadata.state_dict_metadata[ROUTER]
    entry.size = torch.Size([2**50, 3, 12])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0, 0]), entry.size)]


def empty(metadata):
    metadata.state_dict_metadata[ROUTER].size = torch.Size([3, 0, 12])


def wrong_dtype(metadata):
    metadata.state_dict_metadata[ROUTER].properties.dtype = torch.float32


def odd_dtype(metadata):
    metadata.state_dict_metadata[ROUTER].properties.dtype = "bfloat16"


def compressed(metadata):
    for index, info in metadata.storage_data.items():
        if index.fqn == ROUTER:
            info.transform_descriptors = ["zstd"]


def no_storage(metadata):
    metadata.storage_data = None


def negative_place(metadata):
    next(info for index, info in metadata.storage_data.items() if index.fqn == ROUTER).offset = -1


def bytes_instead(metadata):
    metadata.state_dict_metadata[ROUTER] = metadata.state_dict_metadata["rng_state/shard_0.0_1.1"]


def both_ways(metadata):
    entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    metadata.state_dict_metadata["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"] = entry
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == "decoder.final_layernorm.weight":
            copy = MetadataIndex("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", index.offset)
            metadata.storage_data[copy] = info


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_chunk, "no chunk of 'decoder.layers.mlp.router.weight' holds"),
        (lose_place, "is in no file"),
        (overlap, "overlap"),
        (leave_tensor, "lies outside the tensor"),
        (fewer_axes, "lies outside the tensor"),
        (no_chunks, "no chunk of"),
        (wrong_layers, "holds its elements from"),
        (huge_layers, "cannot fit into"),
        (empty, "is empty"),
        (wrong_dtype, "cannot fit into|must be torch.float32"),
        (odd_dtype, "no readable dtype"),
        (compressed, "compressed"),
        (no_storage, "storage_data"),
        (negative_place, "integers from 0"),
        (bytes_instead, "expected a tensor"),
        (both_ways, "is there twice"),
    ],
)
def test_metadata_that_cannot_be_true(change, message, small_torch_dist, tmp_path):
    edit_metadata(small_torch_dist.folder, change)
    with pytest.raises(ConversionError, match=message):
        convert_to_hf(small_torch_dist.root, tmp_path / "out", dtype="float32", progress=False)
    assert not (tmp_path / "out").exists()


def test_experts_must_agree_with_the_arguments(tmp_path, megatron):
    shape = megatron.Shape()
    tensors = megatron.stacked(megatron.named_for(megatron.canonical(shape), shape, "te"), shape)
    megatron.save_torch_dist(tmp_path / "source", tensors, megatron.args(shape, num_experts=4))
    with pytest.raises(
        ConversionError, match=r"args\.num_layers = 3 and args\.num_experts = 4, got shape \(3, 3, 20, 12\)"
    ):
        open_checkpoint(tmp_path / "source")


def test_swapped_chunks_are_noticed_by_their_shape(small_torch_dist, tmp_path):
    def swap(metadata):
        places = {index: info for index, info in metadata.storage_data.items() if "linear_fc1" in index.fqn}
        other = [info for index, info in metadata.storage_data.items() if "linear_proj" in index.fqn]
        for index, info in zip(places, other, strict=False):
            metadata.storage_data[index] = info

    edit_metadata(small_torch_dist.folder, swap)
    with pytest.raises(ConversionError, match=r"must be torch.bfloat16 of shape|cannot fit"):
        convert_to_hf(small_torch_dist.root, tmp_path / "out", progress=False)


def test_optimizer_tensors_with_the_model_s_names_are_left_out(tmp_path, megatron):
    shape = megatron.Shape()
    weights = megatron.canonical(shape)
    tensors = megatron.stacked(megatron.named_for(weights, shape, "te"), shape)
    decoys = {
        f"{prefix}.{name}": torch.zeros_like(value, dtype=torch.float32)
        for prefix in ("optimizer.state.param", "optimizer.state.exp_avg", "chained_0.optimizer.state.fp32_param")
        for name, value in tensors.items()
    }
    root = megatron.save_torch_dist(tmp_path / "source", {**decoys, **tensors}, megatron.args(shape))
    report = convert_to_hf(root, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.expected_hf(weights, shape))
    assert sum(entry.reason == "optimizer state" for entry in report.dropped) == len(decoys)


def test_unknown_tensors_are_an_error(tmp_path, megatron):
    shape = megatron.Shape()
    tensors = megatron.stacked(megatron.named_for(megatron.canonical(shape), shape, "te"), shape)
    tensors["decoder.layers.mlp.shared_experts.linear_fc1.weight"] = torch.ones(3, 4)
    root = megatron.save_torch_dist(tmp_path / "source", tensors, megatron.args(shape))
    with pytest.raises(ConversionError, match=r"3 tensors that the model does not.*shared_experts"):
        convert_to_hf(root, tmp_path / "out", progress=False)


def test_metadata_that_tries_to_run_code(small_torch_dist, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'mark'}",)

    edit_metadata(small_torch_dist.folder, lambda metadata: setattr(metadata, "planner_data", Evil()))
    with pytest.raises(ConversionError, match=r"\.metadata: refused to unpickle '(posix|nt)\.system'"):
        open_checkpoint(small_torch_dist.root)
    assert not (tmp_path / "mark").exists()


def test_metadata_of_another_kind(small_torch_dist):
    for content in (b"", b"\x80\x02N.", b"\x80\x02}.", json.dumps({}).encode(), b"\x80\x02ca.b\nC\n)\x81."):
        (small_torch_dist.folder / ".metadata").write_bytes(content)
        with pytest.raises(ConversionError, match=r"\.metadata"):
            open_checkpoint(small_torch_dist.root)
