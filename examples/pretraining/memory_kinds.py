"""Memories and hosts that only the comparison has: what stands in the place of a memory, and which model it is in.

`new_model` reads the fields of a plan of `compare.py`: those of `GengramConfig`, or with `"host"` those of a causal
model of Transformers, to which the memory is attached; and `"memory_kind"`, one of `KINDS`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from gengram import GengramConfig, GengramForCausalLM, GengramTokenizer, MotifMemory, MotifMemoryConfig, attach_memory
from gengram.motif_memory.definition import MemoryOutput, NgramPlan, window_mean
from gengram.motif_memory.module import MemoryRMSNorm, ShortConv

LETTERS = 5  # A, C, G, T, N
BUCKETS = 2039  # rows of a hashed table, a prime; tables that are smaller stay as they are


class DefinedMemory(MotifMemory):
    """A memory that is always computed by its definition, which others change."""

    def forward(self, hidden_states: torch.Tensor, plan: Any, state: Any = None) -> MemoryOutput:
        return self.by_definition(hidden_states, plan, state)


class UngatedMemory(DefinedMemory):
    """Adds the value itself, whatever the hidden state asks for; has no key."""

    def __init__(self, config: MotifMemoryConfig, hidden_size: int, **options: Any):
        super().__init__(config, hidden_size, **options)
        del self.key_proj, self.norm_q, self.norm_k

    def by_definition(self, hidden_states: torch.Tensor, plan: NgramPlan, state: Any = None) -> MemoryOutput:
        value = plan.without_padding(self.value_proj(self.features(plan)))
        return _with_convolution(self, value, plan, state)


class LargestRowMemory(DefinedMemory):
    """Takes the largest number of a window's rows, column by column, instead of their mean."""

    def features(self, plan: NgramPlan) -> torch.Tensor:
        if plan.behind is not None or not plan.is_causal:
            raise ValueError("the largest row is taken of causal windows without position_ids only.")
        parts = []
        for index, table in enumerate(self.embeddings):
            width = plan.window - plan.ngram_sizes[index] + 1
            rows = table(plan.rows(index)).masked_fill(~plan.valid(index).unsqueeze(-1), -math.inf)
            rows = F.pad(rows.transpose(1, 2), (width - 1, 0), value=-math.inf)
            largest = F.max_pool1d(rows, width, stride=1).transpose(1, 2)[:, plan.context :]
            parts.append(largest.masked_fill(largest == -math.inf, 0))
        return torch.cat(parts, dim=-1)


class SharedRowsMemory(DefinedMemory):
    """Tables in which several n-grams share a row, as `row_of` says."""

    def __init__(self, config: MotifMemoryConfig, hidden_size: int, **options: Any):
        super().__init__(config, hidden_size, **options)
        for index, size in enumerate(config.ngram_sizes):
            with torch.device("cpu"):
                rows = self.row_of(size)
            self.register_buffer(f"row_of_{index}", rows, persistent=False)
            self.embeddings[index] = nn.Embedding(int(rows.max()) + 1, config.embedding_dim)
        self.reset_parameters()

    @staticmethod
    def row_of(size: int) -> torch.Tensor:
        """The shared row of every n-gram's own row, int64 (5**size,)."""
        raise NotImplementedError

    def features(self, plan: NgramPlan) -> torch.Tensor:
        parts = []
        for index, table in enumerate(self.embeddings):
            own = plan.rows(index).long()
            parts.append(window_mean(table(getattr(self, f"row_of_{index}").to(own.device)[own]), plan, index))
        return torch.cat(parts, dim=-1)


class HashedMemory(SharedRowsMemory):
    """Large tables are hashed into `BUCKETS` rows, multiplicatively; different n-grams collide."""

    @staticmethod
    def row_of(size: int) -> torch.Tensor:
        rows = torch.arange(LETTERS**size)
        return rows if len(rows) <= BUCKETS else (rows * 2654435761 % 2**32) * BUCKETS >> 32


