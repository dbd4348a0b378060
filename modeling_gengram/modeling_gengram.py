"""Gengram models: a Mixtral-like decoder that reads a memory of k-mers in front of attention on a few layers."""

import copy
import inspect
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralExperts,
    MixtralRotaryEmbedding,
    load_balancing_loss_func,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_gengram import SEQUENCE_POOLINGS, GengramConfig
from ..operators.folded_memory import FoldedTables, fold_tables, folded_key_value
from ..operators.memory_operators import folded_memory, gated_memory, letter_codes, ngram_rows_and_runs
from ..operators.memory_operators import window_features as window_features_operator
from ..operators.memory_path import LARGEST_IRREGULAR_SHARE, choose_algorithm, folded_layout, log_path, uses_native
from ..operators.motif_memory import (
    NgramPlan,
    dilated_taps,
    memory_gate,
    plan_ngrams,
    running_sum,
    window_mean,
)
from ..operators.table_major import packed_rows, rows_to_project, used_rows

logger = logging.get_logger(__name__)

# Transformers 5.24 renamed `past_key_values` to `cache`: in its functions and outputs, and where `generate` calls us.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def _one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given by its older or its newer name."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give only one of them.")
    return past_key_values if cache is None else cache


@dataclass
class GengramModelOutput(MoeModelOutputWithPast):
    """Outputs of `GengramModel`: those of a mixture-of-experts decoder, and what the memory did.

    Args:
        memory_gates: with `output_memory_gates=True`, per memory layer the gate in 0..1, (batch, length).
        memory_residual_norms: with `output_memory_residual_norms=True`, per memory layer the Euclidean norm of what
            the memory added to the residual stream, (batch, length).
    """

    memory_gates: tuple[torch.Tensor, ...] | None = None
    memory_residual_norms: tuple[torch.Tensor, ...] | None = None


@dataclass
class GengramCausalLMOutput(MoeCausalLMOutputWithPast):
    """Outputs of `GengramForCausalLM`; the memory's fields as in `GengramModelOutput`.

    Args:
        z_loss: with router logits, the mean square of the log-partition of the router's logits.
    """

    z_loss: torch.Tensor | None = None
    memory_gates: tuple[torch.Tensor, ...] | None = None
    memory_residual_norms: tuple[torch.Tensor, ...] | None = None


@dataclass
class GengramMaskedLMOutput(MaskedLMOutput):
    """Outputs of `GengramForMaskedLM`; the fields as in `GengramCausalLMOutput`."""

    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    memory_gates: tuple[torch.Tensor, ...] | None = None
    memory_residual_norms: tuple[torch.Tensor, ...] | None = None


class GengramRMSNorm(nn.Module):
    """Root-mean-square norm, computed in at least float32 and rounded once, weight included, as the reference does."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        work = torch.promote_types(hidden_states.dtype, torch.float32)
        x = hidden_states.to(work)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(work) * x).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GengramDepthwiseConv(nn.Module):
    """Depthwise convolution whose taps stay inside a segment; `weight` is (hidden, 1, taps), as in `nn.Conv1d`."""

    def __init__(self, config: GengramConfig):
        super().__init__()
        self.dilation = config.memory_conv_dilation
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 1, config.memory_conv_kernel))

    def forward(self, x: torch.Tensor, reach_back: int, plan: NgramPlan) -> torch.Tensor:
        behind = None if plan.behind is None else plan.behind[:, plan.context :]
        return dilated_taps(x, self.weight, self.dilation, reach_back, behind, plan.ahead)


class GengramShortConv(nn.Module):
    """SiLU of a short dilated convolution over the memory's output: causal, or centred for bidirectional use."""

    def __init__(self, config: GengramConfig):
        super().__init__()
        self.context = config.memory_conv_context
        self.conv = GengramDepthwiseConv(config)

    def forward(
        self, x: torch.Tensor, plan: NgramPlan, is_causal: bool, history: torch.Tensor | None = None
    ) -> torch.Tensor:
        reach_back = self.reach_back(is_causal)
        padded = F.pad(x, (0, 0, 0 if history is not None else reach_back, self.context - reach_back))
        if history is not None:
            padded = torch.cat([history.to(x.dtype), padded], dim=1)
        return F.silu(self.conv(padded, reach_back, plan))

    def reach_back(self, is_causal: bool) -> int:
        """How far the first tap looks back."""
        return self.context if is_causal else self.context - self.context // 2


class _Weights(NamedTuple):
    """The memory's weights where they can be read directly, not only through the modules that hold them."""

    tables: list[torch.Tensor]
    key: torch.Tensor
    value: torch.Tensor
    others: list[torch.Tensor]  # of norms and convolution

    def state(self) -> tuple[tuple[int, int], ...]:
        """Changes when a weight is replaced, or written in place."""
        weights = (*self.tables, self.key, self.value, *self.others)
        return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)


