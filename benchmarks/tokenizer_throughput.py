"""
Tokenizer throughput: GengramTokenizer against plain single-character pipelines of the tokenizers library.

All contenders are called as `tokenizer(text)` and `tokenizer.decode(ids)`, in turn within each round, on the same
random sequence; results are compared before anything is timed, and the medians are reported.

    python benchmarks/tokenizer_throughput.py [--lengths 1000 100000 1000000] [--rounds 7]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gengram.support.machine import describe_machine
from gengram.tokenization import GengramTokenizer

RESULTS = Path(__file__).parent / "results" / "tokenizer_throughput.json"
OURS = "gengram"


def plain_pipeline(pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "C": 5, "G": 6, "T": 7, "A": 8, "N": 9}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
    )


def contenders() -> dict[str, PreTrainedTokenizerFast]:
    return {
        OURS: GengramTokenizer(),
        "WordLevel + FixedLength(1)": plain_pipeline(pre_tokenizers.FixedLength(length=1)),
        "WordLevel + Split": plain_pipeline(pre_tokenizers.Split(Regex("."), "isolated")),
    }


def as_lists(encoded) -> dict[str, list]:
    return {name: np.asarray(values).reshape(-1).tolist() for name, values in encoded.items()}


def tasks(text: str, ids: list[int]) -> dict[str, Callable]:
    tensor = torch.tensor(ids)
    return {
        'encode, return_tensors="pt"': lambda tokenizer: tokenizer(text, return_tensors="pt"),
        'encode, return_tensors="np"': lambda tokenizer: tokenizer(text, return_tensors="np"),
        "encode, lists": lambda tokenizer: tokenizer(text),
        "decode, list": lambda tokenizer: tokenizer.decode(ids),
        "decode, tensor": lambda tokenizer: tokenizer.decode(tensor),
    }


def check(text: str, task: Callable, named: dict[str, PreTrainedTokenizerFast], ids: list[int]):
    expected = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    for name, tokenizer in named.items():
        result = task(tokenizer)
        if result != text and (isinstance(result, str) or as_lists(result) != expected):
            raise AssertionError(f"{name} gave another result")


def seconds(task: Callable, tokenizer: PreTrainedTokenizerFast) -> float:
    start = time.perf_counter()
    result = task(tokenizer)
    elapsed = time.perf_counter() - start
    del result  # freeing the backend's encodings is not charged to it
    return elapsed


def machine() -> dict[str, object]:
    return describe_machine() | {
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
    }


def measure(lengths: list[int], rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    named = contenders()
    generator = np.random.default_rng(0)
    for length in lengths:
        text = "".join(generator.choice(list("ACGTN"), size=length, p=[0.245] * 4 + [0.02]))
        ids = [{"A": 8, "C": 5, "G": 6, "T": 7, "N": 9}[letter] for letter in text]
        for task_name, task in tasks(text, ids).items():
            check(text, task, named, ids)
            times: dict[str, list[float]] = {name: [] for name in named}
            for _ in range(rounds):
                for name, tokenizer in named.items():
                    times[name].append(seconds(task, tokenizer))
            medians = {name: statistics.median(values) for name, values in times.items()}
            plain = min(median for name, median in medians.items() if name != OURS)
            rows.append(
                {
                    "length": length,
                    "task": task_name,
                    "median_seconds": medians,
                    "all_seconds": times,
                    "times_faster_than_the_faster_plain_pipeline": plain / medians[OURS],
                }
            )
            print(
                f"{length:>9,}  {task_name:<28}"
                + "".join(f"{length / medians[name] / 1e6:>28.2f}" for name in named)
                + f"{plain / medians[OURS]:>10.0f}x",
                flush=True,
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    described = machine()
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print("Megabases per second, and ours against the faster plain pipeline:")
    print(f"{'bases':>9}  {'task':<28}" + "".join(f"{name:>28}" for name in contenders()) + f"{'ratio':>11}")
    rows = measure(arguments.lengths, arguments.rounds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": described, "rounds": arguments.rounds, "results": rows}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
