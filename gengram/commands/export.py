"""`gengram export`: a model as an ONNX file."""

import argparse
from pathlib import Path

HELP = "a model as an ONNX file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram export`."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("output", metavar="OUT.onnx", type=Path, help="file to make")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--with-state", action="store_true", help="take and give the state that generating needs")
    parser.add_argument("--quiet", "-q", action="store_true", help="no summary")


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and say how near its numbers are to the model's.

    Raises:
        ValueError: if the model or the name of the output cannot be used.
        OSError: if there is no such model, or the output exists.
        MissingExtraError: if a library of the extra `onnx` is not installed.
    """
    from ..inference.jobs import ModelOptions
    from ..inference.loaded_model import any_head_of
    from ..inference.onnx_export import check_output, export_onnx

    check_output(arguments.output)
    options = ModelOptions(arguments.model, arguments.revision, device="cpu")
    loaded = options.load(any_head_of(options.load_config()))
    apart = export_onnx(loaded, arguments.output, arguments.with_state)
    if not arguments.quiet:
        print(f"wrote {arguments.output}; ONNX Runtime's numbers differ from the model's by {apart:.1e} at most")
    return 0
