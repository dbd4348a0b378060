"""What `gengram prepare` must not do: lose or take in characters silently, write elsewhere, grow with its input."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from gengram import GengramTokenizer
from gengram.cli import main
from gengram.data_preparation import SplitRule, WindowOptions, prepare_genome_dataset, stream_genome_dataset
from gengram.data_preparation.preparation import Preparation, iterate_examples
from gengram.support.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SMALL = WindowOptions(length=16, shortest=1)


def sequence(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=length))


def written(output, cache) -> str:
    """All examples as text."""
    tokenizer = GengramTokenizer()
    return "".join(tokenizer.decode(row["input_ids"]) for row in load_dataset(str(output), cache_dir=cache)["train"])


def run(words: str, folder, **options) -> subprocess.CompletedProcess:
    """A line of bash in `folder`."""
    return subprocess.run(
        ["bash", "-c", words.replace("gengram", f"{sys.executable} -m gengram")],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize("given", ["<(cat a.fa)", "- < a.fa.gz"])
def test_pipes_and_standard_input_are_read_whole(given, tmp_path):
    text = f">a\n{sequence(20_000)}\n"
    (tmp_path / "a.fa").write_text(text)
    (tmp_path / "a.fa.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    done = run(f"gengram prepare {given} --output out --length 64 --shortest 1 --json", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = json.loads(done.stdout)["files"]
    assert file["bases"] == 20_000
    assert written(tmp_path / "out", str(tmp_path / "cache")) == text[3:-1]
    content = (tmp_path / ("a.fa.gz" if "gz" in given else "a.fa")).read_bytes()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert file["name"] == "stdin" or not given.startswith("-")


FOREIGN = {
    "an alignment": "ACGT--ACGT" * 100,
    "masked with X": "ACGTXXXXXX" * 100,
    "GenBank": "        1 acgtacgtac acgtacgtac\n" * 30,
    "protein": "MKVLAEFGHIPQRSTWYDNC\n" * 50,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_not_dna_is_refused_and_the_reason_guessed(kind, tmp_path, capsys):
    path = tmp_path / "a.fa"
    path.write_text(f">a\n{FOREIGN[kind]}\n")
    assert main(["prepare", str(path), "--output", str(tmp_path / "out"), "--json"]) == 1
    error = capsys.readouterr().err
    assert "a.fa: " in error and "letters are not IUPAC codes of DNA" in error and kind in error
    assert "--foreign" in error and not (tmp_path / "out").exists()


def test_foreign_characters_are_counted_and_cut_kept_or_refused(tmp_path, capsys):
    path = tmp_path / "a.fa"
    path.write_text(f">a\n{sequence(30)}--X{sequence(30, 1)}\n{sequence(20, 2)}RYN\n>none\n")
    expected = {"-": 2, "X": 1}
    for foreign, text in (
        ("cut", sequence(30) + sequence(30, 1) + sequence(20, 2) + "NN"),
        ("keep", sequence(30) + "[UNK]" * 3 + sequence(30, 1) + sequence(20, 2) + "NN"),
    ):
        output = tmp_path / foreign
        words = ["prepare", str(path), "--output", str(output), "--length", "16", "--shortest", "1"]
        assert main([*words, "--foreign", foreign]) == 0
        (file,) = json.loads((output / "preparation.json").read_text())["files"]
        assert (file["records"], file["empty_records"]) == (2, 1)
        assert (file["bases"], file["n"], file["other_iupac_codes"]) == (80, 1, 2)
        assert file["foreign_characters"] == expected
        assert written(output, str(tmp_path / "cache")) == text
        shown = capsys.readouterr().out
        fate = {"cut": "cut out", "keep": "made [UNK]"}[foreign]
        assert (
            f"a.fa: 2 records, 80 bases A C G T, 1 N, 2 other IUPAC codes, 3 foreign ('-' 2, 'X' 1; {fate})" in shown
        )
        assert "1 records without a sequence" in shown
    with pytest.raises(InputError, match=r"a\.fa: base 31 of 'a' is '-', which is no IUPAC code"):
        prepare_genome_dataset([path], tmp_path / "x", WindowOptions(foreign="fail"), progress=False)
    with pytest.raises(
        InputError, match=r"a\.fa: 3\.49% of its 86 letters are not IUPAC codes of DNA \('-' 2, 'X' 1\)"
    ):
        prepare_genome_dataset([path], tmp_path / "x", SMALL, progress=False)
    limit = WindowOptions(length=16, shortest=1, most_foreign=0.035)
    assert prepare_genome_dataset([path], tmp_path / "limit", limit, progress=False)["files"][0]["records"] == 2
    with pytest.raises(InputError, match="foreign as one of limit, cut, keep, fail"):
        WindowOptions(foreign="drop")


def test_every_character_becomes_what_the_tokenizer_makes_of_it(tmp_path):
    characters = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in ">;")
    (tmp_path / "a.fa").write_text(f">a\nA{characters}[MASK]<EOD\nA\n")
    options = WindowOptions(length=200, shortest=1, foreign="keep")
    (example,) = [example for _, example in iterate_examples([tmp_path / "a.fa"], options, Preparation())]
    tokenizer = GengramTokenizer()
    expected = [tokenizer(character)["input_ids"][0] for character in f"A{characters}[MASK]<EODA"]
    assert example["input_ids"].tolist() == expected


def test_repeated_names_are_an_error_or_are_numbered(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">a x\nACGT\n>a y\nGGCC\n")
    with pytest.raises(InputError, match=r"a\.fa, line 3: the name 'a' .* line 1 already; .*--repeated-names"):
        prepare_genome_dataset([path], tmp_path / "out", SMALL, progress=False)
    numbered = WindowOptions(length=16, shortest=1, repeated_names="number")
    prepare_genome_dataset([path], tmp_path / "out", numbered, progress=False)
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["origin"] for row in data] == [["a:0-4(+)"], ["a#2:0-4(+)"]]


def test_files_that_cannot_be_told_apart_are_refused(tmp_path):
    for folder, text in (("one", ">a\nACGT\n"), ("two", ">b\nACGT\n"), ("three", ">a\nGG\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.fa").write_text(text)
    one, two, three = (tmp_path / folder / "x.fa" for folder in ("one", "two", "three"))
    assert (
        prepare_genome_dataset([one, two], tmp_path / "out", SMALL, progress=False)["splits"]["train"]["tokens"] == 8
    )
    with pytest.raises(InputError, match=r"two files named x\.fa hold a record 'a'"):
        prepare_genome_dataset([one, two, three], tmp_path / "x", SMALL, progress=False)
    with pytest.raises(InputError, match=r"expected every file once, got .*one/x\.fa more often"):
        prepare_genome_dataset([one, two.parent / ".." / "one" / "x.fa"], tmp_path / "x", SMALL, progress=False)
    with pytest.raises(InputError, match=r"/dev/null can be read only once"):
        stream_genome_dataset(["/dev/null"])


@pytest.mark.parametrize(
    "split", ["../../evil", "/tmp/evil", "a/b", "..", "train\x1b[2J", "a b", "a-b", "all", "x" * 101]
)
def test_a_split_that_could_name_a_path_is_refused(split, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    (tmp_path / "splits.tsv").write_text(f"pattern\tsplit\n*\t{split}\n")
    output = tmp_path / "in" / "deep" / "out"
    words = ["prepare", str(tmp_path / "a.fa"), "--output", str(output), "--splits", str(tmp_path / "splits.tsv")]
    before = sorted(tmp_path.rglob("*"))
    assert main([*words, "--shortest", "1"]) == 1
    error = capsys.readouterr().err
    assert "splits.tsv, line 2: expected a split's name of letters" in error and "\x1b" not in error
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="expected a split's name"):
        SplitRule("*", split)


def test_rules_about_nothing_and_splits_of_nothing_are_said(tmp_path, capsys):
    (tmp_path / "a.fa").write_text(f">chr9\n{sequence(40)}\n")
    (tmp_path / "splits.tsv").write_text("pattern\tsplit\tstart\n*:chr09\ttest\t\n*:chr9\ttest\t40\n*\ttrain\t\n")
    words = ["prepare", str(tmp_path / "a.fa"), "--output", str(tmp_path / "out"), "--length", "16", "--shortest", "1"]
    assert main([*words, "--splits", str(tmp_path / "splits.tsv")]) == 0
    shown = capsys.readouterr().out
    assert "no base matches the rule *:chr09 of the split test" in shown
    assert "no base matches the rule *:chr9 of the split test" in shown
    assert "test                  0 examples" in shown


@pytest.mark.parametrize("packed, line", [(False, 0), (True, 60)])
def test_memory_does_not_grow_with_a_sequence(packed, line, tmp_path, monkeypatch):
    monkeypatch.setattr("gengram.data_preparation.documents.IN_MEMORY", 1 << 19)
    options = WindowOptions(length=1024, packed=packed, both_strands=True)

    def peak(size: int) -> int:
        bases = np.random.default_rng(0).choice(list(b"ACGT"), size).astype(np.uint8)
        if line:
            bases = np.insert(bases, range(line, size, line), ord("\n"))
        (tmp_path / "a.fa").write_bytes(b">a\n" + bases.tobytes())
        tracemalloc.start()
        try:
            preparation = Preparation(sketch_scale=64)
            tokens = sum(
                len(example["input_ids"])
                for _, example in iterate_examples([tmp_path / "a.fa"], options, preparation, folder=tmp_path)
            )
            assert tokens > 1.99 * size
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(1 << 20), peak(4 << 20)
    assert large < 1.3 * small < 64 << 20


@pytest.mark.slow
def test_a_gzip_bomb_of_one_sequence_needs_little_memory(tmp_path):
    """24 MB of one base in 24 kB; the limit is on the data of a process that has loaded its libraries."""
    with gzip.open(tmp_path / "bomb.fa.gz", "wb") as file:
        file.write(b">a\n" + b"A" * (24 << 20))
    code = """
