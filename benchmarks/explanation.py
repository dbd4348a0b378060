"""What shares of k-mers cost: `explain_memory` of 1,024 bases in forward passes of the same model.

    python benchmarks/explanation.py

Prints, and writes to `benchmarks/results/explanation.json`, processor time of one thread: of a forward pass, of each
target, and of its table besides, the fastest of the rounds, which take turns. Two models: gengram-mini, and one of
random weights with the released memory's shape (k = 1..6, 1,024 numbers per k-mer, windows of 21 bases).
"""

import argparse
import time
from collections.abc import Callable

import torch
from memory_setup import machine, write_results
from transformers import AutoModelForCausalLM

import gengram

LENGTH = 1024
TARGETS = ("gate_logit", "residual_norm", "base:actual")


def released_shape() -> torch.nn.Module:
    """Six layers of hidden 1,024, a memory of the released shape in front of the third."""
    torch.manual_seed(0)
    config = gengram.GengramConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8,
        num_local_experts=0, memory_layers=[2],
    )  # fmt: skip
    return gengram.GengramForCausalLM(config).eval()


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(model: torch.nn.Module, rounds: int) -> dict[str, float]:
    letters = torch.tensor(model.config.memory_token_ids[:4])
    ids = letters[torch.randint(4, (1, LENGTH), generator=torch.Generator().manual_seed(1))]
    calls: dict[str, Callable[[], object]] = {"forward pass": lambda: model(input_ids=ids, use_cache=False)}
    for target in TARGETS:
        calls[target] = lambda target=target: gengram.explain_memory(model, ids, target=target)
        calls[f"{target}, with its table"] = lambda target=target: (
            gengram.explain_memory(model, ids, target=target).table
        )
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, call in calls.items():
                taken[name].append(seconds(call))
    return {name: min(found[1:]) for name, found in taken.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {
        "gengram-mini": AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL, dtype=torch.float32).eval(),
        "released memory, hidden 1,024, 6 layers": released_shape(),
    }
    results = {}
    for name, model in models.items():
        found = measure(model, options.rounds)
        results[name] = {what: round(value, 4) for what, value in found.items()}
        print(f"{name}: a forward pass of {LENGTH:,} bases takes {found['forward pass']:.3f} s")
        for what, value in list(found.items())[1:]:
            print(f"  {what}: {value:.3f} s, {value / found['forward pass']:.2f} forward passes")
    write_results("explanation", {"machine": machine(), "length": LENGTH, "seconds": results})


if __name__ == "__main__":
    main()
