"""Small models whose memory matters: unit-gain weights, so that an error in the memory is an error in the logits."""

import torch

from gengram import (
    GengramConfig,
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
)

HEADS = [
    GengramModel,
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
]

LETTERS = [8, 5, 6, 7, 9]


def tiny_config(**changes) -> GengramConfig:
    fields = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        memory_layers=[0, 2],
        memory_ngram_sizes=[1, 2, 3],
        memory_embedding_dim=6,
        memory_window=9,
        memory_conv_kernel=4,
    )
    return GengramConfig(**{**fields, **changes})


def tiny_model(model_class, seed: int = 0, **changes):
    """A model with asymmetric random weights of unit gain, in eval mode."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
            else:
                fan_in = 1 if "embed" in name else weight.shape[-1]
                weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
    return model


def random_ids(*shape: int, seed: int = 0, non_letters: float = 0.05) -> torch.Tensor:
    """Token ids that spell DNA, with a few other tokens in between."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(LETTERS)[torch.randint(5, shape, generator=generator)]
    other = torch.rand(shape, generator=generator) < non_letters
    return torch.where(other, torch.tensor(3), ids)
