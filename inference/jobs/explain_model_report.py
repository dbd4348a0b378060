"""The report of `gengram explain --model-only`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...support.default_model import model_name
from ...support.figures import pyplot, write_figure
from ...support.whole_output import write_whole
from .html_report import html_figure, html_page, html_table, html_text

if TYPE_CHECKING:
    from .explain_model import ExplainModelJob

REPORT = "report.html"
MOST_KMERS = 15  # in a table


def write_model_report(job: "ExplainModelJob", found: dict[str, Any], kmers: pa.Table, folder: Path) -> None:
    """Draw the pictures into `folder`/pictures and write the report that holds them.

    Args:
        job: what was computed.
        found: its numbers.
        kmers: its table.
        folder: to write into.
    """
    pictures = folder / "pictures"
    pictures.mkdir()
    links, sections = {}, []
    if "readiness" in found:
        links["readiness"] = "readiness"
        sections.append(_of_readiness(found, pictures))
    links |= {"symmetry": "reverse complements", "codons": "codons", "kmers": "k-mers"}
    sections += [_of_symmetry(found["symmetry"], pictures), _of_codons(found["codons"]), _of_kmers(kmers)]
    introduction = (
        "Intervals hold 95 %. What stands in a table need not be used, and what is not seen here may be there: these "
        "are simple questions to the memory, not all that it knows."
    )
    title = f"What the memory of {model_name(job.model.model)} learned"
    write_whole(folder / REPORT, html_page(title, introduction, links, sections))


def draw_readiness(axis: Any, found: dict[str, Any]) -> None:
    """Divergence of each layer's prediction from the final one, with intervals."""
    for name in ("model", "twin"):
        if name in found:
            mean, low, high = np.array(found[name]["divergence"]).T
            axis.errorbar(range(len(mean)), mean, [mean - low, high - mean], marker="o", label=name, capsize=3)
    axis.set(xlabel="layers read (0: the embedding)", ylabel="KL(final, layer), nats", title="Readiness")
    axis.xaxis.set_major_locator(pyplot().MaxNLocator(integer=True))
    axis.legend()


def draw_symmetry(axis: Any, found: dict[str, Any]) -> None:
    """How much more alike rows of reverse complements are than matched partners, with intervals."""
    for layer, sizes in found.items():
        if sizes:
            value, low, high = np.array([size["effect_size"] for size in sizes.values()]).T
            error = [value - low, high - value]
            axis.errorbar(list(map(int, sizes)), value, error, marker="o", label=f"layer {layer}", capsize=3)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.xaxis.set_major_locator(pyplot().MaxNLocator(integer=True))
    axis.set(xlabel="k", ylabel="effect size", title="Likeness of reverse complements' rows")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def _picture(path: Path, draw: Any, found: dict[str, Any], caption: str) -> str:
    figure, axis = pyplot().subplots(figsize=(8, 3.5), layout="constrained")
    draw(axis, found)
    write_figure(path, figure)
    return html_figure(path, caption, is_wide=False)


def _of_readiness(found: dict[str, Any], pictures: Path) -> str:
    parts = ['<section id="readiness">\n<h2>Readiness</h2>\n']
    caption = (
        f"How far each layer's prediction is from the final one, by the logit lens: {found['pieces']} pieces of the "
        "sequences."
    )
    parts.append(_picture(pictures / "readiness.svg", draw_readiness, found["readiness"], caption))
    rows: list[list[Any]] = []
    for name, values in found["readiness"].items():
        if "bits_per_base" in values:
            rows.append([name, "bits per base", *values["bits_per_base"]])
        for layer, numbers in enumerate(values.get("divergence", [])):
            rows.append([name, f"KL after {layer} layers, nats", *numbers])
    parts.append(html_table(["of", "value", "mean", "from", "to"], rows))
    if "twin" not in found["readiness"]:
        parts.append("<p>How much of this is the memory's doing, only a twin trained without it can say.</p>\n")
    return "".join([*parts, "</section>\n"])


def _of_symmetry(found: dict[str, Any], pictures: Path) -> str:
    parts = ['<section id="symmetry">\n<h2>Reverse complements</h2>\n']
    caption = (
        "By how many standard deviations rows of reverse complements are more alike than partners with as many G and "
        "C. A memory that knew both strands to be one would have large ones."
    )
    if any(found.values()):
        parts.append(_picture(pictures / "symmetry.svg", draw_symmetry, found, caption))
    rows = [
        [
            *(layer, int(size), each["pairs"], each["cosine_within_pairs"][0], each["cosine_of_matched_partners"][0]),
            *(*each["effect_size"], each["p_value"]),
        ]
        for layer, sizes in found.items()
        for size, each in sizes.items()
    ]
    headings = ["layer", "k", "pairs", "cosine", "of partners", "effect size", "from", "to", "p-value"]
    return "".join([*parts, html_table(headings, rows), "</section>\n"])


def _of_codons(found: dict[str, Any]) -> str:
    words = (
        "Whether clusters of 3-mers agree with amino acids. Synonymous codons share their first two bases, so this "
        "must be more than the agreement with those. By chance: the middle 95 % of permuted labels."
    )
    rows = [
        [layer, name, each["value"], *each["by_chance"], each["p_value"]]
        for layer, scores in found.items()
        for name, each in scores.items()
    ]
    table = html_table(["layer", "agreement", "value", "by chance from", "to", "p-value"], rows)
    return f'<section id="codons">\n<h2>Codons</h2>\n<p>{html_text(words)}</p>\n{table}</section>\n'


def _of_kmers(kmers: pa.Table) -> str:
    parts = ['<section id="kmers">\n<h2>K-mers</h2>\n']
    for layer in dict.fromkeys(kmers["layer"].to_pylist()):
        here = kmers.filter(pc.equal(kmers["layer"], layer))
        parts.append(f"<h3>Layer {html_text(layer)}: rows that say most</h3>\n<p>{_ROWS}</p>\n")
        parts.append(html_table(["k-mer", "norm of its value"], _largest(here, ["kmer", "value_norm"], "value_norm")))
        met = here.filter(pc.is_valid(here["contribution"]))
        if met.num_rows:
            names = ["kmer", "occurrences", "contribution", "mean", "standard_error"]
            parts.append(f"<h3>Layer {html_text(layer)}: k-mers that matter in the sequences</h3>\n<p>{_SHARES}</p>\n")
            headings = ["k-mer", "places", "contribution", "mean of a sequence", "standard error"]
            parts.append(html_table(headings, _largest(met, names, "contribution")))
    return "".join([*parts, "</section>\n"])


_ROWS = "What each k-mer alone adds to the hidden state where the gate is open. Rare k-mers were trained little."
_SHARES = "Shares in the norm of what the memory added, summed over all places."


def _largest(table: pa.Table, names: list[str], by: str) -> Iterator[list[Any]]:
    order = np.argsort(-np.abs(table[by].to_numpy()), kind="stable")[:MOST_KMERS]
    for row in table.take(pa.array(order)).select(names).to_pylist():
        yield ["" if row[name] is None else row[name] for name in names]
