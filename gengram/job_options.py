"""The options that all jobs share."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_job_options(parser: argparse.ArgumentParser, output: str, strands: bool = True) -> None:
    """Add `--output` and the options of `ModelOptions` and `run_job`.

    Args:
        parser: of the command.
        output: what `--output` is.
        strands: whether the job has a choice of strands.
    """
    parser.add_argument("--output", "-o", type=Path, required=True, help=output)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or Hub id; gengram-mini, which ships with the package, by default")
    model.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    model.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(%(default)s)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default the first GPU if there is one")
    model.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="most bases at once (%(default)s)")
    if strands:
        model.add_argument(
            "--strands", default="both", choices=["both", "forward", "reverse"], help="which to read (%(default)s)"
        )
    model.add_argument("--trust-remote-code", action="store_true", help="run code that a model folder brings")
    running = parser.add_argument_group("running")
    running.add_argument("--engine", default="local", choices=["local", "ray"], help="where chunks run (%(default)s)")
    running.add_argument("--shard", metavar="I/N", help="do only the I-th of N parts")
    running.add_argument("--restart", action="store_true", help="discard what an earlier run left unfinished")
    running.add_argument("--quiet", "-q", action="store_true", help="no progress and no summary")
    running.add_argument("--json", action="store_true", help="print the summary as JSON")


def model_options(arguments: argparse.Namespace) -> Any:
    """The `ModelOptions` that the command line asks for.

    Raises:
        ValueError: if a value cannot be used.
    """
    from .inference.jobs import ModelOptions

    names = ("revision", "dtype", "device", "batch_tokens", "trust_remote_code")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.model is not None:
        given["model"] = arguments.model
    if hasattr(arguments, "strands"):
        given["strands"] = arguments.strands
    return ModelOptions(**given)


def run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `run_job` that the command line asks for.

    Raises:
        ValueError: if a value cannot be used.
    """
    from transformers.utils.logging import disable_progress_bar

    from .inference.jobs import Share

    if arguments.quiet:
        disable_progress_bar()  # of loading weights
    return {
        "engine": arguments.engine,
        "shard": None if arguments.shard is None else Share.parse(arguments.shard),
        "restart": arguments.restart,
        "progress": not arguments.quiet,
    }


def print_summary(arguments: argparse.Namespace, summary: Any, words: str, **facts: Any) -> None:
    """Print what a run did: `words`, or as JSON the `facts` with the output's path and the record."""
    if not summary.is_written:  # process 0 says it
        return
    if arguments.json:
        print(json.dumps({"output": str(summary.output), **facts, "record": summary.record}))
    elif not arguments.quiet:
        print(words)
