"""A model of Transformers on its device, with its tokenizer."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

UNKNOWN_CONTEXT = 10**9  # tokens, if nothing says how many a model can read
HEADS: dict[str | None, Any] = {
    None: AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be asked (`eval()`, on its device), and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model is, and inputs have to be."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """How many tokens the model can read at once."""
        return context_length(self.model.config, self.tokenizer)


def load_model(
    name: str,
    head: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
    **loading: Any,
) -> LoadedModel:
    """Any model that the library's Auto classes load, and its tokenizer.

    Args:
        name: folder or Hub id.
        head: `None` for hidden states, the language model: `causal` or `masked`, or `classes` of sequences.
        dtype: of the weights and activations.
        device: where to run; by default the first GPU if there is one.
        loading: further arguments of `from_pretrained`, as `revision` and `trust_remote_code`.

    Raises:
        ValueError: if there is no such head.
        OSError: if there is no such model.
    """
    if head not in HEADS:
        raise ValueError(f"expected a head of {list(HEADS)}, got {head!r}.")
    model = HEADS[head].from_pretrained(name, dtype=dtype, **loading)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(name, **loading))


def head_of(config: Any) -> str | None:
    """Which language model was saved with a configuration: `causal`, `masked`, or None if that is no language model.

    The name of its class says it (`architectures`), or where a model's own code brings the class, what it is for.
    """
    brought = getattr(config, "auto_map", None) or {}
    for architecture in getattr(config, "architectures", None) or []:
        purposes = [purpose for purpose, name in brought.items() if str(name).rpartition(".")[2] == architecture]
        for name in (architecture, *purposes):
            if "MaskedLM" in name:
                return "masked"
            if "CausalLM" in name or "LMHead" in name:
                return "causal"
    return None


def context_length(config: Any, tokenizer: Any) -> int:
    """How many tokens a model can read at once, by its configuration and tokenizer; or `UNKNOWN_CONTEXT`."""
    said = getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    return int(min(said, tokenizer.model_max_length, UNKNOWN_CONTEXT))
