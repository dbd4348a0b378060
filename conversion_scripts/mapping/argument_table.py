"""The table of arguments: each field of a configuration and the arguments of Megatron that say it.

Rows go both ways: `codec.read` makes the field of the arguments, `codec.write` the arguments of the field. Defaults
are those of the authors' command line (`megatron/training/arguments.py`), which an absent argument takes. Dropout of
hidden states, precision and parallelism settings do not change what the weights compute and are not read.
"""

from dataclasses import dataclass
from typing import Any

from .argument_codecs import (
    AuxiliaryLoss,
    Codec,
    ConvolutionTaps,
    Dilation,
    ExpertCount,
    ExpertsInEveryLayer,
    FirstInteger,
    HeadWidth,
    Integer,
    Integers,
    LayersFromOne,
    NgramSizes,
    NoCapacity,
    Not,
    Number,
    QueryGroups,
    Rope,
    Written,
)


@dataclass(frozen=True)
class Pair:
    """One line of the table.

    Args:
        field: The configuration's field; empty if the arguments are only checked or only written.
        arguments: The arguments that say it, with their defaults; those of the memory without its name.
        codec: What takes one to the other.
        part: Which models have the row: `"all"`, `"dense"`, `"experts"` or `"memory"`.
    """

    field: str
    arguments: dict[str, Any]
    codec: Codec
    part: str = "all"


# In the order of reading: codecs look at fields of earlier rows.
PAIRS: tuple[Pair, ...] = (
    Pair("num_hidden_layers", {"num_layers": None}, Integer(most=4096)),
    Pair("num_attention_heads", {"num_attention_heads": None}, Integer()),
    Pair("hidden_size", {"hidden_size": None}, Integer()),
    Pair(
        "max_position_embeddings",
        {"max_position_embeddings": None, "seq_length": None},
        FirstInteger(missing="one of them is needed"),
    ),
    Pair("head_dim", {"kv_channels": None}, HeadWidth()),
    Pair("num_key_value_heads", {"group_query_attention": False, "num_query_groups": 1}, QueryGroups()),
    Pair("initializer_range", {"init_method_std": 0.02}, Number()),
    Pair("rms_norm_eps", {"norm_epsilon": 1e-5}, Number()),
    Pair("tie_word_embeddings", {"untie_embeddings_and_output_weights": False}, Not()),
    Pair("attention_dropout", {"attention_dropout": 0.1}, Number()),
    Pair(
        "rope_parameters",
        {
            "rotary_base": 10000.0,
            "rotary_seq_len_interpolation_factor": None,
            "use_rope_scaling": False,
            "rope_scaling_factor": 8.0,
        },
        Rope(),
    ),
    Pair("num_local_experts", {"num_experts": None}, ExpertCount()),
    Pair(
        "intermediate_size",
        {"ffn_hidden_size": None},
        Integer(missing="it is the width of the feed-forward"),
        part="dense",
    ),
    Pair("", {"moe_layer_freq": 1}, ExpertsInEveryLayer(), part="experts"),
    Pair("", {"moe_expert_capacity_factor": None}, NoCapacity(), part="experts"),
    Pair(
        "intermediate_size",
        {"moe_ffn_hidden_size": None, "ffn_hidden_size": None},
        FirstInteger(missing="one is the experts' width"),
        part="experts",
    ),
    Pair("num_experts_per_tok", {"moe_router_topk": 2}, Integer(), part="experts"),
    Pair("norm_topk_prob", {"moe_router_pre_softmax": False}, Not(), part="experts"),
    Pair(
        "router_aux_loss_coef",
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0},
        AuxiliaryLoss(),
        part="experts",
    ),
    Pair("router_z_loss_coef", {"moe_z_loss_coeff": 0.0}, Number(zero_is_none=True), part="experts"),
    Pair("router_jitter_noise", {"moe_input_jitter_eps": 0.0}, Number(zero_is_none=True), part="experts"),
    Pair("", {"moe_grouped_gemm": False}, Written(True), part="experts"),
    Pair("", {"moe_router_dtype": None}, Written("fp32"), part="experts"),
    Pair("", {"enabled": False}, Written(lambda fields: bool(fields["memory_layers"])), part="memory"),
    Pair("memory_layers", {"layer_ids": None}, LayersFromOne(), part="memory"),
    Pair("memory_ngram_sizes", {"ngram_sizes": (2, 3)}, NgramSizes(), part="memory"),
    Pair("memory_embedding_dim", {"embed_dim_per_ngram": 128}, Integer(), part="memory"),
    Pair("memory_token_ids", {"token_ids": (8, 5, 6, 7, 9)}, Integers(), part="memory"),
    Pair(
        "memory_conv_kernel", {"use_short_conv": False, "short_conv_kernel_size": 4}, ConvolutionTaps(), part="memory"
    ),
    Pair("memory_conv_dilation", {"short_conv_dilation": None}, Dilation(), part="memory"),
    Pair("memory_window", {"window_size": 1024}, Integer(), part="memory"),
    Pair("vocab_size", {"padded_vocab_size": None}, Integer(missing="it is the number of rows of the embedding")),
    Pair("", {"make_vocab_size_divisible_by": 128}, Written(lambda fields: fields["vocab_size"])),
    Pair("", {"hidden_dropout": 0.1}, Written(0.0)),
    Pair("", {"add_position_embedding": True}, Written(False)),
    Pair("", {"use_rotary_position_embeddings": False}, Written(False)),
)

