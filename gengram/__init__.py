"""Gengram for Hugging Face: a genomic foundation model with a memory of k-mers.

Importing this package makes Transformers' Auto classes and `pipeline()` know Gengram. It imports neither PyTorch nor
Transformers: models, configuration and tokenizer are loaded when they are first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "configuration").is_dir():  # a source checkout: the parts are this folder's neighbours
    __path__.append(str(Path(__file__).parents[1]))

from ._version import __version__
from .auto import register, register_with_auto_classes
from .support.default_model import DEFAULT_MODEL

if TYPE_CHECKING:
    from .configuration import GengramConfig
    from .inference.explanation import explain_memory
    from .inference.one_hot import OneHotModel
    from .modeling_gengram import (
        GengramForCausalLM,
        GengramForMaskedLM,
        GengramForSequenceClassification,
        GengramForTokenClassification,
        GengramModel,
        GengramPreTrainedModel,
        GengramQuantizationConfig,
    )
    from .motif_memory import (
        MotifMemory,
        MotifMemoryConfig,
        attach_memory,
        attached_memories,
        detach_memory,
        load_memory,
        memory_path,
        save_memory,
    )
    from .tokenization import GengramTokenizer

DEMO_DATA = Path(__file__).parent / "demo_data"  # a piece of human genome with genes and variants: its README

# Public names that are loaded when first used, and their modules; type checkers read the imports above.
_LOADED_FROM = {
    "GengramConfig": "configuration",
    "GengramForCausalLM": "modeling_gengram",
    "GengramForMaskedLM": "modeling_gengram",
    "GengramForSequenceClassification": "modeling_gengram",
    "GengramForTokenClassification": "modeling_gengram",
    "GengramModel": "modeling_gengram",
    "GengramPreTrainedModel": "modeling_gengram",
    "GengramQuantizationConfig": "modeling_gengram",
    "GengramTokenizer": "tokenization",
    "MotifMemory": "motif_memory",
    "MotifMemoryConfig": "motif_memory",
    "attach_memory": "motif_memory",
    "attached_memories": "motif_memory",
    "detach_memory": "motif_memory",
    "explain_memory": "inference.explanation",
    "load_memory": "motif_memory",
    "OneHotModel": "inference.one_hot",
    "memory_path": "motif_memory",
    "save_memory": "motif_memory",
}

__all__ = [
    "DEFAULT_MODEL",
    "DEMO_DATA",
    "GengramConfig",
    "GengramForCausalLM",
    "GengramForMaskedLM",
    "GengramForSequenceClassification",
    "GengramForTokenClassification",
    "GengramModel",
    "GengramPreTrainedModel",
    "GengramQuantizationConfig",
    "GengramTokenizer",
    "MotifMemory",
    "MotifMemoryConfig",
    "OneHotModel",
    "__version__",
    "attach_memory",
    "attached_memories",
    "detach_memory",
    "explain_memory",
    "load_memory",
    "memory_path",
    "register",
    "save_memory",
]


def __getattr__(name: str) -> Any:
    """A public name, or one of the packages that hold them, at its first use."""
    if name in _LOADED_FROM:
        value = getattr(import_module(f".{_LOADED_FROM[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in {module.partition(".")[0] for module in _LOADED_FROM.values()}:
        return import_module(f".{name}", __name__)
    from .support.errors import quoted

    raise AttributeError(f"module {__name__!r} has no attribute {quoted([name], __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_auto_classes()
