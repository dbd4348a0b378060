"""Speed of the memory's forward pass and of a decoding step: every way there is and, if given, the authors' module.

    python benchmarks/memory_forward.py [--reference PATH_TO_gengram.py] [--device cuda] [--threads N]

The reference is the authors' `megatron/core/transformer/gengram.py`, which is not part of this project. Results are
checked against the definition in float64 before anything is timed; times are medians of interleaved runs without
gradients, and the figures are ratios within one run. The authors' module cannot decode with a cache, so a step is
compared with its pass over the 39 tokens that a step depends on. Extra memory is the rise of the process's peak
resident size during a pass. Writes `benchmarks/results/memory_forward.json`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory_setup import (
    LETTERS,
    add_machine_arguments,
    extra_memory,
    machine,
    prepare,
    random_bases,
    reference_module,
    seconds_of,
    use_machine,
    write_results,
)

from gengram import memory_path
from gengram.motif_memory import MemoryState, fold_memory, letter_codes
from gengram.motif_memory.ways.native import status

CASES = [
    dict(hidden=4096, width=1024, length=8192, dtype="bfloat16"),
    dict(hidden=1024, width=256, length=2048, dtype="float32"),
    dict(hidden=1024, width=256, length=2048, dtype="bfloat16"),
    dict(hidden=1024, width=256, length=300, batch=64, dtype="float32"),  # the first 20 windows of each are not full
]
DECODING = dict(hidden=4096, width=1024, length=39, dtype="bfloat16")


def kernels_of(device: torch.device) -> tuple[str, ...]:
    """What can compute on the device."""
    has_native = status().available and (device.type == "cpu" or status().has_cuda)
    return ("torch", "native") if has_native else ("torch",)


@torch.no_grad()
def measure(
    case: dict, reference: Path | None, rounds: int, is_decoding: bool = False, only: tuple[str, ...] = ()
) -> dict:
    dtype = getattr(torch, case["dtype"])
    memory = prepare(case)
    layer = memory.layer.eval()
    ids = random_bases(case["length"], case.get("batch", 1))
    hidden = torch.randn(*ids.shape, case["hidden"]).bfloat16().to(ids.device)
    with memory_path("token_major", "torch"):
        exact = layer.double()(hidden.double(), memory.plan(ids)).residual
    layer.to(dtype)
    states = hidden.to(dtype)
    paths: dict[str, Callable[[], torch.Tensor]] = {}
    folding = {}
    for kernels in kernels_of(states.device):
        # each its own layer, so that none has to fold again for the other's kernels
        own = prepare(case).layer.to(dtype).eval()
        with memory_path(kernels=kernels):
            started = time.perf_counter()
            fold_memory(own)
            folding[kernels] = time.perf_counter() - started
        if is_decoding:
            state = MemoryState(memory.config)
            with memory_path("folded", kernels):
                output = own(states[:, :-1], memory.plan(ids[:, :-1], state), state)
                state.advance(own.layer_idx, output)
                state.advance_letters(letter_codes(ids[:, :-1], LETTERS))

            def decode(kernels=kernels, own=own, state=state):
                with memory_path(kernels=kernels):
                    return own(states[:, -1:], memory.plan(ids[:, -1:], state), state).residual

            paths[f"folded, {kernels}"] = decode
        else:

            def whole(kernels=kernels, own=own):
                with memory_path("folded", kernels):
                    return own(states, memory.plan(ids)).residual

            def trusted(kernels=kernels, own=own):
                own.kept_fold.owners = 1  # as inside a block of `folded_inference`, which ends after the last round
                try:
                    return whole(kernels, own)
                finally:
                    own.kept_fold.owners = 0

            def unfolded(kernels=kernels):
                with memory_path("token_major", kernels):
                    return layer(states, memory.plan(ids)).residual

            paths[f"folded, {kernels}"] = trusted
            paths[f"folded and checked, {kernels}"] = whole
            paths[f"token_major, {kernels}"] = unfolded
    if reference is not None:
        theirs = reference_module(reference, memory.config, case["hidden"]).to(states).eval()
        theirs.load_state_dict(layer.state_dict())
        sequence_first = states.transpose(0, 1).contiguous()
        paths["reference"] = lambda: theirs(sequence_first, ids).transpose(0, 1)

    if only:
        paths = {name: path for name, path in paths.items() if name.startswith(only)}
    errors, times, extra = {}, {name: [] for name in paths}, {}
    for name, path in paths.items():  # also the warm-up
        result = path().double()
        truth = exact[:, -result.shape[1] :]
        if is_decoding:
            result, truth = result[:, -1:], truth[:, -1:]
        errors[name] = ((result - truth).norm() / truth.norm()).item()
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert name == "reference" or errors[name] < limit, (case, name, errors)
        extra[name] = extra_memory(path)
    repeats = 20 if is_decoding else 1  # a token follows another
    for _ in range(rounds):
        for name, path in paths.items():
            times[name].append(seconds_of(path, repeats))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return dict(
        case=case,
        is_decoding=is_decoding,
        seconds=medians,
        fastest_seconds={name: min(values) for name, values in times.items()},
        relative_error=errors,
        extra_bytes=extra,
        folding_seconds=folding,
        rounds=rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, help="the authors' gengram.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where the results go instead of benchmarks/results")
    parser.add_argument(
        "--only", nargs="*", default=[], help="ways to time, such as folded and reference; all unless given"
    )
    parser.add_argument(
        "--cases", type=int, nargs="*", help="of the list in this file, from 0; the last one is decoding"
    )
    add_machine_arguments(parser)
    arguments = parser.parse_args()
    use_machine(arguments)
    described, rows = machine(), []
    for index, (case, is_decoding) in enumerate([*((case, False) for case in CASES), (DECODING, True)]):
        if arguments.cases is not None and index not in arguments.cases:
            continue
        row = measure(case, arguments.reference, arguments.rounds, is_decoding, tuple(arguments.only))
        rows.append(row)
        fastest = row["fastest_seconds"]
        base, best = (x.get("reference", x["folded, torch"]) for x in (row["seconds"], fastest))
        print("decoding step" if is_decoding else "forward", case)
        for name, seconds in row["seconds"].items():
            print(
                f"  {name}: {1e3 * seconds:.3f} ms ({base / seconds:.1f}x; fastest runs {best / fastest[name]:.1f}x), "
                f"error {row['relative_error'][name]:.1e}, extra memory {row['extra_bytes'][name] / 1e6:.0f} MB",
                flush=True,
            )
    write_results("memory_forward", dict(machine=described, rows=rows), arguments.output)


if __name__ == "__main__":
    main()
