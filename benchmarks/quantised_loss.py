"""What quantised experts cost: bits per base and variant effects beside the same model in float32.

    python benchmarks/quantised_loss.py DATASET --folder FOLDER [--steps 60] [--variants 300]

The released model is not at hand, so a small mixture is made of the default model: each dense feed-forward becomes 8
experts, copies with a tenth of noise, 2 of them used, and all is trained for a few steps with the router's losses.
DATASET is a folder of `gengram prepare`. The mixture stays in FOLDER, where the next run finds it.

Measured on the validation split (bits per base over A, C, G, T) and on variants of BRCA1 (`../shared`): the
log-likelihood ratio of 257 bases around each, both strands, and its Pearson correlation with that of float32.
Results go to `benchmarks/results/quantised_loss.json`.
"""

import argparse
import csv
import gzip
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset

from gengram import DEFAULT_MODEL, GengramConfig, GengramForCausalLM, GengramQuantizationConfig, GengramTokenizer
from gengram.support.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "quantised_loss.json"
SHARED = Path(os.environ.get("GENGRAM_SHARED", Path(__file__).parents[2] / "shared"))
EXPERTS, NOISE, AROUND = 8, 0.1, 128
LETTERS = {"A": 8, "C": 5, "G": 6, "T": 7, "N": 9}
COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


def mixture_of_default() -> GengramForCausalLM:
    """The default model with 8 noisy copies of each feed-forward as experts."""
    dense = GengramForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    fields = {**dense.config.to_dict(), "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    model = GengramForCausalLM(GengramConfig.from_dict(fields))
    weights = dense.state_dict()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, target in model.named_parameters():
            if ".mlp.experts." in name:
                start = name.partition(".experts.")[0]
                parts = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
                source = torch.cat([weights[f"{start}.{part}_proj.weight"] for part in parts])
                noise = torch.randn(target.shape, generator=generator) * source.std() * NOISE
                target.copy_(source + noise)
            elif name in weights:
                target.copy_(weights[name])
    return model


def train(model: GengramForCausalLM, rows: Any, steps: int, batch: int, folder: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in range(steps):
        ids = torch.tensor(rows[torch.randint(len(rows), (batch,), generator=generator).tolist()]["input_ids"])
        loss = model(ids, labels=bases(ids), output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: {loss.item() / math.log(2):.4f} bits, {time.process_time():.0f} s", flush=True)
    model.eval().save_pretrained(folder)


def bases(ids: torch.Tensor) -> torch.Tensor:
    """Labels: only A, C, G and T count."""
    return torch.where(torch.isin(ids, torch.tensor([5, 6, 7, 8])), ids, -100)


def surprises(model: GengramForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """-log2 P of each base but the first, (batch, length - 1); 0 where there is no label."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    labels = bases(ids)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none") / math.log(2)


def bits_per_base(model: GengramForCausalLM, rows: Any, count: int) -> float:
    total, number = 0.0, 0
    for start in range(0, count, 8):
        ids = torch.tensor(rows[start : start + 8]["input_ids"])
        total += float(surprises(model, ids).double().sum())
        number += int((bases(ids)[:, 1:] >= 0).sum())
    return total / number


def variant_windows(count: int) -> torch.Tensor:
    """Token ids (variants, strands, reference or alternative, length)."""
    folder = SHARED / "data" / "brca1_sge"
    with gzip.open(folder / "chr17_41100001-41300000.hg19.fa.gz", "rt") as file:
        text = "".join(line.strip() for line in file if not line.startswith(">")).upper()
    with gzip.open(folder / "variants.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows[:: max(len(rows) // count, 1)][:count]:
        place = int(row["pos_hg19"]) - 41100001
        window = text[place - AROUND : place + AROUND + 1]
        assert window[AROUND] == row["ref"], row
        both = [window, window[:AROUND] + row["alt"] + window[AROUND + 1 :]]
        strands = [both, ["".join(COMPLEMENT[base] for base in reversed(one)) for one in both]]
        found.append([[[LETTERS[base] for base in one] for one in strand] for strand in strands])
    return torch.tensor(found)


def effects(model: GengramForCausalLM, windows: torch.Tensor) -> np.ndarray:
    """log P(alt) - log P(ref) in nats, mean of both strands."""
    scores = []
    for part in windows.split(8):
        bits = surprises(model, part.flatten(0, 2)).sum(-1).view(part.shape[:3])
        scores.append(((bits[..., 0] - bits[..., 1]) * math.log(2)).mean(1))
    return torch.cat(scores).double().numpy()


def load(folder: Path, kind: str) -> GengramForCausalLM:
    if kind == "float32":
        return GengramForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantization = GengramQuantizationConfig(experts=kind)
    return GengramForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", type=Path, help="folder of `gengram prepare`")
    parser.add_argument("--folder", type=Path, required=True, help="where the mixture is kept")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="of the validation split")
    parser.add_argument("--variants", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset(str(options.dataset))
    if not (options.folder / "config.json").is_file():
        train(mixture_of_default(), data["train"], options.steps, options.batch, options.folder)
        GengramTokenizer().save_pretrained(options.folder)
    windows = variant_windows(options.variants)
    results: dict[str, dict[str, float]] = {}
    reference = np.zeros(0)
    with torch.no_grad():
        for kind in ("float32", "int8", "int4"):
            model = load(options.folder, kind)
            llr = effects(model, windows)
            reference = llr if kind == "float32" else reference
            results[kind] = {
                "bits_per_base": bits_per_base(model, data["validation"], options.rows),
                "llr_correlation": float(np.corrcoef(reference, llr)[0, 1]),
                "bytes_of_weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            }
            print(kind, results[kind], flush=True)
    facts = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    record = {"machine": describe_machine(), "options": facts, "results": results}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
