"""Commands that need no model import none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gengram

TINY = str(Path(gengram.__file__).parent / "demo_data" / "tiny_checkpoint")
HEAVY = ("torch", "numpy", "transformers", "huggingface_hub")
MODELS = ("modeling_gengram", "operators", "motif_memory", "inference", "evaluation", "tokenization")
# What the configuration may need of the memory.
DESCRIPTIONS = ("gengram.motif_memory", "gengram.motif_memory.configuration_motif_memory")

# The package without what its own `__init__` imports.
SCRIPT = """
import argparse, importlib, json, sys, types
package = types.ModuleType("gengram")
package.__path__ = json.loads(sys.argv[1])
sys.modules["gengram"] = package
command = importlib.import_module("gengram.commands." + sys.argv[2])
parser = argparse.ArgumentParser()
command.add_arguments(parser)
if len(sys.argv) > 3:
    code = command.run(parser.parse_args(sys.argv[3:]))
    assert code == 0, code
print(json.dumps(sorted(sys.modules)))
"""


def imported(*words):
    """Modules that a command has imported at its end."""
    command = [sys.executable, "-c", SCRIPT, json.dumps([str(Path(path)) for path in gengram.__path__]), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", ["convert", "info", "verify", "diff"])
def test_the_arguments_of_a_command_import_nothing_heavy(command):
    assert not [name for name in imported(command) if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("words", [["info", TINY], ["diff", TINY, TINY, "--quiet"]], ids=lambda words: words[0])
def test_what_reads_checkpoints_imports_no_model(words):
    names = [name for name in imported(*words) if name not in DESCRIPTIONS]
    assert "gengram.conversion_scripts.megatron.open_checkpoint" in names
    assert not [name for name in names if name.startswith("gengram.") and name.split(".")[1] in MODELS]
