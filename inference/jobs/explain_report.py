"""The report of `gengram explain`: one HTML file that holds its pictures, opens offline and fits a phone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ...sequences.intervals import Interval
from ...support.default_model import model_name
from ...support.whole_output import write_whole
from ..motif_matches import Motif, known_motifs, matches, motifs_of
from .explain_pictures import draw_contributions, draw_logos, draw_tracks_of, numbers_of
from .html_report import html_figure, html_page, html_table, html_text
from .mutate_picture import draw_dependencies, draw_mutations

if TYPE_CHECKING:
    from .explain import ExplainJob

REPORT = "report.html"
MOST_KMERS = 15  # in a table
MOST_IN_MOTIFS = 50  # k-mers that are put together to motifs
MOST_MOTIFS = 10
MOST_OF_NAME = 60  # letters of a region's name

_TARGETS = {
    "gate_logit": "the gate's logit: above 0 the memory opens, below 0 it closes",
    "residual_norm": "how much the memory adds to the hidden state",
    "base:actual": "the log-odds of the base that comes next, as the memory alone changes them (logit lens)",
}


def write_html_report(job: "ExplainJob", tables: dict[str, pa.Table], folder: Path) -> None:
    """Draw the pictures into `folder`/pictures and write the report that holds them.

    Adds `motifs` to the tables, and `jaspar` if it was asked for.

    Args:
        job: what was computed.
        tables: its results by name.
        folder: to write into.
    """
    pictures = folder / "pictures"
    pictures.mkdir()
    regions = job.wanted()
    sections = [_section_of_region(job, tables, region, number, pictures) for number, region in enumerate(regions, 1)]
    sections.append(_section_of_kmers(job, tables, pictures))
    introduction = (
        "A k-mer's contribution is its share in what the memory computed; shares sum to the whole exactly. Where the "
        "memory is not linear, a factor is held at the value that it has. What a model learned need not be biology."
    )
    if getattr(job.model.load_config(), "memory_pooling", None) == "as_trained":
        introduction += (
            " This model pools as_trained, with the roundings of its training. Contributions are of exact means: they "
            "differ a little from what it adds in 32 bits, and more in 16."
        )
    links = {**{f"region{number}": _heading(region) for number, region in enumerate(regions, 1)}, "kmers": "k-mers"}
    title = f"What the memory of {model_name(job.model.model)} did"
    write_whole(folder / REPORT, html_page(title, introduction, links, sections))


def _section_of_region(
    job: "ExplainJob", tables: dict[str, pa.Table], region: Interval, number: int, pictures: Path
) -> str:
    name, letters = model_name(job.model.model), job.genome.fetch(region.record, region.start, region.end)
    numbers, place = numbers_of(tables["bases"], region), region.place
    parts = [f'<section id="region{number}">\n<h2>{html_text(_heading(region))}</h2>\n']

    def add(kind: str, caption: str, draw: Any) -> None:
        path = pictures / f"region{number}_{kind}.svg"
        draw(path)
        parts.append(html_figure(path, caption))

    add(
        "tracks",
        "What the model made of every base: surprisal (2 bits is chance), how far the memory opened, and how much it "
        "added. Blue is the forward strand, orange the reverse one.",
        lambda path: draw_tracks_of(numbers, region, letters, path, name, job.genes[number - 1]),
    )
    add(
        "contributions",
        "What each base contributed by the k-mers that hold it, each k-mer in equal parts to its letters: "
        + "; ".join(f"{target}: {_meaning(job, target)}" for target in job.targets)
        + ". Letters below the line count against it.",
        lambda path: draw_contributions(numbers, region, letters, path, f"Contributions to {name}, {place}"),
    )
    if "changes" in tables:
        effect = job.changes.effect
        add(
            "changes",
            "What every single change would do. Red changes make the sequence less likely."
            if effect == "llr"
            else "What every single change would do to the class. Red changes lower it.",
            lambda path: draw_mutations(tables["changes"], region, path, f"Effects by {name}, {place}", effect),
        )
    if "dependencies" in tables and _is_there(tables["dependencies"], region):
        add(
            "dependencies",
            "How much a substitution at one base moves the prediction at each other.",
            lambda path: draw_dependencies(tables["dependencies"], region, letters, path, f"Dependencies, {place}"),
        )
    if "knock_out" in tables:
        parts.append(_knock_out(job, tables["knock_out"], region))
    return "".join([*parts, "</section>\n"])


def _heading(region: Interval) -> str:
    """A region's place, and what its BED file calls it."""
    if not region.name:
        return region.place
    name = region.name if len(region.name) <= MOST_OF_NAME else f"{region.name[:MOST_OF_NAME]}..."
    return f"{region.place} ({name})"


