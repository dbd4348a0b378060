"""Speed of the memory's forward pass: exact definition, folded tables and, if given, the authors' module.

    python benchmarks/memory_forward.py [--reference PATH_TO_gengram.py]

The reference is the authors' `megatron/core/transformer/gengram.py`, which is not part of this project. Results are
checked against the definition in float64 before anything is timed; times are medians of interleaved runs without
gradients, and the figures are ratios within one run. Writes `benchmarks/results/memory_forward.json`.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

from gengram import GengramConfig, __version__
from gengram.modeling_gengram.modeling_gengram import GengramMotifMemory
from gengram.operators.motif_memory import letter_codes, plan_ngrams

CASES = [
    dict(hidden=4096, width=1024, length=8192, dtype="bfloat16"),
    dict(hidden=1024, width=256, length=2048, dtype="float32"),
    dict(hidden=1024, width=256, length=2048, dtype="bfloat16"),
]
RESULTS = Path(__file__).parent / "results" / "memory_forward.json"


def reference_module(path: Path, config: GengramConfig) -> torch.nn.Module:
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
        hidden_size=config.hidden_size,
        dna_token_ids=config.memory_token_ids,
        ngram_sizes=config.memory_ngram_sizes,
        embed_dim_per_ngram=config.memory_embedding_dim,
        active=True,
        use_short_conv=True,
        short_conv_kernel_size=config.memory_conv_kernel,
        short_conv_dilation=config.memory_conv_dilation,
        window_size=config.memory_window,
    )


@torch.no_grad()
def measure(case: dict, reference: Path | None, rounds: int) -> dict:
    dtype = getattr(torch, case["dtype"])
    config = GengramConfig(
        hidden_size=case["hidden"], num_hidden_layers=1, memory_layers=[0], memory_embedding_dim=case["width"]
    )
    torch.manual_seed(0)
    memory = GengramMotifMemory(config, 0).eval()
    for weight in memory.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 if weight.dim() == 2 else 0.5)
        weight.copy_(weight.bfloat16())  # the same numbers in every dtype
    ids = torch.tensor(config.memory_token_ids)[torch.randint(4, (1, case["length"]))]
    hidden = torch.randn(1, case["length"], case["hidden"]).bfloat16()

    def plan():
        codes = letter_codes(ids, config.memory_token_ids)
        return plan_ngrams(codes, config.memory_ngram_sizes, config.memory_window)

    exact = memory.double()(hidden.double(), plan())[0]
    memory.to(dtype)
    states = hidden.to(dtype)
    paths: dict[str, Callable[[], torch.Tensor]] = {}

    def unfolded():
        memory.unfold()
        return memory(states, plan())[0]

    folded_memory = GengramMotifMemory(config, 0).to(dtype).eval()
    folded_memory.load_state_dict(memory.state_dict())
    started = time.perf_counter()
    folded_memory.fold()
    folding = time.perf_counter() - started
    paths["definition"] = unfolded
    paths["folded"] = lambda: folded_memory(states, plan())[0]
    if reference is not None:
        theirs = reference_module(reference, config).to(dtype).eval()
        theirs.load_state_dict(memory.state_dict())
        sequence_first = states.transpose(0, 1).contiguous()
        paths["reference"] = lambda: theirs(sequence_first, ids).transpose(0, 1)

    errors, times = {}, {name: [] for name in paths}
    for name, path in paths.items():  # also the warm-up
        errors[name] = ((path().double() - exact).norm() / exact.norm()).item()
        limit = 5e-3 if dtype == torch.bfloat16 else 1e-3  # float16 tables
        assert name == "reference" or errors[name] < limit, (case, name, errors)
    for _ in range(rounds):
        for name, path in paths.items():
            started = time.perf_counter()
            path()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return dict(case=case, seconds=medians, relative_error=errors, folding_seconds=folding, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, help="the authors' gengram.py")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        row = measure(case, arguments.reference, arguments.rounds)
        rows.append(row)
        base = row["seconds"].get("reference", row["seconds"]["definition"])
        print(
            case,
            *(f"{name} {seconds:.3f} s ({base / seconds:.1f}x)" for name, seconds in row["seconds"].items()),
            *(f"error {name} {error:.1e}" for name, error in row["relative_error"].items()),
            sep="\n  ",
        )
    machine = dict(
        processor=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        gengram=__version__,
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
