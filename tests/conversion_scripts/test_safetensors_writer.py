"""The incremental writer writes what the safetensors library reads."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gengram.conversion_scripts.errors import ConversionError
from gengram.conversion_scripts.safetensors_writer import (
    TensorSpec,
    plan_shards,
    shard_size,
    tensor_digest,
    write_safetensors,
)

TENSORS = {
    "b": torch.randn(4, 3, 5),
    "a": torch.randn(7).bfloat16(),
    "c.half": torch.randn(2, 2).half(),
    "d": torch.randn(1, 1),
}


def write(folder, limit):
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]
    written = []
    digests = write_safetensors(
        folder, specs, lambda spec: (TENSORS[spec.name][i] for i in range(spec.shape[0])), limit, written.append
    )
    assert sum(written) == sum(spec.nbytes for spec in specs)
    return digests


@pytest.mark.parametrize("limit", [1, 250, 10**9])
def test_round_trip(limit, tmp_path):
    digests = write(tmp_path, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {}
    for file in files:
        found |= load_file(file)
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert digests == {name: tensor_digest([tensor]) for name, tensor in TENSORS.items()}
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        assert set(json.loads(index.read_text())["weight_map"]) == set(TENSORS)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, 250)
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert all((tmp_path / "x" / f).read_bytes() == (tmp_path / "y" / f).read_bytes() for f in files)


def test_shards_stay_below_the_limit():
    specs = [TensorSpec(str(i), (size,), torch.float32) for i, size in enumerate([10, 10, 30, 1, 5, 5])]
    shards = plan_shards(specs, 80)
    assert [[spec.name for spec in shard] for shard in shards] == [["0", "1"], ["2"], ["3", "4", "5"]]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5kb", 1500), ("2MiB", 2**21), (77, 77)])
def test_sizes(text, size):
    assert shard_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 apples", "0", None])
def test_wrong_sizes(text):
    with pytest.raises(ConversionError, match="max_shard_size"):
        shard_size(text)
