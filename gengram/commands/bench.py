"""`gengram bench`: evaluates models on a suite of tasks, beside baselines."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = "evaluate models on a suite of tasks, beside baselines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram bench`."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or Hub ids; none runs the baselines only")
    parser.add_argument("--suite", required=True, help="YAML file, or the name of a suite of this package")
    parser.add_argument("--data", type=Path, default=Path(), help="folder that the suite's paths are relative to")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; runs found there are kept")
    parser.add_argument("--tasks", default="*", help="shell pattern of the tasks to run")
    parser.add_argument("--protocols", help="comma-separated; by default those of the suite")
    parser.add_argument("--seeds", default="0", help="comma-separated (%(default)s)")
    parser.add_argument(
        "--fine-tuning",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="options of fine-tuning instead of the suite's, as learning_rate=3e-5 epochs=3 pooling=mean bf16=true",
    )
    parser.add_argument("--device", help="cpu, cuda, ...; by default the first GPU if there is one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--revision", help="of the models on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that a model folder brings")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _values(words: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as a dictionary; values are JSON, or words."""
    found = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"--fine-tuning: expected NAME=VALUE, got {word!r}.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing of the suite, and print the report.

    Raises:
        ValueError: if the suite, its data or an option cannot be used.
        OSError: if a file or model cannot be read.
        MissingExtraError: if a library of the extra `evaluation` is not installed.
    """
    from ..support.errors import MissingExtraError

    try:
        import torch

        from ..evaluation.bench import bench
        from ..evaluation.protocols import EvaluatedModel
        from ..evaluation.suite import read_suite, with_fine_tuning
    except ImportError as error:
        raise MissingExtraError(f"gengram bench needs {error.name}: pip install 'gengram[evaluation]'") from error
    suite = with_fine_tuning(read_suite(arguments.suite), _values(arguments.fine_tuning))
    models = [
        EvaluatedModel(
            name,
            arguments.device,
            getattr(torch, arguments.dtype),
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        for name in arguments.models
    ]
    try:
        results = bench(
            suite,
            models,
            arguments.data,
            arguments.output,
            tasks=arguments.tasks,
            protocols=arguments.protocols.split(",") if arguments.protocols else None,
            seeds=[int(seed) for seed in arguments.seeds.split(",")],
            progress=not arguments.quiet,
        )
    except ImportError as error:  # of what a model's own code needs; its message names it
        raise MissingExtraError(str(error)) from error
    print((arguments.output / "report.md").read_text())
    print(
        f"wrote results.parquet, results.json, report.md and report.svg of {len(results)} runs to {arguments.output}"
    )
    return 0
