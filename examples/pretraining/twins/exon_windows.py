"""Exons beside introns, as tables of labelled windows for `gengram bench`.

    python exon_windows.py --fasta regions.fa.gz --bed exon_intron.bed --test chr9 chr21 --output exons

For each exon of the BED file (column 4: `exon`), a window around its middle; and of the windows drawn in introns of
the same record, away from every exon, the one with the most similar share of G and C. Windows with letters other than
A, C, G and T are left out. Writes `train.csv` and `test.csv` with the columns `sequence` and `label` (1 for exons).
"""

import argparse
import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gengram.sequences.alphabet import BASES
from gengram.sequences.genome import Genome, open_genome
from gengram.sequences.intervals import Interval, read_bed
from gengram.support.whole_output import whole_folder

DRAWN = 20  # windows in introns for each exon


def window(genome: Genome, record: str, middle: int, length: int) -> str | None:
    """The window around a place; None if it leaves the record or holds other letters."""
    start = middle - length // 2
    if start < 0 or start + length > genome.contigs[record]:
        return None
    text = genome.fetch(record, start, start + length)
    return None if set(text) - set(BASES) else text


def share_of_gc(text: str) -> float:
    return (text.count("G") + text.count("C")) / len(text)


def windows_of_record(
    genome: Genome, record: str, intervals: Sequence[Interval], length: int, generator: np.random.Generator
) -> list[tuple[str, int]]:
    """Windows of exons, each followed by its partner from an intron."""
    exons = sorted({(part.start, part.end) for part in intervals if part.name == "exon"})
    introns = sorted({(part.start, part.end) for part in intervals if part.name == "intron"})
    near_exon = np.zeros(genome.contigs[record], dtype=bool)
    for start, end in exons:
        near_exon[max(0, start - length) : end + length] = True
    places = np.concatenate([np.arange(start, end) for start, end in introns] or [np.zeros(0, dtype=int)])
    places = np.unique(places[~near_exon[places]])
    rows: list[tuple[str, int]] = []
    for start, end in exons:
        own = window(genome, record, (start + end) // 2, length)
        if own is None or not len(places):
            continue
        drawn = [window(genome, record, int(place), length) for place in generator.choice(places, DRAWN)]
        others = [text for text in drawn if text is not None]
        if others:
            rows += [(own, 1), (min(others, key=lambda text: abs(share_of_gc(text) - share_of_gc(own))), 0)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="the records that the BED file is about")
    parser.add_argument("--bed", type=Path, required=True, help="exons and introns, so named in column 4")
    parser.add_argument(
        "--test", nargs="+", required=True, help="records of the test rows; all others are for training"
    )
    parser.add_argument("--length", type=int, default=300, help="bases of a window")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    genome, generator = open_genome(arguments.fasta), np.random.default_rng(0)
    by_record: dict[str, list[Interval]] = defaultdict(list)
    for interval in read_bed(arguments.bed, genome.contigs):
        by_record[interval.record].append(interval)
    unknown = set(arguments.test) - by_record.keys()
    if unknown:
        parser.error(f"--test: {sorted(unknown)} are not in {arguments.bed}, which has {sorted(by_record)}")
    tables: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for record, intervals in by_record.items():
        split = "test" if record in arguments.test else "train"
        tables[split] += windows_of_record(genome, record, intervals, arguments.length, generator)
    with whole_folder(arguments.output) as folder:
        for split, rows in tables.items():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([("sequence", "label"), *rows])
            (folder / f"{split}.csv").write_text(text.getvalue())
            print(f"{split}: {len(rows)} windows of {arguments.length} bases, half of them exons")


if __name__ == "__main__":
    main()
