"""Where a memory's time on a GPU goes: in which kernels, and how long the GPU waits between them.

    python benchmarks/memory_profile.py [--output FILE]

One layer of the released model's size (hidden 4096, embeddings of 1024). For a folded and an unfolded forward pass
over 8,192 bases in bfloat16, a step of training over them in float32, and a decoding step: the median of whole calls;
by PyTorch's profiler, how often each kernel runs in a call and for how long; and for native kernels without gradients
the median of the same work replayed by a CUDA graph, which has no launches between the kernels. Writes
`benchmarks/results/memory_profile.json`.
"""

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory_setup import LETTERS, machine, prepare, random_bases, seconds_of, use_machine, write_results
from torch.autograd import DeviceType

from gengram import memory_path
from gengram.motif_memory import MemoryState, fold_memory, letter_codes
from gengram.motif_memory.ways.native import status

HIDDEN, WIDTH, LENGTH = 4096, 1024, 8192
CALLS = 20
SHOWN = 12  # kernels of a call


def works(kernels: str) -> dict[str, Callable[[], Any]]:
    """What is profiled, by name."""
    case = dict(hidden=HIDDEN, width=WIDTH)
    ids = random_bases(LENGTH)
    states = torch.randn(1, LENGTH, HIDDEN, dtype=torch.bfloat16, device=ids.device)
    plain, folded, trained = (prepare(case) for _ in range(3))
    plain.layer.bfloat16().eval()
    folded.layer.bfloat16().eval()
    with memory_path(kernels=kernels):
        fold_memory(folded.layer)
    folded.layer.kept_fold.owners = 1  # as inside a block of `folded_inference`

    @torch.inference_mode()
    def forward(memory=folded, algorithm="folded"):
        with memory_path(algorithm, kernels):
            return memory.layer(states, memory.plan(ids)).residual

    state = MemoryState(folded.config)
    with torch.inference_mode(), memory_path("folded", kernels):
        output = folded.layer(states[:, :40], folded.plan(ids[:, :40], state), state)
        state.advance(folded.layer.layer_idx, output)
        state.advance_letters(letter_codes(ids[:, :40], LETTERS))

    @torch.inference_mode()
    def decode():
        with memory_path("folded", kernels):
            return folded.layer(states[:, -1:], folded.plan(ids[:, -1:], state), state).residual

    leaf = states.float().requires_grad_()

    def train(algorithm):
        with memory_path(algorithm, kernels):
            trained.layer.zero_grad()
            leaf.grad = None
            trained.layer(leaf, trained.plan(ids)).residual.square().sum().backward()

    return {
        "forward, folded": forward,
        "forward, unfolded": lambda: forward(plain, "token_major"),
        "decoding step, folded": decode,
        "training, token_major": lambda: train("token_major"),
        "training, table_major": lambda: train("table_major"),
    }


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def short(name: str) -> str:
    """A kernel's name without its arguments: of ours only the class, with the types of tables and states."""
    if "gengram::" in name:
        name = re.sub(r"gengram::(\w+::)?", "", name)
        name = name.partition("run<")[2].rpartition(">(")[0] or name
    return re.sub(r"^void |\(.*$", "", name)[:100]


def profile(call: Callable[[], Any], has_graph: bool) -> dict[str, Any]:
    """Seconds of a call, of its kernels together, and of each kernel."""
    for _ in range(5):
        call()
    whole = statistics.median(seconds_of(call) for _ in range(CALLS))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            kernels.setdefault(short(event.name), []).append(event.time_range.elapsed_us() * 1e-6)
    rows = [
        {"kernel": name, "per_call": round(len(times) / CALLS, 2), "seconds_per_call": sum(times) / CALLS}
        for name, times in kernels.items()
    ]
    rows.sort(key=lambda row: -row["seconds_per_call"])
    result: dict[str, Any] = {"seconds": whole, "kernel_seconds": sum(row["seconds_per_call"] for row in rows)}
    result |= {"launches": sum(row["per_call"] for row in rows)}
    if has_graph:
        replay = replayed(call)
        result["graph_seconds"] = statistics.median(seconds_of(replay) for _ in range(CALLS))
    return result | {"kernels": rows[:SHOWN]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="where the results go instead of benchmarks/results")
    arguments = parser.parse_args()
    use_machine(argparse.Namespace(threads=None, device="cuda"))
    case = dict(hidden=HIDDEN, width=WIDTH, length=LENGTH, calls=CALLS)
    rows = []
    for kernels in ("native", "torch") if status().has_cuda else ("torch",):
        for name, call in works(kernels).items():
            has_graph = kernels == "native" and "training" not in name  # PyTorch's folded ways wait for the device
            row = dict(work=name, kernels_of=kernels) | profile(call, has_graph)
            rows.append(row)
            graph = f"{1e3 * row['graph_seconds']:.3f} ms as a graph, " if "graph_seconds" in row else ""
            print(
                f"{name}, {kernels}: {1e3 * row['seconds']:.3f} ms, {graph}"
                f"{1e3 * row['kernel_seconds']:.3f} ms in {row['launches']:.0f} kernels",
                flush=True,
            )
            for kernel in row["kernels"][:6]:
                print(f"    {1e3 * kernel['seconds_per_call']:.4f} ms, {kernel['per_call']:.0f} x {kernel['kernel']}")
            write_results("memory_profile", dict(machine=machine(), case=case, rows=rows), arguments.output)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
