"""Checkpoints of format `torch` that tensor and expert parallelism cut, put together again."""

import pytest
import torch
from megatron_ranks import save_ranks

from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.conversion_scripts.inspect_checkpoint import inspect_checkpoint
from gengram.conversion_scripts.mapping.layouts import Split
from gengram.conversion_scripts.megatron.open_checkpoint import open_checkpoint
from gengram.conversion_scripts.megatron.ranks import saving_ranks
from gengram.support.errors import ConversionError

GRIDS = {  # pipeline, tensor, expert, expert tensor
    "tensor": (1, 2, 1, 2),
    "tensor_and_pipeline": (3, 2, 1, 2),
    "experts": (1, 1, 2, 1),
    "experts_and_pipeline": (3, 1, 4, 1),
    "tensor_and_experts": (1, 2, 2, 2),
    "tensor_with_whole_experts": (1, 2, 2, 1),
    "everything": (3, 2, 2, 2),
}


@pytest.fixture
def shape(megatron):
    return megatron.Shape(experts=4)


@pytest.mark.parametrize("layout", ["te", "local"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_ranks_are_merged(grid, layout, tmp_path, megatron, shape):
    weights = megatron.canonical(shape)
    root = save_ranks(
        tmp_path / "a", megatron.named_for(weights, shape, layout), shape, megatron.args(shape, num_experts=4), grid
    )
    convert_to_hf(root, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.expected_hf(weights, shape))
    assert not inspect_checkpoint(root).problem


@pytest.mark.parametrize("changes", [dict(experts=0), dict(tied=True, experts=0), dict(groups=4), dict(taps=0)])
def test_other_models_on_two_tensor_ranks(changes, tmp_path, megatron):
    shape = megatron.Shape(**changes)
    weights = megatron.canonical(shape)
    args = megatron.args(shape)
    root = save_ranks(tmp_path / "a", megatron.named_for(weights, shape, "te"), shape, args, (1, 2, 1, 2))
    convert_to_hf(root, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.expected_hf(weights, shape))


@pytest.mark.parametrize(
    ("grid", "folder", "name"),
    [
        ((1, 2, 1, 2), "mp_rank_01", "decoder.layers.1.mlp.router.weight"),
        ((1, 2, 1, 2), "mp_rank_01", "decoder.layers.0.gengram.key_proj.weight"),
        ((1, 2, 1, 2), "mp_rank_01", "decoder.final_layernorm.weight"),
        ((1, 1, 2, 1), "mp_rank_00_001", "decoder.layers.2.self_attention.linear_qkv.weight"),
    ],
)
def test_copies_that_differ_are_an_error(grid, folder, name, tmp_path, megatron, shape):
    def edit(there, model):
        if there == folder:
            model[name].view(-1)[3] += 1

    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    root = save_ranks(tmp_path / "a", weights, shape, megatron.args(shape), grid, edit)
    with pytest.raises(ConversionError, match=rf"'{name}' differs between mp_rank_00\w* and {folder}"):
        convert_to_hf(root, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_ranks_that_do_not_fit_together(tmp_path, megatron, shape):
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")

    def checkpoint(name, edit=None, grid=(1, 2, 1, 2)):
        return save_ranks(tmp_path / name, weights, shape, megatron.args(shape), grid, edit)

    root = checkpoint("a")
    (root / "iter_0000123" / "mp_rank_01").rename(root / "iter_0000123" / "mp_rank_02")
    with pytest.raises(
        ConversionError, match=r"tensor parallelism 2.*missing 'mp_rank_01' and superfluous 'mp_rank_02"
    ):
        open_checkpoint(root)

    root = checkpoint("b", lambda folder, model: folder == "mp_rank_01" and model.pop("output_layer.weight"))
    with pytest.raises(ConversionError, match=r"is in 'mp_rank_00', expected in all 2 files"):
        open_checkpoint(root)

    def shorter(folder, model):
        if folder == "mp_rank_01":
            model["output_layer.weight"] = model["output_layer.weight"][1:].clone()

    with pytest.raises(ConversionError, match=r"mp_rank_01.*'output_layer.weight' has shape \(7, 12\)"):
        open_checkpoint(checkpoint("c", shorter))

    root = checkpoint("d")
    for folder in (root / "iter_0000123").iterdir():
        saved = torch.load(folder / "model_optim_rng.pt", weights_only=False)
        saved["args"].expert_tensor_parallel_size = 1
        torch.save(saved, folder / "model_optim_rng.pt")
    with pytest.raises(ConversionError, match=r"no file name for every part"):
        open_checkpoint(root)


def test_legacy_grouped_experts_on_ranks_are_refused(tmp_path, megatron, shape):
    weights = megatron.named_for(megatron.canonical(shape), shape, "grouped")
    args = megatron.args(shape)
    root = megatron.save_torch(tmp_path / "a", weights, args)
    folder = root / "iter_0000123"
    for number in range(2):
        saved = torch.load(folder / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
        saved["args"].expert_model_parallel_size = 2
        (folder / f"mp_rank_00_00{number}").mkdir()
        torch.save(saved, folder / f"mp_rank_00_00{number}" / "model_optim_rng.pt")
    (folder / "mp_rank_00" / "model_optim_rng.pt").unlink()
    (folder / "mp_rank_00").rmdir()
    with pytest.raises(ConversionError, match="legacy grouped experts"):
        open_checkpoint(root)


@pytest.mark.parametrize("split", [Split(0), Split(1), Split(0, halves=True), Split()])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_make_the_whole(split, ranks):
    whole = torch.arange(12 * 6).reshape(12, 6)
    parts = [split.part(whole, rank, ranks) for rank in range(ranks)]
    assert all(tuple(part.shape) == split.shape((12, 6), ranks, "x") for part in parts)
    assert split.whole_shape(tuple(parts[0].shape), ranks) == (12, 6)
    assert torch.equal(split.merge(parts), whole)


def test_what_cannot_be_cut():
    with pytest.raises(ConversionError, match=r"axis 0 of fc1, of shape \(6, 4\), must be a multiple of 4"):
        Split(0, halves=True).shape((6, 4), 2, "fc1")


def test_ranks_that_write():
    assert [(r.tensor, r.expert, r.expert_tensor) for r in saving_ranks(2, 2, 1)] == [(0, 0, 0), (1, 1, 0)]
    assert len({(r.tensor, r.expert) for r in saving_ranks(4, 8, 4)}) == 32
