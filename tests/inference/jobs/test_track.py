"""Track files: read by other programs they hold the values of the model, however the run went."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from source_tree import ROOT
from tolerances import SAME_FP32
from transformers import AutoModelForCausalLM

from gengram import GengramTokenizer
from gengram.inference.base_tokens import BaseTokens
from gengram.inference.jobs import ModelOptions, Share, run_job
from gengram.inference.jobs.regions import regions_of
from gengram.inference.jobs.track import track_job
from gengram.inference.jobs.track_files import BedGraphWriter, BigWigWriter, read_track
from gengram.inference.tracks import VALUES, TrackModel
from gengram.sequences.genome import genome_of
from gengram.support.errors import InputError

bigwig = pytest.importorskip("pyBigWig")
pytest.importorskip("pysam")

GENOME = {
    "chr2": "ACGTTGCAAGTCCTGAATTCGGACNNNNACGATTACAGGGCATTCTACGATCGGGACTTAAACGCGC" * 4,
    "chr10": "TTGACAGGCTAACGTTGCAAATTN" * 8,
    "chrM": "A",
    "gap": "N" * 300,
}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in GENOME.items()))
    return path


@pytest.fixture(scope="module")
def options(tiny_folder):  # noqa: F811
    return ModelOptions(str(tiny_folder), device="cpu")


@pytest.fixture(scope="module")
def expected(tiny_folder):  # noqa: F811
    """Values of all bases by contig and track."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tracks = TrackModel(model, BaseTokens.of(GengramTokenizer()), values=VALUES, context=48)
    return {name: tracks.of_sequence(sequence) for name, sequence in GENOME.items()}


def in_bigwigs(folder):
    """Values of all bases by track and contig, nan where a file has none."""
    found = {}
    for path in folder.glob("*.bw"):
        with bigwig.open(str(path)) as file:
            assert file.chroms() == {name: len(sequence) for name, sequence in GENOME.items()}
            for name, length in file.chroms().items():
                values = file.values(name, 0, length) or [np.nan] * length
                found.setdefault(path.stem, {})[name] = np.array(values, dtype=np.float32)
    return found


def in_bedgraphs(folder):
    found = {}
    for path in folder.glob("*.bedgraph"):
        tracks = found[path.stem] = {name: np.full(len(GENOME[name]), np.nan, np.float32) for name in GENOME}
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        assert lines == sorted(lines, key=lambda cells: (cells[0], int(cells[1])))  # as bedGraphToBigWig asks for
        for contig, start, end, value in lines:
            assert int(end) == int(start) + 1
            tracks[contig][int(start)] = np.float32(value)
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_of_a_whole_genome_hold_the_values_of_the_model(fasta, options, expected, tmp_path):
    job = track_job(fasta, options, whole_genome=True)
    summary = run_job(replace(job, chunk=37), tmp_path / "small")
    run_job(track_job(fasta, options, whole_genome=True, format="bedgraph"), tmp_path / "text")
    assert summary.items == sum(map(len, GENOME.values()))
    found, text = in_bigwigs(tmp_path / "small"), in_bedgraphs(tmp_path / "text")
    assert set(found) == set(text) == set(expected["chr2"]) and len(found) == 12
    for track, contigs in found.items():
        for contig, values in contigs.items():
            np.testing.assert_allclose(values, expected[contig][track], atol=SAME_FP32, rtol=SAME_FP32)
            np.testing.assert_allclose(text[track][contig], expected[contig][track], atol=SAME_FP32, rtol=SAME_FP32)
    record = json.loads((tmp_path / "small" / "record.json").read_text())
    assert record["inputs"]["fasta"]["sha256"] and record["settings"]["context"] == 48
    assert record["tracks"][-1] == {
        "file": "residual.layer2.reverse.bw", "value": "residual", "strand": "-", "layer": 2, "unit": "norm",
    }  # fmt: skip
    assert {track["file"] for track in record["tracks"]} == {f"{track}.bw" for track in found}


