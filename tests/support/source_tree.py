"""The repository as the rules in tests/rules read it: its files, and the modules of the package."""

import configparser
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def repository_files() -> tuple[str, ...]:
    """Every file that is tracked, or new and not ignored, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return tuple(name for name in sorted(set(listed)) if name and (ROOT / name).exists())


def setup_options() -> configparser.SectionProxy:
    """`[options]` of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]


@functools.cache
def packages() -> dict[str, str]:
    """Every package of setup.cfg, and its folder: `gengram.configuration` is `configuration`."""
    lines = setup_options()["package_dir"].split("\n")
    folders = dict(line.replace(" ", "").split("=") for line in lines if line)
    return {name: folders.get(name, name.replace(".", "/")) for name in setup_options()["packages"].split()}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package is its `__init__.py`."""
    found = {}
    for package, folder in packages().items():
        for path in sorted((ROOT / folder).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found
