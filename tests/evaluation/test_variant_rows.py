"""Rows of variant tasks: those that cannot be scored are counted by the reason, and no number is made up for them."""

import json
import shutil

import numpy as np
import pytest
from small_benches import FIELDS, GOOD, quick_results, run_suite, write_variants  # noqa: F401

from gengram.cli import main
from gengram.evaluation.variants import VARIANTS
from gengram.sequences.variants import REASONS

pytestmark = pytest.mark.usefixtures("quick_results")


def test_rows_that_cannot_be_scored_are_counted_by_reason_and_move_nothing(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 0
    (before,) = json.loads((tmp_path / "results" / "results.json").read_text())
    alleles = ["*", ".", "-", "<DEL>", "<NON_REF>", "G]17:198982]", "", "X", "A;T"]
    bad = [(i + 41, "ACGT"[i % 4], allele, 1) for i, allele in enumerate(alleles)]
    bad += [(101, "A", "A", 1), (105, "A", "C", ""), (109, "", "C", 1), (900, "A", "C", 0), (0, "A", "C", 1)]
    write_variants(tmp_path, GOOD + bad)
    code, report = run_suite(tmp_path, FIELDS, capsys)
    (after,) = json.loads((tmp_path / "results" / "results.json").read_text())
    assert code == 0 and after["metrics"] == before["metrics"] and after["test_rows"] == 40
    assert sum(after["left_out"].values()) == len(bad) and after["left_out"]["the row has no label"] == 1
    assert (
        f"- it: {len(bad)} of {40 + len(bad)} rows were left out: " in report and "the row has no label (1)" in report
    )


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("x", "A", "C", 1)], "variants.csv, line 42: expected a whole number in the column 'pos', got 'x'"),
        ([("1.5", "A", "C", 1)], "line 42: expected a whole number in the column 'pos', got '1.5'"),
        ([("", "A", "C", 1)], "line 42: expected a whole number in the column 'pos', got ''"),
    ],
)
def test_positions_that_are_none_are_said_with_their_line(rows, message, tmp_path, capsys):
    write_variants(tmp_path, GOOD + rows)
    code, error = run_suite(tmp_path, FIELDS, capsys)
    assert code == 1 and message in error and "task 'it': " in error


def test_labels_that_are_not_there_are_said_with_those_that_are(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    code, error = run_suite(tmp_path, FIELDS + ", positive: LOF", capsys)
    assert (
        code == 1 and "with label = 'LOF' and others without, got 0 and 40; the column has '0' (27), '1' (13)" in error
    )
    code, error = run_suite(tmp_path, FIELDS + ", positive: 1, negative: benign", capsys)
    assert code == 1 and "got 13 and 0; the column has '0' (27), '1' (13)" in error


def test_labels_written_as_decimals_are_the_same_labels(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 0
    (expected,) = json.loads((tmp_path / "results" / "results.json").read_text())
    shutil.rmtree(tmp_path / "results")
    write_variants(tmp_path, [(f"{pos}.0", ref, alt.lower(), f"{label}.0") for pos, ref, alt, label in GOOD])
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 0
    (found,) = json.loads((tmp_path / "results" / "results.json").read_text())
    assert found["metrics"] == expected["metrics"] and found["test_rows"] == 40


def test_several_negative_labels_are_reported(tmp_path, capsys):
    write_variants(tmp_path, [(*row[:3], ["0", "1", "VUS"][i % 3]) for i, row in enumerate(GOOD)])
    code, report = run_suite(tmp_path, FIELDS, capsys)
    assert code == 0 and "- it: compared with the labels '0' (14), 'VUS' (13)." in report


def test_another_assembly_is_an_error_with_both_files(tmp_path, capsys):
    write_variants(tmp_path, [(pos + 1, *rest) for pos, *rest in GOOD])
    code, error = run_suite(tmp_path, FIELDS, capsys)
    assert code == 1 and f"task 'it': {tmp_path}/variants.csv: " in error and f"{tmp_path}/genome.fa has" in error
    assert "another assembly" in error and "first_base is 1" in error


def test_a_vcf_for_a_table_is_said_so(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    (tmp_path / "variants.csv").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n1\t2\t.\tA\tC\n")
    code, error = run_suite(tmp_path, FIELDS, capsys)
    assert code == 1 and f"{tmp_path}/variants.csv: expected a CSV, TSV or Parquet file, got VCF" in error


def test_variants_that_a_model_cannot_score_are_counted_and_not_ranked(tmp_path, tiny_folder, capsys):
    """A letter that is no nucleotide lies in their windows; the baseline, which reads none, ranks them."""
    write_variants(tmp_path, GOOD)
    (tmp_path / "genome.fa").write_text(">g\n" + "ACGT" * 10 + "X" + "ACGT" * 50 + "\n")
    fields = FIELDS.replace("[baseline", "[zero-shot, baseline") + ", flank: 8"
    (tmp_path / "suite.yaml").write_text(f"tasks: [{{name: it, {fields}}}]")
    options = ["--suite", tmp_path / "suite.yaml", "--data", tmp_path, "--output", tmp_path / "out", "--quiet"]
    assert main(["bench", str(tiny_folder), *map(str, options)]) == 0
    zero_shot, baseline = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (zero_shot["test_rows"], baseline["test_rows"], baseline["left_out"]) == (32, 40, {})
    assert zero_shot["left_out"] == {REASONS["foreign_letters"]: 8}
    assert f"- it, {tiny_folder.name}, zero-shot: 8 of 40 rows were left out" in capsys.readouterr().out


def test_likelihoods_that_are_not_finite_are_refused(tmp_path, monkeypatch, capsys):
    write_variants(tmp_path, GOOD)
    monkeypatch.setitem(VARIANTS, "baseline-transversion", lambda *arguments, **named: (np.full(40, np.inf), {}))
    code, error = run_suite(tmp_path, FIELDS, capsys)
    assert code == 1 and "task 'it', baseline-transversion, seed 0 (" in error and "expected finite" in error


def test_alleles_of_words_for_nothing_are_missing(tmp_path, capsys):
    """`NAN` and `NA` are letters of DNA, but stand for an empty cell."""
    write_variants(tmp_path, [*GOOD, (41, "A", "NAN", 1), (45, "NA", "A", 1), (49, "A", "nan", 0)])
    assert run_suite(tmp_path, FIELDS, capsys)[0] == 0
    (result,) = json.loads((tmp_path / "results" / "results.json").read_text())
    assert result["test_rows"] == 40 and result["left_out"] == {REASONS["missing_allele"]: 3}


def test_a_fasta_of_several_records_is_refused(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    (fasta,) = tmp_path.glob("*.fa*")
    fasta.write_text(fasta.read_text() + ">other\nACGT\n")
    code, error = run_suite(tmp_path, FIELDS, capsys)
    assert code == 1 and f"{fasta.name}: expected one record" in error and "task 'it': " in error
