"""Self-contained source code for a saved model folder.

A folder with these files loads with `trust_remote_code=True` where this package is not installed. The files are the
package's own modules, written flat, with their imports of one another turned into imports of siblings: the only ones
that Transformers follows. The tokenizer needs none: its `tokenizer.json` is complete.

The names of the files are a published format: `configuration_gengram.py` and `modeling_gengram.py`, which `auto_map`
names, and `modeling_gengram_PART.py` and `motif_memory_PART.py` for the parts of these folders.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..configuration.configuration_gengram import GengramConfig

_PACKAGE = __package__.rpartition(".")[0]
_START = "modeling_gengram.modeling_gengram"

AUTO_MAP = {
    "AutoConfig": "configuration_gengram.GengramConfig",
    "AutoModel": "modeling_gengram.GengramModel",
    "AutoModelForCausalLM": "modeling_gengram.GengramForCausalLM",
    "AutoModelForMaskedLM": "modeling_gengram.GengramForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_gengram.GengramForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gengram.GengramForTokenClassification",
}

_IMPORT = re.compile(r"^(?P<indent>\s*)from (?P<dots>\.+)(?P<name>[\w.]+) import ", re.MULTILINE)
_OTHER_IMPORT = re.compile(r"^\s*(?:from \.+ import|from gengram|import gengram)", re.MULTILINE)


def flat_name(module: str) -> str:
    """File name, without its ending, of a module such as `motif_memory.ways.choose`."""
    name = module.rpartition(".")[-1]
    if name.startswith(("configuration_", "modeling_")):
        return name
    return module.replace(".", "_")


def flatten_source(source: str, module: str) -> tuple[str, list[str]]:
    """A module's text with its relative imports turned into imports of siblings, and the modules that it imports."""
    imported = []

    def sibling(found: re.Match[str]) -> str:
        room = module.split(".")[: -len(found["dots"])]
        imported.append(".".join([*room, found["name"]]))
        return f"{found['indent']}from .{flat_name(imported[-1])} import "

    flat = _IMPORT.sub(sibling, source)
    assert not _OTHER_IMPORT.search(flat), f"{module} imports the package in a way that no flat file can"
    return flat, imported


@cache
def flat_sources() -> dict[str, str]:
    """Text by file name of all modules that the models need, found by following their imports."""
    texts: dict[str, str] = {}
    waiting, seen = [_START], {_START}
    while waiting:
        module = waiting.pop(0)
        spec = find_spec(f"{_PACKAGE}.{module}")
        assert spec is not None and spec.origin is not None, module
        text, imported = flatten_source(Path(spec.origin).read_text(encoding="utf-8"), module)
        texts[f"{flat_name(module)}.py"] = text
        waiting += [name for name in dict.fromkeys(imported) if name not in seen]
        seen |= set(imported)
    return texts


def write_remote_code(config: GengramConfig, folder: str | Path) -> None:
    """Write the source files into a model's folder, and name their classes in `config.auto_map`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in flat_sources().items():
        (folder / name).write_text(text, encoding="utf-8")
    config.auto_map = dict(AUTO_MAP)
