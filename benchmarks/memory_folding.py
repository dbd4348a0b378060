"""When folded tables repay themselves: what a fold and its check cost, and what they save per token.

    python benchmarks/memory_folding.py [--threads N] [--device cuda]

For each shape: seconds to fold, to check the weights' contents, and per token with and without folded tables; the
tokens after which folding or checking has repaid itself as measured, beside those that the package expects
(`motif_memory/ways/kept_fold.py`).
Then the first call of gengram-mini on 8 bases in `eval()`, beside the same call by the definition: seconds of the CPU
and rise of the process's peak memory. Writes `benchmarks/results/memory_folding.json`.
"""

import argparse
import math
import statistics
import time
from typing import Any

import torch
from memory_setup import (
    LETTERS,
    Memory,
    add_machine_arguments,
    extra_memory,
    machine,
    prepare,
    random_bases,
    seconds_of,
    use_machine,
    write_results,
)

import gengram
from gengram import memory_path
from gengram.motif_memory import fold_memory, unfold_memory
from gengram.motif_memory.ways.kept_fold import fingerprint, tokens_to_check, tokens_to_repay
from gengram.motif_memory.ways.weights import weights_at_hand

CASES: list[dict[str, Any]] = [
    dict(hidden=4096, width=1024, dtype="bfloat16"),
    dict(hidden=1024, width=256, dtype="float32"),
    dict(hidden=512, width=64, dtype="float32"),
    dict(hidden=256, width=64, dtype="float32"),
    dict(model="gengram-mini", dtype="float32"),
]
LENGTH = 1024


def memory_of(case: dict[str, Any]) -> Memory:
    """The memory of a case, in its dtype."""
    if "model" in case:
        model = gengram.GengramForCausalLM.from_pretrained(gengram.DEFAULT_MODEL)
        layer = model.model.layers[model.config.memory_layers[0]].motif_memory
        return Memory(layer.to(random_bases(0).device).eval(), layer.config)
    memory = prepare(case)
    memory.layer.to(getattr(torch, case["dtype"])).eval()
    return memory


@torch.no_grad()
def measure(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Costs and savings of one shape, medians of several runs."""
    memory = memory_of(case)
    layer, ids = memory.layer, random_bases(LENGTH)
    weight = layer.key_proj.weight
    states = torch.randn(1, LENGTH, weight.shape[0]).to(weight)
    plan = memory.plan(ids)
    weights, _ = weights_at_hand(layer, weight.device)
    assert weights is not None
    times: dict[str, list[float]] = {"fold": [], "check": [], "token, projected": [], "token, folded": []}
    for round_number in range(rounds + 1):
        unfold_memory(layer)
        with memory_path("token_major"):
            projected = seconds_of(lambda: layer(states, plan))
        folding = seconds_of(lambda: fold_memory(layer))
        checking = seconds_of(lambda: fingerprint(weights))
        layer.kept_fold.owners = 1  # as in a block of `folded_inference`: no check in the pass
        folded = seconds_of(lambda: layer(states, plan))
        if round_number:  # the first warms up
            for name, seconds in zip(times, (folding, checking, projected / LENGTH, folded / LENGTH), strict=True):
                times[name].append(seconds)
    found = {name: statistics.median(values) for name, values in times.items()}
    saved = found["token, projected"] - found["token, folded"]
    elements = sum(w.numel() for w in weights.tensors())

    def tokens(cost: float, expected: float) -> dict[str, float | None]:
        return dict(measured=cost / saved if saved > 0 else None, expected=None if math.isinf(expected) else expected)

    return dict(
        case=case | dict(features=weight.shape[1], hidden=weight.shape[0], weights=elements),
        seconds=found,
        fold_bytes=layer.kept_fold.fold.bytes,
        tokens_to_repay=tokens(found["fold"], tokens_to_repay(weights, plan)),
        tokens_to_check=tokens(found["check"], tokens_to_check(weights, plan)),
        rounds=rounds,
    )


@torch.no_grad()
def first_call() -> dict[str, Any]:
    """One call of a fresh gengram-mini on 8 bases, as it comes and by the definition."""
    ids = torch.tensor([LETTERS[:4] * 2])
    found: dict[str, Any] = {}
    for name, algorithm in (("warm-up", "token_major"), ("token_major", "token_major"), ("as it comes", "auto")):
        model = gengram.GengramForCausalLM.from_pretrained(gengram.DEFAULT_MODEL).eval()
        with memory_path(algorithm):
            started = time.process_time()
            extra = extra_memory(lambda model=model: model(ids))
            found[name] = dict(cpu_seconds=time.process_time() - started, extra_bytes=extra)
        found["model_bytes"] = sum(w.nbytes for w in model.parameters())
    del found["warm-up"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    add_machine_arguments(parser)
    arguments = parser.parse_args()
    use_machine(arguments)
    described = machine()
    first = first_call()
    print("first call on 8 bases", first, flush=True)
    rows = []
    for case in CASES:
        rows.append(measure(case, arguments.rounds))
        print(rows[-1], flush=True)
    write_results("memory_folding", dict(machine=described, first_call=first, rows=rows))


if __name__ == "__main__":
    main()
