"""`gengram embed` beside Transformers' feature-extraction pipeline, beside the model alone, and its peak memory.

    python benchmarks/embedding.py [--device cuda] [--threads N] [--sequences 2000] [--rounds 1]

Sequences of 30 to 1,024 random bases in random order; all read the forward strand in float32 with gengram-mini, and
means of the last hidden states come out. Ours is the whole job but for loading the model: the FASTA
file is parsed and hashed, and a Parquet file written. The pipeline gets a list in memory and returns tensors, which
are averaged; its best batch size is found on a tenth of the sequences. "The model alone" is its forward pass on full
batches of the mean length that are on the device already.

On a processor that others use too, seconds of the processor are what can be compared; `ratios` are made of them
there, and of seconds on a clock where a GPU computes. Peak memory is that of processes that embed with a tiny model.
Writes `benchmarks/results/embedding.json`.
"""

import argparse
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import pipeline

from gengram import DEFAULT_MODEL, GengramConfig, GengramForCausalLM, GengramTokenizer
from gengram.inference.jobs import ModelOptions, run_job
from gengram.inference.jobs.embed import EmbedJob, embed_job
from gengram.support.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "embedding.json"
SHORTEST, LONGEST = 30, 1024
BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
MEAN_LENGTH = 512

# `ru_maxrss` would hold the size of the process that started this one.
EMBED = """
import sys
from gengram.cli import main
if code := main(sys.argv[1:]):
    sys.exit(code)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


class Clock:
    """Seconds of the processor and on the clock, the device's work included."""

    def __init__(self, device: str):
        self._device = device
        self.processor = self.elapsed = 0.0

    def __enter__(self):
        self._wait()
        self._started = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self._wait()
        self.processor += time.process_time() - self._started[0]
        self.elapsed += time.perf_counter() - self._started[1]

    def _wait(self):
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()

    @property
    def seconds(self) -> float:
        """What can be compared on this device."""
        return self.elapsed if self._device.startswith("cuda") else self.processor

    def described(self) -> dict:
        return {"processor_seconds": self.processor, "elapsed_seconds": self.elapsed}


def random_sequences(count: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices("ACGT", k=generator.randint(SHORTEST, LONGEST))) for _ in range(count)]


class TimedModel:
    """Adds up what a model's forward pass takes."""

    def __init__(self, model, device: str):
        self.clock = Clock(device)
        self._forward, self._model = model.forward, model

    def __enter__(self):
        def timed(*arguments, **named):
            with self.clock:
                return self._forward(*arguments, **named)

        timed.__signature__ = inspect.signature(self._forward)
        self._model.forward = timed
        return self

    def __exit__(self, *_):
        self._model.forward = self._forward


class WarmJob(EmbedJob):
    """A job whose model is loaded before it is timed."""

    warm = None

    def worker(self, device):
        if self.warm is None:
            self.warm = super().worker(device)
        return self.warm


def job_of(fasta: Path, output: Path, device: str) -> WarmJob:
    job = embed_job(fasta, output, model=ModelOptions(device=device, strands="forward"))
    return WarmJob(**{name: value for name, value in vars(job).items() if name != "notes"})


def by_pipeline(embed, sequences: list[str], batch_size: int) -> np.ndarray:
    found = embed(sequences, batch_size=batch_size, return_tensors=True)
    return np.stack([states[0].mean(0).numpy() for states in found])


