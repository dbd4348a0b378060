"""Memory and speed of `gengram convert to-hf` at the real tensor sizes, against `cp` of the bytes that it writes.

    python benchmarks/conversion.py [--folder DIR] [--rounds 3]

Makes checkpoints of random weights in both formats under DIR (deleted at the end; 15 GB are needed for a while):
layers of the released model (hidden size 4096, 16 heads, experts of width 8192, memory of width 6 x 1024) with four
experts each; one layer, about 1 GB, and four layers, about 4 GB. Per checkpoint and round: the converter in a process
of its own, then `cp` of the weight files that it wrote. Both end with the bytes on the disk (fsync), and before both
the files to be read are dropped from the page cache. Then the machine rests, before both for the same time: a virtual
machine gives freed memory back to its host within seconds, and `cp` is twice as fast while it has not yet done so.
Writes medians to `benchmarks/results/conversion.json`.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gengram.support.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "conversion.json"
HIDDEN, HEADS, GROUPS, HEAD_DIM, EXPERTS, WIDTH, VOCAB, MEMORY = 4096, 16, 8, 256, 4, 8192, 128, 1024
SIZES = (1, 2, 3, 4, 5, 6)
LAYERS = {"1 GB": 1, "4 GB": 4}
REST = 12.0  # seconds


class Weights:
    """Random bfloat16 values, cut from one pool so that making them takes no time."""

    def __init__(self) -> None:
        self.pool = torch.randn(2**26 + 2**16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        start = zlib.crc32(name.encode()) % 2**16
        if count > 2**26:
            raise ValueError(f"{name} has {count} elements; the pool has {2**26}")
        return self.pool[start : start + count].reshape(shape)


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """One layer's tensors with Transformer Engine names; experts are numbered."""
    shapes: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "mlp.router.weight": (EXPERTS, HIDDEN),
        "engram_dna.key_proj.weight": (HIDDEN, MEMORY * len(SIZES)),
        "engram_dna.value_proj.weight": (HIDDEN, MEMORY * len(SIZES)),
        "engram_dna.norm_q.weight": (HIDDEN,),
        "engram_dna.norm_k.weight": (HIDDEN,),
        "engram_dna.short_conv.conv.weight": (HIDDEN, 1, 4),
    }
    shapes |= {f"engram_dna.embeddings.{i}.weight": (5**n, MEMORY) for i, n in enumerate(SIZES)}
    for expert in range(EXPERTS):
        shapes[f"mlp.experts.linear_fc1.weight{expert}"] = (2 * WIDTH, HIDDEN)
        shapes[f"mlp.experts.linear_fc2.weight{expert}"] = (HIDDEN, WIDTH)
    return shapes


OUTER = {
    "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (VOCAB, HIDDEN),
}


def arguments(layers: int) -> argparse.Namespace:
    """Megatron's arguments, as far as they describe the model; the fourth layer's memory is not active."""
    memory = dict(
        enabled=True,
        layer_ids=[i for i in range(1, layers + 1) if i < 4],
        ngram_sizes=list(SIZES),
        embed_dim_per_ngram=MEMORY,
        token_ids=[8, 5, 6, 7, 9],
        use_short_conv=True,
        short_conv_kernel_size=4,
        short_conv_dilation=None,
        window_size=21,
    )
    return argparse.Namespace(
        num_layers=layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        group_query_attention=True,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=WIDTH,
        num_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        moe_router_topk=2,
        padded_vocab_size=VOCAB,
        max_position_embeddings=8192,
        seq_length=8192,
        add_bias_linear=False,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        position_embedding_type="rope",
        rotary_base=10000,
        swiglu=True,
        untie_embeddings_and_output_weights=True,
        init_method_std=0.01,
        attention_dropout=0.0,
        pipeline_model_parallel_size=1,
        tensor_model_parallel_size=1,
        params_dtype=torch.bfloat16,
        **{f"engram_dna_{name}": value for name, value in memory.items()},
    )


def write_torch(folder: Path, layers: int, weights: Weights) -> None:
    """Format `torch`, one pipeline stage."""
    model = {name: weights(name, *shape).clone() for name, shape in OUTER.items()}
    for layer in range(layers):
        for name, shape in layer_shapes().items():
            name = f"decoder.layers.{layer}.{name}"
            model[name] = weights(name, *shape).clone()
    rank = folder / "mp_rank_00"
    rank.mkdir(parents=True)
    saved = {"args": arguments(layers), "checkpoint_version": 3.0, "iteration": 1, "model": model}
    torch.save(saved, rank / "model_optim_rng.pt")


