"""A conversion that is stopped anywhere is continued, and the result is the same."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf, main
from gengram.conversion_scripts.files import safetensors_writer
from gengram.conversion_scripts.files.partial_folder import PartialFolder
from gengram.conversion_scripts.to_hf.source_reader import SourceReader
from gengram.support.errors import ConversionError, InputError
from gengram.support.work_folder import work_path

SHARD = "1500"
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def interrupted(root, output, files, error=KeyboardInterrupt, **options):
    """Converts until so many weight files are finished."""
    original = PartialFolder.record

    def record(self, entry):
        original(self, entry)
        if len(self.finished) == files:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialFolder, "record", record)
        with pytest.raises(error):
            convert_to_hf(root, output, max_shard_size=SHARD, progress=False, **options)
    return work_path(output)


def written(monkeypatch):
    """Names of the weight files that are written from now on."""
    names = []
    original = safetensors_writer._write_shard
    monkeypatch.setattr(
        safetensors_writer, "_write_shard", lambda path, *rest: names.append(path.name) or original(path, *rest)
    )
    return names


@pytest.fixture
def whole(small_torch, tmp_path):
    """The files of a conversion that nothing interrupted."""
    convert_to_hf(small_torch.root, tmp_path / "whole", max_shard_size=SHARD, progress=False)
    return hashes(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, MemoryError])
def test_finished_files_are_kept_and_not_written_again(error, small_torch, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out, 3, error)
    assert not out.exists() and (partial / "journal.jsonl").read_text().count("\n") == 4
    names = written(monkeypatch)
    convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    files = sorted(name for name in whole if name.endswith(".safetensors"))
    assert len(files) > 6 and names == files[3:]
    assert hashes(out) == whole and not partial.exists()


def test_a_damaged_or_missing_file_is_written_again(small_torch, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder = interrupted(small_torch.root, out, 5) / "folder"
    files = sorted(folder.iterdir())
    assert len(files) == 5
    data = bytearray(files[0].read_bytes())
    data[-3] ^= 1
    files[0].write_bytes(data)
    data = bytearray(files[1].read_bytes())
    data[30] ^= 1  # of the header
    files[1].write_bytes(data)
    files[2].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-1])
    (folder / "rubbish").write_text("half a file")
    names = written(monkeypatch)
    convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert names[:4] == [file.name for file in files[:4]] and files[4].name not in names
    assert hashes(out) == whole


def test_another_conversion_does_not_take_the_files(small_torch, whole, tmp_path):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out, 2)
    with pytest.raises(ConversionError, match=r"differs from this one in dtype;.*--restart"):
        convert_to_hf(small_torch.root, out, dtype="float32", max_shard_size=SHARD, progress=False)
    with pytest.raises(ConversionError, match="in max_shard_size;"):
        convert_to_hf(small_torch.root, out, progress=False)
    shutil.copytree(small_torch.root, tmp_path / "copy", copy_function=shutil.copyfile)
    with pytest.raises(ConversionError, match="in source, source files;"):
        convert_to_hf(tmp_path / "copy", out, max_shard_size=SHARD, progress=False)
    file = next(small_torch.folder.glob("*/model_optim_rng.pt"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(ConversionError, match="in source files;"):
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert len(list((partial / "folder").iterdir())) == 2
    convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False, restart=True)
    assert hashes(out) == whole and not partial.exists()


def test_the_journal_may_end_anywhere(small_torch, whole, tmp_path):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out, 2)
    journal = (partial / "journal.jsonl").read_bytes()
    shutil.copytree(partial, tmp_path / "saved")
    for length in (0, 10, journal.index(b"\n") + 1, journal.index(b"\n") + 50, len(journal) - 1):
        for folder in (out, partial):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "saved", partial)
        (partial / "journal.jsonl").write_bytes(journal[:length])
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
        assert hashes(out) == whole and not partial.exists()


def test_a_spoiled_journal_or_a_foreign_folder_is_left_alone(small_torch, tmp_path):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out, 1)
    (partial / "journal.jsonl").write_text('{"source": \n')
    with pytest.raises(ConversionError, match=r"not readable.*--restart"):
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt.*move it away"):
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False, restart=True)
    assert (partial / "thesis.txt").read_text() == "mine"


def test_a_full_disk_keeps_what_is_finished(small_torch, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert main([str(small_torch.root), str(out), "--max-shard-size", SHARD]) == 1
    error = capsys.readouterr().err
    assert "1 B free" in error and "3 finished weight files kept in" in error and "same command continues" in error
    assert not out.exists() and partial.exists()
    monkeypatch.undo()
    convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert hashes(out) == whole


def test_only_what_is_still_to_be_written_must_fit(small_torch, tmp_path, monkeypatch):
    out = tmp_path / "out"
    partial = interrupted(small_torch.root, out, 6)
    assert sum(path.stat().st_size for path in (partial / "folder").iterdir()) > 6000
    total = sum(value.nbytes for value in small_torch.expected.values())
    free = total - 2000 + 2**24
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, free))
    convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)


def test_a_bad_tensor_leaves_nothing(small_torch, tmp_path, monkeypatch):
    calls = []
    original = SourceReader._parts

    def failing(self, move):
        calls.append(move)
        if len(calls) == 20:
            raise ConversionError("damaged")
        return original(self, move)

    monkeypatch.setattr(SourceReader, "_parts", failing)
    with pytest.raises(ConversionError, match="damaged"):
        convert_to_hf(small_torch.root, tmp_path / "out", max_shard_size=SHARD, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_killed_between_publishing_and_tidying_up(small_torch, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "_discard", lambda self: None)
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert work_path(out).exists()
    report = convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert hashes(out) == whole and not work_path(out).exists() and report.tensors
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)


def test_an_output_that_came_after_a_kill_is_not_taken_for_ours(small_torch, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "_tidy_up", lambda self, error: self._held.close())
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    (out / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert (out / "config.json").read_text() == "{}"


def test_a_journal_without_its_folder_does_not_make_another_output_ours(small_torch, whole, tmp_path):
    out = tmp_path / "out"
    shutil.rmtree(interrupted(small_torch.root, out, 3) / "folder")
    (tmp_path / "whole").rename(out)
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert hashes(out) == whole


def test_killed_while_it_discards_an_unfinished_conversion(small_torch, tmp_path, monkeypatch):
    def killed(*args, **options):
        raise KeyboardInterrupt

    partial = interrupted(small_torch.root, tmp_path / "out", 3)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_to_hf(small_torch.root, tmp_path / "out", max_shard_size=SHARD, progress=False, restart=True)
    assert sorted(path.name for path in partial.iterdir()) == ["folder", "lock"]  # no journal of what may be gone


def killed_in_a_file(root, output, parts):
    """Converts into one weight file until so many parts of it are written; nothing is tidied up, as after a kill."""
    original = PartialFolder.record_part

    def record(self, part):
        original(self, part)
        if len(self.parts) == parts:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialFolder, "record_part", record)
        patch.setattr(PartialFolder, "_discard", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            convert_to_hf(root, output, progress=False)
    return work_path(output)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "none": lambda partial: None,
    "flipped_byte": lambda partial: flip(partial / "folder" / "model.safetensors", -1),
    "flipped_header": lambda partial: flip(partial / "folder" / "model.safetensors", 20),
    "shorter": lambda partial: os.truncate(partial / "folder" / "model.safetensors", 9000),
    "gone": lambda partial: (partial / "folder" / "model.safetensors").unlink(),
    "longer": lambda partial: open(partial / "folder" / "model.safetensors", "ab").write(b"x" * 9999),
    "notes_are_noise": lambda partial: (partial / "parts.jsonl").write_bytes(b"\xff\n{}\n"),
    "last_note_is_cut": lambda partial: os.truncate(
        partial / "parts.jsonl", (partial / "parts.jsonl").stat().st_size - 5
    ),
}


@pytest.mark.parametrize("parts", [1, 5, 14, 30])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_was_cut_off_is_continued(damage, parts, small_torch, tmp_path, monkeypatch):
    if damage == "shorter" and parts == 1:
        pytest.skip("there is not so much of it")
    convert_to_hf(small_torch.root, tmp_path / "whole", progress=False)
    out = tmp_path / "out"
    partial = killed_in_a_file(small_torch.root, out, parts)
    assert not out.exists() and (partial / "parts.jsonl").read_text().count("\n") == parts
    DAMAGES[damage](partial)
    noted = []
    original = PartialFolder.record_part
    monkeypatch.setattr(PartialFolder, "record_part", lambda self, part: noted.append(part) or original(self, part))
    convert_to_hf(small_torch.root, out, progress=False)
    assert hashes(out) == hashes(tmp_path / "whole") and not partial.exists()
    total = len(noted) + (parts if damage in ("none", "longer") else 0)
    if damage in ("none", "longer", "gone", "flipped_header", "notes_are_noise"):  # all of it, or nothing, was right
        record = json.loads((out / "conversion.json").read_text())["weights"]
        slices = sum(len(entry["sources"]) for entry in record.values() if len(entry["sources"]) > 1)
        assert total == len(record) + slices


def test_two_conversions_into_one_folder(small_torch, tmp_path):
    out = tmp_path / "out"
    with PartialFolder(out, {}):
        with pytest.raises(InputError, match=f"being written by process {os.getpid()}; wait for it"):
            convert_to_hf(small_torch.root, out, progress=False)
    convert_to_hf(small_torch.root, out, progress=False)
    work_path(out).mkdir()
    (work_path(out) / "lock").write_text("999999")  # of a process that died
    shutil.rmtree(out)
    convert_to_hf(small_torch.root, out, progress=False)
    assert not work_path(out).exists()


# Imports once and forks, since importing takes most of a small conversion's time. Each child dies at its n-th step,
# before or after it; steps are blocks of bytes and lines of the journals.
DRIVER = """
import json, os, random, signal, sys
import gengram.cli
from gengram.conversion_scripts import convert_megatron_to_hf as convert
from gengram.conversion_scripts.files import weight_hash
from gengram.conversion_scripts.files.partial_folder import PartialFolder
from gengram.conversion_scripts.to_hf.write_folder import WeightProgress
source, output, kills = sys.argv[1:]
weight_hash.BLOCK = 256
random.seed(5)
def counted(owner, name):
    original = getattr(owner, name)
    def step(self, *words):
        global left
        left -= 1
        if left == 0 and dies_before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(self, *words)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, step)
