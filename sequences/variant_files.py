"""Variants in files: VCF, BCF and tables, as a stream of records in their order."""

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..support.decompression import refuse_cut_bgzip
from ..support.errors import InputError, shortened
from ..support.input_file import is_read_once, shown_name
from .htslib import quiet_pysam
from .tables import is_parquet, table_rows, text_rows
from .text_lines import read_lines, whole_number
from .vcf import VariantRecord, VcfReader

_TABLE_COLUMNS = ("chrom", "pos", "ref", "alt")


class VariantFile:
    """Records of an open file; loop over it once.

    Args:
        header: lines of the header of a VCF or BCF file, without their ends; empty of a table.
        records: the records.
    """

    def __init__(self, header: list[str], records: Iterator[VariantRecord]):
        self.header = header
        self._records = records

    @property
    def is_vcf(self) -> bool:
        """Whether records are lines of VCF."""
        return bool(self.header)

    def __iter__(self) -> Iterator[VariantRecord]:
        return self._records


def read_variants(path: str | Path) -> VariantFile:
    """The variants in a file, one record at a time, in bounded memory.

    VCF (plain, gzip or bgzip), BCF, Parquet, or text with the columns `chrom`, `pos` (counted from 1), `ref` and
    `alt`, separated by tabs or commas. What it is shows by its content. Neither an order nor an index is needed.

    Raises:
        InputError: if it is none of these, damaged, or a record cannot be read, then or while reading; the message
            names the file and the line.
        MissingExtraError: if it is BCF and pysam is not installed.
        OSError: if the file cannot be read.
    """
    if is_parquet(path):
        return VariantFile([], _records_of_rows(table_rows(path, _TABLE_COLUMNS)))
    if _is_bcf(path):
        return _read_bcf(Path(path))
    name = shown_name(path)
    lines = read_lines(path, "VCF, or a table with the columns chrom, pos, ref, alt,")
    first = next(lines, "")
    if first.startswith("##"):
        return _read_vcf(first, lines, name)
    if first.startswith("#CHROM\tPOS\tID\t"):
        raise InputError(f"{name}, line 1: expected VCF, which begins with ##fileformat=VCFv4..., got #CHROM.")
    return VariantFile([], _records_of_rows(text_rows(itertools.chain([first], lines), name, _TABLE_COLUMNS)))


def _records_of_rows(rows: Iterator[tuple[str, tuple[str, ...]]]) -> Iterator[VariantRecord]:
    for where, (contig, position, reference, alternative) in rows:
        start = whole_number(position)
        if start is None:
            raise InputError(f"{where}: expected a whole number in the column pos, got {shortened(position)}.")
        if not contig.strip():
            raise InputError(f"{where}: expected a name in the column chrom, got an empty cell.")
        yield VariantRecord(contig, start - 1, reference, (alternative,), "", where)


# ---- VCF and BCF


def _read_vcf(first: str, lines: Iterator[str], name: str) -> VariantFile:
    header = [first]
    for line in lines:
        header.append(line)
        if not line.startswith("##"):
            break
    reader = VcfReader(header, name)
    numbered = enumerate(lines, start=len(header) + 1)
    return VariantFile(header, (reader.record(line, f"{name}, line {number}") for number, line in numbered))


def _is_bcf(path: str | Path) -> bool:
    """Whether a file (that can be read twice) is BCF."""
    if is_read_once(path):
        return False
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    if start.startswith(b"\x1f\x8b"):
        try:
            start = zlib.decompressobj(wbits=31).decompress(start, 16)
        except zlib.error:
            return False
    return start.startswith(b"BCF\x02")


def _read_bcf(path: Path) -> VariantFile:
    name = shown_name(path)
    refuse_cut_bgzip(path, name)  # htslib only warns
    with quiet_pysam() as pysam:
        try:
            file = pysam.VariantFile(str(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: expected BCF, but its header cannot be read ({error}).") from None
    header = str(file.header).splitlines()
    return VariantFile(header, _records_of_bcf(file, VcfReader(header, name), name))


def _records_of_bcf(file: Any, reader: VcfReader, name: str) -> Iterator[VariantRecord]:
    number = 0
    with file:
        while True:
            number += 1
            where = f"{name}, record {number}"
            with quiet_pysam():
                try:
                    line = str(next(file))
                except StopIteration:
                    return
                except (OSError, ValueError) as error:
                    raise InputError(f"{where}: the file is damaged ({error}); copy or download it again.") from None
            yield reader.record(line.removesuffix("\n"), where)
