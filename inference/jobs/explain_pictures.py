"""Pictures of `gengram explain`: tracks with genes, what each base contributed, and logos of k-mers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...sequences.alphabet import BASES, reverse_complement
from ...sequences.annotation import Gene
from ...sequences.intervals import Interval
from ...support.figures import STRAND_COLOURS, draw_stacked_letters, limits_of_letters, pyplot, write_figure
from ..motif_matches import Motif
from ..tracks import VALUES
from .track_picture import MOST_LETTERS, draw_panels

_PER_LINE = 100  # bases
_WIDTH = 12.0  # inches
_ROW_HEIGHT, _LINE_GAP = 0.75, 0.45
_SMALLEST = 0.02  # of the highest letter: lower ones cannot be seen
_LOGOS_PER_LINE = 5

Numbers = Mapping[tuple[str, str, str], np.ndarray]  # (length,) by value, layer and strand


def numbers_of(bases: pa.Table, region: Interval) -> dict[tuple[str, str, str], np.ndarray]:
    """Values of the bases of a region, nan where there is none."""
    is_inside = pc.and_(pc.greater(bases["pos"], region.start), pc.less_equal(bases["pos"], region.end))
    rows = bases.filter(pc.and_(pc.equal(bases["chrom"], region.record), is_inside))
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for value, layer, strand in sorted(
        set(zip(*(rows[name].to_pylist() for name in ("value", "layer", "strand")), strict=True))
    ):
        chosen = pc.and_(pc.equal(rows["value"], value), pc.equal(rows["layer"], layer))
        part = rows.filter(pc.and_(chosen, pc.equal(rows["strand"], strand)))
        numbers = np.full(len(region), np.nan)
        numbers[part["pos"].to_numpy() - 1 - region.start] = part["number"].to_numpy(zero_copy_only=False)
        found[value, layer, strand] = numbers
    return found


def draw_tracks_of(
    numbers: Numbers, region: Interval, letters: str, path: Path, model: str, genes: Sequence[Gene]
) -> None:
    """Surprisal, entropy, gates and residuals of a region."""
    panels: dict[tuple[str, Any], dict[str, np.ndarray]] = {}
    for value in VALUES:
        for (name, layer, strand), found in numbers.items():
            if name == value:
                panels.setdefault((value, layer or None), {})[strand] = found
    draw_panels(panels, region, letters if len(region) <= MOST_LETTERS else "", path, model, genes)


def draw_contributions(numbers: Numbers, region: Interval, letters: str, path: Path, title: str) -> None:
    """What the k-mers of each base contributed: letters as high as their share, a row for each layer and strand."""
    rows = {names: found for names, found in numbers.items() if names[0].startswith("contribution:")}
    lines = -(-len(region) // _PER_LINE)
    height = (_ROW_HEIGHT * len(rows) + _LINE_GAP) * lines + 0.6
    figure, axes = pyplot().subplots(
        lines * len(rows), 1, figsize=(_WIDTH, height), squeeze=False, layout="constrained"
    )
    limits: dict[tuple[str, str], tuple[float, float]] = {}
    for (value, layer, _), found in rows.items():
        low, high = limits.get((value, layer), (0.0, 0.0))
        limits[value, layer] = (min(low, found.min()), max(high, found.max()))
    for line in range(lines):
        part = slice(line * _PER_LINE, (line + 1) * _PER_LINE)
        first = region.start + part.start + 1
        for row, ((value, layer, strand), found) in enumerate(rows.items()):
            axis = axes[line * len(rows) + row, 0]
            shown = letters if strand == "+" else reverse_complement(letters)[::-1]
            low, high = limits[value, layer]
            smallest = _SMALLEST * max(high, -low)
            columns = [
                [(letter.upper(), float(number))] if abs(number) > smallest else []
                for letter, number in zip(shown[part], found[part], strict=True)
            ]
            draw_stacked_letters(axis, columns, first)
            axis.set_ylim(limits_of_letters(low, high))
            axis.set_xlim(first - 0.5, first + min(_PER_LINE, len(region)) - 0.5)
            axis.axhline(0, color="black", linewidth=0.5)
            name = value.removeprefix("contribution:")
            words = f"{name}\nlayer {layer}, {'forward' if strand == '+' else 'reverse'}"
            axis.set_ylabel(
                words, size=7, rotation=0, ha="right", va="center", color=STRAND_COLOURS.get(strand, "black")
            )
            axis.tick_params(labelsize=7)
            for side in ("top", "right", "bottom"):
                axis.spines[side].set_visible(False)
            if row < len(rows) - 1:
                axis.set_xticks([])
            else:
                axis.xaxis.set_major_locator(pyplot().MaxNLocator(10, steps=[1, 2, 5, 10], integer=True))
                axis.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
    axes[0, 0].set_title(title, size=11)
    axes[-1, 0].set_xlabel(f"{region.record}, position from 1")
    write_figure(path, figure)


def draw_logos(motifs: Sequence[Motif], path: Path) -> None:
    """Logos of motifs, letters as high as they hold information, in bits."""
    lines = -(-len(motifs) // _LOGOS_PER_LINE)
    figure, axes = pyplot().subplots(
        lines, _LOGOS_PER_LINE, figsize=(_WIDTH, 1.5 * lines + 0.2), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(motifs) :]:
        axis.set_visible(False)
    for axis, motif in zip(axes.flat, motifs, strict=False):
        draw_stacked_letters(axis, _columns(motif.shares), 1)
        axis.set_xlim(0.5, len(motif.shares) + 0.5)
        axis.set_ylim(0, 2)
        axis.set_yticks([0, 2])
        axis.set_xticks([])
        axis.tick_params(labelsize=7)
        more = len(motif.members) - 1
        axis.set_title(f"{motif.name}{f' and {more} more' if more else ''}", size=8, family="monospace")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    write_figure(path, figure)


def _columns(shares: np.ndarray) -> list[list[tuple[str, float]]]:
    """Letters and heights of each place, the lowest letter first."""
    information = np.log2(len(BASES)) + (shares * np.log2(shares)).sum(1, keepdims=True)
    return [
        sorted(zip(BASES, map(float, heights), strict=True), key=lambda letter: letter[1])
        for heights in shares * information
    ]
