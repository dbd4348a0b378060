"""The table: layouts are inverses, expansion equals the model's weights as a set, mismatches are named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram.configuration import GengramConfig
from gengram.conversion_scripts.mapping.arguments import config_from_args
from gengram.conversion_scripts.mapping.layouts import FusedQkv, GateUp, LegacyGroupedExperts, Same, Split
from gengram.conversion_scripts.mapping.match import match, parameters
from gengram.conversion_scripts.mapping.weight_table import TABLE, expand, look_up, megatron_entries, split_of
from gengram.modeling_gengram.modeling_gengram import GengramForCausalLM
from gengram.support.errors import ConversionError

small = st.integers(1, 4)


@settings(deadline=None, max_examples=50)
@given(groups=small, per_group=small, head_dim=small, hidden=small, experts=small, width=small, data=st.data())
def test_layouts_and_their_inverses(groups, per_group, head_dim, hidden, experts, width, data):
    cases = [
        (Same(), (width, hidden)),
        (FusedQkv(groups * per_group, groups, head_dim), (groups * (per_group + 2) * head_dim, hidden)),
        (GateUp(), (2 * width, hidden)),
        (LegacyGroupedExperts(experts, hidden, wide=True), (hidden, experts * 2 * width)),
        (LegacyGroupedExperts(experts, width, wide=False), (experts * width, hidden)),
    ]
    layout, shape = data.draw(st.sampled_from(cases))
    tensor = torch.arange(shape[0] * shape[1]).reshape(shape)
    parts = layout.to_hf(tensor)
    assert sorted(x for part in parts for x in part.reshape(-1).tolist()) == list(range(tensor.numel()))
    back = layout.to_megatron(parts)
    assert torch.equal(back, tensor)
    again = layout.to_hf(back)
    assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True))


CONFIGS = {
    "released": {},
    "dense": dict(num_local_experts=0),
    "one_expert": dict(num_local_experts=1),
    "tied": dict(tie_word_embeddings=True),
    "multi_query": dict(num_key_value_heads=1),
    "no_convolution": dict(memory_conv_kernel=0),
    "sizes_out_of_order": dict(memory_ngram_sizes=[4, 1]),
    "no_memory": dict(memory_layers=[]),
    "every_layer": dict(num_hidden_layers=3, memory_layers=[0, 1, 2]),
}


def names_and_shapes(config, which=0):
    """What a complete checkpoint of this configuration has, with the first or the last of alternative names."""
    return {entry.megatron[which]: entry.shape for entry in expand(config) if not (entry.optional and entry.targets)}


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_expanded_table_is_the_model(name, which):
    config = GengramConfig(**CONFIGS[name])
    plan = match(names_and_shapes(config, which), config)
    with torch.device("meta"):
        model = GengramForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert {output.name: output.shape for output in plan.outputs} == expected
    layers = config.num_hidden_layers
    dead = [move for move in plan.dropped if "dead" in move.entry.dropped]
    assert len({move.source.split(".")[2] for move in dead}) == layers - len(config.memory_layers)


def test_sizes_of_the_released_model():
    config = GengramConfig()
    plan = match(names_and_shapes(config), config)
    assert parameters(plan) == 10_480_265_216
    dead = sum(torch.Size(move.entry.shape).numel() for move in plan.dropped)
    assert dead == 633_194_496


def test_every_row_is_used_by_some_configuration():
    used = set()
    for fields in CONFIGS.values():
        config = GengramConfig(**fields)
        used |= {row for row in TABLE if row.when(config)}
    assert used == set(TABLE)


@pytest.fixture
def complete():
    config = GengramConfig(num_hidden_layers=3, memory_layers=[1])
    return config, names_and_shapes(config)


def test_missing(complete):
    config, shapes = complete
    del shapes["decoder.layers.1.mlp.experts.linear_fc1.weight3"]
    with pytest.raises(ConversionError, match=r"lacks 1 tensors.*layers\.1\.mlp\.experts\.linear_fc1\.weight3"):
        match(shapes, config)
    for name in [name for name in shapes if name.startswith("decoder.layers.2.")]:
        del shapes[name]
    with pytest.raises(ConversionError, match=r"and \d+ more"):
        match(shapes, config)


def test_missing_memory_is_missing_only_where_it_is_active(complete):
    config, shapes = complete
    for name in [name for name in shapes if name.startswith(("decoder.layers.0.gengram", "decoder.layers.2.gengram"))]:
        del shapes[name]
    match(shapes, config)
    del shapes["decoder.layers.1.gengram.norm_q.weight"]
    with pytest.raises(ConversionError, match=r"'decoder\.layers\.1\.gengram\.norm_q\.weight' \(nearest:"):
        match(shapes, config)


def test_unknown(complete):
    config, shapes = complete
    shapes["decoder.layers.1.gengram.norm_qq.weight"] = (4096,)
    with pytest.raises(
        ConversionError, match=r"norm_qq\.weight' \(nearest: 'decoder\.layers\.1\.gengram\.norm_q\.weight'"
    ):
        match(shapes, config)
    del shapes["decoder.layers.1.gengram.norm_qq.weight"]
    shapes |= {f"decoder.layers.3.x{i}": (1,) for i in range(40)}
    with pytest.raises(ConversionError, match=r"40 tensors that the model does not.*and 30 more"):
        match(shapes, config)


def test_wrong_shape(complete):
    config, shapes = complete
    shapes["embedding.word_embeddings.weight"] = (136, 4096)
    with pytest.raises(ConversionError, match=r"word_embeddings\.weight: expected \(128, 4096\), got \(136, 4096\)"):
        match(shapes, config)
    shapes["embedding.word_embeddings.weight"] = (128, 4096)
    shapes["decoder.layers.0.gengram.norm_q.weight"] = (7,)  # dead weights are checked too
    with pytest.raises(ConversionError, match="got \\(7,\\)"):
        match(shapes, config)


def test_two_names_for_one_tensor(complete):
    config, shapes = complete
    shapes["decoder.layers.0.input_layernorm.weight"] = (4096,)
    with pytest.raises(ConversionError, match="same tensor under two names"):
        match(shapes, config)
    del shapes["decoder.layers.0.input_layernorm.weight"]
    shapes["decoder.layers.0.mlp.experts.weight1"] = (4096, 8 * 2 * 8192)
    with pytest.raises(ConversionError, match=r"two tensors of the checkpoint make model\.layers\.0\.mlp\.experts"):
        match(shapes, config)


def test_grouped_experts_replace_separate_ones(complete):
    config, shapes = complete
    for layer in range(3):
        for e in range(8):
            del shapes[f"decoder.layers.{layer}.mlp.experts.linear_fc1.weight{e}"]
        shapes[f"decoder.layers.{layer}.mlp.experts.weight1"] = (4096, 8 * 2 * 8192)
    match(shapes, config)
    del shapes["decoder.layers.1.mlp.experts.weight1"]
    with pytest.raises(ConversionError, match="lacks 8 tensors"):
        match(shapes, config)


def test_a_hostile_configuration_does_not_expand(complete):
    _, shapes = complete
    for fields in (
        dict(num_hidden_layers=4000, num_local_experts=4000, num_experts_per_tok=1),
        dict(num_hidden_layers=4096),
    ):
        few = dict(list(shapes.items())[:20])
        with pytest.raises(ConversionError, match="too few"):
            match(few, GengramConfig(**fields, memory_layers=[0]))
    with pytest.raises(ConversionError, match="make no sense"):
        match(shapes, GengramConfig(hidden_size=2**24, head_dim=2**24, num_attention_heads=2**20, num_hidden_layers=3))


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(experts=0), dict(taps=0), dict(active=()), dict(tied=True), dict(prefix="engram_dna", sizes=(3, 1))],
)
def test_names_of_the_way_back(changes, megatron):
    """One name per tensor: those of Transformer Engine's layers, with the shapes that Megatron has."""
    shape = megatron.Shape(**changes)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in megatron.named_for(megatron.canonical(shape), shape, "te").items()
    }
    if shape.tied:  # only some pipeline stages have it
        expected["output_layer.weight"] = (shape.vocab, shape.hidden)
    entries = megatron_entries(config_from_args(vars(megatron.args(shape))), shape.prefix)
    assert {name: entry.shape for name, entry in entries.items()} == expected
    without = [name for name, entry in entries.items() if not entry.targets]
    assert all(f".{shape.prefix}." in name or name == "output_layer.weight" for name in without)


