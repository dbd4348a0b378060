"""Converts a Megatron checkpoint of Gengram into a Hugging Face folder.

    python -m gengram.conversion_scripts.convert_megatron_to_hf SOURCE OUTPUT [--dtype float32|bfloat16]

Both of Megatron's formats are read (`torch`, `torch_dist`), without Megatron and without running anything from the
files. Weights pass through memory piece by piece; the output folder appears when it is whole, or not at all.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ..configuration.configuration_gengram import GengramConfig
from ..modeling_gengram.remote_code import write_remote_code
from ..tokenization import GengramTokenizer
from .errors import ConversionError, size_text
from .megatron_checkpoint import Dropped, MegatronCheckpoint, open_checkpoint, summary_of_dropped
from .megatron_config import RecordedArgs, config_from_args
from .safetensors_writer import DTYPE_NAMES, TensorSpec, shard_size, tensor_digest, write_safetensors
from .weight_table import TABLE_VERSION, Move, Plan, dropped_weights, match, parameters

RECORD = "conversion.json"
MODEL_CARD = Path(__file__).with_name("model_card.md")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTPUT_DTYPES = ("float32", "bfloat16")


@dataclass
class ConversionReport:
    """What a conversion did."""

    source: Path
    output: Path
    format: str
    iteration: int | None
    dtype: str
    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    dropped: list[Dropped] = field(default_factory=list)

    def summary(self) -> str:
        """The report in a few lines for people."""
        step = "" if self.iteration is None else f", iteration {self.iteration}"
        lines = [
            f"Converted {self.source} ({self.format}{step}) to {self.output} in {self.seconds:.1f} s.",
            f"Kept {self.tensors} tensors, {self.parameters:,} parameters, {size_text(self.nbytes)} in {self.dtype}.",
        ]
        if self.dropped:
            lines.append("Left out:")
            lines += [f"  {line}" for line in summary_of_dropped(self.dropped)]
        return "\n".join(lines)


def convert_to_hf(
    source: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    progress: bool = True,
) -> ConversionReport:
    """Converts the Megatron checkpoint `source` into the new folder `output` for Transformers.

    Args:
        source: A checkpoint's root or the folder of one iteration, format `torch` or `torch_dist`.
        output: A folder that does not exist or is empty. It appears when everything is written.
        dtype: `"float32"` or `"bfloat16"`; `None` keeps the checkpoint's, bit for bit.
        max_shard_size: Largest size of one safetensors file.
        progress: Show a progress bar on stderr.

    Raises:
        ConversionError: if the checkpoint or the output cannot be used; nothing is left behind.
        OSError: if reading or writing fails; nothing is left behind.
    """
    started = time.monotonic()
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(OUTPUT_DTYPES)}, or None to keep it, got {dtype!r}")
    limit = shard_size(max_shard_size)
    output = Path(os.path.abspath(output))
    check_output_is_free(output)
    checkpoint = open_checkpoint(source)
    arguments = RecordedArgs(checkpoint.args)
    config = config_from_args(arguments)
    plan = match({name: tensor.shape for name, tensor in checkpoint.tensors.items()}, config)
    target = DTYPES[dtype] if dtype else _common_dtype(checkpoint, plan)
    config.dtype = _dtype_name(target)

    specs = {out.name: TensorSpec(out.name, out.shape, target) for out in plan.outputs}
    total = sum(spec.nbytes for spec in specs.values())
    dropped = dropped_weights(plan, checkpoint.tensors) + checkpoint.dropped
    with staged_folder(output, total) as folder:
        reader = _PlanReader(checkpoint, plan, target)
        with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
            digests = write_safetensors(folder, list(specs.values()), reader.pieces, limit, bar.update)
        reader.check_tied_copies()
        write_remote_code(config, folder)
        config.save_pretrained(folder)
        generation_config(config).save_pretrained(folder)
        GengramTokenizer().save_pretrained(folder)
        shutil.copyfile(MODEL_CARD, folder / "README.md")
        record = _record(checkpoint, arguments, plan, specs, digests, reader.source_digests, dropped)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return ConversionReport(
        source=checkpoint.path,
        output=output,
        format=checkpoint.format,
        iteration=checkpoint.iteration,
        dtype=_dtype_name(target),
        tensors=len(specs),
        parameters=parameters(plan),
        nbytes=total,
        seconds=time.monotonic() - started,
        dropped=dropped,
    )


class _PlanReader:
    """Reads each source tensor once, hashes it, and hands out the parts that the writer asks for, in its order."""

    def __init__(self, checkpoint: MegatronCheckpoint, plan: Plan, dtype: torch.dtype):
        self.checkpoint = checkpoint
        self.plan = plan
        self.dtype = dtype
        self.source_digests: dict[str, str] = {}
        self._outputs = {output.name: output for output in plan.outputs}
        self._current: tuple[str, list[torch.Tensor]] | None = None

    def pieces(self, spec: TensorSpec) -> Iterator[torch.Tensor]:
        for move, which in self._outputs[spec.name].parts:
            yield self._parts(move)[which].to(self.dtype)

    def _parts(self, move: Move) -> list[torch.Tensor]:
        if self._current is None or self._current[0] != move.source:
            self._current = None  # frees the last tensor before the next one is read
            tensor = self.checkpoint.tensors[move.source].read()
            self.source_digests[move.source] = tensor_digest([tensor])
            self._current = (move.source, move.entry.layout.to_hf(tensor))
        return self._current[1]

    def check_tied_copies(self) -> None:
        """A head that a tied model stores beside its embedding must equal it before it is left out."""
        for move in self.plan.dropped:
            if move.source == "output_layer.weight":
                digest = tensor_digest([self.checkpoint.tensors[move.source].read()])
                if digest != self.source_digests["embedding.word_embeddings.weight"]:
                    raise ConversionError(
                        "output_layer.weight differs from embedding.word_embeddings.weight, but "
                        "args.untie_embeddings_and_output_weights is False; expected equal weights"
                    )


def _common_dtype(checkpoint: MegatronCheckpoint, plan: Plan) -> torch.dtype:
    found = sorted({str(checkpoint.tensors[move.source].dtype) for move in plan.moves})
    names = [_dtype_name(dtype) for dtype in DTYPE_NAMES]
    if len(found) != 1 or found[0].removeprefix("torch.") not in names:
        raise ConversionError(
            f"the checkpoint's weights have dtypes {', '.join(found)}; expected one of {', '.join(names)} throughout: "
            "say --dtype float32 or --dtype bfloat16"
        )
    return DTYPES[found[0].removeprefix("torch.")]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def generation_config(config: GengramConfig) -> GenerationConfig:
    """Greedy by default; only A, C, G, T and N can be generated, since padding rows of the head are untrained."""
    letters = set(config.memory_token_ids)
    suppressed = [token for token in range(config.vocab_size) if token not in letters]
    return GenerationConfig(pad_token_id=config.pad_token_id, suppress_tokens=suppressed, do_sample=False)


def _record(
    checkpoint: MegatronCheckpoint,
    arguments: RecordedArgs,
    plan: Plan,
    specs: dict[str, TensorSpec],
    digests: dict[str, str],
    source_digests: dict[str, str],
    dropped: list[Dropped],
) -> dict[str, Any]:
    """What `conversion.json` says: where each tensor came from, with hashes of its bytes on both sides."""
    return {
        "table_version": TABLE_VERSION,
        "gengram_version": version("gengram"),
        "source": {
            "path": str(checkpoint.path.resolve()),
            "format": checkpoint.format,
            "iteration": checkpoint.iteration,
            "files": [
                {"name": str(file.relative_to(checkpoint.path)), "bytes": file.stat().st_size}
                for file in checkpoint.files
            ],
            "args": arguments.as_json(),
            "tensors": {
                move.source: {
                    "sha256": source_digests[move.source],
                    "dtype": _dtype_name(checkpoint.tensors[move.source].dtype),
                    "shape": list(move.entry.shape),
                }
                for move in plan.moves
            },
        },
        "weights": {
            output.name: {
                "sha256": digests[output.name],
                "dtype": _dtype_name(specs[output.name].dtype),
                "shape": list(output.shape),
                "sources": [move.source for move, _ in output.parts],
            }
            for output in plan.outputs
        },
        "dropped": [{"name": entry.name, "reason": entry.reason, "bytes": entry.nbytes} for entry in dropped],
    }


def check_output_is_free(output: Path) -> None:
    """Refuses to write over something."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        what = "is a folder that is not empty" if output.is_dir() else "is there already and not a folder"
        raise ConversionError(f"{output} {what}; name a new folder, or delete it first")


