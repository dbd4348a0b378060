"""Bits per base of held-out sequence: language models beside Markov models, on the same bases."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from ..data_preparation.collator import IGNORED, DataCollatorForGenomeModeling
from ..tokenization.tokenization_gengram import GengramTokenizer


def digits_of(dataset: Dataset, rows_at_once: int = 4096) -> Iterator[np.ndarray]:
    """Examples of `gengram prepare` as digits: 0..3 for A, C, G, T, 4 for other tokens; (length,) each."""
    lookup = np.full(256, 4, dtype=np.uint8)
    lookup[GengramTokenizer().nucleotide_ids[:4]] = range(4)
    for batch in dataset.select_columns("input_ids").with_format("numpy").iter(rows_at_once):
        for row in batch["input_ids"]:
            yield lookup[row]


@torch.inference_mode()
def bits_of_examples(
    model: Any, dataset: Dataset, batch_size: int = 16, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of bits and number of bases of every example by a causal model, without its first token; (examples,) each.

    Args:
        model: a model over the tokens of `GengramTokenizer`.
        dataset: what `gengram prepare` wrote.
        batch_size: examples at once.
        progress: what a bar is named; no bar by default.
    """
    collator = DataCollatorForGenomeModeling(GengramTokenizer())
    device = next(model.parameters()).device
    model.eval()
    bits, bases = [], []
    batches = dataset.select_columns("input_ids").with_format("numpy").iter(batch_size)
    for examples in tqdm(
        batches, total=math.ceil(len(dataset) / batch_size), desc=progress, unit="batch", disable=progress is None
    ):
        batch = collator([{"input_ids": row} for row in examples["input_ids"]])
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:].to(device)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
        )
        bits.append((losses.double().sum(1) / math.log(2)).cpu().numpy())
        bases.append((labels != IGNORED).sum(1).cpu().numpy())
    return np.concatenate(bits), np.concatenate(bases)


def interval_of_mean(bits: np.ndarray, bases: np.ndarray, samples: int = 1000) -> tuple[float, float, float]:
    """Bits per base, and its 95 % percentile interval over bootstrap samples of the examples."""
    drawn = np.random.default_rng(0).integers(len(bits), size=(samples, len(bits)))
    means = bits[drawn].sum(1) / bases[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(bits.sum() / bases.sum()), float(low), float(high)
