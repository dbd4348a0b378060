"""`gengram track`, from the command line to files and pictures."""

import json

import pytest
from saved_models import tiny_folder  # noqa: F401  (a fixture)

import gengram
from gengram.cli import main

for library in ("matplotlib", "pyBigWig", "pysam"):
    pytest.importorskip(library)

FASTA, GTF = (str(gengram.DEMO_DATA / f"region.{kind}.gz") for kind in ("fa", "gtf"))


@pytest.fixture
def track(tiny_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Runs the command in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main(["track", *words, "--fasta", FASTA, "--model", str(tiny_folder), "--device", "cpu"])
        return (code, *capsys.readouterr())

    return run


def test_tracks_and_a_picture(track, tmp_path):
    words = ["chr21_25.7M:34,701-34,900", "--output", "out", "--values", "surprisal, gate", "--quiet"]
    code, out, error = track(*words, "--json")
    summary = json.loads(out)
    assert (code, error, summary["output"], summary["bases"]) == (0, "", "out", 200)
    values = ("surprisal", "gate.layer0", "gate.layer2")
    names = [f"{value}.{strand}" for value in values for strand in ("forward", "reverse")]
    assert summary["tracks"] == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"record.json", *(f"{name}.bw" for name in names)}
    assert track(*words)[0] == 1  # it is there
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, out, error = track(*[word for word in words if word != "--quiet"], "--image", "picture.svg", "--gtf", GTF)
    assert (code, error) == (0, "") and out == "wrote 6 tracks of 200 bases to out, and picture.svg\n"
    assert (tmp_path / "picture.svg").stat().st_size > 10_000
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "words, message",
    [
        (["chr21_25.7M", "--gtf", GTF], "--gtf: genes are drawn only in a picture; add --image FILE"),
        (["chr21_25.7M", "--image", "x.svg", "--shard", "1/2"], "--image: a part (--shard) has no picture"),
        (["chr21_25.7M:1-50000"], "its end is 50,000, but 'chr21_25.7M' has 40,000 bases"),
        (["chr9:1-50"], "no record 'chr9'"),
        (["--values", "gate"], "expected regions or --whole-genome, and not both"),
        (["no.bed"], "no.bed does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_one_message_before_the_work(track, tmp_path, words, message):
    code, out, error = track(*words, "--output", "out", "--quiet")
    assert (code, out) == (1, "") and error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []
