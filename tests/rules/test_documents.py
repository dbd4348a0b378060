"""Documented code runs, or the document says why it is not run; documented commands have the options that they show.

Above each fenced block of Python or shell stands one HTML comment:

- `<!-- code: NAME -->`: Python that is executed here, in an empty folder and without network;
- `<!-- command: NAME -->`: shell that `.ci/run` runs from README.md;
- `<!-- not run: REASON -->`.
"""

import argparse
import re
import shlex
from typing import NamedTuple

import huggingface_hub.constants
import pytest
from source_tree import ROOT, repository_files

import gengram
from gengram.cli import build_parser

DOCUMENTS = [name for name in repository_files() if name.endswith(".md") and not (ROOT / name).is_symlink()]
LANGUAGES = {"python", "bash", "sh", "shell", "console", ""}  # others, such as text, yaml and bibtex, are no code
SHELL = LANGUAGES - {"python"}
# Words of documented Python that stand for something of the reader's.
PLACEHOLDERS = {"PATH_OR_ID": gengram.DEFAULT_MODEL}
EXTRAS = {"captum", "tangermeme"}  # libraries that the tests can do without


class Block(NamedTuple):
    document: str
    line: int
    language: str
    text: str
    mark: str  # "code", "command", "not run", or "" without one
    words: str  # the name or the reason


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document with their marks."""
    pattern = r"^(?:<!-- (code|command|not run): (.*?) -->\n)?( *)```(\w*)[^\n]*\n(.*?)^\3```$"
    text = (ROOT / document).read_text()
    return [
        Block(document, text.count("\n", 0, found.start()) + 1, found[4], found[5], found[1] or "", found[2] or "")
        for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
CODE = [block for block in BLOCKS if block.mark == "code"]


def where(block: Block) -> str:
    return f"{block.document}:{block.line}"


def test_every_block_of_code_is_run_or_says_why_not():
    unmarked = [where(block) for block in BLOCKS if block.language in LANGUAGES and not block.mark]
    assert not unmarked, f"no mark above the fenced blocks at {', '.join(unmarked)}"
    for block in BLOCKS:
        assert block.language == "python" or block.mark != "code", f"{where(block)}: only Python is executed"
        assert block.language in SHELL or block.mark != "command", f"{where(block)}: only shell is a command"
        assert block.mark != "not run" or block.words, f"{where(block)}: the reason is missing"
    fences = sum(len(re.findall(r"^ *```", (ROOT / name).read_text(), re.MULTILINE)) for name in DOCUMENTS)
    assert fences == 2 * len(BLOCKS)  # none was overlooked


def test_names_of_blocks_are_unique():
    names = [(block.document, block.words) for block in BLOCKS if block.mark in ("code", "command")]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[a-z0-9_-]+", name) for _, name in names)


def test_marked_commands_are_those_that_continuous_integration_runs():
    run = re.findall(r"\$\(command_of (\S+)\)", (ROOT / ".ci/run").read_text())
    assert [(block.document, block.words) for block in BLOCKS if block.mark == "command"] == [
        ("README.md", name) for name in run
    ]


@pytest.mark.parametrize("block", CODE, ids=lambda block: f"{block.document}:{block.words}")
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = block.text
    for word, value in PLACEHOLDERS.items():
        text = text.replace(word, value)
    lines_above = "\n" * block.line  # so that a traceback names the document's line
    try:
        exec(compile(lines_above + text, str(ROOT / block.document), "exec"), {"__name__": "document"})
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed")


def documented_lines() -> list[tuple[str, str]]:
    """Every line of a shell block that calls `gengram`, continued lines joined, and where it is."""
    found = []
    for block in BLOCKS:
        if block.language not in SHELL:
            continue
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
            for part in re.sub(r"\s#.*", "", line).split("&&"):
                called = re.match(r"\s*(?:\S*/)?gengram\s(.*)|\s*\S*python3? -m gengram\s(.*)", part)
                if called:
                    found.append((where(block), (called[1] or called[2]).strip()))
    return found


def documented_mentions() -> list[tuple[str, str]]:
    """Every `gengram ...` within a sentence or a table, and the document."""
    found = []
    for document in DOCUMENTS:
        prose = re.sub(r"^( *)```.*?^\1```$", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
        found += [(document, " ".join(span.split())) for span in re.findall(r"`gengram (-*[a-z][^`]*)`", prose)]
    return found


def spelled_out(synopsis: str) -> list[list[str]]:
    """The command lines that a synopsis stands for: everything in brackets, and each word of `x|y` in its turn.

    `...` goes, and a placeholder in capitals stays: it is a path or a name.
    """
    words = re.sub(r"[\[\]]|\.\.\.", "", synopsis.replace(" | ", "|"))
    choices = [word.split("|") for word in shlex.split(words)]
    turns = max(map(len, choices), default=1)
    return [[choice[min(turn, len(choice) - 1)] for choice in choices] for turn in range(turns)]


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices if actions else {}


@pytest.mark.parametrize(("place", "line"), documented_lines())
def test_documented_command_lines_are_understood(place, line, capsys):
    for words in spelled_out(line):
        try:
            build_parser().parse_args(words)
        except SystemExit as stop:
            assert stop.code == 0, f"{place}: gengram {' '.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize(("document", "line"), sorted(set(documented_mentions())))
def test_commands_and_options_in_sentences_exist(document, line):
    parser, words = build_parser(), line.split()
    while words and subparsers_of(parser):
        name = words.pop(0)
        if name.startswith("-"):
            assert name in parser._option_string_actions, f"{document}: gengram {line}"
            return
        assert name in subparsers_of(parser), f"{document}: gengram {line}"
        parser = subparsers_of(parser)[name]
    options = [word.strip("[],.").partition("=")[0] for word in words if word.strip("[").startswith("--")]
    assert all(option in parser._option_string_actions for option in options), f"{document}: gengram {line}"


def test_a_synopsis_is_spelled_out():
    assert spelled_out("convert to-hf ORG/NAME[/FOLDER] [--dtype a|b] [--quiet | --json] ...") == [
        ["convert", "to-hf", "ORG/NAME/FOLDER", "--dtype", "a", "--quiet"],
        ["convert", "to-hf", "ORG/NAME/FOLDER", "--dtype", "b", "--json"],
    ]
