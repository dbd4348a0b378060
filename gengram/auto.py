"""Registration with Transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .configuration import GengramConfig
from .modeling_gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
)
from .tokenization import GengramTokenizer


def register() -> None:
    """Make the Auto classes and `pipeline()` know Gengram; calling it again changes nothing."""
    AutoConfig.register(GengramConfig.model_type, GengramConfig, exist_ok=True)
    AutoTokenizer.register(GengramConfig, tokenizer_class=GengramTokenizer, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, GengramModel),
        (AutoModelForCausalLM, GengramForCausalLM),
        (AutoModelForMaskedLM, GengramForMaskedLM),
        (AutoModelForSequenceClassification, GengramForSequenceClassification),
        (AutoModelForTokenClassification, GengramForTokenClassification),
    ):
        auto_class.register(GengramConfig, model_class, exist_ok=True)
