"""Pictures of tracks: genes, letters where there is room for them, and a panel for each value."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...sequences.alphabet import reverse_complement
from ...sequences.annotation import Gene, read_genes
from ...sequences.genome import open_genome
from ...sequences.intervals import Interval
from ...support.default_model import model_name
from ...support.errors import InputError
from ...support.figures import GENE_COLOUR, OTHER_COLOUR, STRAND_COLOURS, draw_letters, pyplot, write_figure
from ..tracks import UNITS
from .regions import RegionJob
from .track_files import read_track

SUFFIXES = (".svg", ".png")
MOST_PICTURES = 50
LONGEST = 10_000_000  # bases of a picture
MOST_LETTERS = 120
MOST_STEPS = 500  # of a curve

_WIDTH = 12.0  # inches
_HEIGHTS = {"gene": 0.42, "letters": 0.5, "value": 1.15}
_ARROWS = 60  # at most, along the width
_LETTER_WIDTH = 0.0075  # of a gene's name, as a share of the width


def plan_pictures(job: RegionJob, image: Path) -> dict[Path, Interval]:
    """Which picture will show which region: see `pictures_of`."""
    return pictures_of(job.wanted(), image)


def pictures_of(regions: Sequence[Interval], image: Path, longest: int = LONGEST) -> dict[Path, Interval]:
    """Which picture will show which region: `image` for a single one, else names made of it and the region.

    Raises:
        InputError: if the name does not end in .svg or .png, or there are too many or too long regions.
        FileExistsError: if a picture exists.
        MissingExtraError: if Matplotlib is not installed.
    """
    if image.suffix not in SUFFIXES:
        raise InputError(f"--image: expected a name that ends in {' or '.join(SUFFIXES)}, got {image.name!r}.")
    pyplot()
    most = max(map(len, regions), default=0)
    if len(regions) > MOST_PICTURES or most > longest:
        raise InputError(
            f"--image: expected at most {MOST_PICTURES} regions of at most {longest:,} bases to draw, got "
            f"{len(regions):,} of up to {most:,}; draw fewer or shorter ones, or leave it out."
        )
    places = {image: regions[0]} if len(regions) == 1 else _own_names(image, regions)
    for path in places:
        if path.exists():
            raise FileExistsError(f"{path} exists already; choose another picture or remove it first.")
    return places


def _own_names(image: Path, regions: Sequence[Interval]) -> dict[Path, Interval]:
    """A name for each region; those that would be alike, as of the records `a|b` and `a_b`, are numbered from 2 on."""
    places: dict[Path, Interval] = {}
    for region in regions:
        words = f"{image.stem}.{region.record}_{region.start + 1}-{region.end}"
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in words)
        endings = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
        names = (image.with_name(f"{name}{ending}{image.suffix}") for ending in endings)
        places[next(path for path in names if path not in places)] = region
    return places


def draw_tracks(
    folder: str | Path, fasta: str | Path, region: Interval, path: str | Path, genes: Sequence[Gene] = ()
) -> None:
    """Draw a region of the tracks in a folder that `gengram track` made.

    Args:
        folder: with the tracks.
        fasta: the genome that they are of.
        region: what is drawn.
        path: the picture, in .svg or .png.
        genes: of the region.

    Raises:
        OSError: if a file cannot be read or written.
    """
    folder = Path(folder)
    with open_genome(fasta) as genome:
        record = genome.contig(region.record)
        letters = genome.fetch(record, region.start, region.end) if len(region) <= MOST_LETTERS else ""
    record_of_run = json.loads((folder / "record.json").read_text())
    panels: dict[tuple[str, int | None], dict[str, np.ndarray]] = {}
    for track in record_of_run["tracks"]:
        values = read_track(folder / track["file"], record, region.start, region.end)
        panels.setdefault((track["value"], track["layer"]), {})[track["strand"]] = values
    draw_panels(panels, region, letters, path, model_name(record_of_run["model"]["model"]), genes)


def draw_panels(
    panels: Mapping[tuple[str, int | None], Mapping[str, np.ndarray]],
    region: Interval,
    letters: str,
    path: str | Path,
    model: str,
    genes: Sequence[Gene] = (),
) -> None:
    """Draw values of a region, a panel for each, under its genes and letters.

    Args:
        panels: values (length,) by their name and layer, and by strand.
        region: what is drawn.
        letters: of the region; "" to write none.
        path: the picture, in .svg or .png.
        model: its name.
        genes: of the region.

    Raises:
        OSError: if the picture cannot be written.
    """
    rows = pack_genes(genes, region)
    heights = [_HEIGHTS["gene"] * (max(rows.values()) + 1) + 0.1] if rows else []
    heights += [_HEIGHTS["letters"]] if letters else []
    heights += [_HEIGHTS["value"]] * len(panels)
    figure, axes = pyplot().subplots(
        len(heights),
        1,
        figsize=(_WIDTH, sum(heights) + 1.0),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    remaining = list(axes[:, 0])
    if rows:
        _draw_genes(remaining.pop(0), rows, region)
    if letters:
        _draw_both_strands(remaining.pop(0), letters, region)
    for axis, ((value, layer), strands) in zip(remaining, panels.items(), strict=True):
        label = value if layer is None else f"{value}\nof layer {layer}"
        _draw_value(axis, strands, region, f"{label}\n({UNITS[value]})", value)
    _finish(figure, axes[:, 0], region, model, panels)
    write_figure(path, figure)


def pack_genes(genes: Sequence[Gene], region: Interval) -> dict[Gene, int]:
    """Row of each gene of a region, such that genes of one row do not touch, nor do their names."""
    ends: list[float] = []  # of the rows
    rows = {}
    for gene in sorted(genes, key=lambda gene: (gene.start, -gene.end)):
        start = max(gene.start, region.start)
        name_end = start + _LETTER_WIDTH * len(region) * (len(gene.name) + 2)
        row = next((row for row, end in enumerate(ends) if end < start), len(ends))
        ends[row : row + 1] = [max(gene.end, name_end)]
        rows[gene] = row
    return rows


def _draw_genes(axis: Any, rows: dict[Gene, int], region: Interval) -> None:
    """Lines with arrows for genes, low boxes for exons and high ones for what is coding."""
    spacing = max(1, len(region) // _ARROWS)
    for gene, row in rows.items():
        start, end = max(gene.start, region.start), min(gene.end, region.end)
        y = -row
        axis.plot([start + 0.5, end + 0.5], [y, y], color=GENE_COLOUR, linewidth=1, solid_capstyle="butt")
        arrows = np.arange(start + spacing / 2, end, spacing) + 0.5
        if gene.strand in STRAND_COLOURS:
            marker = "$>$" if gene.strand == "+" else "$<$"
            axis.scatter(arrows, np.full(len(arrows), y), s=14, marker=marker, color=GENE_COLOUR, linewidths=0.3)
        for parts, height in ((gene.exons, 0.22), (gene.coding, 0.44)):
            seen = [(left + 0.5, right - left) for left, right in parts if right > region.start and left < region.end]
            axis.broken_barh(seen, (y - height / 2, height), color=STRAND_COLOURS.get(gene.strand, OTHER_COLOUR))
        name = {"+": f"{gene.name} →", "-": f"← {gene.name}"}.get(gene.strand, gene.name)
        axis.text(start + 0.5, y + 0.28, name, size=8, style="italic", va="bottom", ha="left", clip_on=True)
    axis.set_ylim(-max(rows.values()) - 0.4, 0.75)
    axis.set_ylabel("genes", rotation=0, ha="right", va="center")
    axis.set_yticks([])
    for side in ("left", "bottom", "top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(bottom=False)


def _draw_both_strands(axis: Any, letters: str, region: Interval) -> None:
    draw_letters(axis, [letters, reverse_complement(letters)[::-1]], region.start + 1)
    axis.set_yticks([0, -1], ["forward 5'→3'", "reverse 3'←5'"], size=8)
    axis.tick_params(left=False, bottom=False)
    for side in ("left", "bottom", "top", "right"):
        axis.spines[side].set_visible(False)


def _draw_value(axis: Any, strands: Mapping[str, np.ndarray], region: Interval, label: str, value: str) -> None:
    """The forward strand upwards and the reverse one downwards."""
    width = math.ceil(len(region) / MOST_STEPS)
    edges = np.minimum(np.arange(0, len(region) + width, width), len(region)) + region.start + 0.5
    top = {"entropy": 2.0, "gate": 1.0}.get(value, 0.0)
    for strand, values in strands.items():
        means = means_of_bins(values, width)
        signed = means if strand == "+" else -means
        axis.stairs(signed, edges, fill=True, color=STRAND_COLOURS[strand], linewidth=0)
        top = max(top, float(np.nanmax(means, initial=0.0)))
    top = top or 1.0
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_ylim(-top * 1.05 if "-" in strands else 0, top * 1.05 if "+" in strands else 0)
    ticks = [tick for tick in pyplot().MaxNLocator(2, steps=[1, 2, 5, 10]).tick_values(0, top) if 0 <= tick <= top]
    axis.set_yticks(sorted({tick if strand == "+" else -tick for strand in strands for tick in ticks}))
    axis.yaxis.set_major_formatter(lambda number, _: f"{abs(number):g}")
    axis.set_ylabel(label, rotation=0, ha="right", va="center", size=9)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def means_of_bins(values: np.ndarray, width: int) -> np.ndarray:
    """Means of so many values each, without those that are nan; nan where all are: (bins,) float64."""
    starts = np.arange(0, len(values), width)
    is_known = ~np.isnan(values)
    counts = np.add.reduceat(is_known, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(is_known, values, 0), starts, dtype=np.float64)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def _finish(
    figure: Any, axes: Sequence[Any], region: Interval, model: str, panels: Mapping[Any, Mapping[str, Any]]
) -> None:
    width = math.ceil(len(region) / MOST_STEPS)
    axes[-1].set_xlim(region.start + 0.5, region.end + 0.5)
    axes[-1].xaxis.set_major_locator(pyplot().MaxNLocator(10, steps=[1, 2, 5, 10], integer=True))
    axes[-1].xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
    axes[-1].set_xlabel(f"{region.record}, position from 1")
    strands = {strand for found in panels.values() for strand in found}
    words = {"+": "forward strand above the line", "-": "reverse strand below it"}
    for strand in sorted(strands):
        x, side = (0.01, "left") if strand == "+" else (0.99, "right")
        axes[0].annotate(
            words[strand], (x, 1.0), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points",
            color=STRAND_COLOURS[strand], size=9, ha=side, va="bottom",
        )  # fmt: skip
    steps = "" if width == 1 else f", means of {width:,} bases"
    axes[0].set_title(f"{region.place} by {model}{steps}", size=11)


def read_genes_of(path: Path | None, region: Interval) -> list[Gene]:
    """Genes of a region for its picture; none without a file."""
    return [] if path is None else read_genes(path, region.record, region.start, region.end)
