"""`gengram score`: all formats, every field kept, every allele scored or marked, whole or not at all."""

import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from effects_oracle import random_sequence, random_variant
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from shared_files import DATA, needs_data
from source_tree import ROOT
from tiny_models import tiny_model
from tolerances import LOG_LIKELIHOOD_FP32, SAME_FP32
from transformers import AutoModelForCausalLM, AutoTokenizer

import gengram
from gengram import GengramForMaskedLM, GengramTokenizer
from gengram.cli import main
from gengram.evaluation.evaluated_model import EvaluatedModel
from gengram.evaluation.suite_files import read_suite
from gengram.evaluation.variants import read_labelled_variants, zero_shot
from gengram.inference.effects import SCORES
from gengram.inference.jobs.score import ScoreJob
from gengram.inference.variant_effects import variant_effects
from gengram.inference.window_effects import WindowEffects
from gengram.sequences.genome import open_genome
from gengram.sequences.variant_files import read_variants

pysam = pytest.importorskip("pysam")
pytest.importorskip("pysam.bcftools")

COLUMNS = [
    "chrom",
    "pos",
    "ref",
    "alt",
    "llr",
    "llr_forward",
    "llr_reverse",
    "jsd",
    "embedding_distance",
    "memory_change",
    "status",
]
INFO = {
    "GENGRAM_LLR": "llr",
    "GENGRAM_LLR_FWD": "llr_forward",
    "GENGRAM_LLR_REV": "llr_reverse",
    "GENGRAM_JSD": "jsd",
    "GENGRAM_EMBEDDING_DISTANCE": "embedding_distance",
    "GENGRAM_MEMORY_CHANGE": "memory_change",
    "GENGRAM_STATUS": "status",
}
HEADER = """##fileformat=VCFv4.2
##FILTER=<ID=q10,Description="Quality below 10">
##contig=<ID=chr1,length=600,note="a, b">
##contig=<ID=chr2,length=40>
##contig=<ID=1>
##contig=<ID=chr9>
##INFO=<ID=AC,Number=A,Type=Integer,Description="Alleles; all of them">
##INFO=<ID=DB,Number=0,Type=Flag,Description="Known">
##INFO=<ID=END,Number=1,Type=Integer,Description="End">
##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">
##FORMAT=<ID=DP,Number=1,Type=Integer,Description="Depth">
##source=a test
#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tone\ttwo
"""


@pytest.fixture(scope="module")
def genome(tmp_path_factory) -> Path:
    """A genome of two contigs; N at chr1:300-303."""
    sequence = random_sequence(600, seed=8).replace("N", "A")
    sequence = sequence[:299] + "NNNN" + sequence[303:]
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text(f">chr1\n{sequence}\n>chr2\n{random_sequence(40, seed=9).replace('N', 'C')}\n")
    return path


def sequences(genome: Path) -> dict[str, str]:
    lines = genome.read_text().split()
    return {lines[0][1:]: lines[1], lines[2][1:]: lines[3]}


@pytest.fixture(scope="module")
def records(genome) -> list[tuple[str, list[str]]]:
    """Lines of VCF of all kinds, and the status that each allele must have."""
    generator, found = random.Random(8), []
    contigs = sequences(genome)

    def add(contig, start, reference, alternatives, statuses, extra="."):
        name = f"rs{len(found)};x" if len(found) % 3 else "."
        counts = ",".join("1" for _ in alternatives)
        information = ";".join(part for part in (f"AC={counts}" if alternatives else "", "DB", extra) if part != ".")
        cells = (contig, start + 1, name, reference, ",".join(alternatives) or ".", "12.50", "q10", information)
        sample = "GT:DP\t0|1:07\t./." if len(found) % 2 else "GT\t0/0\t1|0"
        found.append(("\t".join([*map(str, cells), sample]), statuses))

    for contig, sequence in contigs.items():
        for _ in range(12):
            start, reference, alternative = random_variant(sequence, generator)
            add(contig, start, reference, [alternative], ["scored"])
    one = contigs["chr1"].upper()
    add("chr1", 50, one[50], [base for base in "ACGT" if base != one[50]], ["scored"] * 3)
    add("chr1", 60, one[60:62], ["*", "<DEL>", one[60] + "TT"], ["spanning_deletion", "symbolic_allele", "scored"])
    add("chr1", 70, one[70], [], [])
    add("chr1", 80, one[80], [f"{one[80]}]chr2:5]"], ["breakend"])
    add("1", 90, one[90].lower(), ["ACGT" if one[90] != "A" else "CCC"], ["scored"])
    add("chr1", 299, "N", ["A"], ["n_at_site"])
    add("chr1", 304, one[304], ["A" if one[304] != "A" else "C"], ["scored"])
    add("chr1", 100, "A" if one[100] != "A" else "C", ["G"], ["ref_mismatch"])
    add("chr1", 700, "A", ["G"], ["beyond_contig"])
    add("chr9", 7, "A", ["G"], ["no_such_contig"])
    add("chr1", 110, one[110], ["R", "<NON_REF>"], ["not_acgtn", "symbolic_allele"], "END=115")
    generator.shuffle(found)
    return found


