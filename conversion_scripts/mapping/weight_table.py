"""The table of weights: each tensor of a Megatron checkpoint and what it is in the Hugging Face model.

Rows are patterns; `expand` fills in layers, experts and tables of one configuration. A row goes both ways:
`layout.to_hf` takes the Megatron tensor to the Hugging Face ones, `layout.to_megatron` takes them back, and `split`
says how tensor parallelism cuts it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError
from ..choices import MEMORY_PREFIXES
from .layouts import FusedQkv, GateUp, Layout, LegacyGroupedExperts, Same, Split

TABLE_VERSION = 1
MOST_TENSORS = 2**18  # of a checkpoint or a model: a thousand layers of 100 experts have 200,000


def _any_config(config: GengramConfig) -> bool:
    return True


def _is_sparse(config: GengramConfig) -> bool:
    return config.num_local_experts > 1


def _is_dense(config: GengramConfig) -> bool:
    return not _is_sparse(config)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        megatron: Alternative names of the tensor; `{layer}`, `{expert}` and `{table}` stand for numbers from 0. The
            first is that of Transformer Engine's layers, which is written on the way back.
        hugging_face: What it becomes; `name[{expert}]` is one slice of a stacked tensor; nothing if it is dropped.
        shape: The Megatron tensor's shape in the terms of `dimensions`.
        layout: Makes the layout for a configuration.
        when: Whether the row applies to a configuration.
        layers: Which layers `{layer}` runs over: `"all"`, `"memory"` or `"other"`.
        dropped: Why the tensor is left out.
        optional: Whether a checkpoint may lack it.
        split: How tensor parallelism cuts it; by default every rank holds all of it (norms, router, memory). `None`:
            in a way that is not merged. Axes: `VocabParallelEmbedding`, `ColumnParallelLinear` (rows of the weight)
            and `RowParallelLinear` (columns) in the authors' `megatron/core/tensor_parallel/layers.py`.
    """

    megatron: tuple[str, ...]
    hugging_face: tuple[str, ...]
    shape: tuple[str, ...]
    layout: Callable[[GengramConfig], Layout] = lambda config: Same()
    when: Callable[[GengramConfig], bool] = _any_config
    layers: str = "all"
    dropped: str = ""
    optional: bool = False
    split: Split | None = Split()  # noqa: RUF009 - frozen


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _memory_row(name: str, shape: tuple[str, ...], when: Callable[[GengramConfig], bool] = _any_config) -> Row:
    names = tuple(f"{_LAYER}{prefix}.{name}" for prefix in MEMORY_PREFIXES)
    return Row(names, (f"{_HF_LAYER}motif_memory.{name}",), shape, when=when, layers="memory")


_MEMORY = (
    _memory_row("embeddings.{table}.weight", ("letter_words", "memory")),
    _memory_row("key_proj.weight", ("hidden", "features")),
    _memory_row("value_proj.weight", ("hidden", "features")),
    _memory_row("norm_q.weight", ("hidden",)),
    _memory_row("norm_k.weight", ("hidden",)),
    _memory_row("short_conv.conv.weight", ("hidden", "one", "taps"), lambda config: config.memory_conv_kernel > 0),
)

