"""Tiny models of Transformers that memories are attached to, and vocabularies of bases, 6-mers and byte pairs."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

from gengram import MotifMemoryConfig
from gengram.motif_memory import attach_memory, attached_memories

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_DECODER = _SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 512}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Host:
    """How to make a tiny model."""

    model: str
    config: str
    sizes: dict[str, Any]
    layers: tuple[int, ...] = (1, 3)

    def make(self, vocabulary: int = 16, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = getattr(hf, self.config)(vocab_size=vocabulary, **special, **self.sizes)
        return getattr(hf, self.model)(config).eval()


DECODERS = {
    "llama": Host("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "gpt_neox": Host("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES | {"max_position_embeddings": 512}),
    "mixtral": Host("MixtralForCausalLM", "MixtralConfig", _DECODER | _EXPERTS),
    "qwen3_moe": Host(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _DECODER | _EXPERTS | {"moe_intermediate_size": 16, "head_dim": 8}
    ),
    "deepseek_v3": Host("DeepseekV3ForCausalLM", "DeepseekV3Config", _DECODER | {"num_key_value_heads": 4} | _MLA),
}
OTHER_DECODERS = {
    "mamba": Host("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}),
}
ENCODERS = {
    "bert": Host("BertForMaskedLM", "BertConfig", _SIZES | {"max_position_embeddings": 512}),
    "esm": Host(
        "EsmForMaskedLM",
        "EsmConfig",
        _SIZES
        | {"max_position_embeddings": 512, "position_embedding_type": "rotary", "mask_token_id": 3}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "modernbert": Host("ModernBertForMaskedLM", "ModernBertConfig", _SIZES | {"max_position_embeddings": 512}),
}
_BART = {f"{part}_{name}": 4 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
_BART |= {"d_model": 32, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "max_position_embeddings": 512}
OF_INNER_MODELS = {  # decoders whose heads call a model within their base model
    "opt": Host("OPTForCausalLM", "OPTConfig", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bart": Host("BartForCausalLM", "BartConfig", _BART),
}
ALL = DECODERS | OTHER_DECODERS | ENCODERS

SINGLE = ["", "", "", "", "", "A", "C", "G", "T", "N"]
SIX_MERS = ["", "", "", ""] + ["".join(word) for word in itertools.product("ACGT", repeat=6)] + list("ACGTN")
PAIRS = ["", "", "", "", "A", "C", "G", "T", "N", "TA", "GATTA", "CCG", "TATAAA", "AC", "", "GT"]
VOCABULARIES = {"single": SINGLE, "6-mers": SIX_MERS, "byte pairs": PAIRS}

CONFIG = MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=8, window=9)


def grafted(name: str, letters=SINGLE, config=CONFIG, trained: bool = True) -> Any:
    """A tiny host with memories; `trained` ones are not 0."""
    host = (ALL | OF_INNER_MODELS)[name]
    model = attach_memory(host.make(max(16, len(letters))), config, layers=list(host.layers), token_letters=letters)
    if trained:
        torch.manual_seed(1)
        for memory in attached_memories(model).values():
            for weight in memory.parameters():
                torch.nn.init.normal_(weight, std=0.5)
    return model


def random_ids(letters=SINGLE, batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    """Tokens that spell DNA."""
    spelled = torch.tensor([index for index, word in enumerate(letters) if word])
    generator = torch.Generator().manual_seed(seed)
    return spelled[torch.randint(len(spelled), (batch, length), generator=generator)]