SPLITS = {
    "embedding.word_embeddings.weight": Split(0),
    "output_layer.weight": Split(0),
    "decoder.layers.{}.self_attention.linear_qkv.weight": Split(0),
    "decoder.layers.{}.self_attention.linear_proj.weight": Split(1),
    "decoder.layers.{}.mlp.linear_fc1.weight": Split(0, halves=True),
    "decoder.layers.{}.mlp.linear_fc2.weight": Split(1),
    "decoder.layers.{}.mlp.experts.linear_fc1.weight{}": Split(0, halves=True),
    "decoder.layers.{}.mlp.experts.linear_fc2.weight{}": Split(1),
    "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1.weight": Split(0, halves=True),
    "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc2.weight": Split(1),
}


def test_how_each_tensor_is_cut():
    """What is not among these is on every rank; alternative names of a tensor are cut alike."""
    for row in TABLE:
        for pattern in row.megatron:
            name = pattern.format(layer=3, expert=12, table=4)
            found = look_up(name)
            assert pattern in found.row.megatron and found.row.split == row.split
            assert split_of(name) == SPLITS.get(pattern.replace("{layer}", "{}").replace("{expert}", "{}"), Split())
    assert split_of("decoder.layers.1.mlp.experts.linear_fc1.bias") == Split() and look_up("model.x") is None


def test_names_of_experts():
    for name in ("decoder.layers.7.mlp.experts.linear_fc1.weight5", "decoder.layers.7.mlp.router.weight"):
        assert look_up(name).expert == (5 if "experts" in name else None)
    name = "decoder.layers.7.mlp.experts.local_experts.5.linear_fc2.weight"
    assert look_up(name).expert == 5 and look_up(name).with_expert(63) == name.replace("s.5.", "s.63.")