TABLE: tuple[Row, ...] = (
    Row(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), ("vocab", "hidden"), split=Split(0)),
    *_MEMORY,
    *(
        Row(
            row.megatron,
            (),
            row.shape,
            when=row.when,
            layers="other",
            optional=True,
            dropped="memory of a layer where it is not active (dead weights)",
        )
        for row in _MEMORY
    ),
    Row(
        (f"{_LAYER}self_attention.linear_qkv.layer_norm_weight", f"{_LAYER}input_layernorm.weight"),
        (f"{_HF_LAYER}input_layernorm.weight",),
        ("hidden",),
    ),
    Row(
        (f"{_LAYER}self_attention.linear_qkv.weight",),
        tuple(f"{_HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
        ("qkv", "hidden"),
        lambda config: FusedQkv(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        split=Split(0),  # whole query groups
    ),
    Row(
        (f"{_LAYER}self_attention.linear_proj.weight",),
        (f"{_HF_LAYER}self_attn.o_proj.weight",),
        ("hidden", "attention"),
        split=Split(1),
    ),
    Row(
        (f"{_LAYER}pre_mlp_layernorm.weight", f"{_LAYER}mlp.linear_fc1.layer_norm_weight"),
        (f"{_HF_LAYER}post_attention_layernorm.weight",),
        ("hidden",),
        when=_is_sparse,
    ),
    Row(
        (f"{_LAYER}mlp.linear_fc1.layer_norm_weight", f"{_LAYER}pre_mlp_layernorm.weight"),
        (f"{_HF_LAYER}post_attention_layernorm.weight",),
        ("hidden",),
        when=_is_dense,
    ),
    Row((f"{_LAYER}mlp.router.weight",), (f"{_HF_LAYER}mlp.gate.weight",), ("experts", "hidden"), when=_is_sparse),
    Row(
        (
            f"{_LAYER}mlp.experts.linear_fc1.weight{{expert}}",
            f"{_LAYER}mlp.experts.local_experts.{{expert}}.linear_fc1.weight",
        ),
        (f"{_HF_LAYER}mlp.experts.gate_up_proj[{{expert}}]",),
        ("gate_up", "hidden"),
        when=_is_sparse,
        split=Split(0, halves=True),
    ),
    Row(
        (f"{_LAYER}mlp.experts.weight1",),
        (f"{_HF_LAYER}mlp.experts.gate_up_proj",),
        ("hidden", "experts_gate_up"),
        lambda config: LegacyGroupedExperts(config.num_local_experts, config.hidden_size, wide=True),
        when=_is_sparse,
        optional=True,
        split=None,
    ),
    Row(
        (
            f"{_LAYER}mlp.experts.linear_fc2.weight{{expert}}",
            f"{_LAYER}mlp.experts.local_experts.{{expert}}.linear_fc2.weight",
        ),
        (f"{_HF_LAYER}mlp.experts.down_proj[{{expert}}]",),
        ("hidden", "width"),
        when=_is_sparse,
        split=Split(1),
    ),
    Row(
        (f"{_LAYER}mlp.experts.weight2",),
        (f"{_HF_LAYER}mlp.experts.down_proj",),
        ("experts_width", "hidden"),
        lambda config: LegacyGroupedExperts(config.num_local_experts, config.intermediate_size, wide=False),
        when=_is_sparse,
        optional=True,
        split=None,
    ),
    Row(
        (f"{_LAYER}mlp.linear_fc1.weight",),
        (f"{_HF_LAYER}mlp.gate_proj.weight", f"{_HF_LAYER}mlp.up_proj.weight"),
        ("gate_up", "hidden"),
        lambda config: GateUp(),
        when=_is_dense,
        split=Split(0, halves=True),
    ),
    Row(
        (f"{_LAYER}mlp.linear_fc2.weight",),
        (f"{_HF_LAYER}mlp.down_proj.weight",),
        ("hidden", "width"),
        when=_is_dense,
        split=Split(1),
    ),
    Row(("decoder.final_layernorm.weight",), ("model.norm.weight",), ("hidden",)),
    Row(
        ("output_layer.weight",),
        ("lm_head.weight",),
        ("vocab", "hidden"),
        when=lambda config: not config.tie_word_embeddings,
        split=Split(0),
    ),
    Row(
        ("output_layer.weight",),
        (),
        ("vocab", "hidden"),
        when=lambda config: config.tie_word_embeddings,
        dropped="copy of the embedding (tied)",
        optional=True,
        split=Split(0),
    ),
)


_NUMBER = re.compile(r"\\\{(layer|expert|table)\\\}")
_NAMES = tuple(
    (re.compile(_NUMBER.sub(r"(?P<\1>[0-9]{1,6})", re.escape(pattern))), pattern, row)
    for row in TABLE
    for pattern in row.megatron
)


@dataclass(frozen=True)
class Named:
    """A Megatron name taken apart: its row, the pattern in there, and the numbers in the pattern's places."""

    row: Row
    pattern: str
    numbers: dict[str, int]

    @property
    def expert(self) -> int | None:
        """The number of the expert, in the name of an expert's weight."""
        return self.numbers.get("expert")

    def with_expert(self, expert: int) -> str:
        """The name with another expert's number."""
        return self.pattern.format(**{**self.numbers, "expert": expert})


def look_up(name: str) -> Named | None:
    """The row of a Megatron tensor, whatever the configuration; `None` if the table does not have the name."""
    for expression, pattern, row in _NAMES:
        match = expression.fullmatch(name)
        if match:
            return Named(row, pattern, {key: int(number) for key, number in match.groupdict().items()})
    return None


def split_of(name: str) -> Split:
    """How the tensor `name` is cut; what the table does not have is on every rank."""
    named = look_up(name)
    return (named and named.row.split) or Split()


def dimensions(config: GengramConfig, table: int | None = None) -> dict[str, int]:
    """The sizes that the table's shapes are written in; `table` is the index of the memory table meant."""
    experts = max(config.num_local_experts, 1)
    sizes = {
        "one": 1,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "attention": config.num_attention_heads * config.head_dim,
        "qkv": (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim,
        "width": config.intermediate_size,
        "gate_up": 2 * config.intermediate_size,
        "experts": experts,
        "experts_width": experts * config.intermediate_size,
        "experts_gate_up": experts * 2 * config.intermediate_size,
        "memory": config.memory_embedding_dim,
        "features": config.memory_embedding_dim * len(config.memory_ngram_sizes),
        "taps": config.memory_conv_kernel,
    }
    if table is not None:
        sizes["letter_words"] = 5 ** config.memory_ngram_sizes[table]
    return sizes


@dataclass(frozen=True)
class Target:
    """A Hugging Face tensor, or one slice of it along its first axis."""

    name: str
    index: int | None
    shape: tuple[int, ...]  # of the tensor, or of the slice


@dataclass(frozen=True)
class Entry:
    """A row with its numbers filled in."""

    megatron: tuple[str, ...]
    targets: tuple[Target, ...]
    shape: tuple[int, ...]
    layout: Layout
    dropped: str
    optional: bool


def expand(config: GengramConfig, table: Sequence[Row] = TABLE) -> list[Entry]:
    """The table for one configuration: one entry per Megatron tensor, in the order of the model's layers.

    Raises:
        ConversionError: if there would be more than `MOST_TENSORS`; then none is made.
    """
    layers, experts = config.num_hidden_layers, max(config.num_local_experts, 1)
    count = layers * (2 * experts + len(config.memory_ngram_sizes) + 16)
    if count > MOST_TENSORS:
        raise ConversionError(
            f"{layers} layers with {experts} experts would be about {count:,} tensors, at most {MOST_TENSORS:,} are "
            "read or written; the arguments, or the configuration, are of no model"
        )
    return list(_expand(config, table))


def _expand(config: GengramConfig, table: Sequence[Row]) -> Iterator[Entry]:
    rows = [row for row in table if row.when(config)]
    memory = set(config.memory_layers)
    first_of_layer = [i for i, row in enumerate(rows) if "{layer}" in row.megatron[0]]
    before, after = rows[: first_of_layer[0]], rows[first_of_layer[-1] + 1 :]
    for row in before:
        yield _entry(row, config, {})
    for layer in range(config.num_hidden_layers):
        for i in first_of_layer:
            row = rows[i]
            if row.layers == "all" or (row.layers == "memory") == (layer in memory):
                if "{expert}" in row.megatron[0]:
                    for expert in range(config.num_local_experts):
                        yield _entry(row, config, {"layer": layer, "expert": expert})
                elif "{table}" in row.megatron[0]:
                    for index in range(len(config.memory_ngram_sizes)):
                        yield _entry(row, config, {"layer": layer, "table": index})
                else:
                    yield _entry(row, config, {"layer": layer})
    for row in after:
        yield _entry(row, config, {})


def _entry(row: Row, config: GengramConfig, numbers: dict[str, int]) -> Entry:
    sizes = dimensions(config, numbers.get("table"))
    shape = tuple(sizes[name] for name in row.shape)
    if prod(shape) > 2**48:
        raise ConversionError(f"{row.megatron[0]} would have shape {shape}; the checkpoint's arguments make no sense")
    layout = row.layout(config)
    targets = []
    if row.hugging_face:
        shapes = [tuple(part.shape) for part in layout.to_hf(torch.empty(shape, device="meta"))]
        for pattern, part in zip(row.hugging_face, shapes, strict=True):
            name, bracket, index = pattern.format(**numbers).partition("[")
            targets.append(Target(name, int(index[:-1]) if bracket else None, part))
    names = tuple(name.format(**numbers) for name in row.megatron)
    return Entry(names, tuple(targets), shape, layout, row.dropped, row.optional)


def model_shapes(entries: Iterable[Entry], experts: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the Hugging Face tensors that some entries make, by name; slices are those of so many experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        for target in entry.targets:
            shapes[target.name] = target.shape if target.index is None else (experts, *target.shape)
    return shapes


def megatron_entries(config: GengramConfig, prefix: str = "gengram") -> dict[str, Entry]:
    """What a checkpoint with Transformer Engine's names has, by name; `prefix` is the memory's.

    Entries without targets are what a Hugging Face folder lacks: memory of layers where it is not active, and the head
    of a tied model, which only some pipeline stages have.
    """
    entries: dict[str, Entry] = {}
    made: set[str] = set()
    for entry in expand(config):
        if any(target.index is None and target.name in made for target in entry.targets):
            continue  # another layout of what an earlier row makes
        names = [name for name in entry.megatron if f".{prefix}." in name]
        if not entry.targets and names and not config.memory_layers:
            continue  # a model without memory has none anywhere
        made.update(target.name for target in entry.targets)
        entries[names[0] if names else entry.megatron[0]] = entry
    return entries
