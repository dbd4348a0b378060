"""What a memory costs: a training step, a prefill and a decoding step, beside the same model without it.

    python benchmarks/graft_overhead.py [--device cuda] [--threads N] [--hidden 512 1024] [--length 2048] [--rounds 9]
        [--hosts llama gengram]

The hosts are a Llama with grouped-query attention and twelve layers, on which memories are grafted, and a dense
Gengram model of six layers that has its own. The memories stand in front of three layers, as in the released model.
Without gradients a third model takes part, whose memories were folded by `fold_memory`. The models take turns, and
each figure is the median of the ratios of neighbouring turns, so that a load that comes and goes touches all. On a CPU
processor time is counted. Writes `benchmarks/results/graft_overhead.json`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory_setup import LETTERS, add_machine_arguments, machine, random_bases, seconds_of, use_machine, write_results
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from gengram import GengramConfig, GengramForCausalLM, GengramTokenizer, MotifMemoryConfig, attach_memory
from gengram.motif_memory import fold_memory

LAYERS = {"llama": 12, "gengram": 6}
MEMORY_LAYERS = {"llama": (2, 5, 9), "gengram": (1, 2, 4)}
TOKENS = 16  # of decoding, a turn each, where other work has one turn


def build(kind: str, hidden: int, has_memory: bool) -> Any:
    """A host of a kind, with memories that add something, as after training, or without."""
    sizes = {
        "vocab_size": len(GengramTokenizer()),
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": LAYERS[kind],
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "max_position_embeddings": 8192,
    }
    layers, width = MEMORY_LAYERS[kind], hidden // 4
    torch.manual_seed(0)
    if kind == "gengram":
        own = {"num_local_experts": 0, "memory_embedding_dim": width, "memory_layers": layers if has_memory else []}
        return GengramForCausalLM(GengramConfig(**sizes, **own))
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    if has_memory:
        attach_memory(model, MotifMemoryConfig(embedding_dim=width), layers=layers, tokenizer=GengramTokenizer())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "motif_memory" in name and weight.dim() > 1:
                    weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


def training_step(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def step() -> None:
        model.eval()
        model(input_ids=ids, logits_to_keep=1)

    return step


def decoding(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    model.eval()
    with torch.inference_mode():
        cache = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).past_key_values
    token = torch.tensor([[LETTERS[0]]], device=ids.device)

    @torch.inference_mode()
    def step() -> None:
        model(input_ids=token, past_key_values=cache)

    return step


WORK = {"training step": training_step, "prefill": prefill, "decoding": decoding}


def measure(kind: str, hidden: int, length: int, dtype: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Medians of seconds of the bare host, and of the others' ratios to it, for each kind of work."""
    ids = random_bases(length)
    models = {
        name: build(kind, hidden, has_memory=name != "bare").to(device, getattr(torch, dtype))
        for name in ("bare", "memory", "folded")
    }
    fold_memory(models["folded"].eval())
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    case: dict[str, Any] = {"host": kind, "layers": LAYERS[kind], "memories": MEMORY_LAYERS[kind]}
    case |= {"hidden": hidden, "length": length, "dtype": dtype, "clock": clock.__name__}
    case["parameters"] = {name: model.num_parameters() for name, model in models.items()}
    for work, of in WORK.items():
        taking_part = [name for name in models if of is not training_step or name != "folded"]
        calls = {name: of(models[name], ids) for name in taking_part}
        for call in calls.values():
            call()
        turns = rounds * TOKENS if of is decoding else rounds
        seconds = [{name: seconds_of(call, clock=clock) for name, call in calls.items()} for _ in range(turns)]
        case[work] = {"bare_seconds": statistics.median(turn["bare"] for turn in seconds)}
        for name in taking_part[1:]:
            ratios = [turn[name] / turn["bare"] for turn in seconds]
            case[work][name] = {"ratio": statistics.median(ratios), "ratios": [round(ratio, 4) for ratio in ratios]}
            print(
                f"{kind}, hidden {hidden}, {length} bases, {dtype}: {work:14} {name:8} "
                f"{statistics.median(ratios):.3f}x",
                flush=True,
            )
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_machine_arguments(parser)
    parser.add_argument("--hosts", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="where the results go instead of benchmarks/results")
    arguments = parser.parse_args()
    device = use_machine(arguments)
    cases = [
        measure(kind, hidden, arguments.length, arguments.dtype, device, arguments.rounds)
        for kind in arguments.hosts
        for hidden in arguments.hidden
    ]
    write_results("graft_overhead", {"machine": machine(), "cases": cases}, arguments.output)


if __name__ == "__main__":
    main()
