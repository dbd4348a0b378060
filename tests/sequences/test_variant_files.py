import gzip
import io
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared_files import DATA, needs_data

from gengram.sequences.variant_files import read_variants
from gengram.support.errors import InputError

pysam = pytest.importorskip("pysam")
pytest.importorskip("pysam.bcftools")

HEADER = """##fileformat=VCFv4.2
##contig=<ID=1,length=1000>
##INFO=<ID=AC,Number=A,Type=Integer,Description="a, <b>">
##FORMAT=<ID=GT,Number=1,Type=String,Description="c">
##FORMAT=<ID=DP,Number=1,Type=Integer,Description="c">
##FORMAT=<ID=ZF,Number=1,Type=Float,Description="c">
"""
COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
RECORDS = [
    "1\t5\trs1;rs2\tA\tC,<DEL>\t12.5\tPASS\tAC=1,2;X",
    "7\t0\t.\ta\t.\t.\tq10;s50\t.",
    "1\t3\t.\tACG\tA,*\t1e3\t.\tAC=0,0;Y=a b",
]
FOUND = [
    ("1", 4, "A", ("C", "<DEL>")),
    ("7", -1, "a", ()),
    ("1", 2, "ACG", ("A", "*")),
]
SAMPLES = ["\tGT:DP:ZF\t0|1:3:.5\t./.", "\tGT\t0\t1|.", "\tDP\t1,2\t."]


def vcf(samples: bool = False, end: str = "\n") -> str:
    rows = [a + b for a, b in zip(RECORDS, SAMPLES, strict=True)] if samples else RECORDS
    columns = COLUMNS + ("\tFORMAT\tone\ttwo" if samples else "")
    return (HEADER + "\n".join([columns, *rows, ""])).replace("\n", end)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["vcf", "vcf.gz", "vcf.bgz", "txt"])
def test_records_of_vcf_keep_their_lines(tmp_path, samples, end, ending):
    text = vcf(samples, end)
    path = written(tmp_path / f"variants.{ending}", gzip.compress(text.encode()) if ending == "vcf.gz" else text)
    if ending == "vcf.bgz":
        pysam.tabix_compress(str(path), str(path) + "2")
        os.replace(str(path) + "2", path)
    file = read_variants(path)
    records = list(file)
    assert file.is_vcf and [record[:4] for record in records] == FOUND
    assert "\n".join([*file.header, *(record.line for record in records), ""]) == vcf(samples)
    assert [record.where for record in records] == [f"{path}, line {number}" for number in (8, 9, 10)]
    assert records[0].variants()[1] == ("1", 4, "A", "<DEL>")


