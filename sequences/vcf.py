"""The form of VCF text: its header, and what a record is (https://samtools.github.io/hts-specs/VCFv4.4.pdf).

Records are kept as lines, so that nothing of them changes when they are written again. What htslib refuses is refused.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..support.errors import InputError, quoted, shortened
from .text_lines import whole_number
from .variants import Variant

_COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")
_INTEGER = r"(?:[+-]?[0-9]+|\.)?"
_FLOAT = r"(?:[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?[iI][nN][fF]|[+-]?[nN][aA][nN]|\.)?"
_FIELDS = {"Integer": rf"{_INTEGER}(?:,{_INTEGER})*", "Float": rf"{_FLOAT}(?:,{_FLOAT})*", "Flag": r"\.?"}
_CALL = r"(?:[0-9]+|\.)"  # one allele of a genotype


class VariantRecord(NamedTuple):
    """One record of a file: a place, its reference allele, and any number of alternative ones.

    Args:
        contig: name of the sequence.
        start: 0-based, of the first base of `reference`.
        reference: as it is written.
        alternatives: as they are written; none if the record has no alternative allele.
        line: the record's line of VCF, without its end; "" of a table.
        where: file and line or record, for messages.
    """

    contig: str
    start: int
    reference: str
    alternatives: tuple[str, ...]
    line: str
    where: str

    def variants(self) -> list[Variant]:
        """Each alternative allele by itself."""
        return [Variant(self.contig, self.start, self.reference, allele) for allele in self.alternatives]


class VcfReader:
    """Makes records of the lines behind a header.

    Args:
        header: the header's lines, from `##fileformat` to `#CHROM`.
        name: the file, for messages.

    Raises:
        InputError: if this is no header of VCF.
    """

    def __init__(self, header: list[str], name: str):
        version = re.match(r"##fileformat=VCFv([34]\.[0-9]+)\s*$", header[0])
        if version is None:
            raise InputError(f"{name}, line 1: expected ##fileformat=VCFv4..., got {shortened(header[0])}.")
        where = f"{name}, line {len(header)}"
        columns = header[-1].split("\t")
        if tuple(columns[:8]) != _COLUMNS:
            raise InputError(
                f"{where}: expected the tab-separated names {' '.join(_COLUMNS)}, which end the header of VCF, got "
                f"{shortened(header[-1])}."
            )
        samples = columns[9:]
        if len(columns) > 8 and (columns[8] != "FORMAT" or len(set(samples)) != len(samples) or not all(samples)):
            raise InputError(
                f"{where}: expected FORMAT and the names of samples, all different, behind INFO, got "
                f"{quoted(columns[8:], limit=5)}."
            )
        self._columns = len(columns)
        lead = "[/|]?" if float(version[1]) >= 4.4 else ""
        self._fields = dict(_field_patterns(header)) | {"GT": rf"(?:{lead}{_CALL}(?:[/|]{_CALL})*)?"}
        self._patterns: dict[str, re.Pattern[str]] = {}

    def record(self, line: str, where: str) -> VariantRecord:
        """The record on a line.

        Raises:
            InputError: if its form is wrong; `where` stands in front of the message.
        """
        cells = line.split("\t")
        if len(cells) != self._columns:
            raise InputError(
                f"{where}: expected a record of {self._columns} tab-separated columns, as the header has, got "
                f"{len(cells) if line.strip() else 'a blank line'}."
            )
        for column, cell in zip(_COLUMNS, cells, strict=False):
            if not cell or (column != "INFO" and " " in cell):
                raise InputError(
                    f"{where}: expected no blank and no empty cell in {column.lstrip('#')}, got {shortened(cell)}."
                )
        contig, position, _, reference, alternatives, quality, _, _ = cells[:8]
        if contig.startswith("#"):
            raise InputError(f"{where}: expected a record, got another line of a header: {shortened(line)}.")
        start = whole_number(position)
        if start is None:
            raise InputError(f"{where}: expected a whole number as POS, got {shortened(position)}.")
        if not re.fullmatch(_FLOAT, quality):
            raise InputError(f"{where}: expected a number or a dot as QUAL, got {shortened(quality)}.")
        if len(cells) > 9:
            self._check_samples(cells[8], cells[9:], where)
        found = () if alternatives == "." else tuple(alternatives.split(","))
        return VariantRecord(contig, start - 1, reference, found, line, where)

    def _check_samples(self, names: str, samples: list[str], where: str) -> None:
        pattern = self._pattern(names, where)
        for sample in set(samples):
            if not pattern.fullmatch(sample):
                raise InputError(
                    f"{where}: expected samples of the fields {shortened(names)}, as the header defines them, got "
                    f"{shortened(sample)}."
                )

    def _pattern(self, names: str, where: str) -> re.Pattern[str]:
        """What the column of a sample may look like, by its FORMAT."""
        if names not in self._patterns:
            keys = names.split(":")
            if len(set(keys)) != len(keys) or not all(keys):
                raise InputError(f"{where}: expected different names of fields in FORMAT, got {shortened(names)}.")
            pattern = ""
            for key in reversed(keys):  # trailing fields may be left out
                field = self._fields.get(key, "[^:]*")
                pattern = field if key == keys[-1] else f"{field}(?::{pattern})?"
            self._patterns[names] = re.compile(f"(?=.){pattern}")
        return self._patterns[names]


def _field_patterns(header: Iterable[str]) -> Iterable[tuple[str, str]]:
    """The FORMAT fields of a header that are numbers, and what numbers look like."""
    for line in header:
        name, kind = (re.search(rf"^##FORMAT=<(?:.*,)?{key}=([^,>]+)", line) for key in ("ID", "Type"))
        if name and kind and kind[1] in _FIELDS:
            yield name[1], _FIELDS[kind[1]]
