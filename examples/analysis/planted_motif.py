"""Whether contributions find the k-mer that decides: a planted motif, beside integrated gradients and mutagenesis.

    python planted_motif.py --output planted_motif

Trains a tiny classifier with a memory on made-up sequences: of class 1 are those that hold the motif once, of class 0
those that hold it with one base changed instead. Then asks four methods which k-mer made class 1, in sequences that
were not trained on, and writes `planted_motif.json` with how often each puts the motif first, how well their values
for each base agree (Pearson's correlation within a sequence, the mean of all), and what they cost.

| method | ranks |
|---|---|
| contributions, by the lens or through all layers | k-mers of all sizes by their share in the class's logit |
| integrated gradients (captum, from a sequence of N) | stretches of the motif's length by the sum of their bases |
| saturation mutagenesis (mean effect of the three changes) | the same |
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gengram
from gengram.support.bootstrap import bootstrap
from gengram.support.machine import describe_machine
from gengram.support.whole_output import whole_folder

try:
    from captum.attr import IntegratedGradients
except ImportError:
    sys.exit("planted_motif.py needs captum: pip install -e '.[explain]' in the root of the repository")

BASES = "ACGT"


def planted(generator: np.random.Generator, count: int, length: int, motif: str) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (count, length) of digits, every second one with the motif, the others with one base of it changed.

    Returns them and where the motif, or what stands for it, begins.
    """
    word = np.array([BASES.index(base) for base in motif])
    found = generator.integers(4, size=(count, length))
    starts = generator.integers(length - len(word) + 1, size=count)
    for row, start in enumerate(starts):
        while True:
            found[row, start : start + len(word)] = word
            if row % 2:
                changed = start + generator.integers(len(word))
                found[row, changed] = (found[row, changed] + generator.integers(1, 4)) % 4
            windows = np.lib.stride_tricks.sliding_window_view(found[row], len(word))
            if (windows == word).all(1).sum() == 1 - row % 2:
                break
            found[row] = generator.integers(4, size=length)
    return found, starts


def new_model(motif: str, length: int, seed: int) -> Any:
    """A classifier of one layer with a memory in front of it, by the largest of each number over the bases."""
    torch.manual_seed(seed)
    config = gengram.GengramConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=0, max_position_embeddings=length, memory_layers=[0],
        memory_ngram_sizes=list(range(1, len(motif) + 1)), memory_embedding_dim=8, memory_window=2 * len(motif),
        classifier_pooling="max", num_labels=2, initializer_range=0.02,
    )  # fmt: skip
    return gengram.GengramForSequenceClassification(config)


def ids_of(digits: np.ndarray, model: Any) -> torch.Tensor:
    return torch.tensor(model.config.memory_token_ids)[torch.tensor(digits)]


def train(model: Any, generator: np.random.Generator, motif: str, length: int, steps: int, batch: int = 64) -> None:
    """Trains in place, on new sequences in every step, so that nothing but the motif can be learned by heart."""
    labels = torch.tensor([1, 0]).repeat(batch // 2)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for _ in range(steps):
        digits, _ = planted(generator, batch, length, motif)
        loss = model(input_ids=ids_of(digits, model), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def class_scores(model: Any, digits: np.ndarray) -> torch.Tensor:
    """Logits of class 1 less those of class 0."""
    pieces = [model(input_ids=piece).logits for piece in ids_of(digits, model).split(256)]
    logits = torch.cat(pieces)
    return logits[:, 1] - logits[:, 0]


def by_contributions(model: Any, digits: np.ndarray, **options: Any) -> list[Any]:
    return [gengram.explain_memory(model, ids_of(row, model), target="class:1", **options) for row in digits]


def first_kmer(explanation: Any) -> str:
    """Of all sizes and places, the one with the largest share in the class."""
    table = explanation.table.group_by(["start", "kmer"]).aggregate([("contribution", "sum")])
    return max(table.to_pylist(), key=lambda kmer: kmer["contribution_sum"])["kmer"]


def by_gradients(model: Any, digits: np.ndarray, steps: int) -> np.ndarray:
    one_hot = gengram.OneHotModel(model, gengram.GengramTokenizer())
    values = []
    for row in digits:
        x = torch.nn.functional.one_hot(torch.tensor(row), 4).T[None].float()
        found = IntegratedGradients(one_hot).attribute(x, torch.zeros_like(x), target=1, n_steps=steps)
        values.append(found.sum(1)[0].detach().numpy())
    return np.array(values)


def by_mutagenesis(model: Any, digits: np.ndarray) -> np.ndarray:
    values = []
    for row in digits:
        changed = np.repeat(row[None], 3 * len(row), axis=0)
        place = np.repeat(np.arange(len(row)), 3)
        changed[np.arange(len(changed)), place] = (row[place] + np.tile([1, 2, 3], len(row))) % 4
        scores = class_scores(model, np.concatenate([row[None], changed]))
        values.append((scores[0] - scores[1:]).view(-1, 3).mean(1).numpy())
    return np.array(values)


def motif_is_first(values: np.ndarray, starts: np.ndarray, length: int) -> list[bool]:
    sums = np.lib.stride_tricks.sliding_window_view(values, length, axis=1).sum(-1)
    return (sums.argmax(1) == starts).tolist()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and seconds of processor time."""
    start = time.process_time()
    return call(), time.process_time() - start


def correlation(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Pearson's correlation within each sequence: mean and its 95 % bootstrap interval."""
    found = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)])
    return bootstrap(lambda rows: found[rows].mean(), len(found)).round(4).tolist()