def test_bcf(tmp_path):
    text = vcf(samples=True).replace(";X", "").replace(";Y=a b", "").replace("q10;s50", ".").replace("7\t0", "1\t0")
    with pysam.VariantFile(str(written(tmp_path / "a.vcf", text))) as file:
        expected = [(r.contig, r.pos - 1, r.ref, r.alts or ()) for r in file]
    pysam.bcftools.view("-Ob", "-o", str(tmp_path / "variants.bcf"), str(tmp_path / "a.vcf"), catch_stdout=False)
    found = read_variants(tmp_path / "variants.bcf")
    assert found.is_vcf and found.header[-1] == COLUMNS + "\tFORMAT\tone\ttwo"
    assert [record[:4] for record in found] == expected
    whole = (tmp_path / "variants.bcf").read_bytes()
    for size in (len(whole) // 2, len(whole) - 28, len(whole) - 30, 40):  # -28: all but the empty last block
        with pytest.raises(InputError, match=r"cut\.bcf"):
            list(read_variants(written(tmp_path / "cut.bcf", whole[:size])))


TABLE = pd.DataFrame(
    {
        "pos": [5, 1, 3],
        "note": ["x", "y", "z"],
        "ref": ["A", "a", "ACG"],
        "alt": ["C", "", "NAN"],
        "chrom": ["1", "chr7", "X"],
    }
)
OF_TABLE = [("1", 4, "A", ("C",)), ("chr7", 0, "a", ("",)), ("X", 2, "ACG", ("NAN",))]


@pytest.mark.parametrize("ending", ["tsv", "csv", "tsv.gz", "txt", "parquet"])
def test_tables(tmp_path, ending):
    path = tmp_path / f"variants.{ending}"
    if ending == "parquet":
        TABLE.to_parquet(path)
    else:
        TABLE.rename(columns={"chrom": "#CHROM"}).to_csv(path, sep="," if ending == "csv" else "\t", index=False)
    file = read_variants(path)
    assert not file.is_vcf and [record[:4] for record in file] == OF_TABLE


def test_parquet_with_missing_values_and_other_types(tmp_path):
    table = TABLE.assign(alt=["C", None, "T"], ref=pd.Categorical(TABLE.ref), pos=[5.0, 1.0, 3.0], chrom=[1, 2, 3])
    table.to_parquet(tmp_path / "a.parquet")
    found = [record[:4] for record in read_variants(tmp_path / "a.parquet")]
    assert found == [("1", 4, "A", ("C",)), ("2", 0, "a", ("",)), ("3", 2, "ACG", ("T",))]
    table.assign(pos=[5.0, np.nan, 3.5]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, row 2: expected a whole number in the column pos, got ''"):
        list(read_variants(tmp_path / "b.parquet"))


def test_quoted_cells_of_csv(tmp_path):
    path = written(tmp_path / "a.csv", 'chrom,pos,ref,alt,"a ""note"""\n"1",5,A,"C,T","x\ny"\n2,7,G,T,\n')
    assert [(*record[:4], record.where[-6:]) for record in read_variants(path)] == [
        ("1", 4, "A", ("C,T",), "line 3"),
        ("2", 6, "G", ("T",), "line 4"),
    ]


@pytest.mark.parametrize("content", [vcf(), TABLE.to_csv(index=False), TABLE.to_csv(index=False, sep="\t")])
def test_pipes_and_standard_input_are_read_once(content, monkeypatch):
    expected = FOUND if content.startswith("##") else OF_TABLE
    for name in ("/dev/fd/{}", "-"):
        read, write = os.pipe()
        os.write(write, content.encode())
        os.close(write)
        before = os.dup(0)
        os.dup2(read, 0)
        try:
            assert [record[:4] for record in read_variants(name.format(read))] == expected
        finally:
            os.dup2(before, 0)
            os.close(before)
            os.close(read)


def test_a_file_is_read_as_it_is_looped_over(tmp_path):
    path = written(tmp_path / "a.vcf", vcf() + "1\tx\t.\tA\tC\t.\t.\t.\n")
    records = iter(read_variants(path))
    assert [next(records)[1] for _ in range(3)] == [4, -1, 2]
    with pytest.raises(InputError, match=r"a\.vcf, line 11: expected a whole number as POS, got 'x'"):
        next(records)


def test_a_file_without_records(tmp_path):
    assert list(read_variants(written(tmp_path / "a.vcf", HEADER + COLUMNS + "\n"))) == []
    assert list(read_variants(written(tmp_path / "a.tsv", "chrom\tpos\tref\talt\n"))) == []
    TABLE[:0].to_parquet(tmp_path / "a.parquet")
    assert list(read_variants(tmp_path / "a.parquet")) == []


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty, expected a VCF, or a table with the columns chrom, pos, ref, alt"),
        ("version https://git-lfs.github.com/spec/v1\nsize 1\n", "Git LFS pointer"),
        ("a\tb\n1\t2\n", "line 1: expected the columns .*, each once, got 0 of 'chrom' among 'a', 'b'"),
        ("chrom,position,ref,alt\n", "got 0 of 'pos' among 'chrom', 'position', 'ref'"),
        ("chrom,pos,ref,alt,ALT\n", "got 2 of 'alt'"),
        ("chrom,pos,ref,alt\n1,5,A\n", "line 2: expected 4 cells, as the first line has, got 3 cells"),
        ("chrom,pos,ref,alt\n1,5,A,C\n\n", "line 3: expected 4 cells, as the first line has, got a blank line"),
        ("chrom\tpos\tref\talt\n1\t5\tA\tC\tG\n", "line 2: expected 4 cells, as the first line has, got 5 cells"),
        ("chrom\tpos\tref\talt\n1\t-5\tA\tC\n", "line 2: expected a whole number in the column pos, got '-5'"),
        ("chrom\tpos\tref\talt\n\t5\tA\tC\n", "line 2: expected a name in the column chrom"),
        ('chrom,pos,ref,alt\n1,5,A,"C\n', "line 2: expected cells separated by commas"),
        ("1\t5\t.\tA\tC\t.\t.\t.\n", "each once"),
        (COLUMNS + "\n1\t5\t.\tA\tC\t.\t.\t.\n", "begins with ##fileformat=VCFv4"),
        ("##fileformat=GFF3\n", "line 1: expected ##fileformat=VCFv4"),
        (HEADER, "line 6: expected the tab-separated names #CHROM POS"),
        (HEADER + COLUMNS.replace("\t", " ") + "\n", "line 7: expected the tab-separated names"),
        (HEADER + COLUMNS + "\tFORMAT\ta\ta\n", "line 7: expected FORMAT and the names of samples, all different"),
        (HEADER + COLUMNS + "\n1\t5\t.\tA\tC\t.\t.\n", "line 8: expected a record of 8 .* columns, .* got 7"),
        (HEADER + COLUMNS + "\n1\t5\t.\tA\tC\t.\t.\t.\n\n", "line 9: .* got a blank line"),
        (HEADER + COLUMNS + "\n1\t5\t.\tA\tC\tx\t.\t.\n", "line 8: expected a number or a dot as QUAL, got 'x'"),
        (HEADER + COLUMNS + "\n1\t5\t.\t\tC\t.\t.\t.\n", "line 8: expected no blank and no empty cell in REF"),
        (HEADER + COLUMNS + "\n" + "#" + COLUMNS[1:] + "\n", "another line of a header"),
        (
            HEADER + COLUMNS + "\tFORMAT\ta\n1\t5\t.\tA\tC\t.\t.\t.\tGT\tAC\n",
            "samples of the fields 'GT', .* got 'AC'",
        ),
        (HEADER + COLUMNS + "\tFORMAT\ta\n1\t5\t.\tA\tC\t.\t.\t.\tDP\tx\n", "samples of the fields 'DP', .* got 'x'"),
        (HEADER + COLUMNS + "\tFORMAT\ta\n1\t5\t.\tA\tC\t.\t.\t.\tGT:GT\t0\n", "different names of fields in FORMAT"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_and_line(tmp_path, content, words):
    path = written(tmp_path / "variants.vcf", content)
    with pytest.raises(InputError, match=words) as error:
        list(read_variants(path))
    assert str(path) in str(error.value)


def test_damaged_parquet(tmp_path):
    TABLE.to_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(InputError, match=r"b\.parquet: expected Parquet"):
        list(read_variants(written(tmp_path / "b.parquet", whole[:-20])))


@needs_data
def test_variants_of_1000_genomes_are_what_pysam_reads():
    path = DATA / "genome_human/raw/chr20_z.1000G_phase3.vcf.gz"
    verbosity = pysam.set_verbosity(0)
    with pysam.VariantFile(str(path)) as file:
        expected = [(r.contig, r.pos - 1, r.ref, r.alts or ()) for r in file]
    pysam.set_verbosity(verbosity)
    assert [record[:4] for record in read_variants(path)] == expected and len(expected) == 28998


# ---- oddities

_CELLS = {
    "contig": ["1", "chr2", "X", "<c>", "", "1 2", "#1"],
    "position": ["1", "5", "0", "007", "-1", "+4", "1.0", "1e3", "x", "", "99999999999", "9" * 30, "٣"],
    "name": [".", "rs1", "rs1;rs1", "", "a b"],
    "reference": ["A", "acgt", "N", "R", ".", "", "A1", "A C", "*"],
    "alternatives": ["C", "C,T", ".", "*", "<DEL>", "A]1:5]", "C,,T", "C,", "", "c", "<NON_REF>,T", "-", "NaN", ".,C"],
    "quality": [".", "1", "1e-3", "-5", "x", "", "inf", "1 "],
    "filters": [".", "PASS", "a;b", ""],
    "information": [".", "AC=1", "AC=x", "AC=1;;B", "=", "", "A b", "X=é"],
}
_FORMATS = ["GT", "GT:DP", "DP:GT", "ZF", "XX:GT", "GT:GT", "", ".", "GT:"]
_SAMPLES = ["0|1", "./.", ".", "0/1:3", "3:0|1", "0/1:x", "1.5", "", ":", "0|9", "x", "/0", "0/1:3:4", "nan", "0|"]


@st.composite
def vcf_texts(draw) -> str:
    """VCF of which most is right, and some things are not."""
    oddness = draw(st.integers(0, 6))

    def pick(choices):
        return choices[draw(st.integers(0, min(oddness, len(choices) - 1)))]

    samples = draw(st.integers(0, 2))
    columns = COLUMNS.split("\t") + (["FORMAT", "one", "two"][: samples + 1] if samples else [])
    lines = []
    for _ in range(draw(st.integers(0, 3))):
        cells = [draw(st.sampled_from(choices[: 1 + 2 * oddness])) for choices in _CELLS.values()]
        if samples:
            cells.append(draw(st.sampled_from(_FORMATS[: 1 + 2 * oddness])))
            cells += [draw(st.sampled_from(_SAMPLES[: 1 + 2 * oddness])) for _ in range(samples)]
        if oddness > 3 and draw(st.integers(0, 9)) == 0:
            cells = cells[: draw(st.integers(0, len(cells)))] + [""] * draw(st.integers(0, 1))
        lines.append("\t".join(cells))
    version = pick(["4.2", "4.3", "4.4", "4.5", "3.3", "4.1", "x"])
    text = HEADER.replace("4.2", version) + "\n".join(["\t".join(columns), *lines]) + pick(["\n", "", "\n", "\n\n"])
    text = text.replace("\n", draw(st.sampled_from(["\n", "\n", "\r\n"])))
    if oddness == 6:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["\t", "\n", "#", " ", "é", "\0", ">", "\r", ";"])) + text[at:]
    return text


@pytest.mark.slow
@settings(max_examples=3500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(vcf_texts())
def test_what_is_read_is_what_pysam_reads_and_what_it_refuses_is_refused(tmp_path_factory, text):
    check_against_pysam(tmp_path_factory.getbasetemp() / "odd.vcf", text)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(vcf_texts())
def test_oddities_of_vcf(tmp_path_factory, text):
    check_against_pysam(tmp_path_factory.getbasetemp() / "odd.vcf", text)


def check_against_pysam(path: Path, text: str) -> None:
    written(path, text)
    verbosity = pysam.set_verbosity(0)
    try:
        with pysam.VariantFile(str(path)) as file:
            expected = [(r.contig, r.pos - 1, r.ref, r.alts or ()) for r in file]
    except (OSError, ValueError):
        expected = None
    finally:
        pysam.set_verbosity(verbosity)
    try:
        file = read_variants(path)
        found = list(file)
    except InputError as error:
        assert re.match(re.escape(str(path)), str(error)) and "\n" not in str(error)
        return
    assert expected is not None, "pysam refuses it"
    assert [(r.contig, r.start, r.reference, tuple(a or "." for a in r.alternatives)) for r in found] == expected
    lines = io.StringIO(text.removeprefix("\ufeff"), newline=None).read().split("\n")
    assert [*file.header, *(record.line for record in found)] == [line for line in lines if line]
