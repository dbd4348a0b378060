"""The table of weights: each tensor of a Megatron checkpoint and what it is in the Hugging Face model.

Rows are patterns; `expand` fills in layers, experts and tables of one configuration, `match` compares the result with
a checkpoint's names as sets. A row goes both ways: `layout.to_hf` takes the Megatron tensor to the Hugging Face ones,
`layout.to_megatron` takes them back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch

from ..configuration.configuration_gengram import GengramConfig
from ..support.errors import ConversionError, quoted
from .megatron_checkpoint import Dropped
from .torch_archive import LazyTensor

TABLE_VERSION = 1
MEMORY_PREFIXES = ("gengram", "engram_dna")


class Layout(Protocol):
    """How one Megatron tensor becomes one or more Hugging Face tensors, and back; values are only moved."""

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Same:
    """The tensor as it is."""

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor


@dataclass(frozen=True)
class FusedQkv:
    """Rows of queries, keys and values: per group its query heads, one key head, one value head."""

    heads: int
    groups: int
    head_dim: int

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        hidden = tensor.shape[-1]
        per_group = self.heads // self.groups
        blocks = tensor.reshape(self.groups, per_group + 2, self.head_dim, hidden)
        parts = blocks.split([per_group, 1, 1], dim=1)
        return [part.reshape(-1, hidden) for part in parts]

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        hidden = tensors[0].shape[-1]
        blocks = [tensor.reshape(self.groups, -1, self.head_dim, hidden) for tensor in tensors]
        return torch.cat(blocks, dim=1).reshape(-1, hidden)


@dataclass(frozen=True)
class GateUp:
    """Rows of the gate, then rows of the up projection, as two tensors (dense feed-forward)."""

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(tensor.chunk(2, dim=0))

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors), dim=0)


@dataclass(frozen=True)
class LegacyGroupedExperts:
    """All experts of a layer in one matrix, transposed: legacy `GroupedMLP` (`view(experts, …)` in `experts.py`).

    Args:
        experts: How many experts the matrix holds.
        inputs: Columns of an expert's weight as PyTorch has it, (outputs, inputs).
        wide: Whether the matrix is (inputs, experts * outputs), as `weight1`, or (experts * inputs, outputs), as
            `weight2`. Either is read as (experts, inputs, outputs).
    """

    experts: int
    inputs: int
    wide: bool

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.reshape(self.experts, self.inputs, -1).transpose(1, 2)]  # (experts, outputs, inputs)

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        rows = self.inputs if self.wide else self.experts * self.inputs
        return tensor.transpose(1, 2).reshape(rows, -1)


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
    """

    megatron: tuple[str, ...]
    hugging_face: tuple[str, ...]
    shape: tuple[str, ...]
    layout: Callable[[GengramConfig], Layout] = lambda config: Same()
    when: Callable[[GengramConfig], bool] = _any_config
    layers: str = "all"
    dropped: str = ""
    optional: bool = False


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
    Row(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), ("vocab", "hidden")),
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
    ),
    Row(
        (f"{_LAYER}self_attention.linear_proj.weight",),
        (f"{_HF_LAYER}self_attn.o_proj.weight",),
        ("hidden", "attention"),
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
    ),
    Row(
        (f"{_LAYER}mlp.experts.weight1",),
        (f"{_HF_LAYER}mlp.experts.gate_up_proj",),
        ("hidden", "experts_gate_up"),
        lambda config: LegacyGroupedExperts(config.num_local_experts, config.hidden_size, wide=True),
        when=_is_sparse,
        optional=True,
    ),
    Row(
        (
            f"{_LAYER}mlp.experts.linear_fc2.weight{{expert}}",
            f"{_LAYER}mlp.experts.local_experts.{{expert}}.linear_fc2.weight",
        ),
        (f"{_HF_LAYER}mlp.experts.down_proj[{{expert}}]",),
        ("hidden", "width"),
        when=_is_sparse,
    ),
    Row(
        (f"{_LAYER}mlp.experts.weight2",),
        (f"{_HF_LAYER}mlp.experts.down_proj",),
        ("experts_width", "hidden"),
        lambda config: LegacyGroupedExperts(config.num_local_experts, config.intermediate_size, wide=False),
        when=_is_sparse,
        optional=True,
    ),
    Row(
        (f"{_LAYER}mlp.linear_fc1.weight",),
        (f"{_HF_LAYER}mlp.gate_proj.weight", f"{_HF_LAYER}mlp.up_proj.weight"),
        ("gate_up", "hidden"),
        lambda config: GateUp(),
        when=_is_dense,
    ),
    Row(
        (f"{_LAYER}mlp.linear_fc2.weight",), (f"{_HF_LAYER}mlp.down_proj.weight",), ("hidden", "width"), when=_is_dense
    ),
    Row(("decoder.final_layernorm.weight",), ("model.norm.weight",), ("hidden",)),
    Row(
        ("output_layer.weight",),
        ("lm_head.weight",),
        ("vocab", "hidden"),
        when=lambda config: not config.tie_word_embeddings,
    ),
    Row(
        ("output_layer.weight",),
        (),
        ("vocab", "hidden"),
        when=lambda config: config.tie_word_embeddings,
        dropped="copy of the embedding (tied)",
        optional=True,
    ),
)


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
    """The table for one configuration: one entry per Megatron tensor, in the order of the model's layers."""
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


