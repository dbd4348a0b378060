"""Arguments of a checkpoint as a configuration, and every one that the model cannot express refused by name."""

import math

import pytest
import torch
from shared_files import FIXTURES, fixture_json, needs_fixtures
from tolerances import ROPE_FREQUENCIES_FP32_RELATIVE
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gengram.configuration import GengramConfig
from gengram.conversion_scripts.mapping.argument_table import FIXED, PAIRS, WITHOUT_ARGUMENT
from gengram.conversion_scripts.mapping.arguments import RecordedArgs, config_from_args
from gengram.conversion_scripts.megatron.checkpoint import args_of
from gengram.conversion_scripts.megatron.torch_archive import TorchArchive
from gengram.support.errors import ConversionError


@needs_fixtures
def test_the_released_10b_model():
    path = FIXTURES / "args_real_10b" / "args_real_10b.pt"
    args = args_of(TorchArchive(path).load(), path)
    config = config_from_args(args, dtype="bfloat16")
    released = GengramConfig(dtype="bfloat16", architectures=["GengramForCausalLM"])
    assert config.to_dict() == released.to_dict()


@needs_fixtures
def test_no_argument_of_the_authors_is_overlooked():
    """Every argument that shapes the model is either read or among those that only matter in training."""
    known = fixture_json("args_real_10b", "args_real_10b.json")
    model_fields = set(fixture_json("args_real_10b", "transformer_config_real_10b.json")) & set(known)
    recorded = RecordedArgs({**known, "params_dtype": None})
    config_from_args(recorded)
    unread = {name for name in model_fields if name not in recorded.asked and not name.startswith(TRAINING)}
    assert unread <= set(WITHOUT_EFFECT), sorted(unread - set(WITHOUT_EFFECT))


TRAINING = (
    *("fp8", "fp4", "tp_", "moe_deepep", "moe_hybridep", "moe_flex", "moe_token", "cuda_graph", "recompute"),
    *("cpu_offloading", "overlap", "dsa_", "linear_", "mamba_", "inference", "heterogeneous", "mtp_loss", "qk_clip"),
    *(
        "pipeline_model_parallel",
        "num_layers_",
        "enable_cuda",
        "external_cuda",
        "account_for",
        "moe_pad",
        "moe_router_pad",
    ),
)
WITHOUT_EFFECT = """
    tensor_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size
    hierarchical_context_parallel_sizes hybrid_context_parallel expert_model_parallel_size expert_tensor_parallel_size
    moe_extended_tp perform_initialization use_cpu_initialization fp16 bf16 params_dtype deterministic_mode
    gradient_accumulation_fusion async_tensor_model_parallel_allreduce cross_entropy_loss_fusion
    cross_entropy_fusion_impl delay_wgrad_compute ep_overlap_early_attn_memory_release variable_seq_lengths
    use_ring_exchange_p2p defer_embedding_wgrad_compute wgrad_deferral_limit microbatch_group_size_per_vp_stage
    barrier_with_L1_time attention_backend hidden_dropout fp32_residual_connection log_max_attention_logit test_mode
    calculate_per_token_loss window_attn_skip_freq embedding_init_method_std init_model_with_meta_device
    attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul masked_softmax_fusion bias_dropout_fusion
    apply_rope_fusion use_fused_weighted_squared_relu distribute_saved_activations first_last_layers_bf16
    moe_shared_expert_overlap moe_router_dtype moe_router_bias_update_rate moe_grouped_gemm
    moe_use_legacy_grouped_gemm moe_enable_deepep moe_per_layer_logging moe_layer_recompute moe_permute_fusion
    moe_router_fusion cp_comm_type clone_scatter_output_in_embedding config_logger_dir flash_decode
    use_te_activation_func symmetric_ar_type mlp_chunks_for_prefill transformer_impl fallback_to_eager_attn
    fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
""".split()


def convert(megatron, shape=None, **changes):
    return config_from_args(vars(megatron.args(shape or megatron.Shape(), **changes)))


def test_fields(megatron):
    config = convert(megatron, moe_aux_loss_coeff=0.25, moe_z_loss_coeff=0.5, moe_input_jitter_eps=0.125)
    assert config.rms_norm_eps == 2e-5 and config.rope_parameters["rope_theta"] == 50000
    assert config.memory_layers == [0, 2] and config.memory_conv_dilation == 2 and config.memory_window == 5
    assert config.intermediate_size == 10 and config.num_experts_per_tok == 2
    assert config.router_aux_loss_coef == 0.25 and config.router_z_loss_coef == 0.5
    assert config.router_jitter_noise == 0.125 and config.initializer_range == 0.01
    assert config.norm_topk_prob and not config.tie_word_embeddings


