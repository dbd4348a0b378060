"""The configuration: what it describes, what it refuses, and that it survives saving."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared_files import fixture_json, needs_fixtures
from transformers import AutoConfig

from gengram import GengramConfig

SMALL = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def test_defaults_are_the_released_model():
    config = GengramConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 4096, 8192)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 256)
    assert (config.num_local_experts, config.num_experts_per_tok, config.vocab_size) == (8, 2, 128)
    assert config.memory_layers == [2, 5, 9]
    assert config.memory_ngram_sizes == [1, 2, 3, 4, 5, 6]
    assert (config.memory_embedding_dim, config.memory_window, config.memory_conv_kernel) == (1024, 21, 4)
    assert config.memory_token_ids == [8, 5, 6, 7, 9]
    assert config.memory_conv_dilation == 6
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@needs_fixtures
@pytest.mark.parametrize("model", ["model_a", "model_b"])
def test_fixture_models_can_be_described(model):
    fields = fixture_json(model, "config.json")
    config = GengramConfig(
        hidden_size=fields["hidden_size"],
        num_hidden_layers=fields["num_layers"],
        num_attention_heads=fields["num_attention_heads"],
        num_key_value_heads=fields["num_query_groups"],
        memory_layers=fields["active_layers_0based"],
        memory_ngram_sizes=fields["ngram_sizes"],
    )
    assert config.head_dim == fields["kv_channels_resolved"]
    assert config.memory_conv_dilation == fields["short_conv_dilation_resolved"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"memory_layers": (3, 1)},
        {"memory_layers": []},
        {"memory_ngram_sizes": [4, 1, 2], "memory_window": 4},
        {"memory_conv_kernel": 0},
        {"memory_conv_dilation": 9},
        {"memory_token_ids": [20, 21, 5, 6, 7]},
        {"memory_pooling": "as_trained"},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 1, "head_dim": 48},
        {"num_local_experts": 0},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"is_causal": False, "num_labels": 5, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_saving_and_loading_changes_nothing(fields, tmp_path):
    config = GengramConfig(**{**SMALL, **fields})
    config.save_pretrained(tmp_path / "one")
    for again in (GengramConfig.from_pretrained(tmp_path / "one"), AutoConfig.from_pretrained(tmp_path / "one")):
        assert type(again) is GengramConfig
        assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        again.save_pretrained(tmp_path / "two")
        assert (tmp_path / "two" / "config.json").read_bytes() == (tmp_path / "one" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_layers": [12]}, r"must lie in 0..3, got 12 \(the original configuration counts layers from 1"),
        ({"memory_layers": [1, 1]}, "must not repeat a layer, got \\[1, 1\\]"),
        ({"memory_ngram_sizes": []}, "at least one size"),
        ({"memory_ngram_sizes": [0, 1]}, "each 1 or more, got \\[0, 1\\]"),
        ({"memory_window": 5}, "at least the largest of memory_ngram_sizes \\(6\\), got 5"),
        ({"memory_embedding_dim": 0}, "memory_embedding_dim must be at least 1, got 0"),
        ({"memory_token_ids": [1, 2, 3, 4]}, "five different ids"),
        ({"memory_token_ids": [1, 2, 3, 4, 4]}, "five different ids"),
        ({"memory_token_ids": [1, 2, 3, 4, 128]}, "must lie in 0..127"),
        ({"memory_conv_kernel": -1}, "0 \\(no convolution\\) or more, got -1"),
        ({"memory_conv_dilation": 0}, "memory_conv_dilation must be at least 1"),
        ({"memory_norm_eps": 0.0}, "memory_norm_eps must be positive"),
        ({"memory_pooling": "mean"}, "must be one of .*'exact', 'as_trained'.*got 'mean'"),
        ({"memory_pooling": "as_trained", "is_causal": False}, "which is causal"),
        ({"memory_windows": 21}, "no field 'memory_windows'; did you mean 'memory_window'"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"head_dim": None, "num_attention_heads": 6}, "multiple of num_attention_heads when head_dim is not given"),
        ({"num_experts_per_tok": 9}, "must lie in 1..8"),
        ({"num_local_experts": -1}, "num_local_experts must be 0 or 1"),
        ({"hidden_size": 0, "head_dim": 16}, "hidden_size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        GengramConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("fields", [{"memory_window": "21"}, {"memory_layers": "2"}, {"is_causal": 1}], ids=str)
def test_types_are_checked(fields):
    with pytest.raises(Exception, match=f"{next(iter(fields))}.*expected"):
        GengramConfig(**{**SMALL, **fields})


def test_states_that_a_cache_keeps():
    assert GengramConfig(**SMALL).memory.states == ("conv_inputs", "letter_codes")
    assert GengramConfig(**SMALL, memory_conv_kernel=0).memory.states == ("letter_codes",)
    assert GengramConfig(**SMALL, memory_pooling="as_trained").number_of_conv_states == 3
    bare = GengramConfig(**SMALL, memory_ngram_sizes=[1], memory_window=1, memory_conv_kernel=1)
    assert bare.memory.states == () and set(bare.layer_types) == {"full_attention"}
    assert (
        GengramConfig(**SMALL, memory_layers=[1]).layer_types == ["full_attention", "hybrid"] + ["full_attention"] * 2
    )


def test_a_default_that_contradicts_is_said_to_be_one():
    with pytest.raises(ValueError, match=r"got 4 and 8 \(8 is the default; give num_key_value_heads too\)"):
        GengramConfig(hidden_size=64, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"no field 'memory_0123456789'\. Its memory fields are memory_layers, "):
        GengramConfig(**SMALL, memory_0123456789=1)
    with pytest.raises(ValueError, match="no field 'num_hidden_layer'; did you mean 'num_hidden_layers'"):
        GengramConfig(**SMALL, num_hidden_layer=2)
    assert GengramConfig(**SMALL, of_another_library=1).of_another_library == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4096, got 1000000000"),
        ({"memory_window": 10**9}, "memory_window must be at most 65536, got 1000000000"),
        ({"memory_conv_dilation": 10**15}, "memory_conv_dilation must be at most 65536, got 10*"),
        (
            {"memory_conv_kernel": 1024, "memory_conv_dilation": 65},
            "reach back at most 65536 bases, got .*1024 - 1.*65",
        ),
        ({"memory_ngram_sizes": [14], "memory_window": 20}, "sizes up to 13, got \\[14\\]"),
        ({"vocab_size": 10**5000}, "vocab_size must be at most .*, got something of type int that is too large"),
        ({"num_labels": 10**9}, "num_labels must be at most 65536"),
        ({"num_labels": 0}, "num_labels must be at least 1"),
        ({"num_labels": "3"}, "num_labels must be an integer, got '3'"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label must name the classes 0, 1, 2, ..., got"),
        ({"id2label": ["a"]}, "id2label must be a dictionary"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number, got inf"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive, got 0.0"),
        ({"memory_norm_eps": float("nan")}, "memory_norm_eps must be a finite number"),
        ({"memory_norm_eps": 2.0}, "memory_norm_eps must be at most 1, got 2.0"),
        ({"rope_theta": 0.0}, "rope_theta of rope_parameters must be at least 1, got 0.0"),
        ({"rope_theta": float("nan")}, "rope_theta of rope_parameters must be a finite number"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "rope_type must be one of default, linear"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "Missing required keys .*'factor'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("inf")}},
            "factor of rope_parameters must be a finite number",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor of rope_parameters must be 1",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention of rope_parameters must be"),
        ({"initializer_range": -0.1}, "initializer_range must be at least 0, got -0.1"),
        ({"attention_dropout": 1.5}, "attention_dropout must be at most 1, got 1.5"),
        ({"classifier_dropout": float("nan")}, "classifier_dropout must be a finite number"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be a finite number"),
        ({"pad_token_id": 128}, "pad_token_id must lie in 0..127 \\(vocab_size\\), got 128"),
        ({"eos_token_id": [12, -1]}, "eos_token_id must lie in 0..127 \\(vocab_size\\), got -1"),
        ({"dtype": "nope"}, "dtype must be a dtype of PyTorch, .*, got 'nope'"),
        ({"torch_dtype": 5}, "torch_dtype must be a dtype of PyTorch"),
        ({"architectures": 5}, "architectures must be a list of names, got 5"),
        ({"per_layer_config": {0: {"hidden_size": 8}}}, "layers are all alike"),
        ({"is_encoder_decoder": True}, "Gengram is a decoder"),
        ({"attribute_map": 5}, "attribute_map belongs to the class"),
        ({"num_experts": 0.5}, "num_local_experts.*expected int, got float"),
        ({"num_experts": -1}, "num_local_experts must be 0 or 1"),
    ],
    ids=lambda value: str(value)[:60] if not isinstance(value, dict) else next(iter(value)),
)
def test_bounds_are_stated(fields, message):
    with pytest.raises(ValueError, match=message) as raised:
        GengramConfig(**{**SMALL, **fields})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 800


@pytest.mark.parametrize("changes", [{"num_experts": 0}, {"num_local_experts": 0}], ids=str)
def test_what_depends_on_a_field_follows_it_wherever_it_is_given(changes, tmp_path):
    GengramConfig(**SMALL).save_pretrained(tmp_path)
    for config in (
        GengramConfig(**SMALL, **changes),
        GengramConfig.from_pretrained(tmp_path, **changes),
        AutoConfig.from_pretrained(tmp_path, **changes),
    ):
        assert config.num_local_experts == config.num_experts == 0
        assert "layers.*.mlp.gate_proj" in config.base_model_tp_plan
    config.num_local_experts = 8
    assert "layers.*.mlp.gate_proj" not in config.base_model_tp_plan
    with pytest.raises(ValueError, match="two names of one field"):
        GengramConfig.from_pretrained(tmp_path, num_experts=2, num_local_experts=4)
    with pytest.raises(ValueError, match="memory_window must be at least the largest"):
        GengramConfig.from_pretrained(tmp_path, memory_window=3)


@pytest.mark.parametrize("name", ["base_model_tp_plan", "base_model_ep_plan"])
def test_what_a_quantiser_adds_to_a_plan_is_kept_and_not_saved(name, tmp_path):
    config = GengramConfig(**SMALL)
    own = dict(getattr(config, name))
    setattr(config, name, own | {"layers.*.mlp.experts.down_proj_scale_inv": "grouped_gemm"})
    assert getattr(config, name) == own | {"layers.*.mlp.experts.down_proj_scale_inv": "grouped_gemm"}
    config.save_pretrained(tmp_path)
    assert name not in (tmp_path / "config.json").read_text() and getattr(GengramConfig(**SMALL), name) == own


# Any values from a file

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([10**9, -(10**9), 10**15, 10**400, 2**31, 2**63]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
)
values = st.recursive(
    st.one_of(
        st.none(), numbers, st.text(max_size=8), st.sampled_from(["exact", "mean", "silu", "float32", "linear"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "0", "1", "a"]), inner, max_size=4),
    ),
    max_leaves=8,
)
FIELDS = [name for name in GengramConfig.__dataclass_fields__ if not name.startswith("_") and name != "model_type"]
FIELDS += ["num_labels", "rope_theta", "rope_scaling", "num_experts", "layer_types", "torch_dtype", "per_layer_config"]
FIELDS += ["output_attentions", "name_or_path", "memory_size", "x"]


def is_read_or_refused_in_one_line(fields: dict, folder) -> None:
    (folder / "config.json").write_text(json.dumps({**SMALL, "model_type": "gengram", **fields}))
    try:
        config = AutoConfig.from_pretrained(folder)
        json.loads(config.to_json_string())
    except (ValueError, OSError) as error:
        assert len(str(error)) < 1500
        return
    assert len(config.layer_types) == config.num_hidden_layers <= 4096
    assert config.memory.context < 2**16 and config.memory.conv_context <= 2**16
    numbers = (config.rms_norm_eps, config.memory_norm_eps, config.rope_parameters["rope_theta"])
    assert all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2))
def test_any_file_is_read_or_refused_in_one_line(fields, tmp_path):
    is_read_or_refused_in_one_line(fields, tmp_path)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
def test_ten_thousand_files_are_read_or_refused_in_one_line(fields, tmp_path):
    is_read_or_refused_in_one_line(fields, tmp_path)
