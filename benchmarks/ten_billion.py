"""The released model's size on one GPU: does it fit, what does it need, how fast is it; in bfloat16, int8 and int4.

    python benchmarks/ten_billion.py FOLDER [--kinds bfloat16 int8 int4] [--only-make]

Weights are random, of the released configuration, and lie in FOLDER (40 GB; /dev/shm is fast), where a second run
finds them. Measured are the memory of PyTorch's allocator and seconds: of loading, of prompts read in one pass with a
cache, and of tokens by `generate`, with and without the memory. Beside each stands what `gengram info --memory`
computes. Then the allocator is held to what a smaller card has left beside CUDA itself, and prompts grow until one
does not fit. Writes `benchmarks/results/ten_billion.json`.
"""

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memory_setup import LETTERS, machine, use_machine, write_results

from gengram import GengramConfig, GengramForCausalLM, GengramQuantizationConfig, memory_path
from gengram.inference.memory_needs import memory_needs
from gengram.motif_memory.ways.native import status

KINDS = ("bfloat16", "int8", "int4")
CARDS = {"bfloat16": (24, 80), "int8": (16,), "int4": (8,)}  # GiB
CUDA_ITSELF = 600 * 10**6  # bytes of a card that its context takes
LENGTHS = (1024, 8192, 32768, 131072)
GROWING = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PROMPT, TOKENS = 1024, 48  # of `generate`


def make(folder: Path, kinds: list[str]) -> None:
    """The folders that are not there yet."""
    for kind in ["bfloat16", *kinds]:
        if (folder / kind / "done").exists():
            continue
        if kind == "bfloat16":
            torch.manual_seed(0)
            with torch.device("cuda"):
                model = GengramForCausalLM._from_config(GengramConfig(), dtype=torch.bfloat16)
        else:
            model = load(folder / "bfloat16", quantization_config=GengramQuantizationConfig(kind))
        model.save_pretrained(folder / kind)
        (folder / kind / "done").touch()
        del model
        empty()
        print("made", folder / kind, flush=True)


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder, on the GPU."""
    return GengramForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda", **options).eval()


def empty() -> None:
    """Give back what nothing holds."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def timed(call: Any) -> tuple[float, Any]:
    """Seconds and result of a call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def bases(length: int) -> torch.Tensor:
    return torch.tensor(LETTERS[:4])[torch.randint(4, (1, length))].cuda()


@torch.no_grad()
def read(model: Any, length: int, tokens: int = 0) -> dict[str, Any]:
    """Seconds and memory of a prompt, and of the tokens after it."""
    empty()
    before = torch.cuda.memory_allocated()
    ids = bases(length)
    seconds, outputs = timed(lambda: model(ids, use_cache=True, logits_to_keep=1))
    peak, held = (size() - before for size in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated))
    for _ in range(tokens):
        outputs = model(outputs.logits[:, -1:].argmax(-1), cache=outputs.cache, use_cache=True)
    torch.cuda.synchronize()
    return dict(length=length, seconds=seconds, peak_bytes=peak, cache_bytes=held)


@torch.no_grad()
def seconds_per_token(model: Any, **options: Any) -> float:
    """Of `generate` after a prompt, whose own time is subtracted."""
    ids = bases(PROMPT)
    options |= dict(do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))

    def whole(tokens: int) -> float:
        return timed(lambda: model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options))[0]

    whole(TOKENS)  # may compile
    return statistics.median((whole(TOKENS) - whole(1)) / (TOKENS - 1) for _ in range(3))


@contextlib.contextmanager
def without_memory(model: Any) -> Iterator[None]:
    """The same model, its memories switched off."""
    memories = [layer.motif_memory for layer in model.model.layers]
    for layer in model.model.layers:
        layer.motif_memory = None
    try:
        yield
    finally:
        for layer, memory in zip(model.model.layers, memories, strict=True):
            layer.motif_memory = memory


def measure(folder: Path, kind: str) -> dict[str, Any]:
    """Everything about one kind of weights, but for compiled steps."""
    empty()
    seconds, model = timed(lambda: load(folder / kind))
    row: dict[str, Any] = dict(kind=kind, load_seconds=seconds, load_peak_bytes=torch.cuda.max_memory_allocated())
    row["weights_bytes"] = torch.cuda.memory_allocated()
    row["prompts"] = []
    for length in LENGTHS:
        read(model, min(length, 8192))  # warms up
        needs = memory_needs(GengramConfig(), torch.bfloat16, 1, length)
        weights = needs.weights_by_experts.get(kind, needs.weights)
        computed = dict(weights=weights, cache=needs.cache, activations=needs.activations)
        row["prompts"].append(read(model, length) | dict(computed_bytes=computed))
        with without_memory(model):
            row["prompts"][-1]["seconds_without_memory"] = read(model, length)["seconds"]
        print(kind, row["prompts"][-1], flush=True)
    row["seconds_per_token"] = {"eager": seconds_per_token(model)}
    with without_memory(model):
        row["seconds_per_token"]["eager, without memory"] = seconds_per_token(model)
    if status().has_cuda:
        with memory_path(kernels="torch"):
            row["seconds_per_token"]["eager, PyTorch's operations"] = seconds_per_token(model)
    print(kind, row["seconds_per_token"], flush=True)
    row["cards"] = [longest_prompt(model, gib) for gib in CARDS[kind]]
    print(kind, row["cards"], flush=True)
    return row


def longest_prompt(model: Any, gib: int) -> dict[str, int]:
    """The longest of the growing prompts that a card of this size reads, and writes some tokens after."""
    whole, longest = torch.cuda.get_device_properties(0).total_memory, 0
    empty()
    torch.cuda.set_per_process_memory_fraction(min((gib * 2**30 - CUDA_ITSELF) / whole, 1))
    with contextlib.suppress(torch.OutOfMemoryError):
        for length in GROWING:
            read(model, length, tokens=8)
            longest = length
    torch.cuda.set_per_process_memory_fraction(1.0)
    return dict(gib=gib, longest_prompt=longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only-make", action="store_true", help="write the folders and stop")
    parser.add_argument(
        "--compiled", action="store_true", help="also generate with a compiled step, by a static cache"
    )
    parser.add_argument("--output", type=Path, help="where the results go instead of benchmarks/results")
    options = parser.parse_args()
    make(options.folder, options.kinds)
    if options.only_make:
        return
    use_machine(argparse.Namespace(threads=None, device="cuda"))
    rows = []
    for kind in options.kinds:
        rows.append(measure(options.folder, kind))
        write_results("ten_billion", dict(machine=machine(), rows=rows), options.output)
    for row in rows if options.compiled else ():
        empty()
        seconds = seconds_per_token(load(options.folder / row["kind"]), cache_implementation="static")
        row["seconds_per_token"]["compiled, static cache"] = seconds
        print(row["kind"], row["seconds_per_token"], flush=True)
        write_results("ten_billion", dict(machine=machine(), rows=rows), options.output)


if __name__ == "__main__":
    main()