def test_bedgraph_loses_nothing(fasta, options, tmp_path):
    values = np.array([0, np.nan, 1e-38, 1 / 3, 16777217, 2.5e-10, 1.9999999], dtype=np.float32)
    with BedGraphWriter(tmp_path / "x.bedgraph", {"a": 9}) as file:
        file.add("a", 2, values)
        file.add("b", 0, values)
        file.add('c"5\'"', 0, values)  # a contig may be called so
    np.testing.assert_array_equal(read_track(tmp_path / "x.bedgraph", "a", 2, 9), values)
    np.testing.assert_array_equal(read_track(tmp_path / "x.bedgraph", 'c"5\'"', 0, 7), values)
    assert np.isnan(read_track(tmp_path / "x.bedgraph", "c", 0, 3)).all()
    job = track_job(fasta, options, ["chr2:20-90"], format="bedgraph")
    run_job(job, tmp_path / "text")
    run_job(replace(job, format="bigwig"), tmp_path / "binary")
    for track, contigs in in_bigwigs(tmp_path / "binary").items():
        values = contigs["chr2"][5:150]
        np.testing.assert_array_equal(read_track(tmp_path / f"text/{track}.bedgraph", "chr2", 5, 150), values)
        np.testing.assert_array_equal(read_track(tmp_path / f"binary/{track}.bw", "chr2", 5, 150), values)


def test_means_of_a_bigwig_are_those_of_its_values(tmp_path):
    values = np.random.default_rng(0).random(65_536).astype(np.float32)
    values[16_384:32_768] = np.nan
    with BigWigWriter(tmp_path / "x.bw", {"a": 65_536, "b": 5}) as file:
        file.add("a", 0, values[:11_111])
        file.add("a", 11_111, values[11_111:])
    with bigwig.open(str(tmp_path / "x.bw")) as file:
        assert file.header()["nBasesCovered"] == 49_152 and file.header()["nLevels"] > 1
        means = file.stats("a", 0, 65_536, nBins=16)  # bounds that the overviews have too
    expected = values.reshape(16, -1).mean(1)
    assert means[4:8] == [None] * 4
    known = ~np.isnan(expected)
    known[-1] = False  # pyBigWig leaves the last 16 bases of a file out of its overviews
    np.testing.assert_allclose(np.array(means, dtype=float)[known], expected[known], rtol=SAME_FP32)


intervals = st.tuples(st.sampled_from(["chr2", "2", "chr10", "gap"]), st.integers(0, 190), st.integers(1, 60))


@settings(max_examples=15, deadline=None)
@given(st.lists(intervals, min_size=1, max_size=6), st.integers(10, 300), st.booleans())
def test_regions_in_any_order_overlapping_or_repeated_have_the_values_of_the_whole(
    fasta, options, expected, tmp_path_factory, regions, chunk, as_bed
):
    folder = tmp_path_factory.mktemp("regions")
    texts = [f"{name}:{start + 1:,}-{min(start + size, 192):,}" for name, start, size in regions]
    wanted = {name: np.zeros(len(sequence), dtype=bool) for name, sequence in GENOME.items()}
    for name, start, size in regions:
        wanted["chr2" if name == "2" else name][start : min(start + size, 192)] = True
    if as_bed:
        lines = [f"{name} {start} {min(start + size, 192)}\r\n" for name, start, size in regions]
        (folder / "regions.bed.gz").write_bytes(gzip.compress("".join(["#\r\n", "track x\n", *lines]).encode()))
        texts = [str(folder / "regions.bed.gz")]
    job = track_job(fasta, options, texts, values=["surprisal"])
    summary = run_job(replace(job, chunk=chunk), folder / "out")
    assert summary.items == sum(map(np.sum, wanted.values()))
    for track, contigs in in_bigwigs(folder / "out").items():
        for contig, values in contigs.items():
            masked = np.where(wanted[contig], expected[contig][track], np.nan)
            np.testing.assert_allclose(values, masked, atol=SAME_FP32, rtol=SAME_FP32)


