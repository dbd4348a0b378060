"""Bits per base of held-out sequence: language models beside Markov models, on the same bases."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data_preparation.collator import DataCollatorForGenomeModeling
from ..data_preparation.prepared_examples import digits_of
from ..inference.base_tokens import BaseTokens
from ..inference.likelihood import IGNORED, next_token_log_probabilities
from ..sequences.alphabet import OTHER
from ..support.bootstrap import Estimate, estimate
from ..support.errors import InputError, quoted
from ..support.input_file import shown_name
from ..support.progress import progress_bar
from .differences import drawn_of
from .evaluated_model import EvaluatedModel
from .markov import MarkovModel
from .suite import LikelihoodTask

_ORIGIN = re.compile(r"(.*):(\d+)-(\d+)\([+-]\)", re.DOTALL)  # see `genome_dataset.features`


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


def bits_per_base(bits: np.ndarray, bases: np.ndarray, places: np.ndarray | None = None) -> Estimate:
    """Bits per base of examples, each with its sum of bits and its number of bases.

    Args:
        bits, bases: (examples,)
        places: (examples,) numbers from 0 of what is drawn together for the interval; by default each example alone.

    Raises:
        ValueError: if there are no bases, or bits are not finite.
    """
    if not bases.sum():
        raise ValueError("expected examples with bases behind their first token, got none.")
    if not np.isfinite(bits).all():
        raise ValueError(
            f"expected finite bits, got others for {int((~np.isfinite(bits)).sum())} of {len(bits)} examples."
        )
    if places is not None:
        bits, bases = np.bincount(places, bits), np.bincount(places, bases)
    with np.errstate(invalid="ignore"):  # a sample of examples may have no bases
        return estimate(lambda rows: bits[rows].sum() / bases[rows].sum(), len(bits))


def places_of(dataset: Dataset) -> np.ndarray | None:
    """Which examples to draw together, because both strands of the same bases say nearly the same of a model.

    Places are parts of records, as long as four examples. Packed examples of the two strands begin at other bases, so
    that now and then one is in the next part.

    Args:
        dataset: what `gengram prepare` wrote.

    Returns:
        (examples,) numbers from 0; None if only forward strands are in it, or it does not say.
    """
    if "origin" not in dataset.column_names:
        return None
    first = [origins[0] if origins else "" for origins in dataset["origin"]]
    if not any(origin.endswith("(-)") for origin in first):
        return None
    parsed = [_ORIGIN.fullmatch(origin) for origin in first]
    if not all(parsed):
        return None
    found = [(origin[1], int(origin[2]), int(origin[3])) for origin in parsed if origin is not None]
    part = 4 * max(end - start for _, start, end in found)
    names = [(record, (start + end) // 2 // part) for record, start, end in found]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def read_splits(task: LikelihoodTask, data: Path, protocols: Sequence[str] = ()) -> dict[str, Dataset]:
    """The splits `train`, `validation` and `test` of a task, by these names.

    Raises:
        InputError: if the folder is not what `gengram prepare` wrote, or lacks a split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    folder = data / task.dataset
    if not (folder / "data").is_dir():
        raise InputError(
            f"{shown_name(folder)}: expected the folder that `gengram prepare` wrote, got no folder `data` in it."
        )
    try:
        loaded = load_dataset(str(folder))
    except (DatasetsError, ValueError) as error:  # Arrow's errors are among the latter
        raise InputError(
            f"{shown_name(folder)}: expected what `gengram prepare` wrote: {' '.join(str(error).split())}"
        ) from error
    names = {"test": task.test, "train": task.train, "validation": task.validation}
    missing = [name for name in names.values() if name not in loaded]
    if missing:
        raise InputError(f"{shown_name(folder)}: expected the splits {quoted(names.values())}, got {quoted(loaded)}.")
    splits = {part: loaded[name] for part, name in names.items()}
    for part, split in splits.items():
        if "input_ids" not in split.column_names or not len(split):
            raise InputError(
                f"{shown_name(folder)}, split {names[part]!r}: expected examples with input_ids, got "
                f"{len(split)} with {quoted(split.column_names)}."
            )
    if task.examples is not None and task.examples < len(splits["test"]):
        splits["test"] = splits["test"].shuffle(seed=0).select(range(task.examples))
    return splits


def causal_likelihood(
    model: EvaluatedModel, splits: dict[str, Dataset], progress: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Bits and bases of every example by a causal model.

    Raises:
        ValueError: if the model's tokens are not those of the data set.
    """
    _check_tokens(BaseTokens.of(model.causal.tokenizer), splits["test"])
    bar = model.name if progress else None
    return *bits_of_examples(model.causal.model, splits["test"], progress=bar), {}


def _check_tokens(tokens: BaseTokens, dataset: Dataset) -> None:
    """Refuse a model that would read the bases of a data set as others: its likelihoods would mean nothing."""
    few = dataset.select(range(min(64, len(dataset))))
    expected = np.array([*tokens.bases])
    for ids, digits in zip(few.with_format("numpy")["input_ids"], digits_of(few), strict=True):
        is_base = digits < OTHER
        if (expected[digits[is_base]] != ids[is_base]).any():
            raise ValueError(
                f"expected a model whose tokens are those of `gengram prepare`, got one that reads A, C, G and T as "
                f"{list(tokens.bases)}."
            )


def markov_likelihood(
    model: None, splits: dict[str, Dataset], progress: bool, order: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Bits and bases of every example by a Markov model of the training split, smoothing chosen on validation."""
    markov = MarkovModel(order)
    markov.count(digits_of(splits["train"]))
    strength = markov.choose_strength(list(digits_of(splits["validation"])))
    counted = [markov.evaluate([digits], strength) for digits in digits_of(splits["test"])]
    bits, bases = np.array(counted).T
    return bits, bases, {"order": order, "strength": strength}


LIKELIHOOD: dict[str, Callable[..., tuple[np.ndarray, np.ndarray, dict[str, Any]]]] = {
    "likelihood": causal_likelihood,
    "baseline-markov-5": functools.partial(markov_likelihood, order=5),
    "baseline-markov-11": functools.partial(markov_likelihood, order=11),
}


def run_likelihood(
    protocol: str,
    model: EvaluatedModel | None,
    task: LikelihoodTask,
    splits: dict[str, Dataset],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Bits per base of the test split by one protocol."""
    bits, bases, details = LIKELIHOOD[protocol](model, splits, progress=progress)
    found = {"bits_per_base": bits_per_base(bits, bases, places_of(splits["test"]))}
    return {
        "metrics": {name: estimate.numbers() for name, estimate in found.items()},
        **drawn_of(found, bases),
        "details": details,
        "train_rows": len(splits["train"]),
        "test_rows": len(splits["test"]),
    }