def write_torch_dist(folder: Path, layers: int, weights: Weights) -> None:
    """Format `torch_dist`: layers and experts stacked, chunks of one layer, one expert and, in fc1, gate or up."""
    folder.mkdir(parents=True)
    described: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with open(folder / "__0_0.distcp", "wb") as first, open(folder / "__0_1.distcp", "wb") as second:
        files = [first, second]

        def chunk(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], value: torch.Tensor) -> None:
            number = len(places) % 2
            archive = io.BytesIO()
            torch.save(value.clone(), archive)
            start = files[number].tell()
            files[number].write(archive.getbuffer())
            size = torch.Size(shape)
            entry = described.setdefault(name, TensorStorageMetadata(TensorProperties(value.dtype), size, []))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), value.shape))
            place = _StorageInfo(f"__0_{number}.distcp", start, files[number].tell() - start)
            places[MetadataIndex(name, torch.Size(offsets), 0)] = place

        for name, shape in OUTER.items():
            chunk(name, shape, (0,) * len(shape), weights(name, *shape))
        for layer in range(layers):
            for name, shape in layer_shapes().items():
                value = weights(f"decoder.layers.{layer}.{name}", *shape)
                if not name.startswith("mlp.experts."):
                    zeros = (0,) * len(shape)
                    chunk(f"decoder.layers.{name}", (layers, *shape), (layer, *zeros), value[None])
                    continue
                stem, _, expert = name.removeprefix("mlp.experts.").partition(".weight")
                whole = f"decoder.layers.mlp.experts.experts.{stem}.weight"
                rows = shape[0] // 2 if stem == "linear_fc1" else shape[0]
                for row in range(0, shape[0], rows):
                    offsets = (layer, int(expert), row, 0)
                    chunk(whole, (layers, EXPERTS, *shape), offsets, value[row : row + rows][None, None])
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, planner_data={}, storage_data=places)))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"args": arguments(layers), "checkpoint_version": 3.0, "iteration": 1}, folder / "common.pt")


def drop_from_page_cache(files: list[Path]) -> None:
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    time.sleep(REST)


# The peak is read from VmHWM: `ru_maxrss` would include the process that started this one.
CONVERT = """
import sys
from gengram.cli import main
code = main(["convert", "to-hf", *sys.argv[1:], "--json"])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, file=sys.stderr)
sys.exit(code)
"""


def convert(source: Path, output: Path) -> dict[str, float]:
    drop_from_page_cache([path for path in source.rglob("*") if path.is_file()])
    started = time.monotonic()
    command = [sys.executable, "-c", CONVERT, str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.monotonic() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    report = json.loads(done.stdout)
    peak = int(done.stderr.split()[-1]) * 1024
    return {"seconds": report["seconds"], "process_seconds": wall, "peak_bytes": peak, "bytes": report["nbytes"]}


def copy(output: Path, target: Path) -> float:
    files = sorted(output.glob("*.safetensors"))
    drop_from_page_cache(files)
    target.mkdir()
    started = time.monotonic()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    subprocess.run(["sync", *(str(target / file.name) for file in files)], check=True)
    return time.monotonic() - started


def measure(source: Path, folder: Path, rounds: int) -> dict:
    runs = []
    for _ in range(rounds):
        output, target = folder / "output", folder / "copy"
        run = convert(source, output)
        run["cp_seconds"] = copy(output, target)
        runs.append(run)
        print(f"{source.name}: {run}", flush=True)
        shutil.rmtree(output)
        shutil.rmtree(target)
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    size = median["bytes"]
    return {
        "bytes_of_weights": size,
        "peak_bytes": median["peak_bytes"],
        "convert_bytes_per_second": size / median["seconds"],
        "cp_bytes_per_second": size / median["cp_seconds"],
        "share_of_cp": median["cp_seconds"] / median["seconds"],
        "share_of_cp_with_start_of_python": median["cp_seconds"] / median["process_seconds"],
        "runs": runs,
    }


def hash_speed() -> dict[str, float]:
    data = os.urandom(2**20) * 128
    speeds = {}
    for name, function in (("sha256", hashlib.sha256), ("crc32", zlib.crc32)):
        started = time.monotonic()
        function(data)
        speeds[f"{name}_bytes_per_second"] = len(data) / (time.monotonic() - started)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints; the system's by default")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gengram-benchmark-", dir=options.folder))
    if shutil.disk_usage(folder).free < 15 * 10**9:
        sys.exit(f"{folder} needs 15 GB of free space; name another place with --folder")
    results: dict[str, dict] = {}
    weights = Weights()
    try:
        for form, write in (("torch", write_torch), ("torch_dist", write_torch_dist)):
            results[form] = {}
            for name, layers in LAYERS.items():
                source = folder / f"{form} {name}"
                write(source, layers, weights)
                results[form][name] = measure(source, folder, options.rounds)
                shutil.rmtree(source)
            peaks = [entry["peak_bytes"] for entry in results[form].values()]
            results[form]["peak_difference_bytes"] = peaks[1] - peaks[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = {
        "machine": describe_machine() | {"load_average": os.getloadavg(), **hash_speed()},
        "page_cache": "files to be read are dropped before each run of the converter and of cp; both end with fsync",
        "seconds_of_rest_before_each": REST,
        "rounds": options.rounds,
        "results": results,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    for form, entries in results.items():
        for name in LAYERS:
            entry = entries[name]
            print(
                f"{form:10} {name}: peak {entry['peak_bytes'] / 1e6:.0f} MB, "
                f"{entry['convert_bytes_per_second'] / 1e6:.0f} MB/s, {entry['share_of_cp']:.0%} of cp"
            )
        print(f"{form:10} the peaks differ by {entries['peak_difference_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
