"""Rows of variant tasks: those that cannot be scored are counted by the reason, and no number is made up for them."""

import json
import shutil

import pytest
from small_benches import FIELDS, GOOD, quick_results, run_suite, write_variants  # noqa: F401

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
    assert sum(after["left_out"].values()) == len(bad) and after["left_out"]["no label"] == 1
    assert f"- it: {len(bad)} of {40 + len(bad)} rows were left out: " in report and "no label (1)" in report


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
    assert code == 1 and "task 'it'" in error and "another assembly" in error


def test_a_vcf_for_a_table_is_said_so(tmp_path, capsys):
    write_variants(tmp_path, GOOD)
    (tmp_path / "variants.csv").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n1\t2\t.\tA\tC\n")
    code, error = run_suite(tmp_path, FIELDS, capsys)
    assert code == 1 and f"{tmp_path}/variants.csv: expected a CSV, TSV or Parquet file, got VCF" in error
