"""Gengram for Hugging Face: a genomic foundation model with a memory of k-mers.

Importing this package registers configuration, tokenizer and models with Transformers' Auto classes.
"""

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
from .tokenization import GengramTokenizer

register()

__all__ = [
    "GengramConfig",
    "GengramForCausalLM",
    "GengramForMaskedLM",
    "GengramForSequenceClassification",
    "GengramForTokenClassification",
    "GengramModel",
    "GengramPreTrainedModel",
    "GengramTokenizer",
    "__version__",
    "register",
]
