"""What `gengram score` writes: a table with a row per alternative allele, or VCF with INFO fields."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...sequences.alphabet import IUPAC
from ...sequences.genome import Genome
from ...sequences.variant_files import VariantFile
from ...sequences.variants import SCORED
from ...sequences.vcf import VariantRecord
from ...sequences.vcf_output import header_with, indexes_of, line_with, write_vcf
from ...support.errors import InputError, shortened
from ..effects import NUMBERS, StrandEffects
from ..variant_effects import VariantEffect
from .record import record_json
from .tables import beside_table, write_table

OUTPUTS = (".vcf", ".vcf.gz", ".tsv", ".parquet")

_DIGITS = 7  # that mean something: the model computes in float32 at best
SCHEMA = pa.schema(
    [
        ("chrom", pa.string()),
        ("pos", pa.int64()),
        ("ref", pa.string()),
        ("alt", pa.string()),
        *((name, pa.float64()) for name in NUMBERS),
        ("status", pa.string()),
    ]
)
RESULTS = SCHEMA.append(pa.field("record", pa.int64()))  # and the number of the input's record

_PREFIX = "GENGRAM_"
_STATUS = "GENGRAM_STATUS"
_INFO = {
    "llr": ("GENGRAM_LLR", "log P(ALT) - log P(REF) of windows in nats, mean of strands; negative is less likely"),
    "llr_forward": ("GENGRAM_LLR_FWD", "The same on the forward strand"),
    "llr_reverse": ("GENGRAM_LLR_REV", "The same on the reverse strand"),
    "jsd": ("GENGRAM_JSD", "Jensen-Shannon divergence of next-base distributions behind the allele, summed, nats"),
    "embedding_distance": (
        "GENGRAM_EMBEDDING_DISTANCE",
        "Euclidean distance of embeddings at the allele and of the window",
    ),
    "memory_change": ("GENGRAM_MEMORY_CHANGE", "Norm of the change of what the memory adds, mean of its layers"),
}
_LETTERS = f"[{''.join(IUPAC)}]"
_ALLELE_OF_VCF = re.compile(rf"{_LETTERS}+|\*|<[^<>,;\s]+>|{_LETTERS}*[][][^][,;\s]+[][]{_LETTERS}*", re.IGNORECASE)


def score_table(effects: Iterable[tuple[int, VariantEffect]]) -> pa.Table:
    """Rows of `RESULTS`, one for each variant; empty where a number was not asked for or is not defined."""
    rows = [
        {
            "chrom": variant.contig,
            "pos": variant.start + 1,
            "ref": variant.reference,
            "alt": variant.alternative,
            "status": status,
            "record": record,
            **({} if found is None else _numbers(found)),
        }
        for record, (variant, status, found) in effects
    ]
    return pa.Table.from_pylist(rows, schema=RESULTS)


def _numbers(found: StrandEffects) -> dict[str, float | None]:
    numbers = found.numbers()
    return {name: None if number is None else float(f"{number:.{_DIGITS}g}") for name, number in numbers.items()}


def beside_scores(output: Path) -> list[Path]:
    """What `write_scores` may put beside its file: an index of VCF, or the record of a TSV."""
    return beside_table(output) if output.suffix in (".tsv", ".parquet") else indexes_of(output)


def write_scores(
    results: Iterable[pa.Table], output: Path, record: dict[str, Any], file: VariantFile, genome: Genome
) -> None:
    """Write rows of `RESULTS` in the format that the output's name says.

    Args:
        results: tables of consecutive records.
        output: ends in one of `OUTPUTS`.
        record: of the run.
        file: the input, whose records VCF repeats.
        genome: its contigs go into the header of VCF that is made of a table.
    """
    if output.suffix in (".tsv", ".parquet"):
        write_table((table.select(SCHEMA.names) for table in results), output, record, SCHEMA)
        return
    rows = itertools.chain.from_iterable(table.to_pylist() for table in results)
    header = file.header or _header_of_table(genome)
    additions = [f'##INFO=<ID={key},Number=A,Type=Float,Description="{words}">' for key, words in _INFO.values()]
    additions.append(
        f'##INFO=<ID={_STATUS},Number=A,Type=String,Description="{SCORED}, or the reason why the allele is not">'
    )
    additions.append(f"##gengram_score={record_json(record)}")
    write_vcf(output, itertools.chain(header_with(header, additions, "gengram_"), _lines(rows, file)))


def _header_of_table(genome: Genome) -> list[str]:
    contigs = [f"##contig=<ID={name},length={length}>" for name, length in genome.contigs.items()]
    return ["##fileformat=VCFv4.2", *contigs, "\t".join("#CHROM POS ID REF ALT QUAL FILTER INFO".split())]


def _lines(rows: Iterable[Mapping[str, Any]], file: VariantFile) -> Iterator[str]:
    """Lines of VCF: those records of the input that have rows, with what was found."""
    records = enumerate(file)
    for number, group in itertools.groupby(rows, key=lambda row: row["record"]):
        record = next(record for index, record in records if index == number)
        alleles = list(group)
        line = record.line or _line_of_row(record)
        yield line_with(line, _info(alleles) if record.alternatives else {}, _PREFIX)


def _info(alleles: list[Mapping[str, Any]]) -> dict[str, str]:
    """Values by their keys, one for each alternative allele; numbers that no allele has are left out."""
    found = {}
    for name, (key, _) in _INFO.items():
        numbers = [allele[name] for allele in alleles]
        if any(number is not None for number in numbers):
            found[key] = ",".join("." if number is None else f"{number:.6g}" for number in numbers)
    return found | {_STATUS: ",".join(allele["status"] for allele in alleles)}


def _line_of_row(record: VariantRecord) -> str:
    cells = (record.contig, str(record.start + 1), ".", record.reference, record.alternatives[0], ".", ".", ".")
    return "\t".join(cells)


def check_fits_vcf(record: VariantRecord) -> None:
    """Refuse a row of a table that VCF cannot hold.

    Raises:
        InputError: if so.
    """
    for allele in (record.reference, *record.alternatives):
        if not _ALLELE_OF_VCF.fullmatch(allele):
            raise InputError(
                f"{record.where}: VCF cannot hold the allele {shortened(allele)}; choose an output in .tsv "
                "or .parquet, where it is marked."
            )
    if re.search(r"\s", record.contig) or record.start < -1:
        raise InputError(f"{record.where}: VCF cannot hold the contig {shortened(record.contig)}.")
