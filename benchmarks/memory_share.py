"""The memory's share of a forward pass of layers shaped like the released model, and a pass over a million bases.

    python benchmarks/memory_share.py [--device cuda] [--threads N]

Four layers of the released model's shape (hidden 4096, 8 experts of 8192, two per token), one of them with a memory as
in three of its twelve, random bfloat16 weights; the time inside the memory (its plan included) over that of the whole
pass, for every way to compute it. The long pass is one memory layer of hidden 256 in float32, tables too. Writes
`benchmarks/results/memory_share.json`.
"""

import argparse
import statistics
import time

import torch
from memory_setup import (
    add_machine_arguments,
    extra_memory,
    machine,
    prepare,
    random_bases,
    seconds_of,
    synchronize,
    use_machine,
    write_results,
)

from gengram import GengramConfig, GengramModel, memory_path
from gengram.modeling_gengram import modeling_gengram
from gengram.motif_memory import fold_memory, unfold_memory
from gengram.motif_memory.ways.native import status

WAYS = [("token_major", "torch"), ("folded", "torch"), ("folded", "native")]
LENGTH, MILLION, ROUNDS = 512, 1_000_000, 3


class Stopwatch:
    """Adds up the time spent in a function."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments, **named):
        synchronize()
        started = time.perf_counter()
        result = self.function(*arguments, **named)
        synchronize()
        self.seconds += time.perf_counter() - started
        return result


@torch.no_grad()
def share() -> dict:
    config = GengramConfig(
        num_hidden_layers=4, memory_layers=[2], hidden_size=4096, memory_embedding_dim=1024, num_local_experts=8,
        intermediate_size=8192, num_attention_heads=16, num_key_value_heads=8, head_dim=256, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = GengramModel(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = random_bases(LENGTH)
    model.to(ids.device)
    memory = model.layers[2].motif_memory
    watches = [Stopwatch(memory.forward), Stopwatch(modeling_gengram.plan_ngrams)]
    memory.forward, modeling_gengram.plan_ngrams = watches
    found: dict[str, list[float]] = {f"{a}, {k}": [] for a, k in WAYS}
    totals: dict[str, list[float]] = {name: [] for name in found}
    for round_number in range(ROUNDS + 1):
        for algorithm, kernels in WAYS:
            with memory_path(algorithm, kernels):
                unfold_memory(memory)
                if algorithm == "folded":
                    fold_memory(memory)
                for watch in watches:
                    watch.seconds = 0.0
                total = seconds_of(lambda: model(ids))
            if round_number:  # the first warms up
                found[f"{algorithm}, {kernels}"].append(sum(watch.seconds for watch in watches) / total)
                totals[f"{algorithm}, {kernels}"].append(total)
    return dict(
        layers=4, memory_layers=1, length=LENGTH, share={name: statistics.median(x) for name, x in found.items()},
        seconds={name: statistics.median(x) for name, x in totals.items()},
    )  # fmt: skip


@torch.no_grad()
def million() -> dict:
    case = dict(hidden=256, width=64)
    memory = prepare(case)
    layer = memory.layer.eval()
    ids, states = random_bases(MILLION), torch.randn(1, MILLION, case["hidden"])
    states = states.to(ids.device)
    with memory_path("token_major", "torch"):
        last = layer(states[:, -2000:], memory.plan(ids[:, -2000:])).residual[:, 100:]
    found = {}
    for _, kernels in WAYS[1:]:
        with memory_path("folded", kernels):
            unfold_memory(layer)
            fold_memory(layer)
            output = layer(states, memory.plan(ids)).residual
            error = ((output[:, -1900:] - last).norm() / last.norm()).item()
            del output
            extra = 0

            def whole() -> None:
                nonlocal extra
                extra = extra_memory(lambda: layer(states, memory.plan(ids)))

            found[f"folded, {kernels}"] = dict(
                seconds=seconds_of(whole), extra_bytes=extra, output_bytes=states.nbytes, error=error
            )
    return case | dict(length=MILLION, ways=found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_machine_arguments(parser)
    has_native = status().available
    if use_machine(parser.parse_args()).type == "cuda":
        has_native = status().has_cuda
    if not has_native:
        WAYS.pop()
    results = dict(machine=machine(), long=million(), whole=share())
    print(results)
    write_results("memory_share", results)