@pytest.fixture(scope="module")
def vcf(records, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("variants") / "variants.vcf"
    path.write_text(HEADER + "".join(f"{line}\n" for line, _ in records))
    return path


def score(*words) -> int:
    return main(["score", *map(str, words), "--quiet"])


def run(folder: Path, variants: Path, genome: Path, output: str, *words) -> Path:
    """Score into a new folder, and say where the output is."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / output
    model = [] if "--model" in words else ["--model", run.model]
    assert score(variants, "--fasta", genome, "--output", place, "--context", 40, *model, *words) == 0
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return place


@pytest.fixture(autouse=True)
def tiny(tiny_folder):  # noqa: F811
    run.model = tiny_folder


def lines_of(path: Path) -> tuple[list[str], list[str]]:
    """Lines of the header and of the records."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        lines = file.read().split("\n")
    assert lines.pop() == ""
    return [line for line in lines if line.startswith("#")], [line for line in lines if not line.startswith("#")]


def table_of(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(path, sep="\t", keep_default_na=False, na_values={name: [""] for name in COLUMNS[4:10]})


# ---- VCF


@pytest.mark.parametrize("output", ["out.vcf", "out.vcf.gz"])
def test_vcf_keeps_everything_and_gains_info(tmp_path, vcf, genome, records, output):
    place = run(tmp_path, vcf, genome, output)
    header, lines = lines_of(place)
    before = HEADER.rstrip("\n").split("\n")
    assert [line for line in header if "GENGRAM" not in line and "gengram_score" not in line] == before
    added = header[len(before) - 1 : -1]
    assert [re.match("##INFO=<ID=(.*),Number=A,Type=(.*),D", line).groups() for line in added[:-1]] == [
        (key, "String" if key == "GENGRAM_STATUS" else "Float") for key in INFO
    ]
    record = json.loads(added[-1].removeprefix("##gengram_score="))
    assert record["settings"]["context"] == 40 and record["inputs"]["variants"]["sha256"]
    for line, (original, statuses) in zip(lines, records, strict=True):
        cells, kept = line.split("\t"), original.split("\t")
        ours = [entry for entry in cells[7].split(";") if entry.startswith("GENGRAM_")]
        cells[7] = ";".join(entry for entry in cells[7].split(";") if entry not in ours)
        assert cells == kept
        values = {key: entry.split(",") for key, entry in (entry.split("=") for entry in ours)}
        assert values.pop("GENGRAM_STATUS", []) == statuses
        if "scored" not in statuses:
            assert not values
            continue
        assert {"GENGRAM_LLR", "GENGRAM_LLR_FWD", "GENGRAM_LLR_REV"} <= set(values) <= set(INFO)
        for numbers in values.values():
            assert len(numbers) == len(statuses)
            for number, status in zip(numbers, statuses, strict=True):
                assert status == "scored" or number == "."
        assert all(
            (number != ".") == (status == "scored")
            for number, status in zip(values["GENGRAM_LLR"], statuses, strict=True)
        )


def test_vcf_is_valid_for_the_tools_of_the_field(tmp_path, vcf, genome, records, capfd):
    place = run(tmp_path, vcf, genome, "out.vcf")
    ordered = tmp_path / "sorted.vcf"
    pysam.bcftools.sort("-o", str(ordered), str(vcf), catch_stdout=False)
    compressed = run(tmp_path, ordered, genome, "out.vcf.gz")
    capfd.readouterr()
    pysam.bcftools.view("-Ob", "-o", str(tmp_path / "out.bcf"), str(place), catch_stdout=False)
    assert "GENGRAM" not in capfd.readouterr().err  # no complaint about ours
    with pysam.VariantFile(str(tmp_path / "out.bcf")) as file:
        found = [tuple(r.info.get("GENGRAM_STATUS", ())) for r in file]
    assert sorted(found) == sorted(tuple(statuses) for _, statuses in records)
    with pysam.VariantFile(str(compressed)) as file:
        assert {r.pos for r in file.fetch("chr1", 40, 65)} == {
            int(line.split("\t")[1])
            for line, _ in records
            if line.startswith("chr1\t") and 41 <= int(line.split("\t")[1]) <= 65
        }


def test_numbers_are_those_of_the_python_interface(tmp_path, vcf, genome):
    table = table_of(run(tmp_path, vcf, genome, "out.parquet"))
    model = AutoModelForCausalLM.from_pretrained(run.model)
    effects = WindowEffects(model, AutoTokenizer.from_pretrained(run.model), SCORES)
    variants = [variant for record in read_variants(vcf) for variant in record.variants()]
    with open_genome(genome) as opened:
        found = list(variant_effects(effects, opened, variants, 40))
    rows = table[table.status != "no_alt"].to_dict("records")
    for row, effect in zip(rows, found, strict=True):
        assert (row["chrom"], row["pos"] - 1, row["ref"], row["alt"]) == effect.variant
        assert row["status"] == effect.status
        if effect.effects is None:
            assert all(math.isnan(row[name]) for name in COLUMNS[4:10])
            continue
        assert row["llr_forward"] == pytest.approx(effect.effects.forward.llr, abs=SAME_FP32)
        assert row["llr_reverse"] == pytest.approx(effect.effects.reverse.llr, abs=SAME_FP32)
        for name in ("llr", "jsd", "embedding_distance", "memory_change"):
            assert row[name] == pytest.approx(effect.effects.mean(name), abs=SAME_FP32, nan_ok=True)


def test_tables_and_vcf_say_the_same(tmp_path, vcf, genome, records):
    parquet = table_of(run(tmp_path, vcf, genome, "out.parquet"))
    tsv = table_of(run(tmp_path, vcf, genome, "out.tsv"))
    assert list(parquet.columns) == list(tsv.columns) == COLUMNS
    assert (tmp_path / "out.tsv").read_text().split("\n")[0] == "\t".join(COLUMNS)
    pd.testing.assert_frame_equal(parquet, tsv)
    assert parquet.status.tolist() == [status for _, statuses in records for status in statuses or ["no_alt"]]
    assert b"gengram" in pq.read_schema(tmp_path / "out.parquet").metadata
    assert json.loads((tmp_path / "out.tsv.json").read_text())["job"] == "score"
    rows = iter(parquet.to_dict("records"))
    for record in read_variants(run(tmp_path, vcf, genome, "out.vcf")):
        entries = dict(entry.split("=") for entry in record.line.split("\t")[7].split(";") if "=" in entry)
        for place in range(max(1, len(record.alternatives))):
            row = next(rows)
            assert row["chrom"] == record.contig and row["pos"] == record.start + 1
            for key, name in INFO.items():
                value = entries[key].split(",")[place] if key in entries else "."
                if name == "status":
                    assert value == row[name] or row[name] == "no_alt"
                elif value == ".":
                    assert math.isnan(row[name])
                else:
                    assert float(value) == pytest.approx(row[name], rel=SAME_FP32)


def test_variants_may_come_as_bcf_or_as_a_table(tmp_path, vcf, genome):
    plain = tmp_path / "plain.vcf"
    header, lines = lines_of(vcf)
    kept = [line for line in lines if line.startswith(("chr1", "chr2")) and line.split("\t")[4] != "."]
    plain.write_text("\n".join([*header, *kept, ""]))
    expected = table_of(run(tmp_path, plain, genome, "vcf.parquet"))
    pysam.bcftools.view("-Ob", "-o", str(tmp_path / "a.bcf"), str(plain), catch_stdout=False)
    pysam.tabix_compress(str(plain), str(tmp_path / "a.vcf.gz"))
    expected[["alt", "ref", "pos", "chrom"]].to_csv(tmp_path / "a.csv", index=False)
    expected[COLUMNS[:4]].to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    expected[COLUMNS[:4]].to_parquet(tmp_path / "a.parquet")
    for name in ("a.bcf", "a.vcf.gz", "a.csv", "a.tsv", "a.parquet"):
        found = table_of(run(tmp_path, tmp_path / name, genome, f"{name}.out.parquet"))
        pd.testing.assert_frame_equal(found, expected)
    _, from_table = lines_of(run(tmp_path, tmp_path / "a.tsv", genome, "table.vcf"))
    assert [line.split("\t")[:5] for line in from_table] == [
        [row.chrom, str(row.pos), ".", row.ref, row.alt] for row in expected.itertuples()
    ]
    with pysam.VariantFile(str(tmp_path / "table.vcf")) as file:
        assert [record.info["GENGRAM_STATUS"][0] for record in file] == expected.status.tolist()


def test_scores_of_before_are_replaced(tmp_path, vcf, genome):
    first = run(tmp_path, vcf, genome, "first.vcf")
    second = run(tmp_path, first, genome, "second.vcf")
    assert lines_of(second)[1] == lines_of(first)[1]
    assert [line for line in lines_of(second)[0] if "gengram_score" not in line] == [
        line for line in lines_of(first)[0] if "gengram_score" not in line
    ]


# ---- options


def test_only_what_is_asked_for(tmp_path, vcf, genome):
    table = table_of(run(tmp_path, vcf, genome, "out.parquet", "--scores", "llr,jsd"))
    assert (
        list(table.columns) == COLUMNS and table.embedding_distance.isna().all() and table.memory_change.isna().all()
    )
    header, lines = lines_of(run(tmp_path, vcf, genome, "out.vcf", "--scores", "llr"))
    assert "GENGRAM_LLR_FWD=" in lines[0] + lines[1] and not any("GENGRAM_JSD=" in line for line in lines)
    assert any("ID=GENGRAM_LLR," in line for line in header)
    for strand, other in (("forward", "reverse"), ("reverse", "forward")):
        one = table_of(run(tmp_path, vcf, genome, f"{strand}.parquet", "--strands", strand))
        assert one[f"llr_{other}"].isna().all()
        pd.testing.assert_series_equal(one.llr, one[f"llr_{strand}"], check_names=False)
        pd.testing.assert_series_equal(one[f"llr_{strand}"], table[f"llr_{strand}"], atol=LOG_LIKELIHOOD_FP32)


def test_parts_joined_are_the_whole(tmp_path, vcf, genome, monkeypatch):
    monkeypatch.setattr("gengram.inference.jobs.score._ALLELES_PER_CHUNK", 5)
    whole = lines_of(run(tmp_path, vcf, genome, "whole.vcf"))[1]
    parts = [lines_of(run(tmp_path, vcf, genome, f"{i}.vcf", "--shard", f"{i}/3"))[1] for i in (1, 2, 3)]
    assert [line for part in parts for line in part] == whole and all(parts)


def test_regions_that_together_are_everything_give_everything(tmp_path, vcf, genome, records, capsys):
    def scored(folder, name, *words):  # without digits, which depend on what is in a batch
        lines = lines_of(run(folder, vcf, genome, name, *words))[1]
        return [re.sub(r"=-?[0-9.]+(e-?[0-9]+)?(?=[;,\t])", "=", line) for line in lines]

    whole = scored(tmp_path / "whole", "all.vcf")
    (tmp_path / "rest.bed").write_text("chr1\t70\t80\nchr1\t80\t595\n2\t0\t40\n")
    regions = [["1:1-50", "chr1:51-70"], [tmp_path / "rest.bed"]]
    parts = [scored(tmp_path, f"{number}.vcf", "--regions", *each) for number, each in enumerate(regions)]
    starts = {line: (line.split("\t")[0].removeprefix("chr"), int(line.split("\t")[1]) - 1) for line in whole}
    assert parts[0] == [line for line in whole if starts[line] < ("1", 70) and starts[line][0] == "1"]
    outside = [line for line in whole if line not in parts[0] + parts[1]]
    assert sorted(starts[line] for line in outside) == [("1", 700), ("9", 7)]
    assert sorted(parts[0] + parts[1] + outside) == sorted(whole)

    command = ["score", vcf, "--fasta", genome, "--model", run.model, "--context", 40]
    assert main([*map(str, command), "-o", str(tmp_path / "none.tsv"), "--regions", "chr2:40-40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["alleles"] + found["records_left_out"] >= len(records)
    assert found["record"]["settings"]["regions"] == ["chr2:40-40"]


@pytest.mark.parametrize("words", [[], ["--shard", "1/2"]])
def test_records_outside_the_regions_are_counted_to_the_end_of_the_file(tmp_path, genome, capsys, monkeypatch, words):
    monkeypatch.setattr("gengram.inference.jobs.score._ALLELES_PER_CHUNK", 5)
    sequence = sequences(genome)["chr1"]
    places = [*range(10, 20), *range(100, 130)]  # of which the first 10 lie in the region
    rows = [("chr1", place + 1, sequence[place], "N") for place in places]
    pd.DataFrame(rows, columns=COLUMNS[:4]).to_csv(tmp_path / "a.csv", index=False)
    command = ["score", tmp_path / "a.csv", "--fasta", genome, "--model", run.model, "--context", 40, "--json"]
    command += ["--regions", "chr1:1-50", "--output", tmp_path / "out.tsv", *words]
    assert main([*map(str, command)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["alleles"], found["records_left_out"]) == (5 if words else 10, 30)


@pytest.mark.parametrize(
    "region, said", [("chr3:1-5", "no record 'chr3'"), ("chr2:1-50", "its end is 50"), ("none.bed", "none.bed")]
)
def test_regions_that_are_not_there(tmp_path, vcf, genome, capsys, region, said):
    words = [vcf, "--fasta", genome, "--model", run.model, "--output", tmp_path / "out.tsv", "--regions", region]
    assert said in refused(capsys, *words)


def test_a_summary_counts_what_was_not_scored(tmp_path, vcf, genome, records, capsys):
    words = [vcf, "--fasta", genome, "--context", 40, "--model", run.model]
    assert main(["score", *map(str, words), "--output", str(tmp_path / "a.tsv")]) == 0
    statuses = [status for _, found in records for status in found or ["no_alt"]]
    out = capsys.readouterr().out
    assert f"scored {statuses.count('scored')} of {len(statuses)} alternative alleles" in out
    assert re.search("2 symbolic_allele: a symbolic allele, such as <DEL>", out)
    assert main(["score", *map(str, words), "--output", str(tmp_path / "b.tsv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["alleles"] == len(statuses) and found["scored"] == statuses.count("scored")
    assert found["not_scored"] == {s: statuses.count(s) for s in set(statuses) - {"scored"}}
    assert found["output"] == str(tmp_path / "b.tsv")


def test_a_masked_model(tmp_path, vcf, genome, records):
    folder = tmp_path / "masked"
    tiny_model(GengramForMaskedLM).save_pretrained(folder)
    GengramTokenizer().save_pretrained(folder)
    table = table_of(run(tmp_path, vcf, genome, "out.parquet", "--model", folder))
    is_indel = (table.ref.str.len() != table.alt.str.len()) & table.status.isin(["scored", "needs_causal_model"])
    assert (table.status[is_indel] == "needs_causal_model").all() and (table.status == "scored").sum() > 5
    scored = table[table.status == "scored"]
    assert scored.llr.notna().all() and scored.embedding_distance.notna().all() and scored.jsd.isna().all()


# ---- plain answers


def refused(capsys, *words) -> str:
    """The one line that is said instead of scoring."""
    assert score(*words) == 1
    captured = capsys.readouterr()
    (said,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == "" and "Traceback" not in captured.err
    return said


def test_another_assembly_is_noticed_before_the_model_is_loaded(tmp_path, genome, capsys, monkeypatch):
    sequence = sequences(genome)["chr1"].upper()
    path = tmp_path / "shifted.tsv"
    rows = [("chr1", place + 2, sequence[place], "N") for place in range(5, 100)]
    pd.DataFrame(rows, columns=COLUMNS[:4]).to_csv(path, sep="\t", index=False)
    monkeypatch.setattr("gengram.inference.jobs.score.ScoreWorker", None)
    said = refused(capsys, path, "--fasta", genome, "--output", tmp_path / "out.tsv")
    assert "another assembly, or are the positions counted from 0" in said
    assert not (tmp_path / "out.tsv").exists() and not list(tmp_path.glob(".out*"))


def test_contigs_of_another_name_are_found_or_named(tmp_path, genome, capsys):
    sequence = sequences(genome)["chr1"]
    rows = [("1", 6, sequence[5], "N")] * 3
    pd.DataFrame(rows, columns=COLUMNS[:4]).to_csv(tmp_path / "a.csv", index=False)
    assert table_of(run(tmp_path, tmp_path / "a.csv", genome, "out.tsv")).status.tolist() == ["scored"] * 3
    pd.DataFrame([("scaffold7", 6, "A", "C")] * 3, columns=COLUMNS[:4]).to_csv(tmp_path / "b.csv", index=False)
    said = refused(capsys, tmp_path / "b.csv", "--fasta", genome, "--output", tmp_path / "b.tsv")
    assert "has no contig 'scaffold7'" in said and "chr1" in said


def test_files_without_variants(tmp_path, genome):
    (tmp_path / "a.vcf").write_text(HEADER)
    for output in ("a.out.vcf", "a.out.vcf.gz", "a.out.tsv", "a.out.parquet"):
        run(tmp_path, tmp_path / "a.vcf", genome, output)
    assert lines_of(tmp_path / "a.out.vcf.gz")[1] == []
    assert list(table_of(tmp_path / "a.out.tsv").columns) == COLUMNS and len(table_of(tmp_path / "a.out.parquet")) == 0
    with pysam.VariantFile(str(tmp_path / "a.out.vcf.gz")) as file:
        assert list(file) == []
    sequence = sequences(genome)["chr1"]
    (tmp_path / "b.vcf").write_text(HEADER + f"chr1\t6\t.\t{sequence[5]}\t.\t.\t.\t.\tGT\t0\t0\n")
    assert lines_of(run(tmp_path, tmp_path / "b.vcf", genome, "b.out.vcf"))[1] == lines_of(tmp_path / "b.vcf")[1]


def test_what_is_not_sorted_gets_no_index(tmp_path, vcf, genome, caplog):
    run(tmp_path, vcf, genome, "out.vcf.gz")
    assert not (tmp_path / "out.vcf.gz.tbi").exists()
    assert any("not sorted, so it gets no index" in record.message for record in caplog.records)


@pytest.mark.parametrize("name", ["out.vcf.gz.tbi", "out.vcf.gz.csi"])
def test_an_index_of_another_file_is_not_left_beside_the_output(tmp_path, vcf, genome, capsys, name):
    (tmp_path / name).write_text("of another file")
    said = refused(capsys, vcf, "--fasta", genome, "--model", run.model, "--output", tmp_path / "out.vcf.gz")
    assert f"{name} exists already" in said and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("allele", ["", "A,T", "-", "NA N", "<DEL", "A;T"])
def test_alleles_that_vcf_cannot_hold_are_refused_before_the_work(tmp_path, genome, capsys, allele):
    pd.DataFrame([("chr1", 6, "A", allele)], columns=COLUMNS[:4]).to_csv(tmp_path / "a.csv", index=False)
    said = refused(capsys, tmp_path / "a.csv", "--fasta", genome, "--output", tmp_path / "out.vcf")
    assert "a.csv, line 2: VCF cannot hold the allele" in said and ".tsv" in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--context", 1], "--context: expected 2 bases or more, got 1"),
        (["--context", 0], "--context: expected 2 bases or more, got 0"),
        (["--context", 49], "--context: expected at most 48 bases, which the model can read, got 49"),
        (["--scores", "llr,loss"], "--scores: expected some of llr, jsd, embedding, memory, got 'llr, loss'"),
        (["--output", "out.txt"], "--output: expected a name that ends in .vcf, .vcf.gz, .tsv, .parquet"),
        (["--output", "out.bcf"], "--output: expected a name that ends in"),
    ],
)
def test_options_that_make_no_sense(tmp_path, vcf, genome, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    given = [vcf, "--fasta", genome, "--model", run.model]
    if "--output" not in words:
        words = [*words, "--output", "out.tsv"]
    assert said in refused(capsys, *given, *words)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_damaged_line_is_named_before_the_work(tmp_path, vcf, genome, capsys, monkeypatch):
    path = tmp_path / "damaged.vcf"
    path.write_text(vcf.read_text() + "chr1\t5\n")
    monkeypatch.setattr("gengram.inference.jobs.score.ScoreWorker", None)
    said = refused(capsys, path, "--fasta", genome, "--output", tmp_path / "out.vcf")
    assert re.search(r"damaged\.vcf, line \d+: expected a record of 11 tab-separated columns", said)


@pytest.mark.parametrize("change", [lambda lines: lines[::-1], lambda lines: lines[:5]], ids=["reversed", "cut"])
@pytest.mark.parametrize("output", ["out.vcf", "out.tsv"])
def test_variants_that_change_before_they_are_written_are_not_written(
    tmp_path, vcf, genome, capsys, monkeypatch, output, change
):
    live = tmp_path / "live.vcf"
    live.write_text(vcf.read_text())

    def write(*arguments):
        header, lines = lines_of(vcf)
        live.write_text("".join(f"{line}\n" for line in [*header, *change(lines)]))
        return original(*arguments)

    original = ScoreJob.write
    monkeypatch.setattr(ScoreJob, "write", write)
    words = [live, "--fasta", genome, "--context", 40, "--model", run.model, "--output", tmp_path / output]
    assert "live.vcf has changed since this run began" in refused(capsys, *words)
    assert not (tmp_path / output).exists()


def test_gengram_mini_is_the_default_model(tmp_path, vcf, genome):
    assert score(vcf, "--fasta", genome, "--output", tmp_path / "out.parquet", "--context", 64) == 0
    record = json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"gengram"])
    assert record["model"]["model"] == gengram.DEFAULT_MODEL


# ---- real data, end to end


def in_background(folder: Path, *words) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "gengram", "score", *map(str, words), "--quiet"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@needs_data
def test_1000_genomes_end_to_end_killed_three_times(tmp_path):
    variants = DATA / "genome_human/raw/chr20_z.1000G_phase3.vcf.gz"
    words = [variants, "--fasta", DATA / "genome_human/raw/chr20_z.hs37d5.fa.gz", "--context", 32]
    words += ["--model", run.model, "--output", "out.vcf.gz"]
    assert in_background(tmp_path / "whole", *words).wait() == 0
    killed = tmp_path / "killed"
    for finished in (1, 30, 80):
        process = in_background(killed, *words)
        while len(list(killed.glob(".out.vcf.gz.chunks/*.arrow"))) < finished:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (killed / "out.vcf.gz").exists()
    assert in_background(killed, *words).wait() == 0
    for name in ("out.vcf.gz", "out.vcf.gz.tbi"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == ["out.vcf.gz", "out.vcf.gz.tbi"]

    before, after = lines_of(variants), lines_of(killed / "out.vcf.gz")
    assert [line for line in after[0] if not re.match("##(INFO=<ID=)?gengram", line, re.I)] == before[0]
    assert len(after[1]) == len(before[1]) == 28998
    for old, new in zip(before[1], after[1], strict=True):
        assert re.sub(";GENGRAM_[A-Z_]+=[^;\t]*", "", new) == old
    verbosity = pysam.set_verbosity(0)
    with pysam.VariantFile(str(killed / "out.vcf.gz")) as file:
        statuses = [status for record in file for status in record.info["GENGRAM_STATUS"]]
        assert len(list(file.fetch("z", 500_000, 510_000))) > 100
    pysam.set_verbosity(verbosity)
    assert set(statuses) <= {"scored", "symbolic_allele"} and statuses.count("scored") > 28_900


@pytest.mark.slow
@needs_data
def test_brca1_is_scored_as_in_the_benchmark(tmp_path):
    task = next(task for task in read_suite("variants").tasks if task.name.startswith("BRCA1"))
    rows = read_labelled_variants(task, DATA)
    assert len(rows.variants) > 3_800
    rows = replace(rows, variants=rows.variants[::20])
    in_benchmark, left_out = zero_shot(EvaluatedModel(gengram.DEFAULT_MODEL, device="cpu"), task, rows, progress=False)
    table = pd.DataFrame([(each.contig, each.start + 1, each.reference, each.alternative) for each in rows.variants])
    table.to_csv(tmp_path / "brca1.csv", header=COLUMNS[:4], index=False)
    words = ["--fasta", DATA / task.fasta, "--context", 2 * task.flank + 1, "--scores", "llr"]
    assert score(tmp_path / "brca1.csv", *words, "--output", tmp_path / "out.parquet") == 0
    found = table_of(tmp_path / "out.parquet")
    assert not left_out and set(found["status"]) == {"scored"}
    assert found["llr"].to_numpy() == pytest.approx(-in_benchmark, abs=LOG_LIKELIHOOD_FP32)
