"""What a model's memory learned: the questions of the paper's figures, with decoys, permutations and intervals.

    python what_it_learned.py --fasta chr9.fa.gz --gtf chr9.gtf.gz --output what_it_learned \
        --yeast yeast.fa.gz --yeast-gtf yeast.gtf.gz --tata tata.bed

- Readiness, how early the model knows its prediction: KL(final, layer) by the logit lens in nats; of a twin, too.
- Whether rows of reverse complements are alike: cosine within pairs, beside partners of the same share of G and C.
- Whether rows of codons know amino acids: ARI and NMI of clusters of codons, beside permuted labels.
- Whether the memory sees elements: AUC of gate and residual at start and stop codons, poly-A signals, TATA boxes and
  CpG islands against decoys, the same letters elsewhere, as near and with as much G and C as can be.

Splice sites have a script of their own, `splice_sites.py`. Writes `what_it_learned.json` and `what_it_learned.svg`.
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
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from splice_sites import auc_with_interval, gc_share, has_room, nearest_decoy, oriented, profiles
except ImportError as error:
    sys.exit(f"{sys.argv[0]} needs {error.name}: pip install -e '.[evaluation]' in the root of the repository")

from gengram.inference.explanation import memories_by_layer
from gengram.inference.loaded_model import load_model
from gengram.inference.logit_lens import last_norm
from gengram.sequences.alphabet import BASES, reverse_complement
from gengram.sequences.annotation import Gene, read_genes
from gengram.sequences.fasta import read_fasta
from gengram.sequences.intervals import read_bed
from gengram.support.bootstrap import bootstrap
from gengram.support.figures import pyplot, write_figure
from gengram.support.machine import describe_machine
from gengram.support.whole_output import whole_folder

CODE = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"  # of codons in the order of ACGT
STOPS = ("TAA", "TAG", "TGA")
LONGEST_SIZE = 8  # of k-mers whose symmetry is tested
ISLAND = 200  # bases
REACH = 8  # bases behind an element that still hold its letters in their window

Element = tuple[str, int, str]  # strand, place on it, its letters


def kmers_of(size: int) -> list[str]:
    return ["".join(letters) for letters in itertools.product(BASES, repeat=size)]


def rows_of(memory: Any, kmers: Sequence[str]) -> np.ndarray:
    """Rows of k-mers less their mean, each of length 1: (k-mers, width)."""
    index = list(memory.config.ngram_sizes).index(len(kmers[0]))
    digits = np.array([[BASES.index(letter) for letter in kmer] for kmer in kmers])
    rows = memory.embeddings[index].weight.detach().double().numpy()
    rows = rows[digits @ 5 ** np.arange(len(kmers[0]) - 1, -1, -1)]
    rows = rows - rows.mean(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def symmetry(memory: Any, size: int, permutations: int) -> dict[str, Any]:
    """How alike the rows of reverse complements are, beside partners with as many G and C, by a permutation test."""
    kmers = kmers_of(size)
    place = {kmer: index for index, kmer in enumerate(kmers)}
    pairs = np.array([(place[kmer], place[other]) for kmer in kmers if kmer < (other := reverse_complement(kmer))])
    rows, generator = rows_of(memory, kmers), np.random.default_rng(0)
    content = np.array([kmer.count("G") + kmer.count("C") for kmer in kmers])[pairs[:, 0]]
    classes = [np.flatnonzero(content == value) for value in np.unique(content)]
    own = (rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(1)
    means, others = [], []
    for _ in range(permutations):
        partner = np.arange(len(pairs))
        for members in classes:
            partner[members] = generator.permutation(members)
        others.append((rows[pairs[:, 0]] * rows[pairs[partner, 1]]).sum(1))
        means.append(others[-1].mean())
        others = others[-10:]
    spread = np.concatenate(others).std()
    return {
        "pairs": len(pairs),
        "cosine_within_pairs": bootstrap(lambda chosen: own[chosen].mean(), len(own)).round(4).tolist(),
        "cosine_of_matched_partners": [round(float(value), 4) for value in (np.mean(means), *_middle(means))],
        "effect_size": bootstrap(lambda chosen: (own[chosen].mean() - np.mean(means)) / spread, len(own))
        .round(3)
        .tolist(),
        "p_value": (1 + int((np.array(means) >= own.mean()).sum())) / (1 + permutations),
    }


def _middle(values: Sequence[float]) -> list[float]:
    return np.percentile(values, [2.5, 97.5]).tolist()


def codons(memory: Any, permutations: int) -> dict[str, Any]:
    """How well clusters of the rows of codons agree with labels, beside permuted labels."""
    kmers, generator = kmers_of(3), np.random.default_rng(0)
    rows = rows_of(memory, kmers)
    labels = {
        "amino acid": list(CODE),
        "first two bases": [kmer[:2] for kmer in kmers],
        "G and C": [kmer.count("G") + kmer.count("C") for kmer in kmers],
    }
    result = {}
    for name, label in labels.items():
        _, numbers = np.unique(label, return_inverse=True)
        found = AgglomerativeClustering(len(set(numbers)), metric="cosine", linkage="average").fit_predict(rows)
        for score, function in (("ARI", adjusted_rand_score), ("NMI", normalized_mutual_info_score)):
            value = function(numbers, found)
            by_chance = [function(generator.permutation(numbers), found) for _ in range(permutations)]
            result[f"{score}, {name}"] = {
                "value": round(float(value), 4),
                "by_chance": [round(number, 4) for number in _middle(by_chance)],
                "p_value": (1 + int((np.array(by_chance) >= value).sum())) / (1 + permutations),
            }
    return result


@torch.inference_mode()
def readiness(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[float]]:
    """KL(final, layer) in nats by the logit lens: of each layer's output the mean and its bootstrap interval."""
    norm, head = last_norm(model), model.get_output_embeddings()
    found: list[list[float]] = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        outputs = model(input_ids=ids, output_hidden_states=True)
        final = outputs.logits.double().log_softmax(-1)
        row = []
        for states in outputs.hidden_states[:-1]:
            layer = head(norm(states)).double().log_softmax(-1)
            row.append(float((final.exp() * (final - layer)).sum(-1).mean()))
        found.append(row)
    values = np.array(found)  # (texts, layers)
    return bootstrap(lambda rows: values[rows].mean(0), len(values)).round(4).T.tolist()


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


