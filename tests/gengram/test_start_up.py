"""The front door is quick because it imports little: what each command imports, and no seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gengram
from gengram.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors", "datasets", "huggingface_hub"}
# What the configuration may need of the memory.
DESCRIPTIONS = {"gengram.motif_memory", "gengram.motif_memory.configuration_motif_memory"}
TINY = str(ROOT / "gengram" / "demo_data" / "tiny_checkpoint")
FASTA = str(ROOT / "gengram" / "demo_data" / "region.fa.gz")


def imported_by(*argv: str) -> tuple[int, set[str]]:
    """Exit code of `gengram ARGV` in a process of its own, and all modules that it has imported."""
    code = """
import json, runpy, sys
sys.argv = ["gengram", *sys.argv[1:]]
try:
    runpy.run_module("gengram", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    print()
    print(json.dumps([stop.code, sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    exit_code, modules = json.loads(done.stdout.splitlines()[-1])
    return exit_code, set(modules)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(argv):
    code, modules = imported_by(*argv)
    assert code == 0 and not HEAVY & modules


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["convert"],
        ["convert", "to-hf"],
        ["convert", "to-hf", TINY, "output", "--dtype", "int8"],
        ["convert", "to-megatron", "folder", "output", "--format", "zip"],
        ["prepare", FASTA],
        ["bench", "--nonsense"],
    ],
)
def test_usage_errors_import_nothing_heavy(argv):
    code, modules = imported_by(*argv)
    assert code == 2 and not HEAVY & modules


@pytest.mark.parametrize(
    ("argv", "unused"),
    [
        (["info", TINY], {"modeling_gengram", "motif_memory", "inference", "evaluation", "tokenization"}),
        (["diff", TINY, TINY], {"modeling_gengram", "motif_memory", "inference", "evaluation", "tokenization"}),
        (["prepare", FASTA, "--length", "64"], {"modeling_gengram", "motif_memory", "inference", "evaluation"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_that_need_no_model_import_none(argv, unused, tmp_path):
    if argv[0] == "prepare":
        argv = [*argv, "--output", str(tmp_path / "prepared")]
    code, modules = imported_by(*argv)
    rooms = {name.split(".")[1] for name in modules - DESCRIPTIONS if name.startswith("gengram.")}
    assert code == 0 and not unused & rooms


def test_every_command_has_a_file_of_its_own_and_one_line_of_help():
    files = {path.stem for path in (ROOT / "gengram" / "commands").glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS)
    for name, command in COMMANDS.items():
        assert command.__name__ == f"gengram.commands.{name}"
        assert command.HELP and "\n" not in command.HELP


def test_names_are_loaded_when_they_are_first_used():
    code = """
import sys
import gengram
assert set(gengram.__all__) <= set(dir(gengram))
assert gengram.GengramTokenizer.__module__ == "gengram.tokenization.tokenization_gengram"
assert "torch" not in sys.modules and "gengram.modeling_gengram" not in sys.modules
assert gengram.tokenization is sys.modules["gengram.tokenization"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match=r"module 'gengram' has no attribute 'GengramModl' \(nearest: 'GengramM"):
        gengram.GengramModl  # noqa: B018
    assert not hasattr(gengram, "__wrapped__")