import resource, sys
from gengram.data_preparation import prepare_genome_dataset, WindowOptions
import gengram.data_preparation.genome_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = WindowOptions(length=4096, packed=True, both_strands=True)
record = prepare_genome_dataset([sys.argv[1]], sys.argv[2], options, progress=False)
print(record["files"][0]["bases"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb.fa.gz"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    bases, megabytes = map(int, done.stdout.split())
    assert bases == 24 << 20 and megabytes < 450


@pytest.mark.parametrize("content", [b">a\nAC\0\0GT\n", b"\0" * 100, b">a\n" + b"ACGT" * 1000 + b"\0"])
def test_nul_bytes_are_no_bases(content, tmp_path):
    (tmp_path / "a.fa").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.fa.*(NUL|0x00)"):
        prepare_genome_dataset([tmp_path / "a.fa"], tmp_path / "out", SMALL, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_device_without_end_and_a_pipe_without_a_writer_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gengram.support.input_file.WAIT_FOR_A_WRITER", 0.05)
    os.mkfifo(tmp_path / "pipe")
    for path, message in (("/dev/zero", "NUL"), (tmp_path / "pipe", "a pipe that holds nothing")):
        with pytest.raises(InputError, match=message):
            prepare_genome_dataset([path], tmp_path / "out", SMALL, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path):
    (tmp_path / "a.fa").write_text(f">a\n{sequence(300_000)}\n")
    code = """
import resource, signal, sys
from gengram.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(["prepare", "a.fa", "--output", "out", "--length", "64", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/out was not written: the file would be larger than the system allows (see `ulimit -f`). "
        "Nothing of it is kept.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_or_says_what_it_left(number, tmp_path, capsys):
    os.mkfifo(tmp_path / "a.fa")
    words = ["prepare", str(tmp_path / "a.fa"), "--output", str(tmp_path / "out"), "--shortest", "1"]
    process = subprocess.Popen([sys.executable, "-m", "gengram", *words], stderr=subprocess.DEVNULL)
    with open(tmp_path / "a.fa", "w") as file:  # opens when the other side reads
        file.write(">a\nACGT\n")
        file.flush()
        work = tmp_path / ".out.partial" / "folder"
        while not work.exists():
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) in (128 + number, -number)
    (tmp_path / "a.fa").unlink()
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    if number == signal.SIGKILL:
        assert main(words) == 1
        error = capsys.readouterr().err
        assert f"{tmp_path}/.out.partial holds" in error and "give --restart to delete it" in error
    assert main([*words, "--restart"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fa", "out"]


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(b">a\n" + b"ACGT" * 1000, mtime=0)[:-3], "its gzip data ends in the middle"),
        (gzip.compress(b">a\nACGT\n", mtime=0) + b"tail", "something that is not gzip follows"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"", "is empty"),
        (b">a\nACGT>b\nAC\n", "line 2: '>' stands in the middle of a line"),
    ],
)
def test_a_damaged_file_is_named_by_the_command(content, message, tmp_path, capsys):
    (tmp_path / "a.fa").write_bytes(content)
    (tmp_path / "b.fa").write_text(">a\nACGT\n")
    output = ["--output", str(tmp_path / "out"), "--json"]
    calls = [["prepare", str(tmp_path / "a.fa"), *output]]
    if not content.startswith((b">", b"\x1f")):
        calls.append(["prepare", str(tmp_path / "b.fa"), "--splits", str(tmp_path / "a.fa"), *output])
    for words in calls:
        assert main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/a.fa") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
