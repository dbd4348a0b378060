"""What a model's memory learned: the questions of the paper's figures, with decoys, permutations and intervals.

    python what_it_learned.py --fasta chr9.fa.gz --gtf chr9.gtf.gz --output what_it_learned \
        --yeast yeast.fa.gz --yeast-gtf yeast.gtf.gz --tata tata.bed

- Readiness, how early the model knows its prediction: KL(final, layer) by the logit lens in nats. With `--twin`, the
  same model trained without its memory, also the difference over the same texts, and that of the surprisal: this is
  the memory's doing.
- Whether rows of reverse complements are alike: cosine within pairs, beside partners of the same share of G and C.
- Whether rows of codons know amino acids: ARI and NMI of clusters of codons, beside permuted labels.
- Whether the memory sees elements: AUC of gate and residual at start and stop codons, poly-A signals, TATA boxes and
  CpG islands against decoys, the same letters elsewhere, as near and with as much G and C as can be. Of the residual
  also without its window: the same memory reads only the k-mers that end at a base, in place of means over its window.

Splice sites have a script of their own, `splice_sites.py`. Writes `what_it_learned.json` and `.svg`, and
base by base around the elements `profiles.json` and `.svg`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gengram

try:
    import sklearn  # noqa: F401
    from splice_sites import (
        auc_with_interval,
        gc_share,
        has_room,
        mean_and_interval,
        nearest_decoy,
        oriented,
        profiles,
        without_folders,
    )
except ImportError as error:
    sys.exit(f"{sys.argv[0]} needs {error.name}: pip install -e '.[evaluation]' in the root of the repository")

from gengram.inference.explanation import memories_by_layer, residual_norms
from gengram.inference.jobs.explain_model import summaries
from gengram.inference.jobs.explain_model_report import draw_readiness, draw_symmetry
from gengram.inference.loaded_model import load_model
from gengram.inference.readiness import random_pieces, readiness
from gengram.inference.table_structure import codon_structure, sizes_of, symmetry
from gengram.sequences.alphabet import BASES
from gengram.sequences.annotation import Gene, read_genes
from gengram.sequences.fasta import read_fasta
from gengram.sequences.intervals import read_bed
from gengram.support.figures import pyplot, write_figure
from gengram.support.machine import describe_machine
from gengram.support.whole_output import whole_folder

STOPS = ("TAA", "TAG", "TGA")
ISLAND = 200  # bases
REACH = 8  # bases behind an element that still hold its letters in their window
SHOWN = 48  # bases of a profile, the last REACH of them behind the element
WINDOWLESS = "memory residual, no window"

Element = tuple[str, int, str]  # strand, place on it, its letters


def codon_elements(text: str, genes: Iterable[Gene]) -> dict[str, list[Element]]:
    """First and last codons of genes, where they are what they should be, and AATAAA at the end of genes."""
    found: dict[str, list[Element]] = {"start codon": [], "stop codon": [], "poly-A signal": []}
    texts = {strand: oriented(text, strand) for strand in "+-"}
    for gene in genes:
        if not gene.coding or gene.strand not in texts:
            continue
        here, length = texts[gene.strand], len(text)
        spans = [(start, end) if gene.strand == "+" else (length - end, length - start) for start, end in gene.coding]
        first, last = min(spans)[0], max(end for _, end in spans) - 3
        if here[first : first + 3] == "ATG":
            found["start codon"].append((gene.strand, first, "ATG"))
        if here[last : last + 3] in STOPS:
            found["stop codon"].append((gene.strand, last, here[last : last + 3]))
        end = gene.end if gene.strand == "+" else length - gene.start
        signal = here.rfind("AATAAA", max(0, end - 40), end)
        if signal >= 0:
            found["poly-A signal"].append((gene.strand, signal, "AATAAA"))
    return found


def tata_boxes(sequences: dict[str, str], bed: Path) -> dict[str, list[Element]]:
    """The first six bases of TATA boxes, by record."""
    found: dict[str, list[Element]] = {}
    strands = {(name, strand): oriented(text, strand) for name, text in sequences.items() for strand in "+-"}
    for box in read_bed(bed):
        record = box.record if box.record in sequences else box.record.removeprefix("chr")
        text = strands[record, box.strand]
        place = box.start if box.strand == "+" else len(text) - box.end
        word = text[place : place + 6]
        if word.startswith("TATA"):
            found.setdefault(record, []).append((box.strand, place, word))
    return found


def with_decoys(text: str, elements: Sequence[Element], context: int, most: int) -> list[tuple[str, str]]:
    """Pairs of texts that end `REACH` bases behind an element and behind its decoy."""
    result, texts = [], {strand: oriented(text, strand) for strand in "+-"}
    order = np.random.default_rng(0).permutation(len(elements))
    used: dict[str, set[int]] = {"+": set(), "-": set()}
    for strand, place, word in (elements[index] for index in order):
        here, room = texts[strand], (context, len(word) + REACH)
        sites = np.array([site for other, site, _ in elements if other == strand])
        if len(result) == most or not has_room(here, place, *room):
            continue
        around = (max(context, place - 50_000), min(len(here), place + 50_000))
        decoy = nearest_decoy(here, place, word, around, sites, used[strand], room)
        if decoy is not None:
            used[strand].add(decoy)
            ends = (at + len(word) + REACH for at in (place, decoy))
            result.append(tuple(here[end - context - len(word) - REACH : end] for end in ends))
    return result


def add_pairs(
    elements: dict[str, list[tuple[str, str]]], kind: str, text: str, found: Sequence[Element], options: Any
) -> None:
    """Add elements of a text with their decoys, up to so many of a kind."""
    pairs = elements.setdefault(kind, [])
    if len(pairs) < options.most:
        pairs += with_decoys(text, found, options.context, options.most - len(pairs))


def add_genes(
    elements: dict[str, list[tuple[str, str]]], species: str, sequences: dict[str, str], gtf: Path, options: Any
) -> None:
    """Add the codons and signals of genes, record by record until there are enough."""
    for record, text in sequences.items():
        for kind, found in codon_elements(text, read_genes(gtf, record, 0, len(text))).items():
            add_pairs(elements, f"{kind} ({species})", text, found, options)
        kinds = [name for name in elements if species in name]
        if all(len(elements[kind]) >= options.most for kind in kinds if "signal" not in kind):
            break


def islands(text: str, context: int, most: int) -> list[tuple[str, str]]:
    """CpG islands (Gardiner-Garden and Frommer 1987) beside pieces of as much G and C with few CpG."""
    found: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for start in range(context, len(text) - ISLAND, ISLAND):
        piece = text[start : start + ISLAND]
        if set(piece) <= set(BASES) and set(text[start - context : start]) <= set(BASES):
            c, g = piece.count("C"), piece.count("G")
            ratio = piece.count("CG") * ISLAND / max(1, c * g)
            if (c + g) / ISLAND > 0.5 and (ratio > 0.6 or ratio < 0.4):
                found[ratio > 0.6].append(((c + g) / ISLAND, start))
    result, others = [], list(found[False])
    for share, start in np.random.default_rng(0).permutation(np.array(found[True])).tolist():
        nearest = min(others, key=lambda other: abs(other[0] - share), default=(9.0, 0))
        if len(result) < most and abs(nearest[0] - share) <= 0.02:
            others.remove(nearest)
            result.append(tuple(text[int(at) - context : int(at) + ISLAND] for at in (start, nearest[1])))
    return result


@torch.inference_mode()
def windowless(model: Any, tokenizer: Any, texts: Sequence[str], shown: int) -> np.ndarray:
    """Norm of what the memories would add without windows at the last `shown` bases; 1 is the mean of all texts."""
    layers, found = list(memories_by_layer(model)), []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        norms = [residual_norms(model, ids, layer=layer, has_window=False)[0, -shown:] for layer in layers]
        found.append(torch.stack(norms).mean(0).numpy())
    values = np.stack(found)
    return values / values.mean()


def element_profiles(loaded: Any, pairs: Sequence[tuple[str, str]], shown: int) -> dict[str, np.ndarray]:
    """Values (texts, shown) at the last bases, first of all elements and then of their decoys."""
    texts = [text for which in (0, 1) for text in (pair[which] for pair in pairs)]
    found: dict[str, np.ndarray] = {}
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for _, group in itertools.groupby(order, key=lambda index: len(texts[index])):
        members = list(group)
        here = [texts[index] for index in members]
        values = profiles(loaded.model, loaded.tokenizer, here, shown)
        if "memory residual" in values:
            values[WINDOWLESS] = windowless(loaded.model, loaded.tokenizer, here, shown)
        for name, numbers in values.items():
            found.setdefault(name, np.zeros((len(texts), shown)))[members] = numbers
    return found


def element_scores(pairs: Sequence[tuple[str, str]], found: dict[str, np.ndarray], scored: int) -> dict[str, Any]:
    """AUC of the means over the last `scored` bases, elements against decoys."""
    gc = [gc_share(text, len(text) - 50) for which in (0, 1) for text in (pair[which] for pair in pairs)]
    return {
        "pairs": len(pairs),
        "gc_share": [round(float(np.mean(half)), 4) for half in (gc[: len(pairs)], gc[len(pairs) :])],
        "auc": {
            name: [round(value, 4) for value in auc_with_interval(values[:, -scored:].mean(1), len(pairs))]
            for name, values in found.items()
        },
    }


def curves(found: dict[str, np.ndarray], half: int) -> dict[str, Any]:
    """Mean and interval of each base: of elements, of decoys, and of the difference within pairs."""
    return {
        name: {
            "elements": mean_and_interval(values[:half, -SHOWN:]).tolist(),
            "decoys": mean_and_interval(values[half:, -SHOWN:]).tolist(),
            "elements minus decoys": mean_and_interval(values[:half, -SHOWN:] - values[half:, -SHOWN:]).tolist(),
        }
        for name, values in found.items()
    }


def analyse(options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results, and profiles by kind of element."""
    models = {"model": load_model(options.model, "causal", dtype="auto", device="cpu")}
    if options.twin is not None:
        models["twin"] = load_model(options.twin, "causal", dtype="auto", device="cpu")
    for loaded in models.values():
        loaded.model.float()
    model = models["model"].model
    sequences = {name: text.upper() for name, text in read_fasta(options.fasta)}
    name, text = next(iter(sequences.items()))
    elements: dict[str, list[tuple[str, str]]] = {}
    add_genes(elements, "human", {name: text}, options.gtf, options)
    elements["CpG island (human)"] = islands(text, options.context, options.most)
    if options.yeast is not None:
        yeast = {record: letters.upper() for record, letters in read_fasta(options.yeast)}
        add_genes(elements, "yeast", yeast, options.yeast_gtf, options)
        for record, found in tata_boxes(yeast, options.tata).items():
            add_pairs(elements, "TATA box (yeast)", yeast[record], found, options)
    texts = random_pieces(options.fasta, options.texts, options.length)
    results: dict[str, Any] = {"symmetry": {}, "codons": {}, "elements": {}}
    results["readiness"] = summaries({name: readiness(loaded, texts) for name, loaded in models.items()})
    for layer, memory in memories_by_layer(model).items():
        sizes = [size for size in sizes_of(memory) if size >= 3]
        results["symmetry"][str(layer)] = {str(size): symmetry(memory, size, options.permutations) for size in sizes}
        if 3 in sizes:
            results["codons"][str(layer)] = codon_structure(memory, options.permutations)
    shown = {}
    for kind, pairs in elements.items():
        if len(pairs) < 10:
            continue
        scored = ISLAND if kind.startswith("CpG") else REACH
        found = element_profiles(models["model"], pairs, max(scored, SHOWN))
        if "twin" in models:
            twin = element_profiles(models["twin"], pairs, max(scored, SHOWN))
            found["surprisal of the twin"] = twin["surprisal"]
            found["surprisal less that of the twin"] = found["surprisal"] - twin["surprisal"]
        results["elements"][kind] = element_scores(pairs, found, scored)
        if not kind.startswith("CpG"):  # an island has no place to begin at
            shown[kind] = curves(found, len(pairs))
    return results, shown


