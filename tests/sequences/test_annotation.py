"""Exons, introns, labels and genes from GTF and GFF3: coordinates, strands, and what cannot be read."""

import gzip

import numpy as np
import pytest
from shared_files import DATA, needs_data

from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.annotation import Gene, Transcript, base_labels, read_genes, read_transcripts
from gengram.sequences.fasta import read_fasta


def line(start, end, strand="+", transcript="T1", record="r", feature="exon") -> str:
    return (
        f'{record}\tme\t{feature}\t{start}\t{end}\t.\t{strand}\t.\tgene_id "G"; transcript_id "{transcript}"; x "y";\n'
    )


@pytest.fixture
def read(tmp_path):
    def read_text(text: str) -> list[Transcript]:
        (tmp_path / "genes.gtf").write_text(text)
        return read_transcripts(tmp_path / "genes.gtf")

    return read_text


def test_coordinates_and_sites_of_both_strands(read):
    """GTF counts from 1 and includes the end: exons 3..5 and 9..10 are 2:5 and 8:10, the intron is 5:8."""
    text = "#!genome-build x\n\n" + line(3, 5) + line(9, 10) + line(9, 10, "-", "T2") + line(3, 5, "-", "T2")
    forward, reverse = read(text)
    assert forward == Transcript("r", "T1", "+", ((2, 5), (8, 10)))
    assert reverse == Transcript("r", "T2", "-", ((2, 5), (8, 10)))  # listed backwards, as Ensembl does
    assert forward.introns == reverse.introns == [(5, 8)]
    assert (forward.donors, forward.acceptors) == ([5], [7])
    assert (reverse.donors, reverse.acceptors) == ([7], [5])


def test_other_features_are_ignored_and_names_are_per_record_and_strand(read):
    text = (
        line(1, 90, feature="gene") + line(1, 2) + line(5, 6, "-") + line(5, 6, record="s") + line(3, 4, feature="CDS")
    )
    found = read(text)
    assert [(t.record, t.strand, t.exons) for t in found] == [
        ("r", "+", ((0, 2),)),
        ("r", "-", ((4, 6),)),
        ("s", "+", ((4, 6),)),
    ]


def test_exons_that_touch_or_overlap_are_one(read):
    (found,) = read(line(1, 3) + line(4, 6) + line(6, 8) + line(2, 2) + line(10, 11))
    assert found.exons == ((0, 8), (9, 11)) and found.introns == [(8, 9)]


def test_plain_and_compressed_are_the_same(tmp_path, read):
    with gzip.open(tmp_path / "genes.gtf.gz", "wt") as file:
        file.write(line(3, 5))
    assert read_transcripts(tmp_path / "genes.gtf.gz") == read(line(3, 5))


def test_attributes_in_any_order_and_without_quotes(read):
    cells = line(1, 2).split("\t")[:8]
    for attributes in (
        'transcript_id "A"',
        'ref_transcript_id "B"; transcript_id "A";',
        "gene_id G; transcript_id A;",
    ):
        assert [t.name for t in read("\t".join([*cells, attributes]) + "\n")] == ["A"]


