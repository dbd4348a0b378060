"""The motif memory as a module: looks up every k-mer of a window, averages, adds what the hidden state asks for."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_motif_memory import MotifMemoryConfig
from .definition import (
    MemoryOutput,
    NgramPlan,
    SpelledPlan,
    at_least_float32,
    dilated_taps,
    memory_gate,
    rms_norm,
    window_mean,
)
from .kmer_rows import place_of_kmer
from .state import MemoryState
from .ways.compute import compute
from .ways.kept_fold import FoldKeeper
from .ways.weights import conv_reach_back


class MotifMemory(nn.Module):
    """A memory of k-mers in front of a layer: `hidden_states + memory(hidden_states, plan).residual`.

    Args:
        config: sizes and choices of the memory.
        hidden_size: width of the residual stream.
        layer_idx: which layer it stands in front of; finds its part of a `MemoryState`.
        initializer_range: standard deviation of new weights; None leaves them to the model around.

    Example:

    >>> import torch
    >>> from gengram.motif_memory import MotifMemory, MotifMemoryConfig, letter_codes, plan_ngrams
    >>> config = MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=8, window=9)
    >>> memory = MotifMemory(config, hidden_size=32)
    >>> input_ids = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]])
    >>> plan = plan_ngrams(letter_codes(input_ids, letters=(0, 1, 2, 3, 4)), config)  # once, for all memories
    >>> memory(torch.randn(1, 8, 32), plan).residual.shape
    torch.Size([1, 8, 32])
    """

    part_types: ClassVar[tuple[type, ...]]  # of norms, convolution and its taps: what faster ways may read past

    def __init__(
        self, config: MotifMemoryConfig, hidden_size: int, layer_idx: int = 0, initializer_range: float | None = 0.02
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.embeddings = nn.ModuleList(nn.Embedding(5**size, config.embedding_dim) for size in config.ngram_sizes)
        self.key_proj = nn.Linear(config.features, hidden_size, bias=False)
        self.value_proj = nn.Linear(config.features, hidden_size, bias=False)
        self.norm_q = MemoryRMSNorm(hidden_size, config.norm_eps)
        self.norm_k = MemoryRMSNorm(hidden_size, config.norm_eps)
        self.short_conv = ShortConv(config, hidden_size) if config.conv_kernel else None
        self.kept_fold = FoldKeeper()
        if initializer_range is not None:
            self.reset_parameters(initializer_range)

    def reset_parameters(self, std: float = 0.02) -> None:
        """New weights: normal with this standard deviation, and ones for the norms."""
        for weight in self.parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                nn.init.normal_(weight, std=std)

    def forward(
        self, hidden_states: torch.Tensor, plan: NgramPlan | SpelledPlan, state: MemoryState | None = None
    ) -> MemoryOutput:
        """What the memory adds to the residual stream, by the fastest way that `ways/choose.py` finds.

        Args:
            hidden_states: (batch, length, hidden), in front of the layer.
            plan: from `plan_ngrams`, or of tokens that spell several letters.
            state: of earlier tokens; only read. `state.advance(layer_idx, output)` is up to the caller.
        """
        if isinstance(plan, SpelledPlan):
            return self.by_spelling(hidden_states, plan, state)
        return compute(self, hidden_states, plan, state)

    def by_spelling(
        self, hidden_states: torch.Tensor, plan: SpelledPlan, state: MemoryState | None = None
    ) -> MemoryOutput:
        """The definition for tokens of several letters: the window of a token is that of its last letter."""
        if not torch.compiler.is_compiling() and hidden_states.shape[:2] != plan.last.shape:
            raise ValueError(
                f"expected hidden states of (batch, length, hidden) for tokens of {tuple(plan.last.shape)}, got "
                f"{tuple(hidden_states.shape)}."
            )
        features = self.features(plan.letters)
        features = features.gather(1, plan.last.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        key, value = self.key_proj(features), self.value_proj(features)
        return self.from_key_and_value(hidden_states, key, value, plan.tokens, state)

    def by_definition(
        self, hidden_states: torch.Tensor, plan: NgramPlan, state: MemoryState | None = None
    ) -> MemoryOutput:
        """The definition, through the modules that hold the weights."""
        key, value = self.look_up(plan)  # W_k f, W_v f: (batch, length, hidden)
        return self.from_key_and_value(hidden_states, key, value, plan, state)

    def look_up(self, plan: NgramPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of every position: W_k f and W_v f."""
        features = self.features(plan)
        return self.key_proj(features), self.value_proj(features)

    def features(self, plan: NgramPlan) -> torch.Tensor:
        """f, the concatenated mean embeddings of the window of every position: (batch, length, sizes * width)."""
        means = []
        for index, table in enumerate(self.embeddings):
            rows = table(plan.rows(index))  # (batch, context + length, width)
            means.append(window_mean(rows, plan, index).to(rows.dtype))
        return torch.cat(means, dim=-1)

    def from_key_and_value(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: NgramPlan,
        state: MemoryState | None = None,
        work: torch.dtype | None = None,
    ) -> MemoryOutput:
        """Gate, and add the short convolution; in at least float32, or in the dtype `work`."""
        work = work or at_least_float32(hidden_states.dtype)
        gate = memory_gate(self.norm_q(hidden_states.to(work)), self.norm_k(key.to(work)))  # (batch, length)
        gated = plan.without_padding(gate.unsqueeze(-1) * value.to(work))  # (batch, length, hidden)
        residual = gated
        if self.short_conv is not None:
            history = None if state is None else state.conv_inputs(self.layer_idx)
            residual = gated + self.short_conv(gated, plan, history)
        return MemoryOutput(residual.to(hidden_states.dtype), gate, gated)

    # Rows by their k-mers: memory["TATAAA"] is read, and memory["TATAAA"] = 0 forgets it.

    def __getitem__(self, kmer: str) -> torch.Tensor:
        """A copy of the row of a k-mer, (embedding_dim,).

        Raises:
            ValueError: if the memory has no table for k-mers of this size, or its tables cannot be read.
        """
        table, row = self._row(kmer)
        return table.weight.detach()[row].clone()

    def __setitem__(self, kmer: str, value: torch.Tensor | float) -> None:
        """Replace the row of a k-mer, in place; folded tables are dropped.

        Raises:
            ValueError: as for reading, or if the value is neither a number nor a row.
        """
        table, row = self._row(kmer)
        new = torch.as_tensor(value, dtype=table.weight.dtype, device=table.weight.device)
        if new.shape not in ((), table.weight.shape[1:]):
            raise ValueError(f"{kmer}: expected a number or ({table.weight.shape[1]},), got {tuple(new.shape)}.")
        with torch.no_grad():
            table.weight[row] = new
        self.kept_fold.drop()

    def __iter__(self):
        raise TypeError("a memory cannot be iterated; its tables are memory.embeddings.")

    def _row(self, kmer: str) -> tuple[nn.Embedding, int]:
        index, row = place_of_kmer(kmer, self.config.ngram_sizes)
        table = self.embeddings[index]
        if type(table) is not nn.Embedding or table.weight.is_meta:
            raise ValueError(
                "expected plain tables in memory; merge adapters, or load offloaded or quantised weights first."
            )
        return table, row

    # What changes the weights' device or dtype, or starts training, ends the use of folded tables.

    def train(self, mode: bool = True) -> "MotifMemory":
        if mode:
            self.kept_fold.forget()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.kept_fold.forget()
        return super()._apply(fn, recurse)


