"""Gengram models in the idiom of Transformers."""

from .modeling_gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
    GengramPreTrainedModel,
)
from .quantization import GengramQuantizationConfig
from .remote_code import write_remote_code

GengramPreTrainedModel._remote_code_writer = staticmethod(write_remote_code)

__all__ = [
    "GengramForCausalLM",
    "GengramForMaskedLM",
    "GengramForSequenceClassification",
    "GengramForTokenClassification",
    "GengramModel",
    "GengramPreTrainedModel",
    "GengramQuantizationConfig",
    "write_remote_code",
]
