"""The scripts of `examples/`: as modules, and as a user runs them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load_example(path: str) -> ModuleType:
    """A script of `examples/` as a module."""
    name = "example_" + Path(path).stem
    folder = str((EXAMPLES / path).parent)
    if folder not in sys.path:  # where a script finds what it shares with others
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_example(path: str, *arguments: object) -> subprocess.CompletedProcess:
    """The result of a script over `Trainer`, on the CPU, without the network."""
    return run_script(path, "--use_cpu", "--disable_tqdm", "True", *arguments)


def run_script(path: str, *arguments: object) -> subprocess.CompletedProcess:
    """The script's result, without the network."""
    return subprocess.run(
        [sys.executable, EXAMPLES / path, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
