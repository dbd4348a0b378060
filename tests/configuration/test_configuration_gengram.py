"""The configuration: what it describes, what it refuses, and that it survives saving."""

import pytest
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