def test_regions_are_merged_and_sorted_by_name():
    genome = genome_of({"chr2": "A" * 100, "chr10": "A" * 50, "none": ""})
    found = regions_of(genome, ["chr2:41-60", "2:1-20", "chr10", "chr2:21-30", "chr2:50-70", "chr10:3-4"])
    assert [str(region) for region in found] == ["chr10:1-50", "chr2:1-30", "chr2:41-70"]
    assert [str(region) for region in regions_of(genome)] == ["chr10:1-50", "chr2:1-100"]
    with pytest.raises(ValueError, match="'chr2' has 100 bases"):
        regions_of(genome, ["chr2:1-101"])
    with pytest.raises(ValueError, match="no record 'chr3'"):
        regions_of(genome, ["chr3:1-10"])


def test_merged_regions_keep_the_names_of_a_bed_file(tmp_path):
    bed = tmp_path / "some.bed"
    bed.write_text("chr2\t50\t60\tlast\nchr2\t10\t20\tTATA\nchr2\t0\t10\t.\nchr2\t15\t30\tCAAT\nchr2\t15\t18\tTATA\n")
    found = regions_of(genome_of({"chr2": "A" * 100}), ["chr2:80-90"], [bed])
    assert [(str(region), region.name) for region in found] == [
        ("chr2:1-30", "TATA, CAAT"),
        ("chr2:51-60", "last"),
        ("chr2:80-90", ""),
    ]


KILLED = """
import os, signal, sys
from dataclasses import replace
from gengram.inference.jobs import ModelOptions, run_job
from gengram.inference.jobs.track import TrackJob, track_job
original, done = TrackJob.worker, []
def worker(self, device):
    compute = original(self, device)
    def dying(content):
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(content)
        return compute(content)
    return dying
TrackJob.worker = worker
job = track_job(sys.argv[1], ModelOptions(sys.argv[2], device="cpu"), whole_genome=True)
run_job(replace(job, chunk=64), sys.argv[3])
"""


