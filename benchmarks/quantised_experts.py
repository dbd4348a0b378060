"""Speed of quantised experts beside bfloat16: a decode step and a prompt, in processor time, side by side.

    python benchmarks/quantised_experts.py [--hidden 1024] [--layers 6] [--rounds 5]

Two things are timed: a whole model of 8 experts, 2 of them used (hidden size 1024, width 2048, one memory), and the
experts of its layers alone, with and without the native kernels. Weights are random, since speed does not depend on
them. All kinds take turns in every round; the medians of the ratios go to `benchmarks/results/quantised_experts.json`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gengram import GengramConfig, GengramForCausalLM, GengramQuantizationConfig
from gengram.modeling_gengram import quantized_experts
from gengram.motif_memory.ways import native
from gengram.support.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "quantised_experts.json"
KINDS = ("int8", "int4")
LETTERS = (8, 5, 6, 7)


def models(hidden: int, layers: int) -> dict[str, Any]:
    """The same random weights in bfloat16, int8 and int4."""
    config = GengramConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        num_local_experts=8,
        num_experts_per_tok=2,
        memory_layers=[layers // 2],
        memory_embedding_dim=hidden // 8,
    )
    torch.manual_seed(0)
    found = {"bfloat16": GengramForCausalLM(config).to(torch.bfloat16).eval()}
    with tempfile.TemporaryDirectory() as folder:
        found["bfloat16"].save_pretrained(folder)
        for kind in KINDS:
            quantization = GengramQuantizationConfig(experts=kind)
            model = GengramForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=quantization)
            found[kind] = model.eval()
    return found


def decode(model: Any, steps: int) -> float:
    """Processor seconds of a step after a prompt of 64 bases."""
    ids = torch.tensor([[LETTERS[i * i % 4] for i in range(64)]])
    outputs = model(ids, use_cache=True)
    name = "cache" if "cache" in outputs else "past_key_values"
    started = time.process_time()
    for step in range(steps):
        token = torch.tensor([[LETTERS[step % 4]]])
        model(token, use_cache=True, **{name: outputs[name]})
    return (time.process_time() - started) / steps


def prefill(model: Any, length: int) -> float:
    """Processor seconds of a prompt."""
    ids = torch.tensor([[LETTERS[i * i % 4] for i in range(length)]])
    started = time.process_time()
    model(ids, use_cache=False)
    return time.process_time() - started


def experts_alone(model: Any, tokens: int, repeats: int) -> float:
    """Processor seconds of the mixtures of all layers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, model.config.hidden_size, generator=generator).to(torch.bfloat16)
    started = time.process_time()
    for _ in range(repeats):
        for layer in model.model.layers:
            layer.mlp(x)
    return (time.process_time() - started) / repeats


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=512, help="of the prompt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = models(options.hidden, options.layers)
    tasks = {
        "decode, whole model": lambda model: decode(model, 8),
        "decode, experts": lambda model: experts_alone(model, 1, 8),
        "prompt, whole model": lambda model: prefill(model, options.length),
        "prompt, experts": lambda model: experts_alone(model, options.length, 1),
    }
    kernels = ["native", "torch"] if native.status().available else ["torch"]
    has_native = quantized_experts._has_native_product
    seconds: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):  # the first is not counted
        for task, run in tasks.items():
            seconds.setdefault(f"{task}: bfloat16", []).append(run(loaded["bfloat16"]))
            for kind in KINDS:
                for kernel in kernels:
                    quantized_experts._has_native_product = has_native if kernel == "native" else lambda *_: False
                    seconds.setdefault(f"{task}: {kind}, {kernel}", []).append(run(loaded[kind]))
    quantized_experts._has_native_product = has_native
    results = {}
    for name, values in seconds.items():
        peers = seconds[f"{name.partition(':')[0]}: bfloat16"]
        ratio = statistics.median(a / b for a, b in zip(values[1:], peers[1:], strict=True))
        results[name] = {"processor_seconds": statistics.median(values[1:]), "of_bfloat16": ratio}
        print(f"{name:40} {results[name]['processor_seconds'] * 1e3:9.2f} ms  {ratio:.2f}", flush=True)
    record = {
        "machine": describe_machine() | {"load_average": os.getloadavg()},
        "options": vars(options),
        "native": native.status().capability or native.status().reason,
        "results": results,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