def share(is_first: list[bool]) -> list[float]:
    found = np.array(is_first)
    return bootstrap(lambda rows: found[rows].mean(), len(found)).round(4).tolist()


def compare(options: Any) -> dict[str, Any]:
    generator = np.random.default_rng(options.seed)
    held_out, starts = planted(generator, 2 * options.sequences, options.length, options.motif)
    model = new_model(options.motif, options.length, options.seed)
    _, seconds = timed(lambda: train(model, generator, options.motif, options.length, options.steps_of_training))
    is_right = ((class_scores(model, held_out) > 0) == torch.tensor([True, False]).repeat(options.sequences)).numpy()
    positive, starts = held_out[::2], starts[::2]
    _, one_pass = timed(lambda: [model(input_ids=ids_of(row, model)[None]) for row in positive])

    methods: dict[str, tuple[np.ndarray, list[bool] | None, float]] = {}
    for name, through_layers in (("by the lens", False), ("through all layers", True)):
        found, duration = timed(
            lambda is_path=through_layers: by_contributions(model, positive, through_layers=is_path)
        )
        values = np.concatenate([each.by_base() for each in found])
        methods[f"contributions {name}"] = (values, [first_kmer(each) == options.motif for each in found], duration)
    gradients, duration = timed(lambda: by_gradients(model, positive, options.steps))
    methods["integrated gradients"] = (gradients, None, duration)
    mutations, duration = timed(lambda: by_mutagenesis(model, positive))
    methods["saturation mutagenesis"] = (mutations, None, duration)
    return {
        "accuracy": float(is_right.mean()),
        "training_seconds": round(seconds, 1),
        "sequences": len(positive),
        "methods": {
            name: {
                "motif_first_among_all_kmers": None if is_first is None else share(is_first),
                "motif_first_by_its_bases": share(motif_is_first(values, starts, len(options.motif))),
                "agreement_with_mutagenesis": correlation(values, mutations),
                "agreement_with_integrated_gradients": correlation(values, gradients),
                "forward_passes": round(duration / one_pass, 1),
            }
            for name, (values, is_first, duration) in methods.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--motif", default="TGACTC", help="(%(default)s)")
    parser.add_argument("--length", type=int, default=40, help="bases of a sequence (%(default)s)")
    parser.add_argument("--steps-of-training", type=int, default=400, help="of 64 new sequences (%(default)s)")
    parser.add_argument("--sequences", type=int, default=200, help="that are explained (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=50, help="of integrated gradients; captum's default (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with whole_folder(options.output) as folder:
        results = compare(options)
        described = {name: value for name, value in vars(options).items() if name != "output"}
        record = {"options": described, "machine": describe_machine(), **results}
        (folder / "planted_motif.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"accuracy {results['accuracy']:.3f} on sequences that were not trained on")
    for name, found in results["methods"].items():
        first = found["motif_first_among_all_kmers"] or found["motif_first_by_its_bases"]
        print(
            f"{name}: motif first in {100 * first[0]:.1f} % ({100 * first[1]:.1f} to {100 * first[2]:.1f}), "
            f"correlation with mutagenesis {found['agreement_with_mutagenesis'][0]:.2f}, with integrated gradients "
            f"{found['agreement_with_integrated_gradients'][0]:.2f}; {found['forward_passes']:.0f} forward passes"
        )


if __name__ == "__main__":
    main()
