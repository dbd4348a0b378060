"""The incremental writer writes what the safetensors library reads."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gengram.conversion_scripts.files import weight_hash
from gengram.conversion_scripts.files.safetensors_writer import (
    TensorSpec,
    plan_shards,
    shard_is_intact,
    shard_size,
    write_safetensors,
)
from gengram.conversion_scripts.files.weight_hash import WeightHash, tensor_digest, weight_digest
from gengram.support.errors import ConversionError

TENSORS = {
    "b": torch.randn(4, 3, 5),
    "a": torch.randn(7).bfloat16(),
    "c.half": torch.randn(2, 2).half(),
    "d": torch.randn(1, 1),
}


def slow_digest(tensor):
    def sha256(part):
        return hashlib.sha256(part.contiguous().view(torch.uint8).numpy().tobytes())

    if tensor.dim() < 3:
        return sha256(tensor).hexdigest()
    return hashlib.sha256(b"".join(sha256(part).digest() for part in tensor)).hexdigest()


def write(folder, limit):
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]
    written = []
    digests = write_safetensors(
        folder,
        specs,
        lambda spec, first: (TENSORS[spec.name][i] for i in range(first, spec.shape[0])),
        limit,
        written.append,
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
    assert digests == {name: slow_digest(tensor) for name, tensor in TENSORS.items()}
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


@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
@pytest.mark.parametrize("name", TENSORS)
def test_the_hash_does_not_depend_on_pieces(name, block, monkeypatch):
    tensor = TENSORS[name]
    monkeypatch.setattr(weight_hash, "BLOCK", block)
    for pieces in ([tensor], list(tensor), [tensor.transpose(0, -1).clone().transpose(0, -1)]):
        assert weight_digest(tensor.shape, tensor.dtype, pieces) == slow_digest(tensor)
    digest = WeightHash(tuple(tensor.shape), tensor.dtype)
    parts = [tensor] if tensor.dim() < 3 else list(tensor)
    assert all(digest.takes(part) for part in parts) and not digest.takes(parts[0].double())
    for part in parts:
        digest.add(tensor_digest([part]))
    assert digest.hexdigest() == slow_digest(tensor)


def test_a_file_is_intact_or_not(tmp_path):
    digests = write(tmp_path, 10**9)
    specs = sorted((TensorSpec(n, tuple(t.shape), t.dtype) for n, t in TENSORS.items()), key=lambda spec: spec.name)
    path = tmp_path / "model.safetensors"
    assert shard_is_intact(path, specs, digests)
    assert not shard_is_intact(path, specs[:-1], digests) and not shard_is_intact(tmp_path / "x", specs, digests)
    data = path.read_bytes()
    for place in range(0, len(data), 13):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert not shard_is_intact(path, specs, digests)
