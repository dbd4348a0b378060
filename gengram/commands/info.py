"""`gengram info`: says what a checkpoint or folder is, and how much memory its model needs."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

HELP = "say what a checkpoint or folder is, and how much memory it needs"
_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram info`."""
    parser.add_argument(
        "path", metavar="PATH", help="Megatron checkpoint or Hugging Face folder, or ORG/NAME[/FOLDER] on the Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; its main branch by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory", action="store_true", help="say how many bytes a model needs, and load nothing")
    memory.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the numbers (default: bfloat16)")
    memory.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    memory.add_argument("--length", type=int, default=8192, metavar="N", help="tokens of each (default: 8192)")


def run(arguments: argparse.Namespace) -> int:
    """Prints what `PATH` is; returns the exit code, 1 if there is a problem."""
    from ..support.errors import InputError
    from ..support.printable import printable, printable_lines

    if (Path(arguments.path) / "adapter_config.json").is_file():
        raise InputError(
            f"{printable(arguments.path)} holds adapters of a model; ask about the model, which its "
            "adapter_config.json names as base_model_name_or_path."
        )
    if arguments.memory:
        needs = _memory(arguments)
        print(json.dumps(needs.as_json(), indent=1) if arguments.json else needs.summary())
        return 0
    from ..conversion_scripts.inspect_checkpoint import inspect_checkpoint

    info = inspect_checkpoint(arguments.path, arguments.revision)
    print(json.dumps(asdict(info), indent=1) if arguments.json else printable_lines(info.summary()))
    return 1 if info.problem else 0


def _memory(arguments: argparse.Namespace) -> Any:
    """What the model of the checkpoint or folder needs."""
    import torch

    from ..conversion_scripts.inspect_checkpoint import config_at
    from ..inference.memory_needs import memory_needs
    from ..support.errors import InputError

    for name in ("batch", "length"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    config = config_at(arguments.path, arguments.revision)
    return memory_needs(config, getattr(torch, arguments.dtype), arguments.batch, arguments.length)