# Without these, arguments do not describe a model.
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")

# What the model cannot express: argument, default of the command line, accepted values, what the model has.
FIXED: tuple[tuple[str, Any, tuple, str], ...] = (
    ("add_bias_linear", True, (False,), "no biases"),
    ("add_qkv_bias", False, (False,), "no biases"),
    ("normalization", "LayerNorm", ("RMSNorm",), "RMSNorm only"),
    ("apply_layernorm_1p", False, (False,), "norm weights around 1"),
    ("apply_residual_connection_post_layernorm", False, (False,), "residuals taken before the norm"),
    ("qk_layernorm", False, (False,), "no norm of queries and keys"),
    ("qk_l2_norm", False, (False,), "no norm of queries and keys"),
    ("apply_query_key_layer_scaling", False, (False,), "no scaling of attention by layer"),
    ("softmax_scale", None, (None,), "attention scaled by 1/sqrt(head_dim)"),
    ("softmax_type", "vanilla", ("vanilla",), "a plain softmax in attention"),
    ("attention_output_gate", False, (False,), "no gate on attention"),
    ("window_size", None, (None,), "full attention"),
    ("multi_latent_attention", False, (False,), "grouped-query attention"),
    ("experimental_attention_variant", None, (None,), "grouped-query attention"),
    ("linear_attention_type", None, (None,), "grouped-query attention"),
    ("position_embedding_type", "learned_absolute", ("rope",), "rotary embeddings"),
    ("rotary_interleaved", False, (False,), "rotary embeddings that are not interleaved"),
    ("rotary_percent", 1.0, (1.0,), "rotary embeddings of the whole head"),
    ("rope_type", None, (None, "rope"), "plain rotary embeddings"),
    ("mrope_section", None, (None,), "rotary embeddings of one axis"),
    ("no_rope_freq", None, (None, 0), "rotary embeddings in every layer"),
    ("swiglu", False, (True,), "a SwiGLU feed-forward"),
    ("squared_relu", False, (False,), "a SwiGLU feed-forward"),
    ("quick_geglu", False, (False,), "a SwiGLU feed-forward"),
    ("activation_func_clamp_value", None, (None,), "a SwiGLU feed-forward without clamping"),
    ("glu_linear_offset", 0.0, (0.0,), "a SwiGLU feed-forward without offset"),
    ("moe_router_score_function", "softmax", ("softmax",), "a softmax router"),
    ("moe_router_num_groups", None, (None, 1), "routing over all experts"),
    ("moe_router_group_topk", None, (None, 0), "routing over all experts"),
    ("moe_router_topk_limited_devices", None, (None,), "routing over all experts"),
    ("moe_router_topk_scaling_factor", None, (None, 0.0, 1.0), "unscaled expert weights"),
    ("moe_router_enable_expert_bias", False, (False,), "a router without bias"),
    ("moe_router_force_load_balancing", False, (False,), "learned routing"),
    ("moe_shared_expert_intermediate_size", None, (None, 0), "no shared experts"),
    ("moe_shared_expert_gate", False, (False,), "no shared experts"),
    ("moe_apply_probs_on_input", False, (False,), "expert weights applied to outputs"),
    ("mtp_num_layers", None, (None, 0), "no multi-token prediction"),
    ("heterogeneous_layers_config_path", None, (None,), "layers of one shape"),
    ("heterogeneous_layers_config_encoded_json", None, (None,), "layers of one shape"),
    ("is_hybrid_model", False, (False,), "attention layers only"),
    ("hybrid_override_pattern", None, (None,), "attention layers only"),
    ("retro_add_retriever", False, (False,), "no retriever"),
    ("spec", None, (None,), "the standard layer"),
)

# What shapes no weight, but is worth keeping for the way back.
KEPT = frozenset(
    (
        *("ffn_hidden_size", "seq_length", "add_position_embedding", "use_rotary_position_embeddings"),
        *("hidden_dropout", "moe_grouped_gemm", "moe_router_dtype", "moe_token_dispatcher_type", "tokenizer_type"),
        *("make_vocab_size_divisible_by", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("pipeline_model_parallel_size", "tensor_model_parallel_size", "expert_model_parallel_size"),
        *("consumed_train_samples", "consumed_valid_samples"),
    )
)

# Fields of a configuration that a Megatron checkpoint does not know: how the model is used.
WITHOUT_ARGUMENT: tuple[str, ...] = (
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "classifier_dropout"),
    "memory_pooling",
)
