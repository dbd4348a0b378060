"""Ways to keep the weights in fewer bits, side by side: what each needs, what it can do, and what it costs.

    python benchmarks/quantised_methods.py DATASET --mixture FOLDER --keep FOLDER [--methods 'float32;int8']
        [--device cuda]

DATASET is a folder of `gengram prepare`, FOLDER a model of `benchmarks/small_mixture.py`. Libraries are used where
they are installed. Every method runs in a process of its own, on two models:

- One of random weights in bfloat16, hidden size 1024, 3 layers, 8 experts, a memory: bytes of the saved weight files;
  growth of a process's memory by loading these and a prompt, and its peak; whether outputs are the same then, and it
  generates and trains LoRA on its attention.
- The mixture in float32 (in the row "bfloat16", in this): bits per base of the validation split, over A, C, G, T; and
  of variants of BRCA1 (`../shared`) the log-likelihood ratio of 257 bases around each, mean of both strands, and its
  Pearson correlation with that of float32.

On a GPU memory is what PyTorch's allocator holds there. Prints a table, and writes
`benchmarks/results/quantised_methods.json`.
"""

import argparse
import csv
import gzip
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from small_mixture import bases

from gengram import GengramConfig, GengramForCausalLM, GengramQuantizationConfig
from gengram.support.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "quantised_methods.json"
SHARED = Path(os.environ.get("GENGRAM_SHARED", Path(__file__).parents[2] / "shared"))
AROUND = 128
SAME = 0.01  # products of the same weights at other addresses, in bfloat16
LETTERS = {"A": 8, "C": 5, "G": 6, "T": 7, "N": 9}
COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
EXPERTS = r"re:.*experts\.(gate_up_proj|down_proj)"


def _torchao(kind: str, only: str | None = None, **options: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    config = getattr(quantization, f"{kind}WeightOnlyConfig")(version=2, **options)
    return TorchAoConfig(quantization.FqnToConfig({only: config}) if only else config)


def _bitsandbytes(**options: Any) -> Any:
    import bitsandbytes  # noqa: F401  # Transformers' message is long
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _fp8() -> Any:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config()


def _quanto() -> Any:
    import optimum.quanto  # noqa: F401
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


METHODS: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "bfloat16": lambda: None,
    "int8": lambda: GengramQuantizationConfig("int8"),
    "int8, attention int8": lambda: GengramQuantizationConfig("int8", "int8"),
    "int4": lambda: GengramQuantizationConfig("int4"),
    "int4, attention int8": lambda: GengramQuantizationConfig("int4", "int8"),
    "int4, attention int4": lambda: GengramQuantizationConfig("int4", "int4"),
    "torchao int8": lambda: _torchao("Int8"),
    "torchao int8, experts named": lambda: _torchao("Int8", EXPERTS),
    "torchao float8, experts named": lambda: _torchao("Float8", EXPERTS),
    "torchao int4, experts named": lambda: _torchao("Int4", EXPERTS, group_size=32),
    "bitsandbytes 8 bits": lambda: _bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4 bits": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "quanto int8": _quanto,
    "fine-grained FP8": _fp8,
}


# ---- one method, in a process of its own


def opened(folder: Path, device: str, **options: Any) -> Any:
    return GengramForCausalLM.from_pretrained(folder, device_map=device, **options).eval()


def load(folder: Path, method: str, dtype: torch.dtype, device: str) -> Any:
    kind = torch.bfloat16 if method == "bfloat16" else torch.float32 if method == "float32" else dtype
    return opened(folder, device, dtype=kind, quantization_config=METHODS[method]())


def resident(device: str) -> int:
    """Bytes of memory that the process holds now."""
    if device != "cpu":
        return torch.cuda.memory_allocated()
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def most_resident(device: str) -> int:
    """The most bytes that it ever held; `ru_maxrss` would include the process that started this one."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def outcome(run: Callable[[], str]) -> str:
    """What came of a try: its own word, or the error's first line."""
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def some_bases(count: int, device: str) -> torch.Tensor:
    """Random A, C, G, T, (1, count)."""
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([5, 6, 7, 8])[torch.randint(4, (1, count), generator=generator)].to(device)


@torch.no_grad()
def measure_saving(method: str, wide: Path, saved: Path, device: str) -> dict[str, Any]:
    """What is said while loading the model of random weights, and the bytes that it is saved in."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("", "transformers"):
        logging.getLogger(name).addHandler(handler)
    model = load(wide, method, torch.bfloat16, device)
    found: dict[str, Any] = {"warning": next((message for message in said if "as they are" in message), None)}
    torch.save(model(some_bases(256, device), use_cache=False).logits, saved / "logits.pt")

    def save() -> str:
        model.save_pretrained(saved)
        found["disk_bytes"] = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
        return "yes"

    return found | {"saves": outcome(save)}


def touch(tensor: Any) -> None:
    """Read something of every page of memory that a tensor lies in."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            touch(getattr(tensor, name))
    else:
        tensor.detach().reshape(-1)[::1024].float().sum()


