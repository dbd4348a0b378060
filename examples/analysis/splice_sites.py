"""What a model makes of splice sites: each base's surprisal, and what the memory adds, around GT and AG.

    python splice_sites.py --fasta chr9.fa.gz --gtf chr9.gtf.gz --output splice_sites

Donors (GT) and acceptors (AG) of the introns in a GTF file are put beside decoys: the same two bases on the same
strand of the same gene, with a similar share of G and C, and 100 bases or more from what is a site in any transcript.
Every sequence is read in the direction of transcription, with the bases before it as context, so a causal model knows
what is before a base and nothing behind it. Writes `splice_sites.json` and `splice_sites.svg`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gengram

try:
    from gengram.evaluation.metrics import evaluate
except ImportError as error:
    sys.exit(f"{sys.argv[0]} needs {error.name}: pip install -e '.[evaluation]' in the root of the repository")

from gengram.inference.likelihood import next_token_log_probabilities
from gengram.inference.loaded_model import load_model
from gengram.sequences.alphabet import BASES, reverse_complement
from gengram.sequences.annotation import Transcript, read_transcripts
from gengram.sequences.fasta import read_fasta
from gengram.support.bootstrap import bootstrap
from gengram.support.figures import pyplot, write_figure
from gengram.support.machine import describe_machine
from gengram.support.progress import progress_bar
from gengram.support.whole_output import whole_folder

MOTIFS = {"donor": "GT", "acceptor": "AG"}
# Bases of a site's score from the motif's first on: those of MaxEntScan (Yeo & Burge 2004, J Comput Biol 11:377).
SCORED = {"donor": (-3, 6), "acceptor": (-18, 5)}
APART = 100  # bases between a decoy and any site


@dataclass(frozen=True)
class Site:
    """The first base of a GT or AG, as it is transcribed; `place` counts on the strand that is read."""

    record: str
    strand: str
    place: int


def oriented(sequence: str, strand: str) -> str:
    return sequence if strand == "+" else reverse_complement(sequence)


def site_places(transcript: Transcript, kind: str, length: int) -> Iterator[int]:
    """First base of each GT or AG of a transcript, on the strand that is read."""
    for base in transcript.donors if kind == "donor" else transcript.acceptors:
        place = base if transcript.strand == "+" else length - 1 - base
        yield place if kind == "donor" else place - 1  # the G of AG is the intron's last base


def pairs(
    sequences: dict[str, str], transcripts: Sequence[Transcript], kind: str, before: int, behind: int
) -> list[tuple[Site, Site]]:
    """Each site that has its GT or AG, and its decoy; without room around it or without a decoy it is left out."""
    motif, result = MOTIFS[kind], []
    for record, sequence in sequences.items():
        for strand in "+-":
            text = oriented(sequence, strand)
            here = [t for t in transcripts if t.record == record and t.strand == strand]
            any_site = np.array(
                sorted({p for t in here for name in MOTIFS for p in site_places(t, name, len(text))}), dtype=np.int64
            )
            used: set[int] = set()
            done: set[int] = set()
            for transcript in here:
                low, high = transcript.exons[0][0], transcript.exons[-1][1]
                if strand == "-":
                    low, high = len(text) - high, len(text) - low
                for place in site_places(transcript, kind, len(text)):
                    if place in done or text[place : place + 2] != motif or not has_room(text, place, before, behind):
                        continue
                    done.add(place)
                    decoy = nearest_decoy(text, place, motif, (low, high), any_site, used, (before, behind))
                    if decoy is not None:
                        used.add(decoy)
                        result.append((Site(record, strand, place), Site(record, strand, decoy)))
    return result


def is_exon(site: Site, sequences: dict[str, str], transcripts: Sequence[Transcript]) -> bool:
    """Whether the first base of a GT or AG lies in an exon of any transcript of its strand."""
    base = site.place if site.strand == "+" else len(sequences[site.record]) - 1 - site.place
    here = [t for t in transcripts if (t.record, t.strand) == (site.record, site.strand)]
    return any(start <= base < end for t in here for start, end in t.exons)


def has_room(text: str, place: int, before: int, behind: int) -> bool:
    around = text[place - before : place + behind] if place >= before else ""
    return len(around) == before + behind and set(around) <= set(BASES)


def gc_share(text: str, place: int) -> float:
    around = text[place - 50 : place + 50]
    return (around.count("G") + around.count("C")) / len(around)


def nearest_decoy(
    text: str,
    place: int,
    motif: str,
    gene: tuple[int, int],
    any_site: np.ndarray,
    used: set[int],
    room: tuple[int, int],
) -> int | None:
    """Of the ten nearest candidates within 0.05 of the site's share of G and C, the one with the most similar one."""
    candidates: list[int] = []
    found = text.find(motif, gene[0], gene[1])
    while found >= 0:
        if found not in used and np.abs(any_site - found).min() >= APART and has_room(text, found, *room):
            candidates.append(found)
        found = text.find(motif, found + 1, gene[1])
    wanted = gc_share(text, place)
    similar = [c for c in candidates if abs(gc_share(text, c) - wanted) <= 0.05]
    nearest = sorted(similar, key=lambda c: abs(c - place))[:10]
    return min(nearest, key=lambda c: abs(gc_share(text, c) - wanted)) if nearest else None