@pytest.mark.parametrize(
    "text, message",
    [
        (line(0, 5), "line 1: expected 1 <= start <= end"),
        (line(1, 5) + line(6, 5), "line 2: expected 1 <= start <= end"),
        (line("x", 5), "expected 1 <= start <= end"),
        (line(1, 5, "."), "strand"),
        ("r\tme\texon\t1\t5\n", "9 tab-separated columns"),
        (line(1, 5).replace('transcript_id "T1"', 'transcript "T1"'), 'expected transcript_id "..."'),
        (line(1, 5).replace('gene_id "G"; transcript_id "T1"; x "y";', "ID=e1"), "expected Parent=..."),
        (line(1, 5, feature="gene"), "feature 'exon', got none"),
        ("# a comment\n", "feature 'exon', got none"),
        ("", "is empty, expected a GTF or GFF3 file"),
        (line("\u0663", 5), "expected 1 <= start <= end"),
        (line("9" * 5000, 5), r"line 1: expected 1 <= start <= end"),
        (line("1_0", 50), "expected 1 <= start <= end"),
        (line(1, 5) + "\0", r"not text \(NUL\)"),
    ],
)
def test_what_cannot_be_read_is_named(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_labels_of_bases(read):
    found = read(line(3, 5) + line(9, 10) + line(2, 3, "-", "T2") + line(12, 12, "-", "T2") + line(4, 6, "+", "T3"))
    assert "".join(map(str, base_labels(found, "+", 12, "exon"))) == "001111001100"
    assert "".join(map(str, base_labels(found, "-", 12, "exon"))) == "011000000001"
    assert "".join(map(str, base_labels(found, "+", 12, "splice"))) == "000001020000"
    assert "".join(map(str, base_labels(found, "-", 12, "splice"))) == "000200000010"
    assert base_labels(found, "+", 12, "exon").dtype == np.int8
    assert not base_labels([], "+", 12, "splice").any()
    with pytest.raises(ValueError, match="ends at base 12, but r has 11"):
        base_labels(found, "-", 11, "exon")
    with pytest.raises(ValueError, match="got 'gene'"):
        base_labels(found, "+", 12, "gene")


def test_a_transcript_to_the_last_base_and_an_intron_of_one_base(read):
    (found,) = read(line(1, 3) + line(5, 6))
    assert base_labels([found], "+", 6, "exon").tolist() == [1, 1, 1, 0, 1, 1]
    assert base_labels([found], "+", 6, "splice").tolist() == [0, 0, 0, 1, 0, 0]  # donor and acceptor at once


@needs_data
def test_introns_of_chromosome_9_are_gt_ag():
    """Known from elsewhere (../shared/data/README.md): 193 of the 195 different introns."""
    raw = DATA / "genome_human" / "raw"
    ((record, sequence),) = read_fasta(raw / "chr9_1-1000000.GRCh38.fa.gz")
    transcripts = read_transcripts(raw / "chr9_1-1000000.GRCh38.91.gtf.gz")
    assert {transcript.record for transcript in transcripts} == {record}
    introns = {(start, end, t.strand) for t in transcripts for start, end in t.introns}
    spelled = [sequence[start:end].upper() for start, end, strand in sorted(introns) if strand == "+"]
    spelled += [reverse_complement(sequence[start:end].upper()) for start, end, strand in introns if strand == "-"]
    assert len(spelled) == 195
    assert sum(text.startswith("GT") and text.endswith("AG") for text in spelled) == 193


GFF3 = """##gff-version 3
r	me	chromosome	1	100	.	.	.	ID=chromosome:r
r	me	exon	3	5	.	-	.	Parent=T1,T2;rank=2
r	me	CDS	4	5	.	-	0	ID=c;Parent=T1
r	me	gene	3	20	.	-	.	ID=G1;Name=ABC%3B1
r	me	mRNA	3	20	.	-	.	ID=T1;Parent=G1
r	me	mRNA	3	12	.	-	.	ID=T2;Parent=G1
r	me	exon	9	20	.	-	.	Parent=T1;rank=1
r	me	exon	11	12	.	-	.	Parent=T2;rank=1
r	me	gene	30	40	.	+	.	ID=G2
r	me	CDS	31	39	.	+	0	Parent=G2
r	me	pseudogene	60	70	.	+	.	ID=G3
s	me	gene	1	9	.	+	.	ID=G4
##FASTA
>r
ACGT
"""


def test_gff3_with_children_before_their_parents(tmp_path):
    path = tmp_path / "genes.gff3"
    path.write_text(GFF3)
    assert read_transcripts(path) == [
        Transcript("r", "T1", "-", ((2, 5), (8, 20))),
        Transcript("r", "T2", "-", ((2, 5), (10, 12))),
    ]
    assert read_genes(path, "r", 0, 100) == [
        Gene("r", "ABC;1", "-", 2, 20, ((2, 5), (8, 20)), ((3, 5),)),
        Gene("r", "G2", "+", 29, 40, ((30, 39),), ((30, 39),)),
        Gene("r", "G3", "+", 59, 70, ((59, 70),), ()),
    ]


def test_genes_of_a_region_touch_it_with_a_base(tmp_path):
    path = tmp_path / "genes.gff3"
    path.write_text(GFF3)
    names = {
        bounds: [gene.name for gene in read_genes(path, "r", *bounds)] for bounds in ((20, 29), (19, 29), (20, 30))
    }
    assert names == {(20, 29): [], (19, 29): ["ABC;1"], (20, 30): ["G2"]}


def test_genes_of_gtf_have_the_exons_of_all_transcripts(tmp_path, caplog):
    coding = line(4, 5, feature="CDS") + line(6, 6, feature="stop_codon")
    text = line(3, 6) + line(9, 10) + line(5, 8, transcript="T2") + coding + line(50, 60, "-").replace('"G"', '"H"')
    path = tmp_path / "genes.gtf"
    path.write_text(text.replace('gene_id "G";', 'gene_id "G"; gene_name "Name";'))
    first, second = read_genes(path, "chrr", 0, 100)  # with and without chr
    assert first == Gene("chrr", "Name", "+", 2, 10, ((2, 10),), ((3, 6),))
    assert (second.name, second.strand, second.exons, second.coding) == ("H", "-", ((49, 60),), ())
    assert [gene.name for gene in read_genes(path, "r", 20, 55)] == ["H"] and not caplog.records
    assert read_genes(path, "other", 0, 100) == []
    assert "has no line of other; its records are 'r'" in caplog.text


def test_lines_of_other_records_and_parents_in_a_circle_do_no_harm(tmp_path):
    path = tmp_path / "genes.gff3"
    path.write_text("s\tme\texon\tx\ty\t.\t+\t.\tParent=T\nr\tme\tmRNA\t1\t9\t.\t+\t.\tID=A;Parent=A\n")
    assert [gene.name for gene in read_genes(path, "r", 0, 100)] == ["A"]


@needs_data
def test_introns_of_arabidopsis_from_gff3_are_gt_ag():
    folder = DATA / "genome_1pct"
    sequences = dict(read_fasta(folder / "at.fa.gz"))
    transcripts = read_transcripts(folder / "at.gff3.gz")
    introns = {(t.record, start, end, t.strand) for t in transcripts for start, end in t.introns}
    spelled = [sequences[record][start:end].upper() for record, start, end, strand in introns if strand == "+"]
    assert len(spelled) > 500
    assert sum(text.startswith("GT") and text.endswith("AG") for text in spelled) > 0.95 * len(spelled)