def test_defaults_of_the_command_line(megatron):
    args = vars(megatron.args(megatron.Shape(hidden=16)))
    for name in ("kv_channels", "moe_ffn_hidden_size", "moe_router_topk", "rotary_base", "norm_epsilon", "seq_length"):
        del args[name]
    for name in ("gengram_token_ids", "gengram_window_size", "gengram_embed_dim_per_ngram", "gengram_ngram_sizes"):
        del args[name]
    config = config_from_args(args)
    assert config.head_dim == 4 and config.intermediate_size == 17 and config.num_experts_per_tok == 2
    assert config.rope_parameters["rope_theta"] == 10000 and config.rms_norm_eps == 1e-5
    assert config.memory_token_ids == [8, 5, 6, 7, 9] and config.memory_window == 1024
    assert config.memory_embedding_dim == 128 and config.memory_ngram_sizes == [2, 3]


@pytest.mark.parametrize("prefix", ["gengram", "engram_dna"])
def test_memory_names(prefix, megatron):
    shape = megatron.Shape(prefix=prefix)
    assert convert(megatron, shape).memory_layers == [0, 2]
    assert convert(megatron, shape, **{f"{prefix}_layer_ids": None}).memory_layers == [0, 1, 2]
    assert convert(megatron, shape, **{f"{prefix}_layer_ids": []}).memory_layers == [0, 1, 2]
    assert convert(megatron, shape, **{f"{prefix}_enabled": False}).memory_layers == []
    assert convert(megatron, shape, **{f"{prefix}_use_short_conv": False}).memory_conv_kernel == 0
    assert convert(megatron, shape, **{f"{prefix}_short_conv_dilation": 7}).memory_conv_dilation == 7
    for wrong in ([0], [4]):
        with pytest.raises(ConversionError, match=rf"args\.{prefix}_layer_ids must lie in 1\.\.3"):
            convert(megatron, shape, **{f"{prefix}_layer_ids": wrong})
    with pytest.raises(ConversionError, match=rf"not known: 'args\.{prefix}_ngram_hash'"):
        convert(megatron, shape, **{f"{prefix}_ngram_hash": True})
    assert convert(megatron, shape, **{f"{prefix}_ngram_hash": None}).memory_layers == [0, 2]


def test_both_memory_names(megatron):
    with pytest.raises(ConversionError, match="both True"):
        convert(megatron, engram_dna_enabled=True)


def test_attention_groups(megatron):
    assert convert(megatron, group_query_attention=False, num_query_groups=1).num_key_value_heads == 4
    assert convert(megatron, group_query_attention=True, num_query_groups=1).num_key_value_heads == 1
    with pytest.raises(ConversionError, match="num_key_value_heads"):
        convert(megatron, num_query_groups=3)