@torch.inference_mode()
def profiles(model: Any, tokenizer: Any, texts: list[str], shown: int, batch_size: int = 16) -> dict[str, np.ndarray]:
    """Of the last `shown` bases of each text: surprisal in bits, and of a Gengram model what the memory does.

    Gate and residual's norm are means over the layers with a memory; the latter in units of its mean over all texts.
    """
    has_memory = bool(getattr(model.config, "memory_layers", None))
    extra = dict(output_memory_gates=True, output_memory_residual_norms=True) if has_memory else {}
    found: dict[str, list[np.ndarray]] = {}
    for start in progress_bar("reading", "batch", over=range(0, len(texts), batch_size)):
        ids = tokenizer(texts[start : start + batch_size], return_tensors="pt")["input_ids"]
        outputs = model(input_ids=ids, **extra)
        values = {"surprisal": -next_token_log_probabilities(outputs.logits, ids) / np.log(2)}
        if has_memory:
            values["memory gate"] = torch.stack(outputs.memory_gates).mean(0)
            values["memory residual"] = torch.stack(outputs.memory_residual_norms).mean(0)
        for name, value in values.items():
            found.setdefault(name, []).append(value[:, -shown:].float().numpy())
    result = {name: np.concatenate(parts) for name, parts in found.items()}
    if "memory residual" in result:
        result["memory residual"] = result["memory residual"] / result["memory residual"].mean()
    return result


def mean_and_interval(values: np.ndarray) -> np.ndarray:
    """Mean over rows and its 95 % bootstrap interval: (3, columns)."""
    return bootstrap(lambda rows: values[rows].mean(0), len(values)).round(4)