@contextlib.contextmanager
def staged_folder(output: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` at the end, or vanishes on any error, interrupt or SIGTERM."""
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    needed_bytes += 16 * 2**20
    if free < needed_bytes:
        raise ConversionError(
            f"{output.parent} has {size_text(free)} free, the output needs {size_text(needed_bytes)}; free some space "
            "or name another disk"
        )
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    with _terminate_as_exit():
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier process that had this number and was killed
            folder.mkdir()
            yield folder
            check_output_is_free(output)
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that it unwinds; signals can only be handled in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram convert to-hf`."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="Megatron checkpoint, format torch or torch_dist")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; new or empty")
    parser.add_argument("--dtype", choices=OUTPUT_DTYPES, help="dtype of the weights; the checkpoint's own by default")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def run_convert(arguments: argparse.Namespace) -> int:
    """Runs `gengram convert to-hf`; returns the exit code."""

    def run() -> int:
        report = convert_to_hf(
            arguments.source,
            arguments.output,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            progress=not arguments.quiet,
        )
        if not arguments.quiet:
            print(report.summary())
        return 0

    return with_clear_errors(run)


def with_clear_errors(run: Callable[[], int]) -> int:
    """Runs a command; what the user can mend is printed in one message, without a traceback, and exits with 1."""
    try:
        return run()
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m gengram.conversion_scripts.convert_megatron_to_hf`."""
    parser = argparse.ArgumentParser(
        prog="python -m gengram.conversion_scripts.convert_megatron_to_hf", description=__doc__.partition("\n")[0]
    )
    add_convert_arguments(parser)
    return run_convert(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
