"""How exact the memory is along a sequence: every way to compute it and the original's, against float64.

    python benchmarks/memory_precision.py [--figure docs/figures/memory_precision.svg]

Prints, and writes to `benchmarks/results/memory_precision.json`, the relative error of the memory's residual by
position: the root mean square over the positions of a bin, divided by that of the exact values. The figure needs
matplotlib.
"""

import argparse
from pathlib import Path

import torch
from memory_setup import LETTERS, machine, write_results

from gengram import MotifMemory, MotifMemoryConfig, memory_path
from gengram.motif_memory import letter_codes, plan_ngrams
from gengram.motif_memory.ways.native import status
from gengram.support.figures import write_figure

LENGTH = 131_072
BINS = [(64, 128)] + [(2**k, 2**k + 2 ** (k - 2)) for k in range(9, 17)] + [(LENGTH - 8192, LENGTH)]
SHORT = torch.float32, torch.bfloat16


def memory(pooling: str, hidden: int, width: int) -> MotifMemory:
    """A memory with tables N(0, 1), as PyTorch initialises them and the original starts from."""
    torch.manual_seed(0)
    module = MotifMemory(MotifMemoryConfig(embedding_dim=width, pooling=pooling), hidden).eval()
    for part in (*module.embeddings, module.key_proj, module.value_proj):
        part.reset_parameters()
    torch.nn.init.normal_(module.short_conv.conv.weight, std=0.5)
    return module


@torch.no_grad()
def residual(pooling: str, algorithm: str, kernels: str, dtype: torch.dtype, hidden: int, width: int) -> torch.Tensor:
    """(length, hidden) in float64, computed in `dtype` from the same bfloat16 numbers."""
    module = memory(pooling, hidden, width)
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor(LETTERS)[torch.randint(4, (1, LENGTH), generator=generator)]
    states = torch.randn(1, LENGTH, hidden, generator=generator).bfloat16()
    for weight in module.parameters():
        weight.copy_(weight.bfloat16())
    plan = plan_ngrams(letter_codes(ids, LETTERS), module.config)
    with memory_path(algorithm, kernels):
        return module.to(dtype)(states.to(dtype), plan).residual[0].double()


def draw(rows: dict[str, list[float]], path: Path) -> None:
    """The errors by position, one line per way."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, errors in rows.items():
        style = "--" if "as_trained" in name else "-"
        axes.loglog([(a + b) / 2 for a, b in BINS], errors, style, marker="o", markersize=3, label=name)
    axes.set(xlabel="position (bases)", ylabel="relative error of the memory's residual")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left")
    write_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=64, help="memory_embedding_dim")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    sizes = dict(hidden=arguments.hidden, width=arguments.width)
    exact = residual("exact", "token_major", "torch", torch.float64, **sizes)
    ways = [("exact", "token_major", "torch"), ("exact", "folded", "torch"), ("as_trained", "auto", "torch")]
    if status().available:
        ways.insert(2, ("exact", "folded", "native"))
    rows = {}
    for pooling, algorithm, kernels in ways:
        for dtype in SHORT:
            ours = residual(pooling, algorithm, kernels, dtype, **sizes)
            name = f"{pooling}, {algorithm}, {kernels}" if pooling == "exact" else pooling
            rows[f"{name}, {str(dtype).removeprefix('torch.')}"] = [
                ((ours[a:b] - exact[a:b]).square().mean() / exact[a:b].square().mean()).sqrt().item() for a, b in BINS
            ]
    for name, errors in rows.items():
        print(f"{name:40}" + "".join(f"{error:10.1e}" for error in errors), flush=True)
    if arguments.figure:
        draw(rows, arguments.figure)
    write_results(
        "memory_precision",
        dict(machine=machine(), shapes=sizes | dict(length=LENGTH), bins=BINS, errors=rows),
    )


if __name__ == "__main__":
    main()
