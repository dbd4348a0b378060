import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
from tolerances import POSTERIOR

from gengram.cli import main
from gengram.inference.filling import GapFiller, gap_windows
from gengram.inference.jobs import ModelOptions, Share, run_job
from gengram.inference.jobs.fill import SCHEMA, fill_file, fill_job
from gengram.inference.loaded_model import load_model
from gengram.sequences.fasta import stream_fasta
from gengram.sequences.gaps import find_gaps

SEQUENCES = {
    "one": "ACGTTGCAAnTTGACC[MASK]GT",
    "whole": "acgtRYACGT",
    "many": "NACNTTGNCCNNA",
    "empty": "",
    "long": "ACGTTGCAAATTGAC" * 5 + "N" + "GATTACA" * 9 + "?" + "ACGN" * 20 + "N" * 30 + "T",
    "last": "?",
}


@pytest.fixture
def sequences(tmp_path):
    path = tmp_path / "in.fa"
    path.write_text("".join(f">{name} of {len(text)}\n{text}\n" for name, text in SEQUENCES.items()))
    return path


@pytest.fixture
def model(tiny_folder):
    return ModelOptions(str(tiny_folder), device="cpu", strands="forward")


def rows_of(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_sequences_and_table_hold_what_the_model_says(sequences, model, tiny_folder, tmp_path):
    summary = fill_file(sequences, tmp_path / "out.fa", model=model, joint=2, context=20, least_probability=0.3)
    loaded = load_model(str(tiny_folder), "causal", device="cpu")
    filler = GapFiller(loaded.model, loaded.tokenizer, "forward")
    found = {piece.name: (piece.description, piece.text) for piece in stream_fasta(tmp_path / "out.fa")}
    rows, statuses = iter(rows_of(tmp_path / "out.fa.tsv")), set()
    for name, text in SEQUENCES.items():
        gapped = find_gaps(text)
        expected = list(gapped.letters)
        for start, window in gap_windows(gapped.letters, gapped.gaps, 20, 2):
            chances = filler.probabilities([window])[0] if window.is_exact else [None] * len(window.asked)
            for number, own in zip(window.asked, chances, strict=True):
                row, place = next(rows), start + window.gaps[number].place
                assert (row["name"], int(row["start"])) == (name, place)
                statuses.add(row["status"])
                if own is None:
                    assert row["status"] == "too_many_gaps" and row["base"] == "N" and row["p_A"] == ""
                    continue
                np.testing.assert_allclose([float(row[f"p_{base}"]) for base in "ACGT"], own, atol=POSTERIOR)
                assert row["base"] == "ACGT"[own.argmax()]
                assert row["status"] == ("filled" if own.max() >= 0.3 else "unsure")
                if row["status"] == "filled":
                    expected[place] = row["base"].lower() if expected[place] == "n" else row["base"]
        assert found[name] == (f"of {len(text)}", "".join(expected))
    assert next(rows, None) is None and statuses == {"filled", "unsure", "too_many_gaps"}
    assert summary.items == sum(len(find_gaps(text).gaps) for text in SEQUENCES.values())
    assert json.loads((tmp_path / "out.fa.tsv.json").read_text())["settings"]["context"] == 20


def test_batches_and_parts_change_nothing(sequences, model, tmp_path):
    options = {"joint": 2, "context": 20, "nearest": True}
    fill_file(sequences, tmp_path / "whole.fa", model=model, **options)
    small = ModelOptions(model.model, device="cpu", strands="forward", batch_tokens=60)
    texts, tables = "", []
    for part in range(3):
        output = tmp_path / f"part{part}.fa"
        fill_file(sequences, output, model=small, shard=Share(part, 3), **options)
        texts += output.read_text()
        tables += rows_of(tmp_path / f"part{part}.fa.tsv")
    assert texts == (tmp_path / "whole.fa").read_text()
    for ours, theirs in zip(tables, rows_of(tmp_path / "whole.fa.tsv"), strict=True):
        assert [ours[name] for name in ("name", "start", "base", "status")] == [
            theirs[name] for name in ("name", "start", "base", "status")
        ]
        assert float(ours["p_A"]) == pytest.approx(float(theirs["p_A"]), abs=POSTERIOR)


def test_chunks_hold_whole_sequences_or_parts_of_one(tmp_path, model):
    path = tmp_path / "in.fa"
    path.write_text(">a\nAN\n>long\n" + "ACGTNACGTACGTACGTACGTACG\n" * 150 + ">b\nAN\n>c\nAC\n>d\nNA\n")
    chunks = list(fill_job(path, tmp_path / "out.fa", model=model, context=10).chunks())
    assert [chunk.size for chunk in chunks] == [1, 64, 64, 22, 2]
    assert [chunk.continues for chunk in chunks] == [False, False, True, True, False]
    assert [{wanted.name for wanted in chunk.content} for chunk in chunks] == [
        {"a"},
        {"long"},
        {"long"},
        {"long"},
        {"b", "c", "d"},
    ]


def test_a_table_alone(sequences, model, tmp_path):
    fill_file(sequences, tmp_path / "out.parquet", model=model, context=20, joint=1, with_codes=True, longest_run=1)
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.schema.names == SCHEMA.names and b"gengram" in table.schema.metadata
    codes = [row for row in table.to_pylist() if row["name"] == "whole"]
    assert [row["start"] for row in codes] == [4, 5] and {row["status"] for row in codes} == {"too_many_gaps"}
    assert {path.name for path in tmp_path.iterdir()} == {"in.fa", "out.parquet"}


def test_the_command(sequences, tiny_folder, tmp_path, capsys):
    words = ["fill", str(sequences), "--model", str(tiny_folder), "--device", "cpu", "--strands", "forward"]
    words += ["--context", "20", "--joint", "2"]
    assert main([*words, "--output", str(tmp_path / "out.fa.gz"), "--table", "parquet"]) == 0
    out = capsys.readouterr().out
    assert "29 gaps" in out and "too many gaps" in out and "1 run of more than 16 N, 31 bases, left" in out
    assert (tmp_path / "out.fa.gz.parquet").exists() and not (tmp_path / "out.fa.gz.parquet.json").exists()
    assert main([*words, "--output", str(tmp_path / "out.tsv"), "--json", "--nearest"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["gaps"]["too_many_gaps"] == 0 and sum(found["gaps"].values()) == 29 and found["long_runs"] == 1


def test_long_runs_are_counted_to_the_end_of_the_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr("gengram.inference.jobs.fill._WINDOWS_PER_CHUNK", 1)
    (tmp_path / "in.fa").write_text(">a\nACGNACG\n>b\nAC" + "N" * 20 + "GT\n>c\nACGNACG\n>d\nAC" + "N" * 20 + "GT\n")
    job = fill_job(tmp_path / "in.fa", tmp_path / "out.tsv", model=model)
    run_job(job, tmp_path / "out.tsv", shard=Share(0, 4))
    assert (job.counts.total(), job.long_runs, job.long_run_bases) == (1, 2, 40)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output", "x.txt"], "expected a name that ends in .fa"),
        (["--output", "x.fa", "--joint", "7"], "joint: expected 1 to 6, since 4^6 fillings are compared, got 7"),
        (["--output", "x.fa", "--least-probability", "1.5"], "least_probability: expected 0 to 1, got 1.5"),
        (["--output", "x.fa", "--longest-run", "0"], "longest_run: expected at least 1, got 0"),
        (["--output", "x.fa", "--context", "2000"], "expected a context of 1 to 1,024 bases"),
        (["--output", "there.fa"], "there.fa.tsv exists already"),
        (["--output", "here.fa"], "here.fa.tsv.json exists already"),
        (["--output", "x.fa"], "in.fa, sequence 'p': expected letters of DNA, N, ? and [MASK], got 'E' at base 1"),
    ],
)
def test_what_cannot_be_done_is_one_message(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.fa").write_text(">p\nMEEPQ\n")
    (tmp_path / "there.fa.tsv").touch()
    (tmp_path / "here.fa.tsv.json").touch()
    assert main(["fill", "in.fa", *words]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and message in error
    assert {path.name for path in tmp_path.iterdir()} == {"in.fa", "there.fa.tsv", "here.fa.tsv.json"}