counted(WeightProgress, "update")
for name in ("begin", "record", "record_part", "publish"):
    counted(PartialFolder, name)
journal = os.path.join(os.path.dirname(output), f".{os.path.basename(output)}.partial", "journal.jsonl")
finished, codes = [], []
for attempt in range(int(kills) + 1):
    left, dies_before = random.randrange(1, 60) if attempt < int(kills) else -1, random.random() < 0.5
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = convert.main([source, output, "--quiet", "--max-shard-size", "1500"])
        finally:
            os._exit(code)
    codes.append(os.waitpid(child, 0)[1])
    finished.append(max(open(journal).read().count("\\n") - 1, 0) if os.path.exists(journal) else 0)
    if codes[-1] == 0:
        break
print(json.dumps([finished, codes]))
"""


@posix
@pytest.mark.parametrize("source", [pytest.param("small_torch", marks=pytest.mark.slow), "small_torch_dist"])
def test_killed_again_and_again_and_continued(source, tmp_path, request):
    made = request.getfixturevalue(source)
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, str(made.root), str(out), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    finished, codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [signal.SIGKILL] * (len(codes) - 1) + [0] and len(codes) > 4  # it may be done before the last kill
    assert max(finished) > 2 and finished[:-1] == sorted(finished[:-1])  # never lost
    convert_to_hf(made.root, tmp_path / "whole", max_shard_size=SHARD, progress=False)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "whole"}


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_continued(number, small_torch, whole, tmp_path):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored\n"
        "from gengram.conversion_scripts import convert_megatron_to_hf as c\n"
        "from gengram.conversion_scripts.to_hf import write_folder\n"
        "def wait(config, folder):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "write_folder.write_remote_code = wait\n"
        "sys.exit(c.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(small_torch.root), str(out), "--quiet", "--max-shard-size", SHARD]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode != 0 and not out.exists() and work_path(out).exists()
    assert b"kept in" in error and b"the same command continues" in error and b"Traceback" not in error
    convert_to_hf(small_torch.root, out, max_shard_size=SHARD, progress=False)
    assert hashes(out) == whole
