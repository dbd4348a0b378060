"""Checkpoints of format `torch` that are incomplete, mixed up or malicious."""

import shutil

import pytest
import torch

from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.conversion_scripts.megatron.open_checkpoint import open_checkpoint
from gengram.support.errors import ConversionError


def spoil(folder, rank="mp_rank_00_001", **changes):
    """Rewrites one stage with some top-level entries changed."""
    path = folder / rank / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    for name, value in changes.items():
        if name == "args":
            for key, content in value.items():
                setattr(saved["args"], key, content)
        elif callable(value):
            value(saved[name])
        else:
            saved[name] = value
    torch.save(saved, path)


def test_opening_reads_no_weights(small_torch, monkeypatch):
    from gengram.conversion_scripts.megatron.torch_archive import TorchArchive

    monkeypatch.setattr(TorchArchive, "read", lambda *_: pytest.fail("weights were read"))
    checkpoint = open_checkpoint(small_torch.root)
    assert checkpoint.tensors["decoder.layers.2.mlp.router.weight"].shape == (3, 12)
    assert checkpoint.layout == "2 pipeline stages"


def test_root_and_iteration_folder_are_the_same(small_torch):
    assert open_checkpoint(small_torch.root).path == open_checkpoint(small_torch.folder).path == small_torch.folder
    (small_torch.root / "latest_checkpointed_iteration.txt").unlink()
    assert open_checkpoint(small_torch.root).path == small_torch.folder
    shutil.copytree(small_torch.folder, small_torch.root / "iter_0000456")
    with pytest.raises(ConversionError, match=r"several iterations.*iter_0000123.*iter_0000456"):
        open_checkpoint(small_torch.root)


