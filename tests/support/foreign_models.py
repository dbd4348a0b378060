"""Tiny models of others whose tokens are single bases: with tokens around a sequence, and other ids than Gengram's."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"NTGCA"]


def foreign_tokenizer(template: str | None = None, length: int = 64) -> PreTrainedTokenizerFast:
    """One token per base; `template` such as `[CLS] $A [SEP]` says what stands around a sequence."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if template:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        mask_token="[MASK]",
        pad_token="[PAD]",
        model_max_length=length,
    )


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
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return _tiny(LlamaForCausalLM, config), foreign_tokenizer()


def gpt2():
    """A causal model with learned positions, and a token in front of every sequence."""
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2)
    return _tiny(GPT2LMHeadModel, config), foreign_tokenizer("[CLS] $A")


def _bert_config(**changes):
    fields = dict(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return BertConfig(**{**fields, **changes})


def bert():
    """A masked model with tokens on both sides."""
    return _tiny(BertForMaskedLM, _bert_config()), foreign_tokenizer("[CLS] $A [SEP]")


def bert_classifier():
    """A classifier of sequences into three."""
    config = _bert_config(num_labels=3)
    return _tiny(BertForSequenceClassification, config), foreign_tokenizer("[CLS] $A [SEP]")