def draw(results: dict[str, Any], path: Path) -> None:
    """Readiness, symmetry and elements, with their intervals."""
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4), layout="constrained")
    draw_readiness(axes[0], results["readiness"])
    draw_symmetry(axes[1], results["symmetry"])
    kinds = list(results["elements"])
    shown = ("memory gate", "memory residual", WINDOWLESS)
    for index, quantity in enumerate(shown if kinds else ()):
        value, low, high = np.array([results["elements"][kind]["auc"][quantity] for kind in kinds]).T
        places = np.arange(len(kinds)) + 0.2 * (index - 1)
        axes[2].errorbar(value, places, xerr=[value - low, high - value], fmt="o", label=quantity, capsize=3)
    axes[2].axvline(0.5, color="black", linewidth=0.5, linestyle=":")
    axes[2].set_yticks(range(len(kinds)), [f"{kind} ({results['elements'][kind]['pairs']})" for kind in kinds])
    axes[2].set(xlabel="AUC against decoys", title="Elements (pairs)")
    if kinds:
        axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small")
    write_figure(path, figure)


def draw_profiles(shown: dict[str, Any], path: Path) -> None:
    """Gate and residual, with and without windows, base by base: a row for each kind of element."""
    quantities = ("memory gate", "memory residual", WINDOWLESS)
    figure, axes = pyplot().subplots(
        len(shown), len(quantities), figsize=(13, 2.2 * len(shown)), sharex=True, squeeze=False, layout="constrained"
    )
    places = np.arange(-SHOWN, 0) + REACH + 1
    for row, (kind, found) in enumerate(shown.items()):
        for axis, quantity in zip(axes[row], quantities, strict=True):
            for which, colour in (("decoys", "tab:gray"), ("elements", "tab:red")):
                mean, low, high = np.array(found[quantity][which])
                axis.plot(places, mean, color=colour, label=which, linewidth=1.2)
                axis.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.axvline(0, color="black", linewidth=0.5, linestyle=":")
            axis.set_title(f"{kind}: {quantity}", size=9)
    for axis in axes[-1]:
        axis.set_xlabel("bases from the element's last")
    axes[0, 0].legend()
    write_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(gengram.DEFAULT_MODEL), help="folder or Hub id; gengram-mini by default"
    )
    parser.add_argument("--twin", help="the same model trained without its memory, for what the memory does")
    parser.add_argument("--fasta", type=Path, required=True, help="a sequence that the model was not trained on")
    parser.add_argument("--gtf", type=Path, required=True, help="its genes")
    parser.add_argument("--yeast", type=Path, help="the genome of yeast")
    parser.add_argument("--yeast-gtf", type=Path, help="its genes")
    parser.add_argument("--tata", type=Path, help="its TATA boxes, BED")
    parser.add_argument("--context", type=int, default=200, help="bases read before an element (%(default)s)")
    parser.add_argument("--most", type=int, default=300, help="elements of a kind (%(default)s)")
    parser.add_argument("--texts", type=int, default=40, help="pieces for readiness (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="bases of a piece (%(default)s)")
    parser.add_argument("--permutations", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    if len({path is None for path in (options.yeast, options.yeast_gtf, options.tata)}) > 1:
        parser.error("--yeast, --yeast-gtf and --tata belong together")
    if options.context < SHOWN:
        parser.error(f"--context must be at least {SHOWN}, the bases that are shown")
    torch.set_num_threads(1)
    with whole_folder(options.output) as folder:
        results, shown = analyse(options)
        described = {name: without_folders(value) for name, value in vars(options).items()}
        record = {"options": described, "machine": describe_machine(), "results": results}
        (folder / "what_it_learned.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(results, folder / "what_it_learned.svg")
        if shown:
            (folder / "profiles.json").write_text(json.dumps(shown) + "\n")
            draw_profiles(shown, folder / "profiles.svg")
    for name, values in results["readiness"].items():
        print(f"{name}: " + "{:.4f} bits per base ({:.4f} to {:.4f})".format(*values["bits_per_base"]))
        if "divergence" in values:
            rows = ("{:.2f} ({:.2f} to {:.2f})".format(*row) for row in values["divergence"])
            print(f"readiness of {name}: " + ", ".join(rows))
    for layer, found in results["symmetry"].items():
        for size, values in found.items():
            words = "effect {:.2f} ({:.2f} to {:.2f})".format(*values["effect_size"])
            print(f"layer {layer}, k = {size}: {words}, p = {values['p_value']:.4f}")
    for layer, found in results["codons"].items():
        for name, values in found.items():
            low, high = values["by_chance"]
            print(f"layer {layer}, {name}: {values['value']:.3f} (by chance {low:.3f} to {high:.3f})")
    for kind, found in results["elements"].items():
        for quantity, auc in found["auc"].items():
            print(f"{kind}, {found['pairs']} pairs, {quantity}: AUC " + "{:.3f} ({:.3f} to {:.3f})".format(*auc))


if __name__ == "__main__":
    main()
