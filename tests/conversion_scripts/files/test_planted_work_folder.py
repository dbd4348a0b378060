"""Whatever somebody planted where a conversion does its hidden work is refused: not followed, written or deleted."""

import json
import os

import pytest

from gengram.cli import main as gengram
from gengram.conversion_scripts.convert_hf_to_megatron import convert_to_megatron
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf
from gengram.support.errors import ConversionError, InputError
from gengram.support.work_folder import work_path


@pytest.fixture(params=["to-hf", "to-megatron"])
def convert(request, small_torch, tmp_path):
    """A conversion in either direction, as a function of OUTPUT; OUTPUT's folder holds nothing else."""
    (tmp_path / "place").mkdir()
    if request.param == "to-hf":
        return lambda output, **more: convert_to_hf(small_torch.root, output, progress=False, **more)
    convert_to_hf(small_torch.root, tmp_path / "hf", progress=False)
    return lambda output, **more: convert_to_megatron(tmp_path / "hf", output, progress=False, **more)


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    return folder


NAMES = ["lock", "journal.jsonl", "journal.jsonl.new", "parts.jsonl", "folder"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["", *NAMES])
@pytest.mark.parametrize("kind", ["link to a folder", "link to a file", "link to nothing", "pipe"])
def test_links_and_pipes_are_refused(kind, name, restart, convert, victim, tmp_path):
    out = tmp_path / "place" / "out"
    planted = work_path(out) / name if name else work_path(out)
    planted.parent.mkdir(exist_ok=True)
    targets = {"link to a folder": victim, "link to a file": victim / "precious", "link to nothing": tmp_path / "x"}
    if kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.symlink_to(targets[kind])
    with pytest.raises(InputError, match=r"is not what a run of this command leaves .*move it away"):
        convert(out, restart=restart)
    assert [path.name for path in victim.iterdir()] == ["precious"] and (victim / "precious").read_text() == "mine"
    assert os.path.lexists(planted) and not os.path.lexists(out) and not (tmp_path / "x").exists()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", *NAMES])
def test_what_belongs_to_somebody_else_is_refused(name, convert, tmp_path):
    out = tmp_path / "place" / "out"
    planted = work_path(out) / name if name else work_path(out)
    if name in ("", "folder"):
        planted.mkdir(parents=True)
    else:
        planted.parent.mkdir()
        planted.write_text("")
    os.chown(planted, 12345, 12345)
    with pytest.raises(InputError, match="owner"):
        convert(out, restart=True)
    assert planted.exists() and not out.exists()


def interrupted(root, output):
    """A conversion of which the first weight file is finished."""
    from gengram.conversion_scripts.files.partial_folder import PartialFolder

    original = PartialFolder.record

    def record(self, entry):
        original(self, entry)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialFolder, "record", record)
        with pytest.raises(KeyboardInterrupt):
            convert_to_hf(root, output, max_shard_size="1500", progress=False)
    return work_path(output)


@pytest.mark.parametrize("name", ["finished", "started", "other"])
def test_links_among_the_weight_files_are_refused(name, small_torch, victim, tmp_path):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out)
    (first,) = (partial / "folder").iterdir()
    if name == "finished":
        first.rename(victim / "weights")
        first.symlink_to(victim / "weights")
    else:
        (partial / "folder" / first.name.replace("00001", "00002" if name == "started" else "x")).symlink_to(victim)
    with pytest.raises(ConversionError, match="which no conversion left"):
        convert_to_hf(small_torch.root, out, max_shard_size="1500", progress=False)
    assert (victim / "precious").read_text() == "mine" and not out.exists()


LINES = {
    "deep": "[" * 200_000,
    "a list": "[1]",
    "null": "null",
    "no fields": "{}",
    "a file that is a list": json.dumps({"file": [1], "tensors": {}, "sources": {}}),
    "hashes that are a number": json.dumps({"file": "x", "tensors": 5, "sources": {}}),
    "a hash that is null": json.dumps({"file": "x", "tensors": {"a": None}, "sources": {}}),
    "sources that are text": json.dumps({"file": "x", "tensors": {}, "sources": "y"}),
    "an unknown field": json.dumps({"file": "x", "tensors": {}, "sources": {}, "z": 1}),
    "no JSON": "\x00\xff",
}


@pytest.mark.parametrize("place", ["journal.jsonl", "parts.jsonl"])
@pytest.mark.parametrize("line", LINES)
def test_journals_of_another_kind_end_in_one_message(line, place, small_torch, tmp_path, capsys):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out)
    with open(partial / place, "a", encoding="latin1") as file:
        file.write(LINES[line] + "\n")
    code = gengram(["convert", "to-hf", str(small_torch.root), str(out), "--max-shard-size", "1500", "--quiet"])
    error = capsys.readouterr().err
    if place == "parts.jsonl":  # parts that cannot be read are written again
        assert code == 0 and out.is_dir()
    else:
        assert code == 1 and "is not readable" in error and "--restart" in error and error.count("\n") == 1
        arguments = [str(small_torch.root), str(out), "--max-shard-size", "1500", "--quiet", "--restart"]
        assert gengram(["convert", "to-hf", *arguments]) == 0


@pytest.mark.parametrize("kind", ["link", "broken link", "mount point"])
def test_an_output_whose_name_cannot_be_taken_is_refused_before_the_work(kind, convert, victim, tmp_path, monkeypatch):
    out = tmp_path / "place" / "out"
    if kind == "mount point":
        out.mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    else:
        (tmp_path / "empty").mkdir()
        out.symlink_to(tmp_path / ("empty" if kind == "link" else "nowhere"))
    with pytest.raises(FileExistsError, match=r"out is a (symbolic link|mount point); name a new folder"):
        convert(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_loser_of_two_conversions_is_not_told_to_delete_the_work_of_the_winner(small_torch, tmp_path, capsys):
    from gengram.conversion_scripts.files.partial_folder import PartialFolder

    out = tmp_path / "out"
    interrupted(small_torch.root, out)
    with PartialFolder(out, json.loads((work_path(out) / "journal.jsonl").read_text().splitlines()[0])):
        for command in ("to-hf", "to-megatron"):
            source = tmp_path / "source"
            if command == "to-megatron":
                convert_to_hf(small_torch.root, tmp_path / "hf", progress=False)
                source = tmp_path / "hf"
            assert gengram(["convert", command, str(source), str(out), "--quiet"]) == 1
            error = capsys.readouterr().err
            assert f"being written by process {os.getpid()}; wait for it, or choose another output" in error
            assert "delet" not in error and "restart" not in error