@dataclass(frozen=True)
class Move:
    """One Megatron tensor of a checkpoint and where its values go."""

    source: str
    entry: Entry


@dataclass
class Output:
    """A Hugging Face tensor and the parts that make it, in order along its first axis."""

    name: str
    shape: tuple[int, ...]
    parts: list[tuple[Move, int]] = field(default_factory=list)  # the move, which of its targets


@dataclass
class Plan:
    """What a conversion does: outputs in the order of writing, and what is left out."""

    outputs: list[Output]
    dropped: list[Move]

    @property
    def moves(self) -> list[Move]:
        """Each tensor that is read, once."""
        seen: dict[str, Move] = {}
        for output in self.outputs:
            for move, _ in output.parts:
                seen.setdefault(move.source, move)
        return list(seen.values())


def match(shapes: Mapping[str, tuple[int, ...]], config: GengramConfig) -> Plan:
    """Compares a checkpoint's names and shapes with the table, as sets in both directions.

    Args:
        shapes: Shape of each tensor by its Megatron name, with global layer numbers.
        config: The model that the checkpoint's arguments describe.

    Raises:
        ConversionError: if a tensor is missing, unknown, there under two names, or of the wrong shape; the message has
            up to ten names with the nearest match.
    """
    # Before the table is expanded: a hostile configuration must not decide how large it gets.
    repeated = max(config.num_local_experts, 1) + len(config.memory_ngram_sizes)
    if config.num_hidden_layers * repeated > 100 * len(shapes):
        raise ConversionError(
            f"the checkpoint has {len(shapes)} tensors, too few for {config.num_hidden_layers} layers with "
            f"{config.num_local_experts} experts (args.num_layers, args.num_experts); tensors are missing"
        )
    entries = expand(config)
    known = {name for entry in entries for name in entry.megatron}
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise ConversionError(
            f"the checkpoint has {len(unknown)} tensors that the model does not: {quoted(unknown, sorted(known))}; "
            "its arguments do not describe them, or the model is of another kind"
        )
    moves, missing = [], []
    for entry in entries:
        found = [name for name in entry.megatron if name in shapes]
        if len(found) > 1:
            raise ConversionError(f"the checkpoint has the same tensor under two names: {quoted(found)}")
        if found:
            moves.append(Move(found[0], entry))
        else:
            missing.append(entry)
    wrong = [move for move in moves if tuple(shapes[move.source]) != move.entry.shape]
    if wrong:
        details = "; ".join(
            f"{move.source}: expected {move.entry.shape}, got {tuple(shapes[move.source])}" for move in wrong[:10]
        )
        more = f" (and {len(wrong) - 10} more)" if len(wrong) > 10 else ""
        raise ConversionError(
            f"tensors do not have the shapes that the checkpoint's arguments describe: {details}{more}"
        )
    outputs = _outputs(moves)
    absent = [entry for entry in missing if not entry.optional and not _is_made(entry, outputs)]
    if absent:
        names = [entry.megatron[0] for entry in absent]
        raise ConversionError(
            f"the checkpoint lacks {len(names)} tensors that the model needs: {quoted(names, sorted(shapes))}"
        )
    return Plan(list(outputs.values()), [move for move in moves if not move.entry.targets])


def _outputs(moves: Sequence[Move]) -> dict[str, Output]:
    outputs: dict[str, Output] = {}
    for move in moves:
        for which, target in enumerate(move.entry.targets):
            output = outputs.setdefault(target.name, Output(target.name, target.shape))
            taken = [part.entry.targets[i].index for part, i in output.parts]
            if target.index in taken or (taken and None in (*taken, target.index)):
                raise ConversionError(
                    f"two tensors of the checkpoint make {target.name}: "
                    f"{quoted([part.source for part, _ in output.parts[:1]] + [move.source])}"
                )
            output.parts.append((move, which))
    for output in outputs.values():
        first, which = output.parts[0]
        if first.entry.targets[which].index is not None:
            output.shape = (len(output.parts), *first.entry.targets[which].shape)
    return outputs


def _is_made(entry: Entry, outputs: Mapping[str, Output]) -> bool:
    """Whether other tensors make what an absent one would: whole stacked tensors instead of their slices."""
    for target in entry.targets:
        output = outputs.get(target.name)
        if output is None:
            return False
        first, which = output.parts[0]
        if first.entry.targets[which].index is not None:
            return False
    return bool(entry.targets)


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


def dropped_weights(plan: Plan, tensors: Mapping[str, LazyTensor]) -> list[Dropped]:
    """What the plan leaves out, with its size."""
    return [Dropped(move.source, move.entry.dropped, tensors[move.source].nbytes) for move in plan.dropped]


def parameters(plan: Plan) -> int:
    """Numbers in the converted model."""
    return sum(prod(output.shape) for output in plan.outputs)
