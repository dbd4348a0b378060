"""Archives that are written tensor by tensor, read by PyTorch."""

import argparse
import io
import zipfile
import zlib
from collections import OrderedDict

import pytest
import torch

from gengram.conversion_scripts.megatron import torch_archive_writer
from gengram.conversion_scripts.megatron.torch_archive import LazyTensor, TorchArchive
from gengram.conversion_scripts.megatron.torch_archive_writer import write_torch_archive

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def lazy(tensor):
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def content():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (), (2, 1, 4), (0,), (3, 0)]
    tensors = {f"{d}{s}": (100 * torch.randn(s, generator=generator)).to(d) for d in DTYPES for s in shapes}
    args = argparse.Namespace(name="x", numbers=[1, 2.5, None, True], dtype=torch.bfloat16)
    return tensors, args


def write(path, **options):
    tensors, args = content()
    with open(path, "wb") as file:
        count = write_torch_archive(
            file, {"args": args, "model": OrderedDict((n, lazy(t)) for n, t in tensors.items())}, "model", **options
        )
    assert count == path.stat().st_size
    return tensors, args


def check(saved, tensors, args):
    assert vars(saved["args"]) == vars(args)
    assert list(saved["model"]) == list(tensors)
    for name, tensor in tensors.items():
        found = saved["model"][name]
        assert found.dtype == tensor.dtype and found.is_contiguous() and torch.equal(found, tensor), name


@pytest.mark.parametrize("options", [dict(weights_only=True), dict(weights_only=False), dict(mmap=True)])
def test_torch_load(options, tmp_path):
    tensors, args = write(tmp_path / "x.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        check(torch.load(tmp_path / "x.pt", **options), tensors, args)


def test_our_reader_and_the_checksums(tmp_path):
    tensors, _ = write(tmp_path / "x.pt")
    archive = TorchArchive(tmp_path / "x.pt")
    for name, reference in archive.load()["model"].items():
        assert torch.equal(archive.read(reference), tensors[name])
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert file.testzip() is None
        names = file.namelist()
    torch.save({"a": torch.ones(2)}, tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model") as file:
        theirs = {name for name in file.namelist() if ".data/" not in name}
    assert names[0] == "model/data.pkl" and theirs <= set(names)


def test_storages_are_aligned(tmp_path):
    write(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        for entry in file.infolist():
            with open(tmp_path / "x.pt", "rb") as raw:
                raw.seek(entry.header_offset + 26)
                lengths = int.from_bytes(raw.read(2), "little") + int.from_bytes(raw.read(2), "little")
            assert (entry.header_offset + 30 + lengths) % 64 == 0, entry.filename


def test_the_fields_of_large_files(tmp_path, monkeypatch):
    """With lower limits small files take the way of large ones."""
    monkeypatch.setattr(torch_archive_writer, "_MANY", 4)
    tensors, args = write(tmp_path / "many.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        check(torch.load(tmp_path / "many.pt"), tensors, args)


def test_sizes_and_places_that_need_64_bits(tmp_path, monkeypatch):
    """A sparse file: the large entry is never written, nor the bytes before the archive's end."""
    size = 2**32 + 64

    class Zeros:
        def __len__(self):
            return size

    checksum = zlib.crc32
    monkeypatch.setattr(
        torch_archive_writer.zlib, "crc32", lambda data: 0 if isinstance(data, Zeros) else checksum(data)
    )
    with open(tmp_path / "x.zip", "wb") as file:
        archive = torch_archive_writer._ZipWriter(file)
        write = archive._write

        def skipping(data):
            if isinstance(data, Zeros):
                file.seek(size, io.SEEK_CUR)
                archive.position += size
            else:
                write(data)

        monkeypatch.setattr(archive, "_write", skipping)
        archive.add("x/large", Zeros())
        archive.add("x/small", b"after")
        count = archive.finish()
    assert count == (tmp_path / "x.zip").stat().st_size > 2**32
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        assert [entry.file_size for entry in file.infolist()] == [size, 5]
        assert file.read("x/small") == b"after"


def test_an_archive_inside_a_file(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "many.distcp"
    places = []
    with open(path, "wb") as file:
        for factor in range(1, 4):
            start = file.tell()
            places.append((start, write_torch_archive(file, lazy(tensor * factor))))
    blob = path.read_bytes()
    for factor, (start, length) in enumerate(places, 1):
        piece = torch.load(io.BytesIO(blob[start : start + length]), weights_only=True)
        assert torch.equal(piece, tensor * factor)


def test_values_are_read_one_after_another(tmp_path):
    order = []

    def reading(number):
        def read():
            order.append(number)
            return torch.full((2,), float(number))

        return LazyTensor((2,), torch.float32, read)

    done = []
    with open(tmp_path / "x.pt", "wb") as file:
        write_torch_archive(file, [reading(0), reading(1)], progress=lambda count: done.append((count, len(order))))
    assert order == [0, 1] and done == [(8, 1), (8, 2)]


def test_a_tensor_that_is_not_as_announced(tmp_path):
    with open(tmp_path / "x.pt", "wb") as file:
        with pytest.raises(AssertionError):
            write_torch_archive(file, LazyTensor((3,), torch.float32, lambda: torch.ones(2)))
