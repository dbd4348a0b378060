"""What the memory's benchmarks share: a layer with random weights, random bases, the authors' module, results."""

import argparse
import gc
import importlib.util
import json
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gengram import GengramConfig, MotifMemory, MotifMemoryConfig
from gengram.motif_memory import MemoryState, NgramPlan, letter_codes, plan_ngrams
from gengram.motif_memory.ways.native import status
from gengram.support.machine import describe_machine

_device = torch.device("cpu")


LETTERS = GengramConfig().memory_token_ids


class Memory(NamedTuple):
    """A memory layer, and how its plans are made."""

    layer: MotifMemory
    config: MotifMemoryConfig

    def plan(self, ids: torch.Tensor, state: MemoryState | None = None) -> NgramPlan:
        return plan_ngrams(letter_codes(ids, LETTERS), self.config, state=state)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--threads`, which `use_machine` reads."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is a GPU")
    parser.add_argument("--threads", type=int, help="of the CPU; all of them unless given")


def use_machine(arguments: argparse.Namespace) -> torch.device:
    """Sets the number of threads and the device that layers and bases are made on."""
    global _device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _device = torch.device(arguments.device)
    return _device


def seconds_of(call: Callable[[], Any], repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call, the device's work included."""
    synchronize()
    started = clock()
    for _ in range(repeats):
        call()
    synchronize()
    return (clock() - started) / repeats


def synchronize() -> None:
    """Wait for the device."""
    if _device.type == "cuda":
        torch.cuda.synchronize()


def prepare(case: dict) -> Memory:
    """A layer with the case's `hidden` and `width`; its weights are bfloat16 numbers, the same in every dtype."""
    config = MotifMemoryConfig(embedding_dim=case["width"])
    torch.manual_seed(0)
    layer = MotifMemory(config, case["hidden"])
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 if weight.dim() == 2 else 0.5)
            weight.copy_(weight.bfloat16())
    return Memory(layer.to(_device), config)


def random_bases(length: int, batch: int = 1) -> torch.Tensor:
    """(batch, length) token ids of A, C, G and T."""
    return torch.tensor(LETTERS)[torch.randint(4, (batch, length))].to(_device)


def reference_module(path: Path, config: MotifMemoryConfig, hidden: int) -> Any:
    """The authors' module; of Megatron it needs one query, the size of the tensor-parallel group."""
    state = types.ModuleType("megatron.core.parallel_state")
    state.get_tensor_model_parallel_world_size = lambda: 1  # type: ignore[attr-defined]
    core = types.ModuleType("megatron.core")
    core.parallel_state = state  # type: ignore[attr-defined]
    sys.modules |= {"megatron": types.ModuleType("megatron"), "megatron.core": core, state.__name__: state}
    spec = importlib.util.spec_from_file_location("reference_gengram", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Gengram(
        hidden_size=hidden,
        dna_token_ids=LETTERS,
        ngram_sizes=list(config.ngram_sizes),
        embed_dim_per_ngram=config.embedding_dim,
        active=True,
        use_short_conv=True,
        short_conv_kernel_size=config.conv_kernel,
        short_conv_dilation=config.conv_dilation,
        window_size=config.window,
    )


def extra_memory(step: Callable[[], Any]) -> int:
    """Bytes by which the peak of the memory in use rises above what was in use before, during one call.

    On a GPU that of PyTorch's allocator, on the CPU the process's resident size.
    """
    if _device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    status_file = Path("/proc/self/status")

    def size(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status_file.read_text())[1])  # type: ignore[index]

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    before = size("VmRSS")
    step()
    return size("VmHWM") - before


def machine() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    device = torch.cuda.get_device_name() if _device.type == "cuda" else "cpu"
    return describe_machine() | dict(device=device, native_kernels=status().capability or None)


def write_results(name: str, results: dict[str, Any], output: Path | None = None) -> None:
    """Write a JSON file, to `benchmarks/results` unless told otherwise."""
    path = output or Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
