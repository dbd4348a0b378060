"""`gengram bench`: evaluates models on a suite of tasks, beside baselines."""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = "evaluate models on a suite of tasks, beside baselines"
_SUITE_FILE = """\
A suite file is YAML; paths in it are relative to --data:

  name: mine
  tasks:
    - name: enhancers
      train: train.csv              # columns sequence and label; CSV, TSV or Parquet, also compressed
      test: test.csv
      protocols: [frozen, baseline-kmer]
    - name: effects
      kind: variants                # or likelihood
      variants: variants.tsv        # columns pos, ref, alt and label (1: low likelihood expected)
      fasta: region.fa.gz
      first_base: 41100001          # position of the FASTA's first base in the table

docs/evaluation.md describes all fields and protocols.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram bench`."""
    parser.epilog, parser.formatter_class = _SUITE_FILE, argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or Hub ids; none runs the baselines only")
    parser.add_argument(
        "--suite", required=True, help=f"YAML file (see below), or one of the package: {', '.join(_suites())}"
    )
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


def _suites() -> list[str]:
    """Names of the suites of the package."""
    room = importlib.util.find_spec("..evaluation", __package__)  # not imported
    assert room is not None and room.origin is not None
    return sorted(path.stem for path in Path(room.origin).with_name("suites").glob("*.yaml"))


def _values(words: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as a dictionary; values are JSON, or words."""
    found: dict[str, Any] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"--fine-tuning: expected NAME=VALUE, got {word!r}.")
        if name in found:
            raise ValueError(f"--fine-tuning: expected each name once, got {name!r} twice.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _seeds(text: str) -> list[int]:
    """Whole numbers of 0 to 2**32 - 1, which NumPy, PyTorch and scikit-learn take, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 11 and int(word) < 2**32 for word in words):
        raise ValueError(f"--seeds: expected whole numbers from 0 to {2**32 - 1}, separated by commas, got {text!r}.")
    return list(dict.fromkeys(map(int, words)))


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
        from ..evaluation.evaluated_model import EvaluatedModel
        from ..evaluation.suite import with_fine_tuning
        from ..evaluation.suite_files import read_suite
    except ImportError as error:
        raise MissingExtraError(f"gengram bench needs {error.name}: pip install 'gengram[evaluation]'") from error
    suite = with_fine_tuning(read_suite(arguments.suite), _values(arguments.fine_tuning))
    seeds = _seeds(arguments.seeds)
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
            protocols=[word.strip() for word in arguments.protocols.split(",")] if arguments.protocols else None,
            seeds=seeds,
            progress=not arguments.quiet,
        )
    except ImportError as error:  # of what a model's own code needs; its message names it
        raise MissingExtraError(str(error)) from error
    print((arguments.output / "report.md").read_text(encoding="utf-8"))
    print(
        f"wrote report.md, report.svg, results.parquet, results.json and differences.json of {len(results)} runs to "
        f"{arguments.output}"
    )
    return 0
