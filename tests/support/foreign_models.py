"""Tiny models of others whose tokens are single bases: with tokens around a sequence, and other ids than Gengram's."""

import torch
from tiny_tokenizers import one_per_base
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LETTERS = "NTGCA"
VOCABULARY_SIZE = 4 + len(LETTERS)


def _tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = one_per_base(LETTERS, template)
    tokenizer.pad_token, tokenizer.model_max_length = "[UNK]", 64
    return tokenizer


def _tiny(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


def llama():
    """A causal model without a token in front."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return _tiny(LlamaForCausalLM, config), _tokenizer()


def gpt2():
    """A causal model with learned positions, and a token in front of every sequence."""
    config = GPT2Config(vocab_size=VOCABULARY_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1)
    return _tiny(GPT2LMHeadModel, config), _tokenizer("[CLS] $A")


def _bert_config(**changes):
    fields = dict(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return BertConfig(**{**fields, **changes})


def bert():
    """A masked model with tokens on both sides."""
    return _tiny(BertForMaskedLM, _bert_config()), _tokenizer("[CLS] $A [SEP]")


def bert_classifier():
    """A classifier of sequences into three."""
    config = _bert_config(num_labels=3)
    return _tiny(BertForSequenceClassification, config), _tokenizer("[CLS] $A [SEP]")
