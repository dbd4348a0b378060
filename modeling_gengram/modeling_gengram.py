"""Gengram models: a Mixtral-like decoder that reads a memory of k-mers in front of attention on a few layers."""

import copy
import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
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
from ..motif_memory.definition import MemoryOutput, NgramPlan, at_least_float32
from ..motif_memory.module import DepthwiseConv, MemoryRMSNorm, MotifMemory
from ..motif_memory.plan import letter_codes, plan_ngrams
from ..motif_memory.state import MemoryState
from ..motif_memory.ways.kept_fold import fold_memory, unfold_memory

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


class GengramRMSNorm(MemoryRMSNorm):
    """Root-mean-square norm, computed in at least float32 and rounded once, weight included, as the reference does."""


class GengramResidualNorm(nn.Module):
    """Euclidean norm of what a memory adds at each position, (batch, length); recorded on request."""

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        return residual.to(at_least_float32(residual.dtype)).norm(dim=-1)


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
        self.motif_memory = self.residual_norm = None
        if layer_idx in config.memory_layers:
            self.motif_memory = MotifMemory(config.memory, config.hidden_size, layer_idx, initializer_range=None)
            self.residual_norm = GengramResidualNorm()
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
        memory_state: MemoryState | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        wants_norm = kwargs.pop("output_memory_residual_norms", False)
        if self.motif_memory is not None:
            memory = self.motif_memory(hidden_states, memory_plan, memory_state)
            if memory_state is not None:
                memory_state.advance(self.motif_memory.layer_idx, memory)
            if wants_norm:
                self.residual_norm(memory.residual)
            hidden_states = hidden_states + memory.residual

        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: _one_cache(past_key_values, cache)},
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
        "memory_gates": OutputRecorder(MotifMemory, index=MemoryOutput._fields.index("gate")),
        "memory_residual_norms": GengramResidualNorm,
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
        """Fold the memory's projections into its tables now; see `motif_memory.fold_memory`. Returns the model."""
        fold_memory(self, dtype)
        return self

    def unfold_memory(self) -> "GengramPreTrainedModel":
        """Drop the folded tables; new ones are made when they repay themselves again. Returns the model."""
        unfold_memory(self)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MixtralExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, (GengramRouter, DepthwiseConv)):
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
        self.memory_config = config.memory
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
                look across; nor does causal attention, if there is no cache (`use_cache=False`) and no mask; with
                `is_causal=False` attention does. Without them a row is one segment.
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
        config = self.config
        is_causal = kwargs.setdefault("is_causal", config.is_causal)
        kwargs.setdefault("output_memory_residual_norms", getattr(config, "output_memory_residual_norms", False))
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if not is_causal:
            if config.memory_pooling == "as_trained":
                raise ValueError('memory_pooling="as_trained" is causal; use "exact" with is_causal=False.')
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError("is_causal=False sees the whole sequence at once; call without past_key_values.")
            past_key_values, use_cache = None, False
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)

        segments = None if config.memory_pooling == "as_trained" else position_ids
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = positions.unsqueeze(0)  # type: ignore[assignment]

        if isinstance(attention_mask, dict):  # `generate` prepares one when it compiles
            masks = attention_mask
        else:
            mask_arguments: dict[str, Any] = {
                "config": config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                _CACHE: past_key_values,
                "position_ids": position_ids,
            }
            masks = {
                "full_attention": create_causal_mask(**mask_arguments),
                "linear_attention": create_recurrent_attention_mask(**mask_arguments),
            }

        memory_plan = memory_state = codes = None
        if config.memory_layers:
            memory_state = MemoryState.of(past_key_values, self.memory_config, config.memory_layers)
            codes = self._letter_codes(input_ids if memory_input_ids is None else memory_input_ids, inputs_embeds)
            exists = masks.get("linear_attention")
            if exists is not None:
                codes = codes.masked_fill(~exists.to(device=codes.device, dtype=torch.bool), 0)
            memory_plan = plan_ngrams(codes, self.memory_config, segments, exists, memory_state, is_causal=is_causal)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=masks["full_attention"],
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                memory_plan=memory_plan,
                memory_state=memory_state,
                **{_CACHE: past_key_values},  # by the library's name: gradient checkpointing looks for it
                **kwargs,
            )
        if memory_state is not None:
            memory_state.advance_letters(codes)
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