def _is_there(table: pa.Table, region: Interval) -> bool:
    inside = pc.and_(pc.greater(table["i"], region.start), pc.less_equal(table["i"], region.end))
    return bool(pc.any(pc.and_(pc.equal(table["chrom"], region.record), inside)).as_py())


def _knock_out(job: "ExplainJob", table: pa.Table, region: Interval) -> str:
    rows = [
        row
        for row in table.to_pylist()
        if (row["chrom"], row["start"], row["end"]) == (region.record, region.start + 1, region.end)
    ]
    cells = [[row["value"], row["strand"], row["before"], row["after"], row["after"] - row["before"]] for row in rows]
    words = ", ".join(job.knock_out) + (" and their reverse complements" if job.reverse_complements else "")
    return f"<h3>Without the rows of {html_text(words)}</h3>\n" + html_table(
        ["value", "strand", "with them", "without", "change"], cells
    )


def _section_of_kmers(job: "ExplainJob", tables: dict[str, pa.Table], pictures: Path) -> str:
    parts = [
        '<section id="kmers">\n<h2>K-mers</h2>\n<p>Contributions of all positions of the regions, added up.</p>\n'
    ]
    kmers, rows = tables["kmers"], []
    found: list[tuple[str, str, list[Motif]]] = []
    for layer, target in dict.fromkeys(zip(kmers["layer"].to_pylist(), kmers["target"].to_pylist(), strict=True)):
        chosen = kmers.filter(pc.and_(pc.equal(kmers["layer"], layer), pc.equal(kmers["target"], target)))
        listed = chosen.to_pylist()
        parts.append(f"<h3>Layer {html_text(layer)}, {html_text(target)}: {html_text(_meaning(job, target))}</h3>\n")
        cells = [[row["kmer"], row["occurrences"], row["contribution"]] for row in listed[:MOST_KMERS]]
        parts.append(html_table(["k-mer", "places", "contribution"], cells))
        weights = [(row["kmer"], row["contribution"]) for row in listed if row["contribution"] > 0]
        motifs = motifs_of(weights[:MOST_IN_MOTIFS])[:MOST_MOTIFS]
        if motifs:
            path = pictures / f"logos_{len(found) + 1}.svg"
            draw_logos(motifs, path)
            parts.append(
                html_figure(
                    path, "Logos of the k-mers of five bases or more that contributed most, those alike put together."
                )
            )
        found.append((layer, target, motifs))
        rows += [
            {"layer": layer, "target": target, "motif": motif.name, "members": list(motif.members)} for motif in motifs
        ]
    schema = pa.schema([(name, pa.string()) for name in ("layer", "target", "motif")])
    tables["motifs"] = pa.Table.from_pylist(rows, schema=schema.append(pa.field("members", pa.list_(pa.string()))))
    if job.jaspar is not None:
        parts.append(_known(job, found, tables))
    return "".join([*parts, "</section>\n"])


def _known(job: "ExplainJob", found: Iterable[tuple[str, str, Sequence[Motif]]], tables: dict[str, pa.Table]) -> str:
    """Matches of the motifs with JASPAR."""
    known = known_motifs(None if job.jaspar == "all" else job.jaspar)
    pieces = []
    for layer, target, motifs in found:
        table = matches(motifs, known)
        for name, text in (("target", target), ("layer", layer)):
            table = table.add_column(0, name, pa.array([text] * table.num_rows, pa.string()))
        pieces.append(table)
    tables["jaspar"] = pa.concat_tables(pieces)
    first = [row for row in tables["jaspar"].to_pylist() if row["false_discovery_rate"] is not None]
    first.sort(key=lambda row: row["p_value"])
    names = ("layer", "target", "query", "name", "matrix", "p_value", "false_discovery_rate")
    words = (
        f"<h3>Known motifs</h3>\n<p>The most similar of {len(known):,} motifs of JASPAR CORE (Tomtom). The rate of "
        "false discoveries is measured on the same motifs with shuffled places; above 0.1 a match is no finding.</p>\n"
    )
    headings = ["layer", "target", "motif", "most like", "matrix", "p-value", "false-discovery rate"]
    return words + html_table(headings, [[row[name] for name in names] for row in first])


def _meaning(job: "ExplainJob", target: str) -> str:
    if target == "base:actual" and job.changes.head == "masked":
        return "the log-odds of the base that is there, as the memory alone changes them (logit lens)"
    if target.startswith("class:"):
        return f"the logit of {job.changes.label_name}, as the memory alone changes it (logit lens)"
    return _TARGETS[target]
