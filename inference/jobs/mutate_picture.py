"""Pictures of what `gengram mutate` wrote: a logo over a heat map of all changes, or a matrix of dependencies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...sequences.alphabet import BASES
from ...sequences.intervals import Interval
from ...support.default_model import model_name
from ...support.figures import draw_stacked_letters, limits_of_letters, pyplot, write_figure
from ..mutations import DELETED
from .dependency import SCHEMA, DependencyJob
from .mutate import MutateJob
from .tables import read_written
from .track_picture import pictures_of

LONGEST = 2_000  # bases of a picture of changes
LONGEST_MATRIX = 1_024

_PER_LINE = 100  # bases
_WIDTH = 12.0  # inches
_LOGO_HEIGHT, _CELL_HEIGHT, _LINE_GAP = 0.8, 0.16, 0.55
_SIDE = 8.0  # of a matrix
_MOST_LETTERS = 100  # at its sides
_DOTS_PER_INCH = 200  # of a matrix within an SVG
_UNKNOWN = "#dddddd"
_RED = {"llr": "less likely", "effect": "lower"}
_STRANDS_OF_CAUSAL = {
    "both": "\n(above the diagonal by the forward strand, below it by the reverse strand)",
    "forward": "\n(forward strand)",
    "reverse": "\n(reverse strand)",
}
_SMALLEST = 0.005  # of the highest letter: lower ones cannot be seen


def pictures_of_job(job: MutateJob | DependencyJob, image: Path) -> dict[Path, Interval]:
    """Which picture will show which region: see `track_picture.pictures_of`."""
    return pictures_of(job.wanted(), image, LONGEST_MATRIX if isinstance(job, DependencyJob) else LONGEST)


def draw(job: MutateJob | DependencyJob, region: Interval, path: Path) -> None:
    """Draw a region of a job's output.

    Raises:
        OSError: if a file cannot be read or written.
    """
    name = model_name(job.model.model)
    if isinstance(job, DependencyJob):
        letters = job.genome.fetch(region.record, region.start, region.end)
        strands = "" if job.is_masked else _STRANDS_OF_CAUSAL[job.model.strands]
        title = f"Dependencies by {name}, {region.place}{strands}"
        draw_dependencies(read_written(job.output, SCHEMA), region, letters, path, title)
        return
    title = f"Effects{f' on {job.label_name}' if job.label_name else ''} by {name}, {region.place}"
    draw_mutations(read_written(job.output, job.schema), region, path, title, job.effect)


def draw_mutations(table: pa.Table, region: Interval, path: str | Path, title: str, effect: str = "llr") -> None:
    """Draw the effects of all changes of a region, 100 bases a line, the logo above its heat map.

    Of the likelihood, the logo is that of what the model expects at each base, all others as they are: probabilities
    in proportion to exp(llr), as high together as they hold information, 2 bits less their entropy. Of a class, the
    base that is there is as high as it counts: the mean effect of its substitutions, with the other sign.

    Args:
        table: rows that `gengram mutate` wrote.
        region: what is drawn, at most `LONGEST` bases.
        path: the picture, in .svg or .png.
        title: of the picture.
        effect: the column that is drawn, `llr` or `effect`.

    Raises:
        OSError: if the picture cannot be written.
    """
    values, reference = effects_of_region(table, region, effect)
    rows = len(BASES) + bool((~np.isnan(values[:, len(BASES)])).any())
    largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    columns = _expected(values) if effect == "llr" else _importance(values, reference)
    lines = -(-len(region) // _PER_LINE)
    heights = [_LOGO_HEIGHT, _CELL_HEIGHT * rows] * lines
    size = (_WIDTH, sum(heights) + _LINE_GAP * lines + 0.6)
    figure, axes = pyplot().subplots(
        2 * lines, 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    limits = _limits(columns)
    for line, (logo, map_) in enumerate(axes[:, 0].reshape(lines, 2)):
        part = slice(line * _PER_LINE, (line + 1) * _PER_LINE)
        first = region.start + part.start + 1
        draw_stacked_letters(logo, columns[part], first)
        logo.set_ylim(limits)
        logo.set_ylabel("bits" if effect == "llr" else "importance", size=8)
        image = _draw_map(map_, values[part, :rows].T, reference[part], first, largest)
        for axis in (logo, map_):
            axis.set_xlim(first - 0.5, first + min(_PER_LINE, len(region)) - 0.5)
            axis.tick_params(labelsize=8)
        logo.set_xticks([])
        map_.xaxis.set_major_locator(pyplot().MaxNLocator(10, steps=[1, 2, 5, 10], integer=True))
        map_.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
        for side in ("top", "right", "bottom"):
            logo.spines[side].set_visible(False)
    words = "llr (nats)" if effect == "llr" else "effect"
    figure.colorbar(
        image, ax=axes[:, 0].tolist(), label=f"{words}, red: {_RED[effect]}", shrink=0.9, pad=0.01, aspect=12
    )
    axes[0, 0].set_title(title, size=11)
    axes[-1, 0].set_xlabel(f"{region.record}, position from 1")
    write_figure(path, figure)


def effects_of_region(table: pa.Table, region: Interval, effect: str) -> tuple[np.ndarray, str]:
    """Effects (length, 5) of A, C, G, T and a deletion at each base, nan where there is none; and the bases."""
    rows = _rows_of(table, region, "pos")
    values = np.full((len(region), len(BASES) + 1), np.nan)
    reference = ["N"] * len(region)
    for pos, ref, alt, number in zip(*(rows[name].to_pylist() for name in ("pos", "ref", "alt", effect)), strict=True):
        reference[pos - 1 - region.start] = ref
        if number is not None:
            values[pos - 1 - region.start, f"{BASES}{DELETED}".index(alt)] = number
    return values, "".join(reference)


def _rows_of(table: pa.Table, region: Interval, place: str) -> pa.Table:
    is_inside = pc.and_(pc.greater(table[place], region.start), pc.less_equal(table[place], region.end))
    return table.filter(pc.and_(pc.equal(table["chrom"], region.record), is_inside))


def _expected(values: np.ndarray) -> list[list[tuple[str, float]]]:
    """Letters and heights of what is expected at each base, the lowest letter first."""
    columns: list[list[tuple[str, float]]] = []
    for place in values[:, : len(BASES)]:
        if np.isnan(place).all():
            columns.append([])
            continue
        logs = np.nan_to_num(place)  # 0 for the base that is there
        chances = np.exp(logs - logs.max())
        chances /= chances.sum()
        information = np.log2(len(BASES)) + (chances * np.log2(np.maximum(chances, 1e-300))).sum()
        letters = zip(BASES, chances * information, strict=True)
        columns.append(sorted(letters, key=lambda letter: letter[1]))
    return _visible(columns)


def _importance(values: np.ndarray, reference: str) -> list[list[tuple[str, float]]]:
    columns: list[list[tuple[str, float]]] = []
    for base, place in zip(reference, values[:, : len(BASES)], strict=True):
        known = place[~np.isnan(place)]
        columns.append([(base, -float(known.mean()))] if len(known) else [])
    return _visible(columns)


def _visible(columns: list[list[tuple[str, float]]]) -> list[list[tuple[str, float]]]:
    highest = max((abs(height) for column in columns for _, height in column), default=0.0)
    return [[letter for letter in column if abs(letter[1]) > _SMALLEST * highest] for column in columns]


def _limits(columns: Sequence[Sequence[tuple[str, float]]]) -> tuple[float, float]:
    """Of all lines: from 0, or the lowest letter, to the top of the highest column."""
    ups = [sum(max(0.0, height) for _, height in column) for column in columns]
    downs = [sum(min(0.0, height) for _, height in column) for column in columns]
    return limits_of_letters(min(downs, default=0.0), max(ups, default=0.0))


def _draw_map(axis: Any, values: np.ndarray, reference: str, first: int, largest: float) -> Any:
    """Cells of letters (rows) and places, with a dot where the reference has the letter."""
    x = np.arange(values.shape[1] + 1) + first - 0.5
    y = np.arange(values.shape[0] + 1) - 0.5
    axis.set_facecolor(_UNKNOWN)
    shown = np.ma.masked_invalid(values)
    image = axis.pcolormesh(x, y, shown, cmap="RdBu", vmin=-largest, vmax=largest, edgecolors="white", linewidth=0.3)
    places = [(first + place, BASES.index(base)) for place, base in enumerate(reference) if base in BASES]
    if places:
        axis.scatter(*zip(*places, strict=True), s=4, color="black", linewidths=0)
    axis.set_yticks(range(len(values)), [*BASES, "del"][: len(values)])
    axis.invert_yaxis()
    return image


def draw_dependencies(table: pa.Table, region: Interval, letters: str, path: str | Path, title: str) -> None:
    """Draw the dependencies within a region as a matrix: row i is substituted, column j is predicted.

    Args:
        table: rows that `gengram mutate --dependency` wrote.
        region: what is drawn, at most `LONGEST_MATRIX` bases.
        letters: of the region.
        path: the picture, in .svg or .png.
        title: of the picture.

    Raises:
        OSError: if the picture cannot be written.
    """
    matrix = dependencies_of_region(table, region)
    figure, axis = pyplot().subplots(figsize=(_SIDE + 1, _SIDE), dpi=_DOTS_PER_INCH, layout="constrained")
    edges = np.arange(len(region) + 1) + region.start + 0.5
    axis.set_facecolor(_UNKNOWN)
    image = axis.pcolormesh(edges, edges, np.ma.masked_invalid(matrix), cmap="magma_r", vmin=0, rasterized=True)
    axis.set_aspect("equal")
    axis.invert_yaxis()
    if len(region) <= _MOST_LETTERS:
        places = np.arange(len(region)) + region.start + 1
        axis.secondary_xaxis("top").set_xticks(places, list(letters), size=6)
        axis.secondary_yaxis("right").set_yticks(places, list(letters), size=6)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(pyplot().MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
        side.set_major_formatter(lambda place, _: f"{place:,.0f}")
    axis.set_xlabel("j, the base that is predicted")
    axis.set_ylabel("i, the base that is substituted")
    axis.set_title(title, size=11)
    figure.colorbar(image, label="dependency: largest |log2 of the ratio of odds|", shrink=0.8)
    write_figure(path, figure)


def dependencies_of_region(table: pa.Table, region: Interval) -> np.ndarray:
    """Dependencies (i, j) of a region, nan where there is none."""
    rows = _rows_of(_rows_of(table, region, "i"), region, "j")
    matrix = np.full((len(region), len(region)), np.nan)
    i, j = (rows[name].to_numpy() - 1 - region.start for name in ("i", "j"))
    matrix[i, j] = rows["dependency"].to_numpy()
    return matrix