def test_a_killed_run_goes_on_and_its_files_are_identical(fasta, options, tmp_path):
    command = [sys.executable, "-c", KILLED, str(fasta), options.model, str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.chunks/*.arrow"))) == 3
    job = replace(track_job(fasta, options, whole_genome=True), chunk=64)
    summary = run_job(job, tmp_path / "out")
    assert summary.computed == summary.items - 3 * 64
    run_job(job, tmp_path / "other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_parts_hold_the_whole_together(fasta, options, expected, tmp_path):
    job = replace(track_job(fasta, options, whole_genome=True, values=["gate"]), chunk=100)
    for part in range(3):
        run_job(job, tmp_path / str(part), shard=Share(part, 3))
    parts = [in_bigwigs(tmp_path / str(part))["gate.layer2.forward"] for part in range(3)]
    for contig in GENOME:
        values = np.stack([part[contig] for part in parts])
        assert (np.sum(~np.isnan(values), axis=0) <= 1).all()
        together = np.where(np.isnan(values).all(0), np.nan, np.nansum(values, axis=0))
        np.testing.assert_allclose(together, expected[contig]["gate.layer2.forward"], atol=SAME_FP32)


def test_bedgraphs_of_parts_put_together_are_the_whole_file(fasta, options, tmp_path):
    job = replace(track_job(fasta, options, whole_genome=True, values=["gate"], format="bedgraph"), chunk=100)
    parts = [run_job(job, tmp_path / str(part), shard=Share(part, 3)).output for part in range(3)]
    whole = run_job(job, tmp_path / "whole").output
    for path in whole.glob("*.bedgraph"):
        assert b"".join((part / path.name).read_bytes() for part in parts) == path.read_bytes()


def test_a_region_of_nothing_but_n_gives_files_without_values(fasta, options, tmp_path):
    for format in ("bigwig", "bedgraph"):
        run_job(track_job(fasta, options, ["gap"], values=["entropy"], format=format), tmp_path / format)
    assert all(np.isnan(values).all() for values in in_bigwigs(tmp_path / "bigwig")["entropy.forward"].values())
    assert (tmp_path / "bedgraph/entropy.forward.bedgraph").read_text() == ""
    assert np.isnan(read_track(tmp_path / "bedgraph/entropy.forward.bedgraph", "gap", 0, 9)).all()
    assert np.isnan(read_track(tmp_path / "bigwig/entropy.forward.bw", "gap", 0, 9)).all()


def changed_folder(tiny_folder, tmp_path, **changes):  # noqa: F811
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(tiny_folder).iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((Path(tiny_folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return ModelOptions(str(folder), device="cpu")


def test_what_a_model_cannot_do_is_said_before_the_work(fasta, tiny_folder, tmp_path):  # noqa: F811
    plain = changed_folder(tiny_folder, tmp_path, memory_layers=[])
    assert {track.value for track in track_job(fasta, plain, ["chr2"]).tracks} == {"surprisal", "entropy"}
    with pytest.raises(ValueError, match="gives no gate, since it has no memory; only Gengram models do"):
        track_job(fasta, plain, ["chr2"], values=["entropy", "gate"])


def test_a_model_without_a_language_model_head_has_a_memory_to_show(fasta, tiny_folder, expected, tmp_path):  # noqa: F811
    base = changed_folder(tiny_folder, tmp_path, architectures=["GengramModel"])
    job = track_job(fasta, base, ["chr2"])
    assert {track.value for track in job.tracks} == {"gate", "residual"}
    run_job(job, tmp_path / "out")
    found = in_bigwigs(tmp_path / "out")
    np.testing.assert_allclose(
        found["gate.layer2.reverse"]["chr2"], expected["chr2"]["gate.layer2.reverse"], atol=SAME_FP32
    )
    with pytest.raises(ValueError, match="gives no surprisal, since its configuration names no causal or masked"):
        track_job(fasta, base, ["chr2"], values=["surprisal"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({}, "expected regions or --whole-genome, and not both"),
        ({"regions": ["chr2"], "whole_genome": True}, "expected regions or --whole-genome, and not both"),
        (
            {"regions": ["chr2"], "values": ["surprise"]},
            "--values: expected some of surprisal,entropy,gate,residual, got",
        ),
        ({"regions": ["chr2"], "values": []}, "--values: expected some of"),
        ({"regions": ["chr2"], "context": 49}, "expected a context of 1 to 48 bases"),
        ({"regions": ["chr2"], "overlap": 48}, "expected an overlap of 0 to 47"),
        ({"regions": ["chr2"], "format": "wig"}, "--format: expected bigwig or bedgraph, got 'wig'"),
    ],
)
def test_wrong_options_are_refused(fasta, options, wrong, message):
    with pytest.raises(ValueError, match=message):
        track_job(fasta, options, **wrong)


def test_a_bed_file_that_is_not_there_is_no_region(fasta, options, tmp_path):
    with pytest.raises(OSError, match=r"genes.bed does not exist"):
        run_job(track_job(fasta, options, [str(tmp_path / "genes.bed")]), tmp_path / "out")
    (tmp_path / "genes.bed").write_text("chr2\t5\t3\n")
    with pytest.raises(ValueError, match=r"genes.bed, line 1: expected 0 <= start < end"):
        run_job(track_job(fasta, options, [str(tmp_path / "genes.bed")]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["genes.bed"]


@pytest.mark.parametrize("place", [20, 150])  # in the region, and near it
def test_letters_that_are_no_dna_are_refused_before_the_work(place, options, tmp_path):
    text = GENOME["chr2"]
    (tmp_path / "genome.fa").write_text(f">chr2\n{text[:place]}X{text[place + 1 :]}\n")
    job = track_job(tmp_path / "genome.fa", options, ["chr2:1-130"])
    with pytest.raises(InputError, match=rf"genome\.fa, record chr2: expected DNA .* got 'X' at base {place + 1}\."):
        run_job(job, tmp_path / "tracks")
    assert not list(tmp_path.glob("*tracks*"))
    run_job(track_job(tmp_path / "genome.fa", options, ["chr2:210-230"]), tmp_path / "tracks")  # far from it