def speed(count: int, rounds: int, device: str) -> dict:
    sequences = random_sequences(count)
    tokens = sum(map(len, sequences))
    extract = pipeline("feature-extraction", model=DEFAULT_MODEL, device=device)
    some = sequences[: max(1, count // 10)]
    tried = {}
    for size in BATCH_SIZES:
        with Clock(device) as clock:
            by_pipeline(extract, some, size)
        tried[size] = sum(map(len, some)) / clock.seconds
        print(f"pipeline, batch size {size}: {tried[size]:,.0f} tokens/s on a tenth", flush=True)
    best = max(tried, key=tried.get)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder, "sequences.fa")
        fasta.write_text("".join(f">s{i}\n{text}\n" for i, text in enumerate(sequences)))
        job = job_of(fasta, Path(folder, "0.parquet"), device)
        encoder = job.worker(None)._encoder
        for number in range(rounds):
            output = Path(folder, f"{number}.parquet")
            with TimedModel(encoder.model, device) as inside, Clock(device) as ours:
                run_job(job, output)
            with Clock(device) as theirs:
                expected = by_pipeline(extract, sequences, best)
            with Clock(device) as alone:
                read = full_batches(encoder, tokens)
            found = np.stack(pq.read_table(output)["embedding"].to_pylist()).astype(np.float32)
            rows.append(
                {
                    "tokens_per_second": {
                        "gengram embed": tokens / ours.seconds,
                        "pipeline": tokens / theirs.seconds,
                        "model on full batches": read / alone.seconds,
                    },
                    "share_that_is_not_the_model": 1 - inside.clock.seconds / ours.seconds,
                    "largest_difference": float(np.abs(found - expected).max()),
                    "gengram embed": ours.described(),
                    "pipeline": theirs.described(),
                    "load_average": os.getloadavg(),
                }
            )
            print(json.dumps(rows[-1], indent=1), flush=True)

    def median(name):
        return statistics.median(row["tokens_per_second"][name] for row in rows)

    return {
        "sequences": count,
        "tokens": tokens,
        "pipeline_batch_sizes": tried,
        "best_batch_size": best,
        "rounds": rows,
        "ratios": {
            "to the pipeline": median("gengram embed") / median("pipeline"),
            "to the model on full batches": median("gengram embed") / median("model on full batches"),
        },
    }


@torch.inference_mode()
def full_batches(encoder, tokens: int) -> int:
    """Forward passes of full batches until so many tokens are read."""
    rows = max(1, encoder._states.batch_tokens // MEAN_LENGTH)
    ids = torch.from_numpy(encoder.tokens.encode("ACGT" * (MEAN_LENGTH // 4))).repeat(rows, 1).to(encoder.device)
    read = 0
    while read < tokens:
        encoder.model(input_ids=ids, use_cache=False)
        read += ids.numel()
    return read


def tiny_model(folder: Path) -> Path:
    config = GengramConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=0, memory_layers=[], max_position_embeddings=1024,
    )  # fmt: skip
    GengramForCausalLM(config).save_pretrained(folder)
    GengramTokenizer(model_max_length=1024).save_pretrained(folder)
    return folder


def peak_memory() -> list[dict]:
    """Peak of the resident memory of processes, in MB."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder, "model"))
        cases = [("sequences", count, "mean") for count in (1000, 8000)]
        cases += [("contig", length, pooling) for pooling in ("mean", "none") for length in (1_000_000, 10_000_000)]
        for kind, size, pooling in cases:
            fasta = Path(folder, "input.fa")
            with fasta.open("w") as file:
                if kind == "sequences":
                    for number in range(size):
                        file.write(f">s{number}\n{''.join(random.choices('ACGT', k=300))}\n")
                else:
                    line = "".join(random.choices("ACGT", k=100))
                    file.write(">contig\n" + (line + "\n") * (size // 100))
            output = Path(folder, f"{kind}-{size}-{pooling}.parquet")
            command = [sys.executable, "-c", EMBED, "embed", fasta, "-o", output, "--model", model, "--quiet"]
            command += ["--pooling", pooling, "--strands", "forward", "--overlap", "128", "--device", "cpu"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
            peak = int(done.stdout.split()[-2]) / 1024
            rows.append({"input": kind, "size": size, "pooling": pooling, "peak_mb": peak})
            print(rows[-1], flush=True)
            output.unlink()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = {"machine": describe_machine(), "speed": speed(arguments.sequences, arguments.rounds, arguments.device)}
    report["peak_memory"] = peak_memory()
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["speed"]["ratios"], indent=1))


if __name__ == "__main__":
    main()
