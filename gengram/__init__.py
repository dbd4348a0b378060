"""Gengram for Hugging Face: a genomic foundation model with a memory of k-mers.

Importing this package registers configuration, tokenizer and models with Transformers' Auto classes.
"""

from pathlib import Path

if not (Path(__file__).parent / "configuration").is_dir():  # a source checkout: the parts are this folder's neighbours
    __path__.append(str(Path(__file__).parents[1]))

from ._version import __version__
from .auto import register
from .configuration import GengramConfig
from .modeling_gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
    GengramPreTrainedModel,
)
from .motif_memory.ways.choose import memory_path
from .tokenization import GengramTokenizer

register()

# Folder of gengram-mini, a small trained model that ships with the package: `from_pretrained(gengram.DEFAULT_MODEL)`.
DEFAULT_MODEL = str(Path(__file__).parent / "default_model")

__all__ = [
    "DEFAULT_MODEL",
    "GengramConfig",
    "GengramForCausalLM",
    "GengramForMaskedLM",
    "GengramForSequenceClassification",
    "GengramForTokenClassification",
    "GengramModel",
    "GengramPreTrainedModel",
    "GengramTokenizer",
    "__version__",
    "memory_path",
    "register",
]