def test_release_checkpoints(small_torch):
    small_torch.folder.rename(small_torch.root / "release")
    (small_torch.root / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert open_checkpoint(small_torch.root).path.name == "release"


@pytest.mark.parametrize(("text", "message"), [("7", "points to iter_0000007"), ("../x", "must hold the number")])
def test_tracker(text, message, small_torch):
    (small_torch.root / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(ConversionError, match=message):
        open_checkpoint(small_torch.root)


def test_folders_that_are_no_checkpoint(tmp_path, small_torch):
    with pytest.raises(ConversionError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        open_checkpoint(file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("")
    with pytest.raises(ConversionError, match=r"not a Megatron checkpoint.*'notes.txt'"):
        open_checkpoint(other)
    (other / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="converted folder already"):
        open_checkpoint(other)
    (small_torch.folder / ".metadata").write_bytes(b"")
    with pytest.raises(ConversionError, match="both mp_rank"):
        open_checkpoint(small_torch.root)


def test_missing_and_extra_stages(small_torch):
    shutil.copytree(small_torch.folder / "mp_rank_00_001", small_torch.folder / "mp_rank_00_002")
    with pytest.raises(ConversionError, match="superfluous 'mp_rank_00_002'"):
        open_checkpoint(small_torch.root)
    shutil.rmtree(small_torch.folder / "mp_rank_00_002")
    shutil.rmtree(small_torch.folder / "mp_rank_00_001")
    with pytest.raises(ConversionError, match="missing 'mp_rank_00_001'"):
        open_checkpoint(small_torch.root)


def test_a_stage_without_its_file(small_torch):
    (small_torch.folder / "mp_rank_00_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(ConversionError, match=r"'mp_rank_00_001' without model_optim_rng\.pt"):
        open_checkpoint(small_torch.root)
    (small_torch.folder / "mp_rank_0x").mkdir()
    with pytest.raises(ConversionError, match="mp_rank_0x"):
        open_checkpoint(small_torch.root)


def test_a_truncated_stage(small_torch, tmp_path):
    path = small_torch.folder / "mp_rank_00_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=r"mp_rank_00_001.*truncated"):
        convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_same_stage_twice(small_torch):
    shutil.copy(
        small_torch.folder / "mp_rank_00_000" / "model_optim_rng.pt",
        small_torch.folder / "mp_rank_00_001" / "model_optim_rng.pt",
    )
    with pytest.raises(ConversionError, match="also in an earlier stage"):
        open_checkpoint(small_torch.root)


def test_stages_of_different_checkpoints(small_torch):
    spoil(small_torch.folder, iteration=7)
    with pytest.raises(ConversionError, match="saved at iteration 7, the first file at 123"):
        open_checkpoint(small_torch.root)
    spoil(small_torch.folder, iteration=123, args={"hidden_size": 13})
    with pytest.raises(ConversionError, match=r"args\.hidden_size is 13, but 12"):
        open_checkpoint(small_torch.root)


def test_layers_must_add_up(small_torch):
    spoil(
        small_torch.folder,
        model=lambda model: [model.pop(name) for name in list(model) if name.startswith("decoder.layers.1.")],
    )
    with pytest.raises(ConversionError, match=r"2 layers together, but args\.num_layers is 3"):
        open_checkpoint(small_torch.root)
    spoil(
        small_torch.folder,
        model=lambda model: [model.pop(name) for name in list(model) if name.startswith("decoder.layers.0.")],
    )


def test_layer_numbers_with_a_gap(small_torch):
    spoil(small_torch.folder, model=lambda model: model.update({"decoder.layers.5.mlp.router.weight": torch.ones(1)}))
    with pytest.raises(ConversionError, match=r"numbered 0\.\.2"):
        open_checkpoint(small_torch.root)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("virtual_pipeline_model_parallel_size", 2),
        ("pipeline_model_parallel_size", "two"),
        ("pipeline_model_parallel_size", 10**30),
    ],
)
def test_unsupported_splits_name_the_argument(name, value, small_torch):
    spoil(small_torch.folder, "mp_rank_00_000", args={name: value})
    with pytest.raises(ConversionError, match=rf"args\.{name}"):
        open_checkpoint(small_torch.root)


def test_entries_that_are_not_tensors(small_torch):
    spoil(small_torch.folder, model=lambda model: model.update({"decoder.final_layernorm.weight": [1.0]}))
    with pytest.raises(ConversionError, match=r"'decoder.final_layernorm.weight' must be a tensor"):
        open_checkpoint(small_torch.root)
    spoil(small_torch.folder, model=[1])
    with pytest.raises(ConversionError, match="'model' must be a dictionary"):
        open_checkpoint(small_torch.root)


def test_interleaved_stages(small_torch):
    path = small_torch.folder / "mp_rank_00_000" / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    saved["model0"] = saved.pop("model")
    torch.save(saved, path)
    with pytest.raises(ConversionError, match=r"'model0'.*interleaved"):
        open_checkpoint(small_torch.root)


def test_no_arguments(small_torch):
    spoil(small_torch.folder, "mp_rank_00_000", args={})
    path = small_torch.folder / "mp_rank_00_000" / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    del saved["args"]
    torch.save(saved, path)
    with pytest.raises(ConversionError, match="arguments under 'args'"):
        open_checkpoint(small_torch.root)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/gengram_evil",)


def test_a_checkpoint_that_tries_to_run_code(small_torch, tmp_path):
    path = small_torch.folder / "mp_rank_00_000" / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    saved["rng_state"] = Evil()
    torch.save(saved, path)
    with pytest.raises(ConversionError, match=r"mp_rank_00_000.*refused to unpickle '(posix|nt)\.system'"):
        convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_weights_that_the_model_does_not_have(small_torch):
    spoil(
        small_torch.folder,
        model=lambda model: model.update({"decoder.layers.0.mlp.routers.weight": torch.ones(1)}),
    )
    with pytest.raises(
        ConversionError,
        match=r"'decoder\.layers\.1\.mlp\.routers\.weight' \(nearest: 'decoder\.layers\.1\.mlp\.router\.we",
    ):
        convert_to_hf(small_torch.root, small_torch.root.parent / "out", progress=False)


def test_optimizer_state_is_never_taken_for_weights(small_torch, megatron, tmp_path):
    decoy = {"fp32_from_fp16_params": [[torch.zeros(12)]], "decoder.final_layernorm.weight": torch.zeros(12)}
    spoil(small_torch.folder, optimizer=decoy, opt_param_scheduler={"max_lr": 1.0})
    (small_torch.folder / "mp_rank_00_001" / "distrib_optim.pt").write_bytes(b"anything")
    report = convert_to_hf(small_torch.root, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), small_torch.expected)
    dropped = {entry.name: entry for entry in report.dropped}
    assert dropped["mp_rank_00_001: optimizer"].nbytes == 96
    assert dropped["mp_rank_00_001/distrib_optim.pt"].nbytes == 8