class BothStrandsMemory(SharedRowsMemory):
    """An n-gram and its reverse complement share a row, which halves the tables."""

    @staticmethod
    def row_of(size: int) -> torch.Tensor:
        rows = torch.arange(LETTERS**size)
        complement = torch.tensor([3, 2, 1, 0, 4])
        reverse = torch.zeros_like(rows)
        for place in range(size):  # the last letter is the least significant digit
            reverse = reverse * LETTERS + complement[rows // LETTERS**place % LETTERS]
        return torch.unique(torch.minimum(rows, reverse), return_inverse=True)[1]


class ConvolutionTwin(nn.Module):
    """A local convolution of the hidden states in the memory's place: as many parameters per token, the same reach.

    Norm, projection to `width`, depthwise convolution over the memory's window, SiLU, projection back; then the
    memory's own short convolution. It reads no letters. `width` is chosen so that its parameters are nearest to those
    that a token uses of the memory.
    """

    def __init__(self, config: MotifMemoryConfig, hidden_size: int, layer_idx: int = 0):
        super().__init__()
        with torch.device("meta"):
            memory = MotifMemory(config, hidden_size)
        wanted = parameters_per_token(memory, config.window)
        conv = 0 if memory.short_conv is None else sum(weight.numel() for weight in memory.short_conv.parameters())
        width = round((wanted - conv - hidden_size) / (2 * hidden_size + config.window))
        self.config, self.layer_idx = config, layer_idx
        self.norm = MemoryRMSNorm(hidden_size, config.norm_eps)
        self.down = nn.Linear(hidden_size, width, bias=False)
        self.local = nn.Conv1d(width, width, config.window, groups=width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        self.short_conv = ShortConv(config, hidden_size) if config.conv_kernel else None
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=config.window**-0.5 if weight is self.local.weight else 0.02)

    def forward(self, hidden_states: torch.Tensor, plan: NgramPlan, state: Any = None) -> MemoryOutput:
        if state is not None:
            raise ValueError("the convolution twin keeps no state; call the model with use_cache=False.")
        x = plan.without_padding(self.down(self.norm(hidden_states))).transpose(1, 2)
        x = F.silu(self.local(F.pad(x, (self.config.window - 1, 0)))).transpose(1, 2)
        return _with_convolution(self, plan.without_padding(self.up(x)), plan, None)


def _with_convolution(memory: Any, value: torch.Tensor, plan: NgramPlan, state: Any) -> MemoryOutput:
    """The value and its short convolution, not gated."""
    residual = value
    if memory.short_conv is not None:
        history = None if state is None else state.conv_inputs(memory.layer_idx)
        residual = value + memory.short_conv(value, plan, history)
    return MemoryOutput(residual, value.new_ones(value.shape[:2]), value)


KINDS = {
    "no gate": UngatedMemory,
    "largest row": LargestRowMemory,
    "hashed": HashedMemory,
    "both strands": BothStrandsMemory,
    "convolution twin": ConvolutionTwin,
}


def new_model(fields: dict[str, Any]) -> Any:
    """A causal model without training.

    Raises:
        ValueError: for a kind of memory that is not known.
    """
    fields = dict(fields)
    kind, host = fields.pop("memory_kind", None), fields.pop("host", None)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"memory_kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    model = GengramForCausalLM(GengramConfig(**fields)) if host is None else _hosted(host, fields)
    model.config.use_cache = False  # not every kind keeps a state
    for layer in list(model.modules()):
        memory = getattr(layer, "motif_memory", None)
        if kind is not None and isinstance(memory, MotifMemory):
            layer.motif_memory = KINDS[kind](memory.config, memory.norm_q.weight.shape[0], layer_idx=memory.layer_idx)
    return model


def _hosted(host: str, fields: dict[str, Any]) -> Any:
    """A causal model of Transformers, `host` being the beginning of its classes' names, with memories attached."""
    memory = {name: fields.pop(name) for name in list(fields) if name.startswith("memory_")}
    tokenizer = GengramTokenizer()
    config = getattr(transformers, f"{host}Config")(pad_token_id=tokenizer.pad_token_id, **fields)
    model = getattr(transformers, f"{host}ForCausalLM")(config)
    layers = memory.pop("memory_layers")
    if layers:
        attach_memory(model, GengramConfig(memory_layers=[0], **memory).memory, layers=layers, tokenizer=tokenizer)
    return model


def parameters_per_token(model: nn.Module, window: int, experts: float = 1.0) -> int:
    """Parameters that a token uses: a share of the experts, and of the tables the rows of its window."""
    used = 0
    for name, weight in model.named_parameters():
        share = 1.0
        if ".experts." in name:
            share = experts
        elif "embeddings." in name:
            share = min(1.0, window / weight.shape[0])
        used += round(weight.numel() * share)
    return used
