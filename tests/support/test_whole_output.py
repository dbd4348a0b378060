"""Outputs are there as a whole or not at all, also when a process is killed; nothing planted beside them is obeyed."""

import os
import signal
import subprocess
import sys

import pytest

from gengram.support.errors import InputError
from gengram.support.whole_output import whole_folder, write_whole

WRITER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job is started without
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import sys, time
from gengram.support.whole_output import whole_folder
with whole_folder(sys.argv[1]) as folder:
    (folder / "part").write_text("x" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing `tmp_path / "out"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("x")
        assert names(tmp_path / "a") == [".out.partial"]
    assert names(tmp_path / "a") == ["out"] and names(tmp_path / "a" / "out") == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_nothing_remains_of_what_fails(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["full", "file", "link", "broken link"])
def test_an_output_that_is_something_is_refused_before_the_work(kind, tmp_path):
    output = tmp_path / "out"
    if kind == "full":
        output.mkdir()
        (output / "mine").write_text("x")
    elif kind == "file":
        output.write_text("x")
    else:
        if kind == "link":
            (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path)
    with pytest.raises(FileExistsError, match=r"out (exists already; choose another|is a symbolic link; name a new)"):
        with whole_folder(output):
            raise AssertionError("the work began")
    assert names(tmp_path) == before


def test_a_name_that_is_not_utf_8_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"o\\udcfft: expected an output with a name in UTF-8"):
        with whole_folder(tmp_path / os.fsdecode(b"o\xfft")):
            pytest.fail("the work has begun")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_takes_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_process_that_is_asked_to_end_leaves_nothing(number, writer, tmp_path):
    writer.send_signal(number)
    assert writer.wait(30) not in (0, None)
    assert names(tmp_path) == []


def test_what_a_killed_process_leaves_is_named_and_can_be_deleted(writer, tmp_path):
    writer.kill()
    writer.wait()
    assert names(tmp_path) == [".out.partial"]
    for restart, remedy in ((None, "delete that folder"), (False, "give --restart to delete it")):
        with pytest.raises(InputError, match=rf"\.out\.partial holds 1\.0 kB that an earlier run left .*{remedy}"):
            with whole_folder(tmp_path / "out", restart):
                raise AssertionError("the work began")
    with whole_folder(tmp_path / "out", restart=True) as folder:
        assert names(folder) == []
        (folder / "file").write_text("x")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


def test_two_processes_do_not_write_one_output(writer, tmp_path):
    for restart in (None, True):
        with pytest.raises(InputError, match=rf"out is being written by process {writer.pid}; wait for it"):
            with whole_folder(tmp_path / "out", restart):
                raise AssertionError("the work began")
    assert (tmp_path / ".out.partial" / "folder" / "part").read_text() == "x" * 1000


@pytest.mark.parametrize("planted", ["the folder", "folder", "lock", "fifo", "file", "other"])
def test_planted_links_and_other_things_are_refused_and_not_followed(planted, tmp_path):
    work, victim = tmp_path / ".out.partial", tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    if planted == "the folder":
        work.symlink_to(victim)
    elif planted == "file":
        work.write_text("x")
    else:
        work.mkdir()
        if planted == "folder":
            (work / "folder").symlink_to(victim)
        elif planted == "lock":
            (work / "lock").symlink_to(victim / "precious")
        elif planted == "fifo":
            os.mkfifo(work / "lock")
        else:
            (work / "journal.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"\.out\.partial"), whole_folder(tmp_path / "out", restart=True):
        raise AssertionError("the work began")
    assert (victim / "precious").read_text() == "x" and not (tmp_path / "out").exists()
    assert os.path.lexists(work)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else_is_refused(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    os.chown(tmp_path / ".out.partial", 12345, 12345)
    with pytest.raises(InputError, match="of another kind or owner"), whole_folder(tmp_path / "out", restart=True):
        raise AssertionError("the work began")


def test_a_full_disk_is_named_with_the_output(tmp_path):
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from gengram.support.whole_output import whole_folder, write_whole
for kind in (1, 2):
    try:
        if kind == 1:
            write_whole(sys.argv[1], b"x" * 5000)
        else:
            with whole_folder(sys.argv[1]) as folder:
                (folder / "file").write_bytes(b"x" * 5000)
    except OSError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and not done.stderr
    for line in lines:
        assert line.startswith(f"{tmp_path}/out was not written: the file would be larger than the system allows")
        assert line.endswith("Nothing of it is kept.")
    assert names(tmp_path) == []


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write_whole(tmp_path / "a" / "file", "one")
    write_whole(tmp_path / "a" / "file", b"two")
    assert (tmp_path / "a" / "file").read_text() == "two" and names(tmp_path / "a") == ["file"]
