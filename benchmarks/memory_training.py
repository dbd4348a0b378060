"""Speed of the memory's forward and backward pass: through tokens, through tables and, if given, the authors' module.

    python benchmarks/memory_training.py [--reference PATH_TO_gengram.py] [--device cuda] [--threads N]

The reference is the authors' `megatron/core/transformer/gengram.py`, which is not part of this project. Gradients are
checked against the definition in float64 before anything is timed; times are medians of interleaved runs, and the
figures are ratios within one run. The lengths show where projecting rows starts to pay: the threshold in
`motif_memory/ways/choose.py`. Writes `benchmarks/results/memory_training.json`.
"""

import argparse
import statistics
from pathlib import Path

import torch
from memory_setup import (
    add_machine_arguments,
    machine,
    prepare,
    random_bases,
    reference_module,
    seconds_of,
    use_machine,
    write_results,
)

from gengram import MotifMemory, memory_path
from gengram.motif_memory.ways.native import status

CASES = [
    dict(hidden=1024, width=256, length=length, dtype="float32") for length in (512, 1024, 2048, 4096, 8192, 32768)
]


def gradients(memory: torch.nn.Module, states: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the sum of the squares of the output."""
    memory.zero_grad()
    states.grad = None
    output.square().sum().backward()
    return {"hidden_states": states.grad.clone()} | {n: w.grad.clone() for n, w in memory.named_parameters()}


def measure(case: dict, reference: Path | None, rounds: int) -> dict:
    memory = prepare(case)
    ids = random_bases(case["length"])
    plan = memory.plan(ids)
    # Hidden states that lean towards the keys keep the gate off 0, where its square root is steep and any rounding
    # of a key changes gradients at will.
    with torch.no_grad(), memory_path("token_major", "torch"):
        key, _ = memory.layer.look_up(plan)
        key /= key.square().mean(-1, keepdim=True).sqrt()
        states = torch.randn(key.shape).to(key) + 0.15 * key
    paths = {}
    has_native = status().available and (ids.device.type == "cpu" or status().has_cuda)
    for kernels in ("torch", "native") if has_native else ("torch",):
        for algorithm in ("token_major", "table_major"):

            def step(algorithm=algorithm, kernels=kernels):
                with memory_path(algorithm, kernels):
                    return memory.layer(leaf, memory.plan(ids)).residual

            paths[f"{algorithm}, {kernels}"] = (memory.layer, step, False)
    if reference is not None:
        theirs = reference_module(reference, memory.config, case["hidden"]).to(states).train()
        theirs.load_state_dict(memory.layer.state_dict())
        paths["reference"] = (theirs, lambda: theirs(leaf, ids), True)

    exact = MotifMemory(memory.config, case["hidden"]).double().to(states.device)
    exact.load_state_dict(memory.layer.state_dict())
    leaf = states.double().requires_grad_()
    with memory_path("token_major", "torch"):
        truth = gradients(exact, leaf, exact(leaf, plan).residual)
    errors, times = {}, {name: [] for name in paths}
    leaves = {False: states.clone().requires_grad_(), True: states.transpose(0, 1).contiguous().requires_grad_()}
    for name, (module, step, sequence_first) in paths.items():
        leaf = leaves[sequence_first]
        ours = gradients(module, leaf, step())
        if sequence_first:
            ours["hidden_states"] = ours["hidden_states"].transpose(0, 1)
        errors[name] = max(((ours[n].double() - truth[n]).norm() / truth[n].norm()).item() for n in truth)
        assert name == "reference" or errors[name] < 1e-4, (case, name, errors)
    for _ in range(rounds):
        for name, (module, step, sequence_first) in paths.items():
            leaf = leaves[sequence_first]

            def train(module=module, step=step, leaf=leaf):
                module.zero_grad()
                leaf.grad = None
                step().square().sum().backward()

            times[name].append(seconds_of(train))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    return dict(
        case=case, seconds=medians, fastest_seconds=fastest, largest_relative_error_of_a_gradient=errors, rounds=rounds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, help="the authors' gengram.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where the results go instead of benchmarks/results")
    parser.add_argument("--lengths", type=int, nargs="*", help="only these of the lengths")
    add_machine_arguments(parser)
    arguments = parser.parse_args()
    use_machine(arguments)
    described, rows = machine(), []
    for case in (case for case in CASES if not arguments.lengths or case["length"] in arguments.lengths):
        row = measure(case, arguments.reference, arguments.rounds)
        rows.append(row)
        base = row["seconds"].get("reference", row["seconds"]["token_major, torch"])
        fastest = row["fastest_seconds"]
        best = fastest.get("reference", fastest["token_major, torch"])
        print(case, flush=True)
        for name, seconds in row["seconds"].items():
            print(
                f"  {name} {seconds:.3f} s ({base / seconds:.2f}x; fastest runs {best / fastest[name]:.2f}x)",
                flush=True,
            )
    write_results("memory_training", dict(machine=described, rows=rows), arguments.output)


if __name__ == "__main__":
    main()
