"""`gengram convert`: Megatron checkpoints to Hugging Face folders, and back."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..conversion_scripts.choices import FETCH, FORMATS, MEMORY_PREFIXES, OUTPUT_DTYPES, QUANTISED

HELP = "convert checkpoints between formats"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two directions, each with arguments of its own."""
    directions = parser.add_subparsers(title="directions", required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="Megatron checkpoint to Hugging Face folder")
    _add_to_hf_arguments(to_hf)
    to_hf.set_defaults(convert=_to_hf)
    to_megatron = directions.add_parser("to-megatron", help="Hugging Face folder to Megatron checkpoint")
    _add_to_megatron_arguments(to_megatron)
    to_megatron.set_defaults(convert=_to_megatron)


def run(arguments: argparse.Namespace) -> int:
    """Runs the direction that was asked for; returns the exit code."""
    return arguments.convert(arguments)


def _add_to_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="Megatron checkpoint: a folder, or ORG/NAME[/FOLDER] on the Hub"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; new or empty")
    parser.add_argument("--dtype", choices=OUTPUT_DTYPES, help="dtype of the weights; the checkpoint's own by default")
    parser.add_argument(
        "--experts", choices=QUANTISED, help="quantise the experts to 8 or 4 bits per weight; floats by default"
    )
    parser.add_argument("--attention", choices=QUANTISED, help="with --experts: quantise the attention too")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; its main branch by default")
    parser.add_argument(
        "--fetch",
        choices=FETCH,
        default="auto",
        help="from the Hub: only byte ranges that hold weights, or whole files into its cache (default: whole those "
        "files of which nearly all is wanted)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    parser.add_argument("--restart", action="store_true", help="discard what an interrupted conversion left")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    how.add_argument("--json", action="store_true", help="no progress bar; the report, plan or error as JSON")


def _to_hf(arguments: argparse.Namespace) -> int:
    from ..conversion_scripts.convert_megatron_to_hf import convert_to_hf, plan_conversion
    from ..conversion_scripts.files.tensor_memory import give_memory_back
    from ..support.printable import printable_lines

    names = ("dtype", "experts", "attention", "max_shard_size", "revision", "fetch")
    options = {name: getattr(arguments, name) for name in names}
    give_memory_back()
    try:
        done: Any
        if arguments.dry_run:
            done = plan_conversion(arguments.source, arguments.output, **options)
        else:
            shown = not (arguments.quiet or arguments.json)
            done = convert_to_hf(
                arguments.source, arguments.output, **options, progress=shown, restart=arguments.restart
            )
    except BaseException as error:
        _say_more(error, arguments.json)
        raise
    if arguments.json:
        print(json.dumps(done.as_json(), indent=1))
    elif not arguments.quiet:
        print(printable_lines(done.summary()))
    return 0


def _say_more(error: BaseException, as_json: bool = False) -> None:
    """The error as JSON if that was asked for, and of SIGTERM what is kept, which nobody else says."""
    from ..support.errors import FetchError, plain_words
    from ..support.printable import printable_lines

    if as_json and isinstance(error, ValueError | OSError | FetchError):
        print(json.dumps({"error": plain_words(error) if isinstance(error, OSError) else str(error)}))
    if isinstance(error, SystemExit):
        for note in getattr(error, "__notes__", ()):
            print(printable_lines(note), file=sys.stderr)


def _add_to_megatron_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="HF_FOLDER", help="Hugging Face folder of a Gengram model")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="checkpoint root to write; new or empty")
    parser.add_argument(
        "--format", choices=FORMATS, default="torch_dist", help="torch_dist (default; Megatron reshards it) or torch"
    )
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N", help="stages (format torch)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks (format torch)")
    parser.add_argument("--first-stage-layers", type=int, metavar="N", help="layers of the first stage, if uneven")
    parser.add_argument("--last-stage-layers", type=int, metavar="N", help="layers of the last stage, if uneven")
    parser.add_argument(
        "--name-prefix", choices=MEMORY_PREFIXES, help="the memory's name; the original checkpoint's by default"
    )
    parser.add_argument("--dtype", choices=OUTPUT_DTYPES, help="dtype of the weights; the folder's own by default")
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="write iter_N; by default release, without training state"
    )
    parser.add_argument("--restart", action="store_true", help="discard what a killed conversion left")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def _to_megatron(arguments: argparse.Namespace) -> int:
    from ..conversion_scripts.convert_hf_to_megatron import convert_to_megatron
    from ..support.printable import printable_lines

    cut = ("pipeline_parallel", "tensor_parallel", "first_stage_layers", "last_stage_layers")
    names = ("format", *cut, "name_prefix", "dtype", "iteration", "restart")
    options = {name: getattr(arguments, name) for name in names}
    try:
        report = convert_to_megatron(arguments.source, arguments.output, **options, progress=not arguments.quiet)
    except BaseException as error:
        _say_more(error)
        raise
    if not arguments.quiet:
        print(printable_lines(report.summary()))
    return 0
