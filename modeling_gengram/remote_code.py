"""Self-contained source code for a saved model folder.

A folder with these files loads with `trust_remote_code=True` where this package is not installed. The files are the
package's own modules, written flat, with their imports of one another turned into imports of siblings: the only ones
that Transformers follows. The tokenizer needs none: its `tokenizer.json` is complete.
"""

import inspect
import re
from pathlib import Path
from types import ModuleType

from ..configuration import configuration_gengram
from ..configuration.configuration_gengram import GengramConfig
from ..operators import folded_memory, memory_operators, memory_path, motif_memory, native, table_major
from . import modeling_gengram

_MODULES: tuple[ModuleType, ...] = (
    configuration_gengram,
    motif_memory,
    folded_memory,
    table_major,
    native,
    memory_path,
    memory_operators,
    modeling_gengram,
)

AUTO_MAP = {
    "AutoConfig": "configuration_gengram.GengramConfig",
    "AutoModel": "modeling_gengram.GengramModel",
    "AutoModelForCausalLM": "modeling_gengram.GengramForCausalLM",
    "AutoModelForMaskedLM": "modeling_gengram.GengramForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_gengram.GengramForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gengram.GengramForTokenClassification",
}

_PACKAGE_IMPORT = re.compile(r"^from \.\.(?:\w+\.)*(\w+) import ", re.MULTILINE)


def flatten_source(source: str) -> str:
    """The module's text with `from ..folder.name import` turned into `from .name import`."""
    flat = _PACKAGE_IMPORT.sub(r"from .\1 import ", source)
    assert not re.search(r"^\s*(?:from \.\.|from gengram|import gengram)", flat, re.MULTILINE)
    return flat


def write_remote_code(config: GengramConfig, folder: str | Path) -> None:
    """Write the source files into a model's folder, and name their classes in `config.auto_map`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for module in _MODULES:
        name = module.__name__.rpartition(".")[-1]
        (folder / f"{name}.py").write_text(flatten_source(inspect.getsource(module)), encoding="utf-8")
    config.auto_map = dict(AUTO_MAP)
