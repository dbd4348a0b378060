"""Megatron's arguments as a `GengramConfig`, or a refusal that names the argument.

An argument that the checkpoint does not have takes the default of the authors' command line
(`megatron/training/arguments.py`). Dropout of hidden states, precision and parallelism settings do not change what the
weights compute and are not looked at.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..configuration.configuration_gengram import GengramConfig
from ..support.errors import ConversionError, quoted, shortened
from .megatron_checkpoint import argument, is_plain
from .weight_table import MEMORY_PREFIXES

# What the model cannot express: argument, default of the command line, accepted values, what the model has.
_FIXED: tuple[tuple[str, Any, tuple, str], ...] = (
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

# Ending of a memory argument and its default on the command line. Released checkpoints say `engram_dna_`.
_MEMORY_PREFIXES = tuple(f"{prefix}_" for prefix in MEMORY_PREFIXES)
_MEMORY_DEFAULTS: dict[str, Any] = {
    "enabled": False,
    "layer_ids": None,
    "ngram_sizes": (2, 3),
    "embed_dim_per_ngram": 128,
    "token_ids": (8, 5, 6, 7, 9),
    "use_short_conv": False,
    "short_conv_kernel_size": 4,
    "short_conv_dilation": None,
    "window_size": 1024,
}
# Routing types that only add a loss; sinkhorn, the other one, routes differently.
_AUXILIARY_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


# What shapes no weight, but is worth keeping for the way back.
_KEPT = frozenset(
    (
        *("ffn_hidden_size", "seq_length", "add_position_embedding", "use_rotary_position_embeddings"),
        *("hidden_dropout", "moe_grouped_gemm", "moe_router_dtype", "moe_token_dispatcher_type", "tokenizer_type"),
        *("make_vocab_size_divisible_by", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("pipeline_model_parallel_size", "tensor_model_parallel_size", "expert_model_parallel_size"),
        *("consumed_train_samples", "consumed_valid_samples"),
    )
)


class RecordedArgs(dict[str, Any]):
    """Arguments that remember which of them were asked for, so that a conversion can say what it used."""

    def __init__(self, args: Mapping[str, Any]):
        super().__init__(args)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def as_json(self) -> dict[str, Any]:
        """The arguments that were asked for or serve the way back, and are there, as JSON values; others as text."""
        return {name: _plain(self[name]) for name in sorted(self.asked | _KEPT) if name in self}


def _plain(value: Any) -> Any:
    if is_plain(value):
        return value
    if isinstance(value, list | tuple) and len(value) <= 4096 and all(is_plain(v) for v in value):
        return list(value)
    return shortened(value)


def config_from_args(args: Mapping[str, Any], dtype: str | None = None) -> GengramConfig:
    """The configuration that a checkpoint's arguments describe.

    Args:
        args: Megatron's arguments by name; layers are counted from 1 in `*_layer_ids`.
        dtype: What to record as the dtype of the weights.

    Raises:
        ConversionError: if the model cannot express an argument; the message has its name, what was expected and got.
    """
    layers = argument(args, "num_layers", 0, most=4096)
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if args.get(name) is None:
            raise ConversionError(f"args.{name} is missing; the checkpoint's arguments do not describe a model")
    _check_fixed(args)
    heads = argument(args, "num_attention_heads", 0)
    hidden = argument(args, "hidden_size", 0)
    context = argument(args, "max_position_embeddings", argument(args, "seq_length", 0))
    if not context:
        raise ConversionError("args.max_position_embeddings and args.seq_length are missing; one of them is needed")
    if args.get("kv_channels") is None and hidden % heads:
        raise ConversionError(
            f"args.hidden_size must be a multiple of args.num_attention_heads, got {hidden} and {heads}"
        )
    fields = {
        "vocab_size": argument(args, "padded_vocab_size", 0),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": (
            argument(args, "num_query_groups", 1) if _flag(args, "group_query_attention") else heads
        ),
        "head_dim": argument(args, "kv_channels", hidden // heads),
        "max_position_embeddings": context,
        "initializer_range": _number(args, "init_method_std", 0.02),
        "rms_norm_eps": _number(args, "norm_epsilon", 1e-5),
        "tie_word_embeddings": not _flag(args, "untie_embeddings_and_output_weights"),
        "attention_dropout": _number(args, "attention_dropout", 0.1),
        "rope_parameters": _rope(args),
        **_feed_forward(args, layers),
        **_memory(args, layers),
    }
    if not fields["vocab_size"]:
        raise ConversionError("args.padded_vocab_size is missing; it is the number of rows of the embedding")
    try:
        return GengramConfig(**fields, dtype=dtype, architectures=["GengramForCausalLM"])
    except (ValueError, TypeError) as error:
        raise ConversionError(f"the checkpoint's arguments do not make a valid model: {error}") from None


def _check_fixed(args: Mapping[str, Any]) -> None:
    for name, default, accepted, what in _FIXED:
        value = args.get(name, default)
        if not any(type(value) in _like(choice) and value == choice for choice in accepted):
            absent = "" if name in args else " (the default: the checkpoint does not say)"
            raise ConversionError(
                f"args.{name} must be {' or '.join(map(repr, accepted))}, got {shortened(value)}{absent}: the model "
                f"has {what}"
            )


def _like(choice: Any) -> tuple[type, ...]:
    return (int, float) if type(choice) in (int, float) else (type(choice),)


def _flag(args: Mapping[str, Any], name: str) -> bool:
    value = args.get(name, False)
    if not isinstance(value, bool):
        raise ConversionError(f"args.{name} must be True or False, got {shortened(value)}")
    return value


def _number(args: Mapping[str, Any], name: str, default: float) -> float:
    value = args.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or abs(value) > 1e15 or not math.isfinite(value) or value < 0:
        raise ConversionError(f"args.{name} must be a number from 0, got {shortened(value)}")
    return float(value)


def _integers(args: Mapping[str, Any], name: str, default: Any) -> list[int]:
    value = args.get(name, default)
    value = default if value is None else value
    if not isinstance(value, list | tuple) or len(value) > 4096 or not all(type(v) is int for v in value):
        raise ConversionError(f"args.{name} must be a list of integers, got {shortened(value)}")
    return list(value)


def _rope(args: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _number(args, "rotary_base", 10000.0)}
    interpolation = args.get("rotary_seq_len_interpolation_factor")
    scaled = _flag(args, "use_rope_scaling")
    if interpolation is not None and scaled:
        raise ConversionError(
            "args.rotary_seq_len_interpolation_factor and args.use_rope_scaling are both set; the model can have "
            "only one"
        )
    if interpolation is not None:
        factor = _number(args, "rotary_seq_len_interpolation_factor", 1.0)
        rope |= {"rope_type": "linear", "factor": factor}
    elif scaled:  # the constants of `RotaryEmbedding._apply_scaling` in the authors' rotary_pos_embedding.py
        rope |= {
            "rope_type": "llama3",
            "factor": _number(args, "rope_scaling_factor", 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return rope


def _feed_forward(args: Mapping[str, Any], layers: int) -> dict[str, Any]:
    experts = argument(args, "num_experts", 0, most=4096)
    dense_width = argument(args, "ffn_hidden_size", 0)
    if not experts:
        if not dense_width:
            raise ConversionError("args.ffn_hidden_size is missing; it is the width of the feed-forward")
        return {"num_local_experts": 0, "intermediate_size": dense_width}
    if experts == 1:
        raise ConversionError(
            "args.num_experts must be unset or at least 2, got 1: the model has no router for one expert"
        )
    frequency = args.get("moe_layer_freq", 1)
    everywhere = (
        frequency == 1
        if type(frequency) is int
        else (isinstance(frequency, list | tuple) and len(frequency) == layers and all(f == 1 for f in frequency))
    )
    if not everywhere:
        raise ConversionError(
            f"args.moe_layer_freq must be 1 or a list of {layers} ones, got {shortened(frequency)}: all layers of the "
            "model have experts, or none"
        )
    capacity = args.get("moe_expert_capacity_factor")
    if capacity is not None and not (type(capacity) in (int, float) and capacity < 0):
        raise ConversionError(
            f"args.moe_expert_capacity_factor must be None, got {shortened(capacity)}: the model drops no tokens"
        )
    width = argument(args, "moe_ffn_hidden_size", dense_width)
    if not width:
        raise ConversionError(
            "args.moe_ffn_hidden_size and args.ffn_hidden_size are missing; one is the experts' width"
        )
    losses = args.get("moe_router_load_balancing_type", "aux_loss")
    losses = list(losses) if isinstance(losses, list | tuple) else [losses]
    odd = [loss for loss in losses if loss not in _AUXILIARY_LOSSES]
    if odd:
        raise ConversionError(
            f"args.moe_router_load_balancing_type must be among {', '.join(_AUXILIARY_LOSSES)}, got "
            f"{shortened(odd[0])}: the model routes to the experts with the largest logits"
        )
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": argument(args, "moe_router_topk", 2),
        "norm_topk_prob": not _flag(args, "moe_router_pre_softmax"),
        "intermediate_size": width,
        "router_aux_loss_coef": _auxiliary_coefficient(args, losses),
        "router_z_loss_coef": _number(args, "moe_z_loss_coeff", 0.0),
        "router_jitter_noise": _number(args, "moe_input_jitter_eps", 0.0),
    }


def _auxiliary_coefficient(args: Mapping[str, Any], losses: list[str]) -> float:
    coefficients = args.get("moe_aux_loss_coeff", 0.0)
    coefficients = list(coefficients) if isinstance(coefficients, list | tuple) else [coefficients] * len(losses)
    if len(coefficients) != len(losses):
        raise ConversionError(
            f"args.moe_aux_loss_coeff must have one number per moe_router_load_balancing_type ({len(losses)}), got "
            f"{shortened(coefficients)}"
        )
    pairs = zip(losses, coefficients, strict=True)
    return sum(_number({"moe_aux_loss_coeff": c}, "moe_aux_loss_coeff", 0.0) for loss, c in pairs if loss != "none")


def _memory(args: Mapping[str, Any], layers: int) -> dict[str, Any]:
    enabled = [prefix for prefix in _MEMORY_PREFIXES if _flag(args, f"{prefix}enabled")]
    if len(enabled) > 1:
        raise ConversionError("args.gengram_enabled and args.engram_dna_enabled are both True; expected one")
    if not enabled:
        return {"memory_layers": []}
    prefix = enabled[0]
    known = [prefix + name for name in _MEMORY_DEFAULTS]
    unknown = [name for name in args if name.startswith(prefix) and name not in known]
    unknown = [name for name in unknown if args[name] not in (None, False)]
    if unknown:
        raise ConversionError(
            f"the memory has settings that are not known: {quoted(['args.' + name for name in unknown])}; expected "
            f"{', '.join(known)}"
        )

    def integers(name: str) -> list[int]:
        return _integers(args, prefix + name, _MEMORY_DEFAULTS[name])

    numbers = _integers(args, f"{prefix}layer_ids", ())
    # Without a list the original has a memory in every layer (`TransformerLayer.__init__`).
    numbers = numbers or list(range(1, layers + 1))
    outside = [number for number in numbers if not 1 <= number <= layers]
    if outside:
        raise ConversionError(f"args.{prefix}layer_ids must lie in 1..{layers}, got {shortened(outside)}")
    sizes = integers("ngram_sizes")
    if not sizes or not all(1 <= size <= 12 for size in sizes):
        raise ConversionError(f"args.{prefix}ngram_sizes must name sizes in 1..12, got {shortened(sizes)}")
    has_conv = _flag(args, f"{prefix}use_short_conv")
    kernel = argument(args, f"{prefix}short_conv_kernel_size", _MEMORY_DEFAULTS["short_conv_kernel_size"])
    return {
        "memory_layers": [number - 1 for number in sorted(set(numbers))],
        "memory_ngram_sizes": sizes,
        "memory_embedding_dim": argument(
            args, f"{prefix}embed_dim_per_ngram", _MEMORY_DEFAULTS["embed_dim_per_ngram"]
        ),
        "memory_window": argument(args, f"{prefix}window_size", _MEMORY_DEFAULTS["window_size"]),
        "memory_token_ids": integers("token_ids"),
        "memory_conv_kernel": kernel if has_conv else 0,
        "memory_conv_dilation": argument(args, f"{prefix}short_conv_dilation", max(sizes)),
    }


# Fields of a configuration that a Megatron checkpoint does not know: how the model is used.
_WITHOUT_ARGUMENT: tuple[str, ...] = (
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "classifier_dropout"),
    "memory_pooling",
)
_ROUTER_FIELDS: tuple[str, ...] = (
    *("num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"),
)
_MEMORY_FIELDS = tuple(name for name in GengramConfig.__annotations__ if name.startswith("memory_"))


def args_from_config(config: GengramConfig, prefix: str = "gengram") -> dict[str, Any]:
    """Megatron's arguments for a configuration; `config_from_args` of them is the configuration again.

    Args:
        config: A model that the authors' code can express.
        prefix: What the memory is called: `"gengram"` or `"engram_dna"`.

    Raises:
        ConversionError: if the authors' code cannot express it; the message names the fields.
    """
    grouped = config.num_key_value_heads != config.num_attention_heads
    dense = config.num_local_experts <= 1
    args: dict[str, Any] = {name: accepted[0] for name, _, accepted, _ in _FIXED}
    args |= {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": grouped,
        "num_query_groups": config.num_key_value_heads if grouped else 1,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "padded_vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": config.vocab_size,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "init_method_std": config.initializer_range,
        "norm_epsilon": config.rms_norm_eps,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
        "add_position_embedding": False,
        "use_rotary_position_embeddings": False,
        "num_experts": None,
        **_rope_args(dict(config.rope_parameters or {})),
    }
    if not dense:
        args |= {
            "num_experts": config.num_local_experts,
            "moe_ffn_hidden_size": config.intermediate_size,
            "moe_router_topk": config.num_experts_per_tok,
            "moe_router_pre_softmax": not config.norm_topk_prob,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": config.router_aux_loss_coef,
            "moe_z_loss_coeff": config.router_z_loss_coef or None,
            "moe_input_jitter_eps": config.router_jitter_noise or None,
            "moe_layer_freq": 1,
            "moe_grouped_gemm": True,
            "moe_router_dtype": "fp32",
        }
    values: dict[str, Any] = {"enabled": bool(config.memory_layers)}
    if config.memory_layers:
        values |= {
            "layer_ids": [layer + 1 for layer in config.memory_layers],
            "ngram_sizes": list(config.memory_ngram_sizes),
            "embed_dim_per_ngram": config.memory_embedding_dim,
            "token_ids": list(config.memory_token_ids),
            "use_short_conv": config.memory_conv_kernel > 0,
            "short_conv_kernel_size": config.memory_conv_kernel or _MEMORY_DEFAULTS["short_conv_kernel_size"],
            "short_conv_dilation": config.memory_conv_dilation,
            "window_size": config.memory_window,
        }
    args |= {f"{prefix}_{name}": values.get(name, default) for name, default in _MEMORY_DEFAULTS.items()}

    lost = differing_fields(config, config_from_args(args))
    if lost:
        texts = ", ".join(f"{name}={shortened(getattr(config, name))}" for name in lost)
        raise ConversionError(
            f"the authors' code has no argument for this model's {texts}; only models as it makes them can go back"
        )
    return args


def differing_fields(config: GengramConfig, other: GengramConfig, all_fields: bool = False) -> list[str]:
    """Fields in which two configurations describe different models; what does not apply to both is not looked at.

    Fields that a Megatron checkpoint does not know are left out, unless `all_fields` says otherwise.
    """
    ignored: set[str] = set() if all_fields else set(_WITHOUT_ARGUMENT)
    if max(config.num_local_experts, other.num_local_experts) <= 1:
        ignored |= {"num_local_experts", *_ROUTER_FIELDS}
    if not config.memory_layers and not other.memory_layers:
        ignored |= set(_MEMORY_FIELDS)
    if config.memory_conv_kernel == other.memory_conv_kernel == 0:
        ignored.add("memory_conv_dilation")
    names = [name for name in GengramConfig.__annotations__ if name not in ignored]
    return [name for name in names if getattr(config, name) != getattr(other, name)]


def _rope_args(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    theta, factor = rope.get("rope_theta", GengramConfig.default_theta), rope.get("factor")
    return {
        "rotary_base": int(theta) if float(theta).is_integer() else theta,
        "rotary_seq_len_interpolation_factor": factor if kind == "linear" else None,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": factor if kind == "llama3" else 8.0,
    }