def element_scores(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], scored: int) -> dict[str, Any]:
    """AUC of the means over the last `scored` bases of gate, residual and surprisal, elements against decoys."""
    texts = [text for which in (0, 1) for text in (pair[which] for pair in pairs)]
    by_length: dict[str, np.ndarray] = {}
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for _, group in itertools.groupby(order, key=lambda index: len(texts[index])):
        members = list(group)
        for name, values in profiles(model, tokenizer, [texts[index] for index in members], scored).items():
            by_length.setdefault(name, np.zeros(len(texts)))[members] = values.mean(1)
    gc = [gc_share(text, len(text) - 50) for text in texts]
    return {
        "pairs": len(pairs),
        "gc_share": [round(float(np.mean(half)), 4) for half in (gc[: len(pairs)], gc[len(pairs) :])],
        "auc": {
            name: [round(value, 4) for value in auc_with_interval(values, len(pairs))]
            for name, values in by_length.items()
        },
    }


def analyse(options: Any) -> dict[str, Any]:
    loaded = load_model(options.model, "causal", dtype="auto", device="cpu")
    model, tokenizer = loaded.model.float(), loaded.tokenizer
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
    starts = np.linspace(0, len(text) - options.length, options.texts, dtype=int)
    texts = [text[start : start + options.length] for start in starts]
    texts = [piece for piece in texts if set(piece) <= set(BASES)]
    results: dict[str, Any] = {"readiness": {"model": readiness(model, tokenizer, texts)}}
    if options.twin is not None:
        twin = load_model(options.twin, "causal", dtype="auto", device="cpu")
        results["readiness"]["twin"] = readiness(twin.model.float(), twin.tokenizer, texts)
    results["symmetry"], results["codons"] = {}, {}
    for layer, memory in memories_by_layer(model).items():
        sizes = [size for size in memory.config.ngram_sizes if 3 <= size <= LONGEST_SIZE]
        results["symmetry"][str(layer)] = {size: symmetry(memory, size, options.permutations) for size in sizes}
        if 3 in memory.config.ngram_sizes:
            results["codons"][str(layer)] = codons(memory, options.permutations)
    results["elements"] = {
        kind: element_scores(model, tokenizer, pairs, ISLAND if kind.startswith("CpG") else REACH)
        for kind, pairs in elements.items()
        if len(pairs) >= 10
    }
    return results


def draw(results: dict[str, Any], path: Path) -> None:
    """Readiness, symmetry and elements, with their intervals."""
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, rows in results["readiness"].items():
        mean, low, high = np.array(rows).T
        axes[0].errorbar(range(len(rows)), mean, [mean - low, high - mean], marker="o", label=name, capsize=3)
    axes[0].set(xlabel="layers read (0: the embedding)", ylabel="KL(final, layer), nats", title="Readiness")
    axes[0].legend()
    for layer, found in results["symmetry"].items():
        value, low, high = np.array([size["effect_size"] for size in found.values()]).T
        error = [value - low, high - value]
        axes[1].errorbar([int(size) for size in found], value, error, marker="o", label=f"layer {layer}", capsize=3)
    axes[1].axhline(0, color="black", linewidth=0.5)
    axes[1].set(xlabel="k", ylabel="effect size", title="Likeness of reverse complements' rows")
    axes[1].legend()
    kinds = list(results["elements"])
    for index, quantity in enumerate(("memory gate", "memory residual")):
        value, low, high = np.array([results["elements"][kind]["auc"][quantity] for kind in kinds]).T
        places = np.arange(len(kinds)) + 0.15 * (2 * index - 1)
        axes[2].errorbar(value, places, xerr=[value - low, high - value], fmt="o", label=quantity, capsize=3)
    axes[2].axvline(0.5, color="black", linewidth=0.5, linestyle=":")
    axes[2].set_yticks(range(len(kinds)), [f"{kind} ({results['elements'][kind]['pairs']})" for kind in kinds])
    axes[2].set(xlabel="AUC against decoys", title="Elements (pairs)")
    axes[2].legend()
    write_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(gengram.DEFAULT_MODEL), help="folder or Hub id; gengram-mini by default"
    )
    parser.add_argument("--twin", help="the same model trained without its memory, for readiness")
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
    torch.set_num_threads(1)
    with whole_folder(options.output) as folder:
        results = analyse(options)
        described = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
        record = {"options": described, "machine": describe_machine(), "results": results}
        (folder / "what_it_learned.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(results, folder / "what_it_learned.svg")
    for name, rows in results["readiness"].items():
        print(f"readiness of the {name}: " + ", ".join(f"{mean:.2f}" for mean, _, _ in rows))
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