def site_scores(values: np.ndarray, kind: str, flank: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the scored bases without GT or AG itself, which decoys have too; and that less the mean of the others.

    Genes have regions that are easier to predict than others; the second score is how a site differs from its own.
    """
    first, last = SCORED[kind]
    scored = [flank + offset for offset in range(first, last) if offset not in (0, 1)]
    others = [column for column in range(values.shape[1]) if not first <= column - flank < last]
    mean = values[:, scored].mean(1)
    return mean, mean - values[:, others].mean(1)


def auc_with_interval(scores: np.ndarray, half: int) -> list[float]:
    """Chance that a site's score is above a decoy's, and its 95 % bootstrap interval."""
    found = evaluate(np.repeat([1, 0], half), np.stack([-scores, scores], 1), ("auc",))["auc"]
    return [found.value, found.low, found.high]


def analyse(
    model: Any, tokenizer: Any, sequences: dict[str, str], transcripts: Sequence[Transcript], options: Any
) -> dict:
    results = {}
    for kind in MOTIFS:
        chosen = pairs(sequences, transcripts, kind, options.context + options.flank, options.flank)
        if len(chosen) < 10:
            raise ValueError(
                f"expected at least 10 {kind}s with a decoy, got {len(chosen)}; is the GTF of this FASTA?"
            )
        texts = []
        for site in [site for pair in zip(*chosen, strict=True) for site in pair]:
            text = oriented(sequences[site.record], site.strand)
            texts.append(text[site.place - options.context - options.flank : site.place + options.flank])
        found = profiles(model, tokenizer, texts, 2 * options.flank)
        half = len(chosen)
        scores = {name: site_scores(values, kind, options.flank) for name, values in found.items()}
        curves = {
            name: {
                "sites": mean_and_interval(values[:half]).tolist(),
                "decoys": mean_and_interval(values[half:]).tolist(),
                "sites minus decoys": mean_and_interval(values[:half] - values[half:]).tolist(),
            }
            for name, values in found.items()
        }
        gc = [gc_share(text, len(text) - options.flank) for text in texts]
        results[kind] = {
            "pairs": half,
            "decoys_in_exons": sum(is_exon(decoy, sequences, transcripts) for _, decoy in chosen),
            "gc_share": {"sites": float(np.mean(gc[:half])), "decoys": float(np.mean(gc[half:]))},
            "scored_bases": SCORED[kind],
            "means_of_scored_bases": {
                name: {"sites": float(mean[:half].mean()), "decoys": float(mean[half:].mean())}
                for name, (mean, _) in scores.items()
            },
            "auc": {
                name: {"scored bases": auc_with_interval(mean, half), "less others": auc_with_interval(contrast, half)}
                for name, (mean, contrast) in scores.items()
            },
            "curves": curves,
        }
    return results


def draw(results: dict[str, Any], flank: int, path: Path) -> None:
    """One column per kind of site, one row per quantity; bands are 95 % bootstrap intervals of the mean."""
    quantities = list(results["donor"]["curves"])
    labels = {
        "surprisal": "surprisal, bits",
        "memory gate": "memory gate",
        "memory residual": "norm of the memory's residual\n(1: mean of all bases)",
    }
    figure, axes = pyplot().subplots(
        len(quantities), 2, figsize=(11, 2.6 * len(quantities)), sharex=True, squeeze=False, constrained_layout=True
    )
    offsets = np.arange(-flank, flank)
    for column, (kind, found) in enumerate(results.items()):
        for row, quantity in enumerate(quantities):
            axis = axes[row, column]
            for which, colour in (("decoys", "tab:gray"), ("sites", "tab:red")):
                mean, low, high = np.array(found["curves"][quantity][which])
                axis.plot(offsets, mean, color=colour, label=which, linewidth=1.2)
                axis.fill_between(offsets, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.axvline(0, color="black", linewidth=0.5, linestyle=":")
            axis.set_ylabel(labels.get(quantity, quantity))
        axes[0, column].set_title(f"{kind}s ({MOTIFS[kind]}), {found['pairs']} and as many decoys")
        axes[-1, column].set_xlabel(f"bases from the first of {MOTIFS[kind]}, in the direction of transcription")
    axes[0, 0].legend()
    write_figure(path, figure)


def without_folders(value: Any) -> Any:
    """An option as it is recorded: of a path on this machine only the name."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_dir())
    return Path(value).name if is_path else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(gengram.DEFAULT_MODEL), help="folder or Hub id; gengram-mini by default"
    )
    parser.add_argument("--fasta", type=Path, required=True, help="sequences, plain or gzip")
    parser.add_argument("--gtf", type=Path, required=True, help="their genes")
    parser.add_argument("--context", type=int, default=512, help="bases read before those shown")
    parser.add_argument("--flank", type=int, default=60, help="bases shown on either side")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    if options.flank < max(-first for first, _ in SCORED.values()):
        parser.error("--flank must be at least 18, the bases that are scored")
    sequences = {name: sequence.upper() for name, sequence in read_fasta(options.fasta)}
    transcripts = read_transcripts(options.gtf)
    loaded = load_model(options.model, "causal", dtype="auto", device="cpu")
    with whole_folder(options.output) as folder:
        results = analyse(loaded.model, loaded.tokenizer, sequences, transcripts, options)
        described = {name: without_folders(value) for name, value in vars(options).items()}
        record = {"options": described, "machine": describe_machine()}
        (folder / "splice_sites.json").write_text(json.dumps({**record, "results": results}) + "\n")
        draw(results, options.flank, folder / "splice_sites.svg")
    for kind, found in results.items():
        for name, auc in found["auc"].items():
            means = found["means_of_scored_bases"][name]
            print(
                f"{found['pairs']} {kind}s, {name}: {means['sites']:.3f}, decoys {means['decoys']:.3f}; AUC "
                "{:.3f} ({:.3f} to {:.3f})".format(*auc["scored bases"])
                + ", less the bases around {:.3f} ({:.3f} to {:.3f})".format(*auc["less others"])
            )


if __name__ == "__main__":
    main()
