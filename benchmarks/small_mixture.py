"""A small trained mixture of experts, made of the default model, for benchmarks of quantised weights.

    python benchmarks/small_mixture.py DATASET FOLDER [--steps 100]

The released model is not at hand. Each dense feed-forward of the default model becomes 8 experts, 2 of them used. So
that the experts are not copies of one another, half of each one's channels, another half in each, start anew from
random numbers of the same mean and deviation (Drop-Upcycling, arXiv 2502.19261). Then the whole model is trained with
the router's losses. DATASET is a folder of `gengram prepare`.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from gengram import DEFAULT_MODEL, GengramConfig, GengramForCausalLM, GengramTokenizer

EXPERTS, USED, ANEW = 8, 2, 0.5
RATE, WARM_UP = 1e-3, 20
STATE = "training.pt"


def mixture_of_default() -> GengramForCausalLM:
    """The default model with 8 experts in place of each feed-forward, half of each untrained."""
    torch.manual_seed(0)
    dense = GengramForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    fields = {**dense.config.to_dict(), "num_local_experts": EXPERTS, "num_experts_per_tok": USED}
    model = GengramForCausalLM(GengramConfig.from_dict(fields))
    weights = dense.state_dict()
    with torch.no_grad():
        for name, target in model.named_parameters():
            if name in weights:
                target.copy_(weights[name])
        for number, layer in enumerate(model.model.layers):
            start = f"model.layers.{number}.mlp."
            gate, up, down = (weights[f"{start}{part}_proj.weight"] for part in ("gate", "up", "down"))
            for expert in range(EXPERTS):
                anew = torch.rand(len(gate)) < ANEW
                parts = [_partly_anew(part, anew) for part in (gate, up, down.T)]
                layer.mlp.experts.gate_up_proj[expert] = torch.cat(parts[:2])
                layer.mlp.experts.down_proj[expert] = parts[2].T
    return model


def _partly_anew(weight: torch.Tensor, anew: torch.Tensor) -> torch.Tensor:
    """Weights (channels, hidden) of which some channels are random."""
    random = torch.randn(weight.shape) * weight.std() + weight.mean()
    return torch.where(anew.unsqueeze(1), random, weight)


def bases(ids: torch.Tensor) -> torch.Tensor:
    """Labels: only A, C, G and T count."""
    return torch.where(torch.isin(ids, torch.tensor([5, 6, 7, 8], device=ids.device)), ids, -100)


def train(folder: Path, rows: Any, steps: int, batch: int) -> None:
    """AdamW. Every 20 steps the model is written into the folder, from where the next call goes on."""
    state = torch.load(folder / STATE, weights_only=True) if (folder / STATE).is_file() else {"step": 0}
    model = mixture_of_default() if state["step"] == 0 else GengramForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    if state["step"]:
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    for step in range(state["step"], steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, 1)
        ids = torch.tensor(rows[torch.randint(len(rows), (batch,), generator=generator).tolist()]["input_ids"])
        loss = model(ids, labels=bases(ids), output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1}: {loss.item() / math.log(2):.4f} bits, {time.process_time():.0f} s", flush=True)
            model.save_pretrained(folder)
            torch.save({"step": step + 1, "optimizer": optimizer.state_dict()}, folder / STATE)


def alikeness(model: GengramForCausalLM) -> float:
    """Mean cosine between the weights of two experts of a layer: 1 for copies, 0 for unrelated ones."""
    cosines = []
    for layer in model.model.layers:
        experts = layer.mlp.experts
        flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1)
        pairs = torch.nn.functional.normalize(flat, dim=1) @ torch.nn.functional.normalize(flat, dim=1).T
        cosines.append((pairs.sum() - EXPERTS) / (EXPERTS * (EXPERTS - 1)))
    return float(torch.stack(cosines).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", type=Path, help="folder of `gengram prepare`")
    parser.add_argument("folder", type=Path, help="where the mixture is written")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.folder, load_dataset(str(options.dataset))["train"], options.steps, options.batch)
    GengramTokenizer().save_pretrained(options.folder)


if __name__ == "__main__":
    main()