def measure_abilities(method: str, wide: Path, saved: Path, device: str) -> dict[str, Any]:
    """Memory of the saved model, loaded without options (of one that cannot be saved, as it is made), and its work."""
    can_be_saved = (saved / "config.json").is_file()
    METHODS[method]()  # imports
    before = resident(device)
    model = opened(saved, device, dtype="auto") if can_be_saved else load(wide, method, torch.bfloat16, device)
    ids = some_bases(256, device)
    with torch.no_grad():
        for parameter in model.parameters():
            touch(parameter)
        logits = model(ids, use_cache=False).logits
    found: dict[str, Any] = {"resident_bytes": resident(device) - before}
    found["peak_bytes"] = most_resident(device) - before
    found["loads_again"] = "no"
    if can_be_saved:
        expected = torch.load(saved / "logits.pt")
        is_same = (logits - expected).norm() <= SAME * expected.norm()
        found["loads_again"] = "yes" if is_same else "yes, other outputs"

    def generate() -> str:
        longer = model.generate(ids[:, :32], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return "yes" if longer.shape == (1, 36) else f"length {longer.shape[1]}"

    def adapt() -> str:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        adapted(ids, labels=ids, use_cache=False).loss.backward()
        gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
        assert gradients and all(g is not None and bool(g.abs().sum() > 0) for g in gradients), "no gradients"
        return "yes"

    return found | {"generates": outcome(generate), "lora": outcome(adapt)}


def surprises(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """-log2 P of each base but the first, (batch, length - 1); 0 where there is no label."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    labels = bases(ids)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none") / math.log(2)


def bits_per_base(model: Any, rows: Any, count: int) -> float:
    total, number = 0.0, 0
    for start in range(0, count, 8):
        ids = torch.tensor(rows[start : start + 8]["input_ids"], device=model.device)
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


def effects(model: Any, windows: torch.Tensor) -> np.ndarray:
    """log P(alt) - log P(ref) in nats, mean of both strands."""
    scores = []
    for part in windows.to(model.device).split(8):
        bits = surprises(model, part.flatten(0, 2)).sum(-1).view(part.shape[:3])
        scores.append(((bits[..., 0] - bits[..., 1]) * math.log(2)).mean(1).cpu())
    return torch.cat(scores).double().numpy()


@torch.no_grad()
def measure_loss(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Bits per base and variant effects, on the mixture."""
    model = load(options.mixture, method, torch.float32, options.device)
    rows = load_dataset(str(options.dataset))["validation"]
    llr = effects(model, variant_windows(options.variants))
    return {"bits_per_base": bits_per_base(model, rows, options.rows), "llr": llr.tolist()}


# ---- all of them


def write_wide_model(folder: Path) -> None:
    config = GengramConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        memory_layers=[1],
        memory_embedding_dim=128,
    )
    torch.manual_seed(0)
    GengramForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measured(method: str, wide: Path, keep: Path) -> dict[str, Any]:
    """What processes of their own find out about a method, or found out in an earlier call."""
    file = keep / f"{method}.json"
    if file.is_file():
        return json.loads(file.read_text())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as saved:
        for task in ("saving", "abilities", "loss"):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", task, method, str(wide), saved]
            done = subprocess.run(command, capture_output=True, text=True)
            try:
                found |= json.loads(done.stdout.splitlines()[-1])
            except (IndexError, ValueError):
                found |= {"error": f"exit code {done.returncode}: {' '.join(done.stderr.split())[-300:]}"}
            if "error" in found:
                break
    print(method, json.dumps({name: value for name, value in found.items() if name != "llr"}), flush=True)
    file.write_text(json.dumps(found))
    return found


def one(options: argparse.Namespace) -> None:
    task, method, *folders = options.one
    wide, saved = map(Path, folders)
    try:
        if task == "loss":
            found = measure_loss(options, method)
        else:
            found = (measure_saving if task == "saving" else measure_abilities)(method, wide, saved, options.device)
    except ImportError as error:
        found = {"error": f"not installed: {' '.join(str(error).split())[:300]}"}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    print(json.dumps(found))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""

    def megabytes(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:.0f} MB"

    def short(value: str) -> str:
        return value if value.startswith("yes") else "no"

    lines = [
        "| method | on disk | memory | peak | loads again | generates | LoRA | bits per base | LLR correlation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, found in results.items():
        if "error" in found:
            lines.append(f"| {method} | {found['error']} |")
            continue
        sizes = [megabytes(found.get(f"{name}_bytes")) for name in ("disk", "resident", "peak")]
        abilities = [short(found[name]) for name in ("loads_again", "generates", "lora")]
        numbers = [f"{found['bits_per_base']:.5f}", f"{found['llr_correlation']:.5f}"]
        lines.append(f"| {' | '.join([method, *sizes, *abilities, *numbers])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", type=Path, help="folder of `gengram prepare`")
    parser.add_argument("--mixture", type=Path, required=True, help="folder of small_mixture.py")
    parser.add_argument("--keep", type=Path, required=True, help="what is finished; the next call does not repeat it")
    parser.add_argument("--methods", default=";".join(METHODS), help="names, with semicolons between them")
    parser.add_argument("--rows", type=int, default=64, help="of the validation split")
    parser.add_argument("--variants", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="methods that are measured at once")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is a GPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        one(options)
        return
    methods = options.methods.split(";")
    options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        wide = Path(folder)
        write_wide_model(wide)
        results = dict(
            zip(methods, pool.map(lambda method: measured(method, wide, options.keep), methods), strict=True)
        )
    reference = np.array(results["float32"]["llr"])
    for found in results.values():
        if "llr" in found:
            found["llr_correlation"] = float(np.corrcoef(reference, found.pop("llr"))[0, 1])
    facts = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    del facts["one"]
    facts["mixture_steps"] = torch.load(options.mixture / "training.pt", weights_only=True)["step"]
    record = {"machine": describe_machine(), "options": facts, "results": results}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
