"""VCF that is written again with more in it: lines of the header and INFO are added, all else stays as it was."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .htslib import quiet_pysam

logger = logging.getLogger(__name__)

_LONGEST_OF_TABIX = 2**29  # bases of a contig that a .tbi index can hold


def header_with(header: Sequence[str], additions: Iterable[str], prefix: str) -> list[str]:
    """A header with lines in front of `#CHROM`, and without those that an earlier run has added.

    Args:
        header: lines, without their ends.
        additions: lines to add, such as `##INFO=<ID=...>`.
        prefix: how the names of what is added begin: other `INFO` fields and lines of such names are removed.
    """
    ours = re.compile(rf"##(?:INFO=<ID=)?{prefix}", re.IGNORECASE)
    return [*(line for line in header[:-1] if not ours.match(line)), *additions, header[-1]]


def line_with(line: str, additions: Mapping[str, str], prefix: str) -> str:
    """A record with more INFO, and without what an earlier run has added there.

    Args:
        line: of VCF, without its end.
        additions: values by their keys.
        prefix: how keys that are removed begin.
    """
    cells = line.split("\t", 8)
    kept = [entry for entry in cells[7].split(";") if entry != "." and not entry.startswith(prefix)]
    cells[7] = ";".join([*kept, *(f"{key}={value}" for key, value in additions.items())]) or "."
    return "\t".join(cells)


def indexes_of(path: Path) -> list[Path]:
    """The index files that `write_vcf` may put beside a file, of which it makes one at most."""
    return [path.with_name(path.name + ending) for ending in (".tbi", ".csi")] if path.suffix == ".gz" else []


def write_vcf(path: Path, lines: Iterable[str]) -> None:
    """Write lines to a `.vcf` file, or to a `.vcf.gz` file by bgzip, with an index beside it if they are sorted.

    Args:
        path: of the file.
        lines: of the header and the records, without their ends.
    """
    if path.suffix != ".gz":
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        return
    order = _Order()
    with quiet_pysam() as pysam:
        with pysam.BGZFile(str(path), "wb") as file:
            for line in order.watch(lines):
                file.write(f"{line}\n".encode())
        if order.is_sorted:
            pysam.tabix_index(str(path), preset="vcf", force=True, csi=order.furthest > _LONGEST_OF_TABIX)
        else:
            logger.warning("%s is not sorted, so it gets no index; `bcftools sort` sorts it.", path.name)


class _Order:
    """Whether records that pass by can be indexed: by position, each contig in one piece."""

    def __init__(self) -> None:
        self.is_sorted, self.furthest = True, 0

    def watch(self, lines: Iterable[str]) -> Iterator[str]:
        """The lines, unchanged."""
        seen: set[str] = set()
        contig, last = "", 0
        for line in lines:
            if not line.startswith("#"):
                name, position = line.split("\t", 2)[:2]
                if name != contig:
                    self.is_sorted &= name not in seen
                    seen.add(name)
                    contig, last = name, 0
                self.is_sorted &= int(position) >= last
                last = int(position)
                self.furthest = max(self.furthest, last)
            yield line
