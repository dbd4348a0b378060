"""
Variants per second: `gengram score`'s engine beside the plain loop of four forward passes per variant.

The loop tokenizes a window, reads it, and sums log P of its bases: for both alleles on both strands, one after the
other, without gradients. The engine (`gengram.inference.variant_effects`) gets the same variants, model and threads.
Both take turns in one run, and their scores are compared. Wall time and the processor's time are measured: on a
machine that others use, too, the second is the one to look at. Two kinds of work:

- substitutions: of 1000 Genomes on chromosome 20, each in the middle of a window of its own;
- saturation: all substitutions of the bases in the middle of one window.

    python benchmarks/variant_scoring.py [--contexts 64 128 256 512] [--variants 96] [--rounds 5]
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gengram
from gengram.inference.effects import Change
from gengram.inference.window_effects import WindowEffects
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.genome import open_genome
from gengram.sequences.variant_files import read_variants
from gengram.sequences.variants import variant_windows
from gengram.support.machine import describe_machine

SHARED = Path(os.environ.get("GENGRAM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
DATA = SHARED / "data" / "genome_human" / "raw"
RESULTS = Path(__file__).parent / "results" / "variant_scoring.json"
MOST_APART = 1e-4  # nats


def substitutions(count: int, context: int) -> list[Change]:
    """Windows of substitutions that are spread over the file."""
    with open_genome(DATA / "chr20_z.hs37d5.fa.gz") as genome:
        variants = [
            variant
            for record in read_variants(DATA / "chr20_z.1000G_phase3.vcf.gz")
            for variant in record.variants()
            if len(variant.reference) == len(variant.alternative) == 1
        ]
        chosen = variants[:: len(variants) // count][:count]
        return [Change(*variant_windows(genome, *variant, context)) for variant in chosen]


def saturation(count: int, context: int) -> list[Change]:
    """All substitutions of the bases in the middle of one window."""
    with open_genome(DATA / "chr20_z.hs37d5.fa.gz") as genome:
        window = genome.fetch("z", 500_000, 500_000 + context)
    first = context // 2 - count // 6
    return [
        Change(window, window[:place] + base + window[place + 1 :], place)
        for place in range(first, first + count // 3)
        for base in "ACGT"
        if base != window[place]
    ]


class PlainLoop:
    """Four forward passes per variant."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def log_likelihood(self, window: str) -> float:
        ids = self.tokenizer(window, return_tensors="pt")["input_ids"].to(self.model.device)
        chances = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        return chances.gather(1, ids[0, 1:, None]).sum().item()

    @torch.inference_mode()
    def __call__(self, changes: Sequence[Change]) -> list[float]:
        scores = []
        for change in changes:
            windows = (change.reference, change.alternative)
            forward, reverse = (
                self.log_likelihood(after) - self.log_likelihood(before)
                for before, after in (windows, tuple(map(reverse_complement, windows)))
            )
            scores.append((forward + reverse) / 2)
        return scores


def timed(function: Callable, changes: Sequence[Change], device: str) -> tuple[dict[str, float], list[float]]:
    """Variants per second, by both clocks, and the scores."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    starts = {name: clock() for name, clock in clocks.items()}
    scores = function(changes)
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: len(changes) / (clock() - starts[name]) for name, clock in clocks.items()}, scores


def compare(plain: PlainLoop, effects: WindowEffects, changes: list[Change], looped: int, rounds: int) -> dict:
    """Variants per second of both, in turns; the loop gets the first `looped` variants only."""

    def engine(chosen: Sequence[Change]) -> list[float]:
        return [found.mean("llr") for found in effects.of(chosen)]

    device = effects.model.device.type
    for function in (plain, engine):
        function(changes[:4])
    loops, engines, apart = [], [], 0.0
    for _ in range(rounds):
        rates, expected = timed(plain, changes[:looped], device)
        loops.append(rates)
        rates, found = timed(engine, changes, device)
        engines.append(rates)
        apart = max(apart, *(abs(a - b) for a, b in zip(expected, found, strict=False)))
    if apart > MOST_APART:
        raise AssertionError(f"scores are {apart} nats apart")
    result: dict[str, Any] = {"largest_difference_in_nats": apart}
    for clock in ("wall", "processor"):
        ratios = [ours[clock] / loop[clock] for ours, loop in zip(engines, loops, strict=True)]
        result[clock] = {
            "variants_per_second_of_the_loop": statistics.median(rates[clock] for rates in loops),
            "variants_per_second_of_the_engine": statistics.median(rates[clock] for rates in engines),
            "times_faster": statistics.median(ratios),
            "times_faster_in_each_round": ratios,
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=gengram.DEFAULT_MODEL)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--variants", type=int, default=96)
    parser.add_argument("--looped", type=int, default=12, help="variants that the plain loop gets in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(arguments.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    plain, effects = PlainLoop(model, tokenizer), WindowEffects(model, tokenizer)
    machine = describe_machine() | {"load_average": os.getloadavg()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows = []
    for (kind, make), context in itertools.product(
        (("substitutions", substitutions), ("saturation", saturation)), arguments.contexts
    ):
        changes = make(arguments.variants, context)
        found = compare(plain, effects, changes, arguments.looped, arguments.rounds)
        rows.append({"work": kind, "context": context, **found})
        for clock in ("wall", "processor"):
            loop, ours, ratio, _ = found[clock].values()
            print(f"{kind:14} {context:5} bases, {clock:9} loop {loop:8.1f}/s, engine {ours:8.1f}/s, {ratio:.2f}x")
    arguments.output.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
