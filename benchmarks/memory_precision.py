"""How exact the memory is along a sequence: exact pooling and the original's, against float64.

    python benchmarks/memory_precision.py

Prints, and writes to `benchmarks/results/memory_precision.json`, the relative error of the memory's residual by
position: the root mean square over the positions of a bin, divided by that of the exact values.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from gengram import GengramConfig, __version__
from gengram.modeling_gengram.modeling_gengram import GengramMotifMemory
from gengram.operators.motif_memory import letter_codes, plan_ngrams

BINS = [(64, 128), (512, 640), (1024, 1280), (2048, 2560), (4096, 5120), (7168, 8192)]
RESULTS = Path(__file__).parent / "results" / "memory_precision.json"


def memory(pooling: str, hidden: int, width: int) -> tuple[GengramMotifMemory, GengramConfig]:
    """A memory with tables N(0, 1), as PyTorch initialises them and the original starts from."""
    config = GengramConfig(
        hidden_size=hidden, num_hidden_layers=1, memory_layers=[0], memory_embedding_dim=width, memory_pooling=pooling
    )
    torch.manual_seed(0)
    module = GengramMotifMemory(config, 0)
    torch.nn.init.normal_(module.short_conv.conv.weight, std=0.5)
    return module, config


@torch.no_grad()
def residual(pooling: str, dtype: torch.dtype, hidden: int, width: int, length: int) -> torch.Tensor:
    module, config = memory(pooling, hidden, width)
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor(config.memory_token_ids)[torch.randint(4, (1, length), generator=generator)]
    states = torch.randn(1, length, hidden, generator=generator).bfloat16()
    for weight in module.parameters():  # the same numbers in every dtype
        weight.copy_(weight.bfloat16())
    plan = plan_ngrams(letter_codes(ids, config.memory_token_ids), config.memory_ngram_sizes, config.memory_window)
    return module.to(dtype)(states.to(dtype), plan)[0][0].double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=64, help="memory_embedding_dim")
    arguments = parser.parse_args()
    sizes = dict(hidden=arguments.hidden, width=arguments.width, length=8192)
    exact = residual("exact", torch.float64, **sizes)
    rows = {}
    for pooling in ("exact", "as_trained"):
        for dtype in (torch.float32, torch.bfloat16):
            ours = residual(pooling, dtype, **sizes)
            rows[f"{pooling} {str(dtype).removeprefix('torch.')}"] = [
                ((ours[a:b] - exact[a:b]).square().mean() / exact[a:b].square().mean()).sqrt().item() for a, b in BINS
            ]
    print(f"{'positions':22}" + "".join(f"{f'{a}-{b}':>12}" for a, b in BINS))
    for name, errors in rows.items():
        print(f"{name:22}" + "".join(f"{error:12.1e}" for error in errors))
    machine = dict(processor=platform.processor() or platform.machine(), torch=torch.__version__, gengram=__version__)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(dict(machine=machine, shapes=sizes, bins=BINS, errors=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
