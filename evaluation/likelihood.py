"""Bits per base of held-out sequence: language models beside Markov models, on the same bases."""

import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data_preparation.collator import DataCollatorForGenomeModeling
from ..inference.likelihood import IGNORED, next_token_log_probabilities
from ..support.bootstrap import Estimate, estimate
from ..support.progress import progress_bar


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
    collator = DataCollatorForGenomeModeling()
    device = next(model.parameters()).device
    model.eval()
    bits, bases = [], []
    batches = dataset.select_columns("input_ids").with_format("numpy").iter(batch_size)
    for examples in progress_bar(progress, "batch", total=math.ceil(len(dataset) / batch_size), over=batches):
        batch = collator([{"input_ids": row} for row in examples["input_ids"]])
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        labels = batch["labels"].to(device)
        found = next_token_log_probabilities(model(**inputs, use_cache=False).logits, labels)
        bits.append((-found.double().sum(1) / math.log(2)).cpu().numpy())
        bases.append((labels[:, 1:] != IGNORED).sum(1).cpu().numpy())
    return np.concatenate(bits), np.concatenate(bases)


def bits_per_base(bits: np.ndarray, bases: np.ndarray) -> Estimate:
    """Bits per base of examples, each with its sum of bits and its number of bases."""
    return estimate(lambda rows: bits[rows].sum() / bases[rows].sum(), len(bits))
