import gzip
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_files import DATA, needs_data

from gengram.sequences.genome import genome_of, open_genome
from gengram.sequences.variants import ReferenceCheck, Variant
from gengram.support.errors import InputError

pysam = pytest.importorskip("pysam")

RECORDS = {"chr1": "ACGTNacgtryk" * 700, "chr2": "GGC", "empty": "", "chrM": "TTGACA" * 29}


def fasta_text(records: dict[str, str], width: int = 60, end: str = "\n") -> str:
    lines = []
    for name, sequence in records.items():
        lines += [f">{name} some words", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    return end.join([*lines, ""])


def written(path: Path, text: str) -> Path:
    """A file, plain or compressed by its ending."""
    plain = path.parent / "plain.fa"
    plain.write_bytes(text.encode())
    if path.name.endswith(".bgz"):
        pysam.tabix_compress(str(plain), str(path), force=True)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        os.replace(plain, path)
    return path


@pytest.mark.parametrize("name", ["genome.fa", "genome.fa.bgz", "genome.fa.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_part_of_a_genome_is_read(tmp_path, name, end):
    path = written(tmp_path / name, fasta_text(RECORDS, end=end))
    for _ in range(2):  # the second time with the index of the first
        with open_genome(path) as genome:
            assert genome.contigs == {contig: len(sequence) for contig, sequence in RECORDS.items()}
            generator = random.Random(0)
            for contig, sequence in RECORDS.items():
                assert genome.fetch(contig, 0, len(sequence)) == sequence.upper()
                for _ in range(50):
                    start, stop = sorted(generator.choices(range(len(sequence) + 1), k=2))
                    assert genome.fetch(contig, start, stop) == sequence[start:stop].upper()


def test_a_genome_larger_than_a_block_is_read_in_any_order(tmp_path):
    generator = random.Random(1)
    records = {name: "".join(generator.choices("ACGT", k=300_000)) for name in ("a", "b")}
    with open_genome(written(tmp_path / "genome.fa.bgz", fasta_text(records))) as genome:
        for _ in range(300):
            name, start, length = generator.choice("ab"), generator.randrange(300_000), generator.randrange(100_000)
            end = min(start + length, 300_000)
            assert genome.fetch(name, start, end) == records[name][start:end]


@needs_data
def test_ordinary_gzip_is_decompressed_once_and_said(tmp_path, caplog):
    path = DATA / "genome_human/raw/chr20_z.hs37d5.fa.gz"
    with open_genome(path) as genome, gzip.open(path, "rt") as file:
        sequence = "".join(line.strip() for line in file if not line.startswith(">")).upper()
        assert genome.contigs == {"z": 1_000_000} and genome.fetch("z", 0, 1_000_000) == sequence
    assert sum("decompressed into a temporary file" in record.message for record in caplog.records) == 1


def test_a_temporary_copy_goes_when_the_genome_is_closed(tmp_path, monkeypatch):
    path = written(tmp_path / "genome.fa.gz", fasta_text(RECORDS))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with open_genome(path) as genome:
        assert any(folder.iterdir()) and genome.fetch("chr2", 0, 3) == "GGC"
    assert not any(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"genome\.fa\.gz.*(ends in the middle)"):
        open_genome(path)
    assert not any(folder.iterdir())


# ---- names and places


@pytest.mark.parametrize(
    "asked, found",
    [("1", "chr1"), ("chr1", "chr1"), ("Chr2", "chr2"), ("M", "chrM"), ("MT", "chrM"), ("chrMT", "chrM")],
)
def test_contigs_are_found_with_and_without_chr(asked, found):
    assert genome_of(RECORDS).contig(asked) == found


def test_a_genome_without_chr_is_read_by_names_with_it_and_that_is_said_once(caplog):
    genome = genome_of({"1": "ACGT", "2": "GGCC", "MT": "TTA"})
    with caplog.at_level(logging.WARNING):
        assert [genome.fetch(name, 0, 3) for name in ("chr1", "chr2", "chrM", "chr1")] == ["ACG", "GGC", "TTA", "ACG"]
    assert [record.message for record in caplog.records] == [
        "Contigs of the genome have other names: chr1 is read as 1, and so on."
    ]


def test_rna_is_read_as_dna():
    genome = genome_of({"rna": "ACGUuRn"})
    assert genome.fetch("rna", 0, 7) == "ACGTTRN"
    variants = [Variant("rna", 3, "T", "A"), Variant("rna", 4, "t", "C"), Variant("rna", 5, "R", "A")]
    assert [ReferenceCheck(genome).status(each) for each in variants] == ["", "", "not_acgtn"]


def test_a_contig_that_is_not_there_is_an_error_with_its_neighbours():
    with pytest.raises(InputError, match=r"the genome has no contig 'chr3' \(nearest: 'chr[12M]'\); its contigs are"):
        genome_of(RECORDS).fetch("chr3", 0, 1)


@pytest.mark.parametrize("start, end", [(-1, 2), (0, 4), (3, 2), (4, 4)])
def test_a_part_beyond_the_contig_is_an_error(start, end):
    with pytest.raises(InputError, match="expected a part of 'chr2', which has 3 bases"):
        genome_of(RECORDS).fetch("chr2", start, end)


# ---- files that are something else


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"hello\n", "expected FASTA"),
        (b"@r1\nACGT\n+\nIIII\n", "expected FASTA"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3000000000\n", "Git LFS pointer"),
        (b">\nACGT\n", "a name after every '>'"),
        (b">a\nACGT\n>b\nGG\n>a\nTT\n", "two records are named 'a'"),
        (b">a\n>b\n>a\nTT\n", "two records are named 'a'"),
        (b">a\nTT\n>b\n", "its last record 'b' is empty"),
        (b">a\nAC\nACGT\n", "lines of record 'a' differ in length at line 3"),
        (b">a\nACGT\nAC\n\nACGT\n", "lines of record 'a' differ in length at line 5"),
        (b">a\nAC GT\nACGTA\n", "can be indexed"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\xff\xfe>\0a\0", "UTF-16"),
    ],
)
@pytest.mark.parametrize("ending", ["fa", "fa.bgz", "fa.gz"])
def test_what_is_no_genome_is_refused_by_name(tmp_path, content, words, ending):
    path = tmp_path / f"genome.{ending}"
    plain = tmp_path / "plain"
    plain.write_bytes(content)
    if ending == "fa":
        path.write_bytes(content)
    elif ending == "fa.gz":
        path.write_bytes(gzip.compress(content))
    else:
        pysam.tabix_compress(str(plain), str(path), force=True)
    if "LFS" in words and ending != "fa":
        words = "expected FASTA"
    if not content and ending != "fa":
        words = "holds nothing"
    with pytest.raises(InputError, match=words) as error:
        open_genome(path)
    assert str(path) in str(error.value)
    assert sorted(name.name for name in tmp_path.iterdir() if name.name.startswith(".")) == []


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        open_genome(tmp_path)
    with pytest.raises(OSError, match=r"none\.fa"):
        open_genome(tmp_path / "none.fa")


def test_a_pipe_is_read_once(tmp_path):
    read, write = os.pipe()
    os.write(write, fasta_text(RECORDS).encode())
    os.close(write)
    with open_genome(f"/dev/fd/{read}") as genome:
        assert genome.fetch("chr1", 0, 12) == "ACGTNACGTRYK"
    os.close(read)


def test_pysam_missing_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pysam", None)
    with pytest.raises(ImportError, match=r'^genomes and VCF are read by pysam: pip install "gengram\[genomics\]"$'):
        open_genome(written_plain(tmp_path))


def written_plain(folder: Path) -> Path:
    path = folder / "genome.fa"
    path.write_text(fasta_text(RECORDS))
    return path


# ---- the index


def test_an_index_is_left_beside_the_file_and_is_that_of_samtools(tmp_path):
    path = written_plain(tmp_path)
    open_genome(path).close()
    assert sorted(name.name for name in tmp_path.iterdir()) == ["genome.fa", "genome.fa.fai"]
    (tmp_path / "other").mkdir()
    other = shutil.copy(path, tmp_path / "other")
    pysam.faidx(other)
    assert Path(f"{path}.fai").read_text() == Path(f"{other}.fai").read_text()


def test_an_index_is_made_elsewhere_if_the_folder_cannot_be_written(tmp_path, monkeypatch):
    path = written_plain(tmp_path)
    real = os.replace

    def refuse(source, target):
        if Path(target).parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr("os.replace", refuse)
    with open_genome(path) as genome:
        assert genome.fetch("chr2", 0, 3) == "GGC"
    assert [name.name for name in tmp_path.iterdir()] == ["genome.fa"]


CHANGES = {
    "other letters before": lambda text: text.replace("some words", "words"),
    "another record": lambda text: text + ">new\nACGT\n",
    "a record less": lambda text: text.replace(text[text.index(">chr2") : text.index(">empty")], ""),
    "other lines": lambda text: fasta_text(RECORDS, width=50),
    "another name": lambda text: text.replace(">chr2", ">chr9"),
    "longer": lambda text: text.rstrip("\n") + "A\n",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ending", ["fa", "fa.bgz"])
@pytest.mark.parametrize("is_newer", [True, False])
def test_an_index_that_does_not_fit_is_never_used(tmp_path, change, ending, is_newer, caplog):
    path = written(tmp_path / f"genome.{ending}", fasta_text(RECORDS))
    open_genome(path).close()
    changed = CHANGES[change](fasta_text(RECORDS))
    written(path, changed)
    indexes = [name for name in tmp_path.iterdir() if name.suffix in (".fai", ".gzi")]
    for index in indexes:
        when = path.stat().st_mtime + (10 if is_newer else -10)
        os.utime(index, (when, when))
    with open_genome(path) as genome:
        expected = {}
        for record in changed.split(">")[1:]:
            head, *lines = record.split("\n")
            expected[head.split()[0]] = "".join(lines).upper()
        assert genome.contigs == {name: len(sequence) for name, sequence in expected.items()}
        for name, sequence in expected.items():
            assert genome.fetch(name, 0, len(sequence)) == sequence
    assert sum("a new index is made" in record.message for record in caplog.records) == 1


def test_a_damaged_block_is_an_error_that_names_the_file(tmp_path):
    generator = random.Random(2)
    path = written(tmp_path / "genome.fa.bgz", fasta_text({"a": "".join(generator.choices("ACGT", k=500_000))}))
    open_genome(path).close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with open_genome(path) as genome, pytest.raises(InputError, match=r"genome\.fa\.bgz is damaged"):
        for start in range(0, 500_000, 1000):
            genome.fetch("a", start, start + 1000)


def test_a_cut_off_bgzip_file_is_refused(tmp_path):
    path = written(tmp_path / "genome.fa.bgz", fasta_text({"a": "ACGT" * 100_000}))
    open_genome(path).close()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"genome\.fa\.bgz"):
        open_genome(path)


NAMES = st.lists(st.text("abcXYZ019._|-", min_size=1, max_size=6), min_size=1, max_size=5, unique=True)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, data=st.data())
def test_random_genomes_against_their_text(tmp_path_factory, names, data):
    folder = tmp_path_factory.mktemp("genome")
    records = {name: data.draw(st.text("ACGTNacgtn", max_size=40)) for name in names}
    records["last"] = "ACGT"
    text = fasta_text(records, data.draw(st.integers(1, 50)), data.draw(st.sampled_from(["\n", "\r\n"])))
    with open_genome(written(folder / f"g.{data.draw(st.sampled_from(['fa', 'fa.bgz', 'fa.gz']))}", text)) as genome:
        assert genome.contigs == {name: len(sequence) for name, sequence in records.items()}
        for name, sequence in records.items():
            assert genome.fetch(name, 0, len(sequence)) == sequence.upper()


def test_a_bgzip_file_cut_between_two_blocks_is_refused(tmp_path):
    path = written(tmp_path / "genome.fa.bgz", fasta_text({"a": "ACGT" * 50_000}))
    content = path.read_bytes()
    second = int.from_bytes(content[16:18], "little") + 1
    for end in (second, len(content) - 28):  # behind the first block; without the empty one at the end
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match=r"genome\.fa\.bgz: its last bgzip block is missing"):
            open_genome(path)