def test_rope_scaling(megatron):
    linear = convert(megatron, rotary_seq_len_interpolation_factor=4)
    assert linear.rope_parameters == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
    scaled = convert(megatron, use_rope_scaling=True, rope_scaling_factor=8.0, kv_channels=64)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    # RotaryEmbedding._apply_scaling in the authors' rotary_pos_embedding.py, one frequency at a time
    for i, value in enumerate(found.tolist()):
        frequency = 50000 ** (-2 * i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192:
            expected = frequency / 8
        elif wavelength < 8192 / 4:
            expected = frequency
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert math.isclose(value, expected, rel_tol=ROPE_FREQUENCIES_FP32_RELATIVE)
    with pytest.raises(ConversionError, match="both set"):
        convert(megatron, use_rope_scaling=True, rotary_seq_len_interpolation_factor=2)


REFUSED = {
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "normalization": "LayerNorm",
    "apply_layernorm_1p": True,
    "apply_residual_connection_post_layernorm": True,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "apply_query_key_layer_scaling": True,
    "softmax_scale": 0.1,
    "softmax_type": "learnable",
    "attention_output_gate": True,
    "window_size": (128, 0),
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsa",
    "linear_attention_type": "gated_delta_net",
    "position_embedding_type": "learned_absolute",
    "rotary_interleaved": True,
    "rotary_percent": 0.5,
    "rope_type": "yarn",
    "mrope_section": [1, 2],
    "no_rope_freq": 4,
    "swiglu": False,
    "squared_relu": True,
    "quick_geglu": True,
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_limited_devices": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_router_force_load_balancing": True,
    "moe_shared_expert_intermediate_size": 64,
    "moe_shared_expert_gate": True,
    "moe_apply_probs_on_input": True,
    "mtp_num_layers": 1,
    "heterogeneous_layers_config_path": "x.json",
    "heterogeneous_layers_config_encoded_json": "{}",
    "is_hybrid_model": True,
    "hybrid_override_pattern": "M*",
    "retro_add_retriever": True,
    "spec": ["module", "name"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_cannot_express_is_refused(name, megatron):
    with pytest.raises(ConversionError, match=rf"args\.{name} must be .* got .*: the model has"):
        convert(megatron, **{name: REFUSED[name]})


def test_every_fixed_argument_has_a_test():
    assert {name for name, *_ in FIXED} == set(REFUSED)


@pytest.mark.parametrize("name", ["add_bias_linear", "normalization", "position_embedding_type", "swiglu"])
def test_absent_arguments_take_the_default_which_may_be_refused(name, megatron):
    args = vars(megatron.args(megatron.Shape()))
    del args[name]
    with pytest.raises(ConversionError, match=rf"args\.{name} must be .*the default: the checkpoint does not say"):
        config_from_args(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(moe_layer_freq=2), "moe_layer_freq must be 1 or a list of 3 ones, got 2"),
        (dict(moe_layer_freq=[0, 1, 1]), "moe_layer_freq"),
        (dict(moe_layer_freq=[1, 1]), "moe_layer_freq"),
        (dict(moe_expert_capacity_factor=1.5), "moe_expert_capacity_factor must be None"),
        (dict(moe_router_load_balancing_type="sinkhorn"), "sinkhorn"),
        (dict(moe_router_load_balancing_type=["aux_loss", {}]), "load_balancing_type"),
        (dict(moe_aux_loss_coeff=[0.1, 0.2]), "one number per"),
        (dict(num_experts=1), "num_experts must be unset or at least 2"),
        (dict(num_experts=10**9), r"num_experts must be an integer in 1\.\.4096"),
        (dict(num_layers=10**9), r"num_layers must be an integer in 1\.\.4096"),
        (dict(num_layers=None), "num_layers is missing"),
        (dict(hidden_size="64"), "hidden_size must be an integer"),
        (dict(hidden_size=True), "hidden_size must be an integer"),
        (dict(hidden_size=10**5000), "hidden_size must be an integer.*bits"),
        (dict(hidden_size=13, kv_channels=None), "multiple of args.num_attention_heads"),
        (dict(kv_channels=7), "head_dim must be even"),
        (dict(padded_vocab_size=None), "padded_vocab_size is missing"),
        (dict(max_position_embeddings=None, seq_length=None), "max_position_embeddings"),
        (dict(norm_epsilon=float("nan")), "norm_epsilon must be a number"),
        (dict(norm_epsilon="1e-5"), "norm_epsilon must be a number"),
        (dict(untie_embeddings_and_output_weights=1), "must be True or False"),
        (dict(num_experts=None, ffn_hidden_size=None), "ffn_hidden_size is missing"),
        (dict(moe_ffn_hidden_size=None, ffn_hidden_size=None), "ffn_hidden_size are missing"),
        (dict(gengram_ngram_sizes=[1, 13]), r"sizes in 1\.\.12"),
        (dict(gengram_ngram_sizes=[]), "ngram_sizes"),
        (dict(gengram_ngram_sizes="12"), "list of integers"),
        (dict(gengram_token_ids=[1, 2]), "five different ids"),
        (dict(gengram_window_size=1), "memory_window"),
        (dict(moe_router_topk=9), "num_experts_per_tok"),
    ],
)
def test_other_refusals(changes, message, megatron):
    with pytest.raises(ConversionError, match=message):
        convert(megatron, **changes)


def test_accepted_ways_of_saying_the_same(megatron):
    plain = convert(megatron).to_dict()
    same = dict(moe_layer_freq=[1, 1, 1], moe_expert_capacity_factor=-1.0, mtp_num_layers=0, rotary_percent=1)
    same |= dict(moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.0, 0.0])
    assert convert(megatron, **same).to_dict() == plain


def test_what_the_way_back_needs_is_recorded():
    args = RecordedArgs({"tokenizer_type": "x", "decoder_first_pipeline_num_layers": 3, "data_path": "/home/someone"})
    assert args.as_json() == {"tokenizer_type": "x", "decoder_first_pipeline_num_layers": 3}


def test_every_field_has_a_row_or_a_reason():
    """A new field of the configuration cannot be forgotten: it goes both ways, or has no argument."""
    unread = {"hidden_act", "is_causal", "classifier_pooling", "memory_norm_eps"}  # only the default can go back
    fields = {pair.field for pair in PAIRS} - {""}
    assert fields | set(WITHOUT_ARGUMENT) | unread == set(GengramConfig.__annotations__)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.part}-{'-'.join(pair.arguments)}")
def test_each_row_goes_both_ways(pair):
    """What a codec writes of the released model's field it reads again."""
    config = GengramConfig(num_local_experts=0) if pair.part == "dense" else GengramConfig()
    fields = {name: getattr(config, name) for name in GengramConfig.__annotations__}
    args = dict(zip(pair.arguments, pair.codec.write(fields.get(pair.field), pair.arguments, fields), strict=False))
    value = pair.codec.read(args, pair.arguments, fields)
    assert value == (fields[pair.field] if pair.field else None)