class _Fold(NamedTuple):
    tables: FoldedTables
    dtype: torch.dtype
    slab_width: int | None
    made_from: tuple[tuple[int, int], ...]
    norm_weight: torch.Tensor  # as `_fused_weights` has them
    taps: torch.Tensor | None


class GengramMotifMemory(nn.Module):
    """The motif memory: looks up every k-mer of a window, averages, and adds what the hidden state asks for.

    With f(t) the concatenated window means of the tables: `key = W_k f`, `value = W_v f`,
    `gate = memory_gate(norm_q(h), norm_k(key))`, `u = gate * value`, result `u + SiLU(conv(u))`. Gate, value and
    convolution are taken in at least float32; with `memory_pooling="as_trained"`, in the dtype of the hidden states
    and in the original's order. Which of the equivalent ways is taken is up to `operators/memory_path.py`.
    """

    def __init__(self, config: GengramConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.as_trained = config.memory_pooling == "as_trained"
        self.window = config.memory_window
        self.ngram_sizes = config.memory_ngram_sizes
        self.conv_state = config.memory_states.index("conv_inputs") if config.memory_conv_context else None
        self.prefix_state = config.memory_states.index("prefix_sums") if self.as_trained else None

        self.embeddings = nn.ModuleList(
            nn.Embedding(5**size, config.memory_embedding_dim) for size in config.memory_ngram_sizes
        )
        features = config.memory_embedding_dim * len(config.memory_ngram_sizes)
        self.key_proj = nn.Linear(features, config.hidden_size, bias=False)
        self.value_proj = nn.Linear(features, config.hidden_size, bias=False)
        self.norm_q = GengramRMSNorm(config.hidden_size, eps=config.memory_norm_eps)
        self.norm_k = GengramRMSNorm(config.hidden_size, eps=config.memory_norm_eps)
        self.short_conv = GengramShortConv(config) if config.memory_conv_kernel else None
        self._fold: _Fold | None = None
        self._is_fold_wanted = False  # by `fold`, which may also name a dtype
        self._fold_dtype: torch.dtype | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: NgramPlan,
        is_causal: bool = True,
        past_key_values: Cache | None = None,
        output_memory_residual_norms: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Residual (batch, length, hidden), gate and, if wanted, the residual's norm (batch, length)."""
        history = self._conv_history(past_key_values)
        weights, why_not = self._weights_at_hand(hidden_states.device)
        algorithm = self._choose(hidden_states, plan, why_not)
        is_recording = past_key_values is not None and self._records_past(past_key_values)
        is_native = (
            why_not is None
            and not is_recording
            and uses_native(hidden_states.device, hidden_states.dtype, hidden_states.shape[-1])
        )
        tables, top = None, None
        if weights is not None and algorithm == "folded":
            tables = self._current_fold(weights, hidden_states)
        elif weights is not None and algorithm == "table_major":
            used = None
            if not torch.compiler.is_compiling():  # their number depends on the data
                used, top = used_rows(plan)
            slab_width = folded_layout(weights.key.device, hidden_states.dtype, hidden_states.shape[-1])
            tables = packed_rows(weights.tables, weights.key, weights.value, plan, used, slab_width)
        if tables is not None and not is_recording:
            taps = self._fused_weights(is_causal, self._fold if algorithm == "folded" else None)
            residual, gate, gated = folded_memory(hidden_states, tables, plan, *taps, history, top)
        else:
            if tables is not None:
                key, value = folded_key_value(tables, plan, top)
            else:
                key, value = self._project(plan, past_key_values, weights, is_native)
            if is_native and not self.as_trained and key.dtype == value.dtype:
                taps = self._fused_weights(is_causal)
                residual, gate, gated = gated_memory(hidden_states, key, value, plan, *taps, history)
            else:
                residual, gate, gated = self._gate(hidden_states, key, value, plan, is_causal, history)
        if past_key_values is not None and self.conv_state is not None:
            assert self.short_conv is not None
            past_key_values.update_conv_state(
                gated.transpose(1, 2),
                self.layer_idx,
                state_idx=self.conv_state,
                conv_kernel_size=self.short_conv.context,
            )
        work = torch.promote_types(residual.dtype, torch.float32)
        norm = residual.to(work).norm(dim=-1) if output_memory_residual_norms else None
        return residual, gate, norm

    def _choose(
        self,
        hidden_states: torch.Tensor,
        plan: NgramPlan,
        why_not: str | None,
    ) -> str:
        algorithm = choose_algorithm(
            can_project=why_not,
            needs_grad=torch.is_grad_enabled(),
            is_folded=self._may_fold(plan),
            tokens=hidden_states.shape[0] * hidden_states.shape[1],
            rows=rows_to_project(self.ngram_sizes),
        )
        if not torch.compiler.is_compiling():
            log_path(algorithm, hidden_states.device, hidden_states.dtype, hidden_states.shape[-1])
        return algorithm

    def _may_fold(self, plan: NgramPlan) -> bool:
        """Whether folded tables are there or may be made, and are worth it: most windows are full of letters."""
        if self.training:
            return False
        if torch.compiler.is_compiling():
            return self._fold is not None
        if self._is_fold_wanted or plan.length <= plan.window:
            return True
        runs = plan.runs[:, plan.context :]
        breaks = (runs[:, :-1] > 0) & (runs[:, 1:] == 0)  # each spoils a window's length
        return breaks.is_meta or breaks.sum().item() * plan.window <= LARGEST_IRREGULAR_SHARE * breaks.numel()

    def _gate(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: NgramPlan,
        is_causal: bool,
        history: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Residual, gate and the convolution's inputs; `operators.motif_memory.gated_memory` through the modules."""
        dtype = hidden_states.dtype
        work = dtype if self.as_trained else torch.promote_types(dtype, torch.float32)
        gate = memory_gate(self.norm_q(hidden_states.to(work)), self.norm_k(key.to(work)))  # (batch, length)
        gated = gate.unsqueeze(-1) * value.to(work)  # (batch, length, hidden)
        if plan.exists is not None:  # padding must not reach its neighbours through the convolution
            gated = gated * plan.exists.unsqueeze(-1).to(work)
        residual = gated
        if self.short_conv is not None:
            residual = gated + self.short_conv(gated, plan, is_causal, history)
        return residual.to(dtype), gate, gated

    def _project(
        self, plan: NgramPlan, past_key_values: Cache | None, weights: _Weights | None, is_native: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of every token, each (batch, length, hidden)."""
        if self.as_trained:
            features = self._features_as_trained(plan, past_key_values)
        elif is_native and weights is not None:
            features = window_features_operator(weights.tables, plan)
        else:
            features = self._features(plan)
        return self.key_proj(features), self.value_proj(features)

    def _fused_weights(
        self, is_causal: bool, fold: _Fold | None = None
    ) -> tuple[torch.Tensor, float, torch.Tensor | None, int, int]:
        """Norm weight, epsilon, taps (hidden, taps), dilation and reach, as the fused operators take them.

        Those of a fold that was made from the present weights need not be computed again.
        """
        if fold is not None:
            if self.short_conv is None:
                return fold.norm_weight, self.norm_q.eps, None, 1, 0
            reach = self.short_conv.reach_back(is_causal)
            return fold.norm_weight, self.norm_q.eps, fold.taps, self.short_conv.conv.dilation, reach
        work = torch.promote_types(self.norm_q.weight.dtype, torch.float32)
        norm_weight = self.norm_q.weight.to(work) * self.norm_k.weight.to(work)
        if self.short_conv is None:
            return norm_weight, self.norm_q.eps, None, 1, 0
        conv = self.short_conv.conv
        reach_back = self.short_conv.reach_back(is_causal)
        return norm_weight, self.norm_q.eps, conv.weight.squeeze(1).to(work), conv.dilation, reach_back

    def _conv_history(self, past_key_values: Cache | None) -> torch.Tensor | None:
        """Inputs of the convolution before this call, (batch, context, hidden), if there are any."""
        if past_key_values is None or self.conv_state is None:
            return None
        layer: Any = past_key_values.layers[self.layer_idx]
        if not layer.has_previous_state[self.conv_state]:
            return None
        assert self.short_conv is not None
        states = layer.conv_states[self.conv_state][..., -self.short_conv.context :]
        missing = self.short_conv.context - states.shape[-1]
        return (F.pad(states, (missing, 0)) if missing else states).transpose(1, 2)

    def _records_past(self, past_key_values: Cache) -> bool:
        """Whether the cache keeps all inputs of the convolution, to take tokens back later (assisted decoding)."""
        return bool(getattr(past_key_values.layers[self.layer_idx], "record_past", False))

    # Weights read past their modules, and folded tables.

    def _weights_at_hand(self, device: torch.device) -> tuple[_Weights | None, str | None]:
        """The weights, or why they cannot be read past the modules that hold them."""
        if self.as_trained:
            return None, 'memory_pooling="as_trained" repeats the original\'s operations in their order'
        tables: list[Any] = list(self.embeddings)
        projections: list[Any] = [self.key_proj, self.value_proj]
        others: list[Any] = [self.norm_q, self.norm_k]
        if self.short_conv is not None:
            others += [self.short_conv, self.short_conv.conv]
        for module, kind in [(m, nn.Embedding) for m in tables] + [(m, nn.Linear) for m in projections]:
            if type(module) is not kind:
                return None, "the memory's tables or projections are wrapped by adapters; merge these first"
        for module in (*tables, *projections, *others):
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                return None, "a part of the memory has hooks, which would not be called"
        rest = [p for m in others for p in m.parameters(False)]
        weights = _Weights([table.weight for table in tables], self.key_proj.weight, self.value_proj.weight, rest)
        for weight in (*weights.tables, weights.key, weights.value, *rest):
            if weight.is_meta:
                return None, "the memory's weights are offloaded; load them onto a device first"
            if type(weight) not in (nn.Parameter, torch.Tensor, FakeTensor):
                return None, f"the memory's weights are of a special kind, {type(weight).__name__}"
            if weight.device != device or not weight.numel():
                return None, "the memory's weights are distributed over devices"
        return weights, None

    @torch.no_grad()
    def fold(self, dtype: torch.dtype | None = None) -> None:
        """Fold the projections into the tables; see `GengramPreTrainedModel.fold_memory`."""
        weights, why_not = self._weights_at_hand(next(self.parameters()).device)
        if weights is None:
            raise ValueError(f"the memory cannot be folded: {why_not}.")
        self._is_fold_wanted, self._fold_dtype = True, dtype
        self._make_fold(weights, weights.key.dtype)

    def unfold(self) -> None:
        """Forget what `fold` made."""
        self._fold, self._is_fold_wanted, self._fold_dtype = None, False, None

    def _make_fold(self, weights: _Weights, dtype: torch.dtype) -> _Fold:
        """Fold for hidden states of a dtype: 16-bit ones get float16 tables, others their own, unless asked."""
        hidden, device = weights.key.shape[0], weights.key.device
        stored = self._fold_dtype or (torch.float16 if dtype in (torch.bfloat16, torch.float16) else dtype)
        slab_width = folded_layout(device, dtype, hidden)
        tables = fold_tables(
            weights.tables, weights.key, weights.value, self.ngram_sizes, self.window, stored, slab_width
        )
        norm_weight, _, taps, _, _ = self._fused_weights(True)
        if taps is not None:
            taps = taps.t().contiguous().t()  # a tap's weights lie together
        self._fold = _Fold(tables, dtype, slab_width, weights.state(), norm_weight, taps)
        return self._fold

    def _current_fold(self, weights: _Weights, hidden_states: torch.Tensor) -> FoldedTables:
        """The folded tables, made now if there are none, or anew if a weight or the dtype has changed."""
        fold = self._fold
        if torch.compiler.is_compiling() and fold is not None:
            return fold.tables
        wanted = folded_layout(hidden_states.device, hidden_states.dtype, hidden_states.shape[-1])
        if fold is not None and fold.dtype == hidden_states.dtype and fold.slab_width == wanted:
            if fold.made_from == weights.state():
                return fold.tables
        with torch.no_grad():
            return self._make_fold(weights, hidden_states.dtype).tables

    # What changes the weights, or their device or dtype, makes folded tables stale; they are never saved.

    def train(self, mode: bool = True) -> "GengramMotifMemory":
        if mode:
            self.unfold()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unfold()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fold": None}

    def _features(self, plan: NgramPlan) -> torch.Tensor:
        """Concatenated window means, (batch, length, sizes * width); `window_features` through the modules."""
        means = []
        for index, table in enumerate(self.embeddings):
            rows = table(plan.rows(index))
            means.append(window_mean(rows, plan, index).to(rows.dtype))
        return torch.cat(means, dim=-1)

    def _features_as_trained(self, plan: NgramPlan, past_key_values: Cache | None) -> torch.Tensor:
        """The same as differences of prefix sums in the dtype of the tables, decoding included."""
        sizes = range(len(self.ngram_sizes))
        valid = [plan.valid(index)[:, plan.context :, None] for index in sizes]
        embedded = [table(plan.rows(i)[:, plan.context :]) for i, table in enumerate(self.embeddings)]
        rows = torch.cat([e * v.to(e.dtype) for e, v in zip(embedded, valid, strict=True)], dim=-1)
        length, width = rows.shape[1], embedded[0].shape[-1]
        initial = None
        if past_key_values is not None:
            layer: Any = past_key_values.layers[self.layer_idx]
            if layer.has_previous_state[self.prefix_state]:
                initial = layer.conv_states[self.prefix_state][..., -1]
        prefix = running_sum(rows, initial)
        if past_key_values is not None:
            prefix = past_key_values.update_conv_state(
                prefix.transpose(1, 2), self.layer_idx, state_idx=self.prefix_state, conv_kernel_size=self.window
            ).transpose(1, 2)
        prefix = F.pad(prefix, (0, 0, max(self.window + length - prefix.shape[1], 0), 0))[:, -(self.window + length) :]
        means = []
        for index, size in enumerate(self.ngram_sizes):
            part = slice(index * width, (index + 1) * width)
            endings = self.window - size + 1
            if endings == 1:
                means.append(rows[..., part])
                continue
            total = prefix[:, self.window :, part] - prefix[:, self.window - endings : -endings, part]
            means.append(total / plan.counts(index).clamp_min(1).unsqueeze(-1).to(total.dtype))
        return torch.cat(means, dim=-1)


class GengramRouter(nn.Module):
    """Scores experts in at least float32 and keeps the best ones; the softmax is taken in float32."""

    def __init__(self, config: GengramConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts  # read by the library's expert parallelism
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (tokens, experts), weights and indices of the chosen experts (tokens, top_k)."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        work = torch.promote_types(hidden_states.dtype, torch.float32)
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.to(work), self.weight.to(work))  # (tokens, experts)
        if self.norm_topk_prob:
            chosen, indices = torch.topk(logits, self.top_k, dim=-1)
            weights = F.softmax(chosen, dim=-1, dtype=torch.float32)
        else:
            weights, indices = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float32), self.top_k, dim=-1)
        return logits, weights.to(logits.dtype), indices


class GengramExperts(MixtralExperts):
    """Mixtral's stacked experts; what grouped products have no kernel for takes the eager loop instead.

    That is float64, and matrices whose rows are not multiples of 16 bytes.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        weights = (self.gate_up_proj, self.down_proj)
        is_supported = hidden_states.dtype != torch.float64 and all(
            weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights
        )
        config: Any = self.config
        if config._experts_implementation == "grouped_mm" and not is_supported:
            eager: Any = inspect.unwrap(MixtralExperts.forward)
            return eager(self, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)


class GengramSparseMoeBlock(nn.Module):
    """Mixture of SwiGLU experts."""

    def __init__(self, config: GengramConfig):
        super().__init__()
        self.jitter_noise = config.router_jitter_noise
        self.gate = GengramRouter(config)
        self.experts = GengramExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            hidden_states = hidden_states * noise
        hidden_states = hidden_states.view(-1, width)  # (tokens, hidden)
        _, weights, indices = self.gate(hidden_states)
        return self.experts(hidden_states, indices, weights).reshape(batch, length, width)


class GengramMLP(nn.Module):
    """Dense SwiGLU feed-forward, for models without experts."""

    def __init__(self, config: GengramConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class GengramDecoderLayer(GradientCheckpointingLayer):
    """Memory (on some layers), attention, feed-forward; each adds to the residual stream."""

    def __init__(self, config: GengramConfig, layer_idx: int):
        super().__init__()
        self.motif_memory = GengramMotifMemory(config, layer_idx) if layer_idx in config.memory_layers else None
        self.self_attn = MixtralAttention(config, layer_idx)
        self.mlp = GengramSparseMoeBlock(config) if config.num_local_experts > 1 else GengramMLP(config)
        self.input_layernorm = GengramRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GengramRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        memory_plan: NgramPlan | None = None,
        is_causal: bool = True,
        output_memory_residual_norms: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        past_key_values = _one_cache(past_key_values, cache)
        if self.motif_memory is not None:
            assert memory_plan is not None
            memory, _, _ = self.motif_memory(
                hidden_states,
                memory_plan,
                is_causal=is_causal,
                past_key_values=past_key_values,
                output_memory_residual_norms=output_memory_residual_norms,
            )
            hidden_states = hidden_states + memory

        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            is_causal=is_causal,
            **{_CACHE: past_key_values},
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GengramPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all Gengram models."""

    config: GengramConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GengramDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(GengramRouter, index=0),
        "hidden_states": GengramDecoderLayer,
        "attentions": MixtralAttention,
        "memory_gates": OutputRecorder(GengramMotifMemory, index=1),
        "memory_residual_norms": OutputRecorder(GengramMotifMemory, index=2),
    }

    # Set by the package; unset in the flat copies that it writes, which Transformers copies by itself.
    _remote_code_writer: Any = None  # (config, folder) -> None

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """Save weights and configuration, and source code with which the folder also loads without this package."""
        if self._remote_code_writer is not None and is_main_process:  # first: `push_to_hub=True` uploads from inside
            self._remote_code_writer(self.config, save_directory)
        return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # `save_pretrained(push_to_hub=True)` uploads what is newer than this list, but the source code is older.
        timestamps: dict[str, float] = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in timestamps.items() if not name.endswith(".py")}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do where the source code is written anyway; the library would overwrite it with a bare copy."""
        if cls._remote_code_writer is None:
            super().register_for_auto_class(auto_class)

    # Transformers guesses these two from the text of this module, which imports the blocks in question.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def fold_memory(self, dtype: torch.dtype | None = None) -> "GengramPreTrainedModel":
        """Fold the memory's projections into its tables now, not at the first forward pass; returns the model.

        Key and value of a position become a sum of table rows instead of two matrix products (`operators/README.md`).
        A model in `eval()` does this by itself in its first pass without gradients; a compiled model uses folded
        tables only if they are there before. Needs about (5**N + 2 * 5**(N - 1)) * 2 * hidden numbers per memory
        layer, N the largest k-mer: 371 MB in float16 for the released model. `train()`, `to()`, `unfold_memory()` and
        writing to a weight undo it (a write through `weight.data` is not seen: call `unfold_memory()`); nothing of it
        is saved. `gengram.memory_path("token_major")` or GENGRAM_MEMORY_ALGORITHM=token_major avoids it altogether.

        Args:
            dtype: of the folded tables. By default float16 for 16-bit models (scaled by a power of two, so that it
                cannot overflow), and that of the hidden states for others.

        Raises:
            ValueError: if the model is in training mode, or its memory has adapters, is offloaded, or `as_trained`.
        """
        if self.training:
            raise ValueError("fold_memory is for inference; call model.eval() first.")
        for module in self.modules():
            if isinstance(module, GengramMotifMemory):
                module.fold(dtype)
        return self

    def unfold_memory(self) -> "GengramPreTrainedModel":
        """Drop the folded tables; the next pass without gradients in `eval()` makes new ones. Returns the model."""
        for module in self.modules():
            if isinstance(module, GengramMotifMemory):
                module.unfold()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MixtralExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, (GengramRouter, GengramDepthwiseConv)):
            init.normal_(module.weight, mean=0.0, std=std)


class GengramModel(GengramPreTrainedModel):
    """The decoder without a head: last hidden states, (batch, length, hidden).

    Example:

    ```python
    >>> import torch
    >>> from gengram import GengramConfig, GengramModel
    >>> config = GengramConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    ...                        num_key_value_heads=2, num_local_experts=4, memory_layers=[1], memory_embedding_dim=4)
    >>> model = GengramModel(config).eval()
    >>> outputs = model(torch.tensor([[8, 5, 6, 7, 9]]), output_memory_gates=True)
    >>> outputs.last_hidden_state.shape, outputs.memory_gates[0].shape
    (torch.Size([1, 5, 32]), torch.Size([1, 5]))

    ```
    """

    def __init__(self, config: GengramConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(GengramDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GengramRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        memory_input_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GengramModelOutput:
        """Hidden states of a batch of token ids.

        Args:
            input_ids: (batch, length). Exactly one of `input_ids` and `inputs_embeds` must be given.
            attention_mask: (batch, past + length), 1 for tokens and 0 for padding on either side. Padding is neither
                attended to nor read by the memory.
            position_ids: (batch, length). Where they start again at 0 a new segment begins, and the memory does not
                look across; nor does attention, if there is no cache (`use_cache=False`). Without them a row is one
                segment.
            past_key_values: a cache; build it with `DynamicCache(config=model.config)`. `cache`, the name that
                Transformers gives it since 5.24, means the same.
            inputs_embeds: (batch, length, hidden) instead of ids. The memory reads the letters whose embedding rows
                occur exactly, any other vector is "not a letter"; `memory_input_ids` overrides this.
            memory_input_ids: (batch, length), the ids that the memory reads if they differ from `input_ids`.
            is_causal: whether to look back only (defaults to `config.is_causal`).
            output_memory_gates, output_memory_residual_norms: also return what the memory did.

        Raises:
            ValueError: if both or none of `input_ids` and `inputs_embeds` are given, or the cache cannot hold the
                memory's states, or a cache or `as_trained` pooling is combined with `is_causal=False`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        past_key_values = _one_cache(past_key_values, cache)
        is_causal = kwargs.pop("is_causal", self.config.is_causal)
        output_memory_residual_norms = kwargs.pop(
            "output_memory_residual_norms", getattr(self.config, "output_memory_residual_norms", False)
        )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if not is_causal:
            if self.config.memory_pooling == "as_trained":
                raise ValueError('memory_pooling="as_trained" is causal; use "exact" with is_causal=False.')
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError("is_causal=False sees the whole sequence at once; call without past_key_values.")
            past_key_values, use_cache = None, False
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        segment_ids = None if self.config.memory_pooling == "as_trained" else position_ids
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = positions.unsqueeze(0)  # type: ignore[assignment]

        if isinstance(attention_mask, dict):  # `generate` prepares one when it compiles
            masks = attention_mask
        else:
            mask_arguments: dict[str, Any] = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                _CACHE: past_key_values,
                "position_ids": position_ids,
            }
            masks = {
                "full_attention": create_causal_mask(**mask_arguments),
                "linear_attention": create_recurrent_attention_mask(**mask_arguments),
            }

        memory_plan = None
        if self.config.memory_layers:
            if memory_input_ids is None:
                memory_input_ids = input_ids
            codes = self._letter_codes(memory_input_ids, inputs_embeds)
            memory_plan = self._plan_memory(
                codes, segment_ids, masks.get("linear_attention"), past_key_values, is_causal
            )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=masks["full_attention"],
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                memory_plan=memory_plan,
                is_causal=is_causal,
                output_memory_residual_norms=output_memory_residual_norms,
                **{_CACHE: past_key_values},  # by the library's name: gradient checkpointing looks for it
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return GengramModelOutput(last_hidden_state=hidden_states, **{_CACHE: past_key_values})

    def _letter_codes(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Letter codes (batch, length) of the ids, or of embeddings that equal a letter's row exactly."""
        token_ids = self.config.memory_token_ids
        if input_ids is not None:
            return letter_codes(input_ids, token_ids)
        codes = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
        rows = self.embed_tokens(torch.tensor(token_ids, device=inputs_embeds.device)).to(inputs_embeds.device)
        for digit, row in enumerate(rows):
            codes = codes.masked_fill((inputs_embeds == row).all(-1), digit + 1)
        return codes

    def _plan_memory(
        self,
        codes: torch.Tensor,
        position_ids: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        is_causal: bool,
    ) -> NgramPlan:
        """The n-gram plan of this forward pass, history included; advances the letter codes in the cache."""
        config = self.config
        length = codes.shape[1]
        exists = None
        if padding_mask is not None:
            exists = padding_mask.to(device=codes.device, dtype=torch.bool)
            codes = codes.masked_fill(~exists, 0)
        context = 0
        if past_key_values is not None and config.memory_context:
            context = config.memory_context
            codes = self._extend_by_history(codes, past_key_values)
            codes = F.pad(codes, (max(context + length - codes.shape[1], 0), 0))[:, -(context + length) :]

        behind = ahead = None
        if position_ids is not None:
            behind = position_ids.expand(codes.shape[0], -1)
            if context:
                earlier = torch.arange(-context, 0, device=behind.device) + behind[:, :1]
                behind = torch.cat([earlier, behind], dim=1)
            if not is_causal:
                is_last = F.pad(behind[:, 1:] != behind[:, :-1] + 1, (0, 1), value=True)
                index = torch.arange(length, device=behind.device)
                ends = torch.where(is_last, index, length).flip(1).cummin(1).values.flip(1)
                ahead = ends - index
        return plan_ngrams(
            codes,
            config.memory_ngram_sizes,
            config.memory_window,
            context=context,
            is_causal=is_causal,
            behind=behind,
            ahead=ahead,
            exists=exists,
            rows_and_runs=ngram_rows_and_runs,
        )

    def _extend_by_history(self, codes: torch.Tensor, past_key_values: Cache) -> torch.Tensor:
        """Codes with those of earlier calls in front; every memory layer keeps its own copy, as the caches expect."""
        extended = codes
        for layer in self.config.memory_layers:
            if len(past_key_values.layers) <= layer or not hasattr(past_key_values.layers[layer], "conv_states"):
                raise ValueError(
                    f"the cache has no room for the memory of layer {layer}: expected one built for this model, got "
                    f"{type(past_key_values).__name__} without its configuration. Build it with "
                    "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)."
                )
            extended = past_key_values.update_conv_state(
                codes.unsqueeze(1),
                layer,
                state_idx=self.config.memory_states.index("letter_codes"),
                conv_kernel_size=self.config.memory_context,
            ).squeeze(1)
        return extended


def router_z_loss(router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens and layers of the router's squared log-partition (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        router_logits: one (batch * length, experts) per layer.
        attention_mask: (batch, length); padding is left out.
    """
    device = router_logits[0].device
    squares = torch.stack([torch.logsumexp(logits.to(device).float(), dim=-1).square() for logits in router_logits])
    if attention_mask is None:
        return squares.mean()
    weight = attention_mask.reshape(1, -1).to(device=device, dtype=squares.dtype)
    return (squares * weight).sum() / (weight.sum() * len(router_logits)).clamp_min(1)


class _LanguageModelLoss:
    """What the two language-model heads share: router losses on request."""

    config: GengramConfig

    def _router_losses(
        self, outputs: GengramModelOutput, attention_mask: torch.Tensor | None, loss: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Load-balancing loss, z-loss, and `loss` with both added; all `None` without router logits."""
        config = self.config
        if not outputs.router_logits:
            return None, None, loss
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        aux_loss: Any = load_balancing_loss_func(
            outputs.router_logits, config.num_local_experts, config.num_experts_per_tok, mask
        )
        z_loss = router_z_loss(outputs.router_logits, mask)
        if loss is not None:
            loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
            loss = loss + config.router_z_loss_coef * z_loss.to(loss.device)
        return aux_loss, z_loss, loss


class GengramForCausalLM(_LanguageModelLoss, GengramPreTrainedModel, GenerationMixin):
    """Gengram with the head that the released weights have: logits of the next base, (batch, length, vocab).

    Example:

    ```python
    >>> import torch
    >>> from gengram import GengramConfig, GengramForCausalLM
    >>> config = GengramConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    ...                        num_key_value_heads=2, num_local_experts=4, memory_layers=[1], memory_embedding_dim=4)
    >>> model = GengramForCausalLM(config).eval()
    >>> model(torch.tensor([[8, 5, 6, 7, 9]])).logits.shape
    torch.Size([1, 5, 128])

    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: GengramConfig):
        if not config.is_causal:
            raise ValueError(
                "GengramForCausalLM predicts from the past alone, but this configuration has is_causal=False, like "
                "those of GengramForMaskedLM; load it with that class, or pass is_causal=True if it was trained so."
            )
        super().__init__(config)
        self.model = GengramModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GengramCausalLMOutput:
        """Next-token logits, and the loss if labels are given; other arguments as in `GengramModel.forward`.

        Args:
            labels: (batch, length), ids, -100 where there is no loss; shifted by one inside.
            output_router_logits: also return router logits and their two losses; with labels they are added to the
                loss with weights `config.router_aux_loss_coef` and `config.router_z_loss_coef`.
            logits_to_keep: compute logits of the last so many positions only (0: of all), or of these indices.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs: GengramModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=_one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states: Any = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss, z_loss, loss = self._router_losses(outputs, attention_mask, loss)
        return GengramCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            memory_gates=outputs.memory_gates,
            memory_residual_norms=outputs.memory_residual_norms,
            **{_CACHE: getattr(outputs, _CACHE)},
        )


class GengramForMaskedLM(_LanguageModelLoss, GengramPreTrainedModel):
    """Gengram used bidirectionally, with a head that predicts masked bases: logits (batch, length, vocab).

    `[MASK]` is not a letter, so every k-mer that touches a masked base is skipped: the memory cannot leak the answer.
    The released weights were never trained for this; loading them says so.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: GengramConfig):
        if config.memory_pooling == "as_trained":
            raise ValueError('memory_pooling="as_trained" is causal; use "exact" for GengramForMaskedLM.')
        if config.is_causal:
            config = copy.deepcopy(config)
            config.is_causal = False
        super().__init__(config)
        self.model = GengramModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if "GengramForCausalLM" in (model.config.architectures or []):
            logger.warning_once(
                f"{pretrained_model_name_or_path} was trained to predict the next base, not masked ones. As "
                "GengramForMaskedLM it looks in both directions, which its weights have never done: fine-tune it "
                "with a masked objective before you trust its predictions, or use GengramForCausalLM."
            )
        return loaded

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GengramMaskedLMOutput:
        """Logits of the token at each position, and the loss if labels (-100: no loss) are given."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        kwargs.pop("use_cache", None)
        kwargs["is_causal"] = False
        outputs: GengramModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss, z_loss, loss = self._router_losses(outputs, attention_mask, loss)
        return GengramMaskedLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            memory_gates=outputs.memory_gates,
            memory_residual_norms=outputs.memory_residual_norms,
        )


def pool_hidden_states(hidden_states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per sequence: (batch, length, hidden) -> (batch, hidden).

    Args:
        hidden_states: (batch, length, hidden).
        mask: (batch, length), true (or 1) where a token belongs to the sequence, padding on either side false.
        pooling: the `"last"` token, the one in the `"centre"` (the earlier of two), or the `"mean"` or `"max"` of all.

    Raises:
        ValueError: if the pooling is not known.
    """
    mask = mask.to(device=hidden_states.device, dtype=torch.bool)
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden_states.dtype)
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
    if pooling == "max":
        return hidden_states.masked_fill(~mask.unsqueeze(-1), torch.finfo(hidden_states.dtype).min).amax(1)
    if pooling not in SEQUENCE_POOLINGS:
        raise ValueError(f"expected a pooling of {SEQUENCE_POOLINGS}, got {pooling!r}.")
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, index, -1).amax(1)
    first = torch.where(mask, index, mask.shape[1]).amin(1)
    chosen = last if pooling == "last" else (first + last) // 2
    return hidden_states[torch.arange(len(mask), device=mask.device), chosen]


# The library's classification heads would build their backbone with AutoModel, which asks for `trust_remote_code` a
# second time in remote code; so they are initialised here and only their `forward` is used.


class GengramForSequenceClassification(GenericForSequenceClassification, GengramPreTrainedModel):
    """Gengram with a linear head on one vector per sequence: logits (batch, num_labels).

    The vector is the hidden state of the last token, or what `config.classifier_pooling` says.
    """

    def __init__(self, config: GengramConfig):
        GengramPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GengramModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Logits of each sequence's classes, and the loss if labels are given; other arguments as in `GengramModel`.

        Args:
            attention_mask: (batch, length), 0 for padding; by default no `config.pad_token_id` is pooled.
            labels: (batch,) classes or, for regression, numbers; (batch, num_labels) for several of either.

        Raises:
            ValueError: if `classifier_pooling` is not `"last"` and the mask is not (batch, length).
        """
        if self.config.classifier_pooling == "last":
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                **kwargs,
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f'classifier_pooling="{self.config.classifier_pooling}" needs an attention_mask of (batch, length), '
                f"got {tuple(attention_mask.shape)}."
            )
        kwargs["use_cache"] = False
        outputs: GengramModelOutput = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden_states: Any = outputs.last_hidden_state
        if attention_mask is not None:
            mask = attention_mask
        elif input_ids is not None and self.config.pad_token_id is not None:
            mask = input_ids != self.config.pad_token_id
        else:
            mask = hidden_states.new_ones(hidden_states.shape[:2])
        logits = self.score(pool_hidden_states(hidden_states, mask, self.config.classifier_pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class GengramForTokenClassification(GenericForTokenClassification, GengramPreTrainedModel):
    """Gengram with a linear head on every base: logits (batch, length, num_labels)."""

    def __init__(self, config: GengramConfig):
        GengramPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GengramModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "GengramForCausalLM",
    "GengramForMaskedLM",
    "GengramForSequenceClassification",
    "GengramForTokenClassification",
    "GengramModel",
    "GengramPreTrainedModel",
]
