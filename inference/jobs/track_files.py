"""Files of tracks: a number for each base that has one. Written as a stream, in the order of contigs and bases."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv

from ...support.errors import MissingExtraError

_PER_BLOCK = 1024  # values of a bigWig that are compressed together, as in UCSC's own files


class TrackWriter(Protocol):
    """Writes one track; use it in a `with` block."""

    suffix: ClassVar[str]

    def __init__(self, path: Path, contigs: Mapping[str, int]) -> None:
        """Open a new file for contigs of these lengths, sorted by name."""

    def __enter__(self) -> "TrackWriter": ...

    def __exit__(self, *error: object) -> None: ...

    def add(self, contig: str, start: int, values: np.ndarray) -> None:
        """Add values of consecutive bases, (length,) float32; nan for those that have none."""


class BigWigWriter:
    """bigWig, by pyBigWig, which keeps float32.

    pyBigWig 0.3.29 makes the overviews (zoom levels) of a file when it is closed, in about 3 bytes of memory per base
    and 12 more per base of the longest contig, up to 1.2 GB.
    """

    suffix: ClassVar[str] = "bw"

    def __init__(self, path: Path, contigs: Mapping[str, int]) -> None:
        self._file = _pybigwig().open(str(path), "w")
        self._file.addHeader(list(contigs.items()))

    def __enter__(self) -> "BigWigWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, contig: str, start: int, values: np.ndarray) -> None:
        for first, end in _runs(values):
            for begin in range(first, end, _PER_BLOCK):
                block = values[begin : min(begin + _PER_BLOCK, end)].tolist()
                self._file.addEntries(contig, start + begin, values=block, span=1, step=1)


class BedGraphWriter:
    """bedGraph, as text that gives the same float32 back: one line for each base."""

    suffix: ClassVar[str] = "bedgraph"
    _SCHEMA = pa.schema([("contig", pa.string()), ("start", pa.int64()), ("end", pa.int64()), ("value", pa.float32())])
    _OPTIONS = pa.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")

    def __init__(self, path: Path, contigs: Mapping[str, int]) -> None:
        self._file = path.open("wb")

    def __enter__(self) -> "BedGraphWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, contig: str, start: int, values: np.ndarray) -> None:
        starts = np.flatnonzero(~np.isnan(values)) + start
        numbers = pa.table([starts, starts + 1, values[starts - start]], names=["start", "end", "value"])
        lines = pa.BufferOutputStream()
        pa.csv.write_csv(numbers, lines, self._OPTIONS)
        name = f"{contig}\t".encode()  # written here, since Arrow refuses one with a quotation mark
        self._file.writelines(name + line for line in lines.getvalue().to_pybytes().splitlines(keepends=True))


FORMATS: dict[str, type[TrackWriter]] = {"bigwig": BigWigWriter, "bedgraph": BedGraphWriter}


def read_track(path: str | Path, contig: str, start: int, end: int) -> np.ndarray:
    """Values of the bases `start` to `end` of a contig, (length,) float32, nan for those that have none.

    Args:
        path: a file that was written here.
    """
    path, found = Path(path), np.full(end - start, np.nan, dtype=np.float32)
    if path.suffix == f".{BigWigWriter.suffix}":
        with _pybigwig().open(str(path)) as file:
            values = file.values(contig, start, end)  # none of a contig without any
        found[: len(values)] = values
        return found
    if not path.stat().st_size:
        return found
    names = BedGraphWriter._SCHEMA.names
    with pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(column_names=names),
        parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pa.csv.ConvertOptions(column_types=BedGraphWriter._SCHEMA),
    ) as lines:
        for batch in lines:
            place, value = batch["start"].to_numpy(), batch["value"].to_numpy()
            chosen = (batch["contig"].to_numpy(zero_copy_only=False) == contig) & (start <= place) & (place < end)
            found[place[chosen] - start] = value[chosen]
    return found


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each run of values that are not nan."""
    steps = np.flatnonzero(np.diff(np.concatenate([[False], ~np.isnan(values), [False]]).astype(np.int8)))
    yield from zip(steps[::2].tolist(), steps[1::2].tolist(), strict=True)


def _pybigwig() -> Any:
    try:
        import pyBigWig
    except ImportError as error:
        raise MissingExtraError('bigWig is written by pyBigWig: pip install "gengram[genomics]"') from error
    return pyBigWig