class MemoryRMSNorm(nn.Module):
    """Root-mean-square norm, computed in at least float32 and rounded once, weight included, as the reference does."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ShortConv(nn.Module):
    """SiLU of a short dilated convolution over the memory's output: causal, or centred for bidirectional use."""

    def __init__(self, config: MotifMemoryConfig, hidden_size: int):
        super().__init__()
        self.context = config.conv_context
        self.conv = DepthwiseConv(config, hidden_size)

    def forward(self, x: torch.Tensor, plan: NgramPlan, history: torch.Tensor | None = None) -> torch.Tensor:
        reach_back = conv_reach_back(self.context, plan.is_causal)
        padded = F.pad(x, (0, 0, 0 if history is not None else reach_back, self.context - reach_back))
        if history is not None:
            padded = torch.cat([history.to(x.dtype), padded], dim=1)
        return F.silu(self.conv(padded, reach_back, plan))


class DepthwiseConv(nn.Module):
    """Depthwise convolution whose taps stay inside a segment; `weight` is (hidden, 1, taps), as in `nn.Conv1d`."""

    def __init__(self, config: MotifMemoryConfig, hidden_size: int):
        super().__init__()
        self.dilation = config.conv_dilation or 1
        self.weight = nn.Parameter(torch.zeros(hidden_size, 1, config.conv_kernel))

    def forward(self, x: torch.Tensor, reach_back: int, plan: NgramPlan) -> torch.Tensor:
        return dilated_taps(x, self.weight.squeeze(1), self.dilation, reach_back, plan.behind_current(), plan.ahead)


MotifMemory.part_types = (MemoryRMSNorm, ShortConv, DepthwiseConv)
