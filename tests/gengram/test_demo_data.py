"""The example data: a real piece of human genome, its genes and its variants, which fit together."""

import gzip

import pytest
from shared_files import DATA, needs_data

import gengram
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.annotation import read_transcripts
from gengram.sequences.fasta import read_fasta

NAME, OFFSET, LENGTH = "chr21_25.7M", 25_700_000, 40_000
FASTA, GTF, VCF = (gengram.DEMO_DATA / f"region.{kind}.gz" for kind in ("fa", "gtf", "vcf"))


@pytest.fixture(scope="module")
def sequence():
    ((name, sequence),) = read_fasta(FASTA)
    assert name == NAME and len(sequence) == LENGTH and set(sequence) == set("ACGT")
    return sequence


def test_it_is_small():
    assert sum(path.stat().st_size for path in gengram.DEMO_DATA.glob("region.*")) < 60_000


@needs_data
def test_it_is_a_piece_of_chromosome_21_that_was_held_out_of_training(sequence):
    records = dict(read_fasta(DATA / "genome_human/human_regions.fa.gz"))
    first = 24_985_581  # of the held-out record, counted from 1
    assert records["chr21_24985581"][OFFSET + 1 - first :][:LENGTH] == sequence
    splits = gengram.DEMO_DATA.parents[1] / "examples/pretraining/splits.tsv"
    rule = next(line for line in splits.read_text().splitlines() if "chr21_24985581" in line)
    assert rule.split("\t")[1] == "test"


def test_its_genes_have_introns_from_gt_to_ag(sequence):
    introns = set()
    for transcript in read_transcripts(GTF):
        assert transcript.record == NAME and transcript.exons[-1][1] <= LENGTH
        for start, end in transcript.introns:
            intron = sequence[start:end]
            introns.add(intron if transcript.strand == "+" else reverse_complement(intron))
    assert len(introns) > 15 and all(intron.startswith("GT") and intron.endswith("AG") for intron in introns)
    names = {
        line.split('gene_name "')[1].split('"')[0]
        for line in gzip.decompress(GTF.read_bytes()).decode().split("\n")
        if line
    }
    assert names == {"JAM2", "ATP5J", "GABPA"}


def test_its_variants_have_the_reference_alleles_of_its_sequence(sequence):
    pysam = pytest.importorskip("pysam")
    with pysam.VariantFile(str(VCF)) as file:
        assert file.header.contigs[NAME].length == LENGTH
        records = list(file)
    assert len(records) == 92 and [record.start for record in records] == sorted(record.start for record in records)
    for record in records:
        assert sequence[record.start : record.stop] == record.ref and record.info["MA"] in record.alleles
    shapes = [(len(record.ref), len(alt)) for record in records for alt in record.alts]
    assert any(ref > alt for ref, alt in shapes) and any(ref < alt for ref, alt in shapes)
    assert any(len(record.alts) > 1 for record in records)


def test_its_index_is_there_and_right(sequence, tmp_path, caplog):
    pytest.importorskip("pysam")
    from gengram.sequences.genome import open_genome

    before = sorted(path.name for path in gengram.DEMO_DATA.iterdir())
    with open_genome(FASTA) as genome:
        assert genome.fetch(NAME, 39_000, LENGTH) == sequence[39_000:]
    assert sorted(path.name for path in gengram.DEMO_DATA.iterdir()) == before and not caplog.records
