"""torch.save archives: what PyTorch reads, this reads; damaged ones end in a clear error."""

import io
import struct
import zipfile

import pytest
import torch

from gengram.conversion_scripts.hub.byte_range import FileRange
from gengram.conversion_scripts.megatron.torch_archive import TorchArchive
from gengram.support.errors import ConversionError


def tensors():
    base = torch.arange(60).float().reshape(3, 4, 5)
    return {
        "plain": base,
        "transposed": base.transpose(0, 2),
        "slice": base[1:, ::2, 1:4],
        "row": base[1],
        "expanded": base[0, 0, :1].expand(1, 5)[:, :1],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(base[2].clone()),
        **{
            str(dtype): torch.arange(7).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool)
        },
    }


def test_tensors_equal_those_of_torch_load(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(tensors(), path)
    archive = TorchArchive(path)
    references = archive.load()
    for name, expected in torch.load(path, weights_only=True).items():
        lazy = archive.lazy(references[name])
        assert lazy.shape == tuple(expected.shape) and lazy.dtype == expected.dtype
        found = lazy.read()
        assert found.is_contiguous() and torch.equal(found, expected), name
        assert lazy.nbytes == expected.numel() * expected.element_size()


def test_a_part_reads_only_its_bytes_after_the_whole_was_checked_once(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    base = torch.randn(4, 6, 100)
    torch.save(base, path)
    archive = TorchArchive(path)
    reference = archive.load()
    counts = []
    original = FileRange.readinto
    monkeypatch.setattr(
        FileRange, "readinto", lambda self, buffer: counts.append(original(self, buffer)) or counts[-1]
    )
    assert torch.equal(archive.read(reference, (2, 3)), base[2, 3])
    assert counts == [30, 30, 9600, 400]  # headers of the entry, all of it for its checksum, and the part
    counts.clear()
    assert torch.equal(archive.read(reference, (0, 1)), base[0, 1])
    assert counts == [30, 400]


def test_an_archive_inside_a_file(tmp_path):
    first, second = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(5), first)
    torch.save(torch.arange(9), second)
    path = tmp_path / "x.distcp"
    path.write_bytes(first.getvalue() + second.getvalue() + b"rest")
    archive = TorchArchive(path, len(first.getvalue()), len(second.getvalue()))
    assert torch.equal(archive.read(archive.load()), torch.arange(9))


def test_truncation_at_any_length_is_an_error(tmp_path):
    path, cut = tmp_path / "x.pt", tmp_path / "cut.pt"
    torch.save({"a": torch.arange(3)}, path)
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ConversionError):
            TorchArchive(cut).load()


def repacked(path, target, compression=zipfile.ZIP_STORED, **replaced):
    """The archive with some entries replaced or, if None, left out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            key = name.partition("/")[2]
            content = replaced.get(key, old.read(name)) if key in replaced else old.read(name)
            if content is not None:
                new.writestr(name, content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(compression=zipfile.ZIP_DEFLATED), "compressed"),
        ({"data/0": b"abc"}, "entry has 3 bytes"),
        ({"data/0": None}, "has no storage '0'"),
        ({"data.pkl": None}, "one data.pkl"),
        ({"byteorder": b"big"}, "little-endian"),
        ({"data.pkl": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."}, "posix.system"),
    ],
)
def test_odd_archives(changes, message, tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "x.pt")
    repacked(tmp_path / "x.pt", tmp_path / "odd.pt", **changes)
    with pytest.raises(ConversionError, match=message):
        TorchArchive(tmp_path / "odd.pt").load()


def test_a_directory_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.arange(3), path)
    size = 2**32
    with open(path, "r+b") as file:
        file.truncate(size)  # a hole in the file
        file.seek(0, io.SEEK_END)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 2**31, 2**31, 0))
    with pytest.raises(ConversionError, match=r"its directory would have 2147483648 bytes, at most"):
        TorchArchive(path)


def test_old_and_foreign_files(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match=r"since PyTorch 1\.6"):
        TorchArchive(path)
    path.write_bytes(b"")
    with pytest.raises(ConversionError, match="zip archive"):
        TorchArchive(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02N.")
        with pytest.warns(UserWarning):
            file.writestr("x/data.pkl", b"\x80\x02N.")
    with pytest.raises(ConversionError, match="two entries"):
        TorchArchive(path)


def test_views_must_lie_in_their_storage(tmp_path):
    torch.save(torch.arange(6.0).reshape(2, 3), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        data = file.read("x/data.pkl")
    # shape (2, 3), strides (3, 1): make the shape (2, 7)
    spoiled = data.replace(b"K\x02K\x03\x86", b"K\x02K\x07\x86")
    assert spoiled != data
    repacked(tmp_path / "x.pt", tmp_path / "odd.pt", **{"data.pkl": spoiled})
    with pytest.raises(ConversionError, match="lies outside its storage of 6 elements"):
        TorchArchive(tmp_path / "odd.pt").load()
    # strides 0: an enormous tensor over one element
    huge = data.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86").replace(b"K\x03K\x01\x86", b"K\x00K\x00\x86")
    repacked(tmp_path / "x.pt", tmp_path / "odd2.pt", **{"data.pkl": huge})
    with pytest.raises(ConversionError, match="lies outside its storage"):
        TorchArchive(tmp_path / "odd2.pt").load()


def test_bytes_that_vanish_between_opening_and_reading(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.randn(1000), path)
    archive = TorchArchive(path)
    lazy = archive.lazy(archive.load())
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ConversionError, match="truncated"):
        lazy.read()


def test_a_flipped_bit_is_noticed_by_the_checksum(tmp_path):
    path = tmp_path / "x.pt"
    values = torch.arange(1000.0)
    torch.save(values, path)
    data = bytearray(path.read_bytes())
    data[data.index(values.numpy().tobytes()) + 77] ^= 4
    path.write_bytes(data)
    archive = TorchArchive(path)
    with pytest.raises(ConversionError, match="storage '0' do not have the checksum"):
        archive.read(archive.load())


@pytest.mark.parametrize("place", [0, 77, 9599])
def test_a_flipped_bit_anywhere_is_noticed_whichever_part_is_read(place, tmp_path):
    path = tmp_path / "x.pt"
    base = torch.randn(4, 6, 100)
    torch.save({"whole": base, "part": base[1]}, path)
    data = bytearray(path.read_bytes())
    data[data.index(base.numpy().tobytes()) + place] ^= 4
    path.write_bytes(data)
    archive = TorchArchive(path)
    references = archive.load()
    for read in (
        lambda: archive.read(references["whole"], (2,)),
        lambda: archive.read(references["whole"], (3, 5)),
        archive.lazy(references["part"]).read,
    ):
        with pytest.raises(ConversionError, match="storage '0' do not have the checksum"):
            read()


def test_archives_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.arange(1000.0), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    archive = TorchArchive(tmp_path / "x.pt")
    lazy = archive.lazy(archive.load())
    assert torch.equal(lazy.read(), torch.arange(1000.0))
    assert lazy.unchecked == ["their file was written without checksums"]


def test_damaged_directories_end_in_an_error_or_data(tmp_path):
    path, broken = tmp_path / "x.pt", tmp_path / "b.pt"
    torch.save({"a": torch.arange(3.0), "b": [1, 2]}, path)
    data = path.read_bytes()
    directory = data.rindex(b"PK\x05\x06") - 400
    for position in range(directory, len(data)):
        for value in (0, 0xFF):
            broken.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            try:
                archive = TorchArchive(broken)
                archive.read(archive.load()["a"])
            except ConversionError:
                pass
