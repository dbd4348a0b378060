"""Gengram models: a Mixtral-like decoder that reads a memory of k-mers in front of attention on a few layers."""

import copy
import inspect
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import (
    MixtralExperts,
    MixtralRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_gengram import GengramConfig
from ..motif_memory.definition import MemoryOutput, NgramPlan, at_least_float32
from ..motif_memory.module import DepthwiseConv, MemoryRMSNorm, MotifMemory
from ..motif_memory.plan import letter_codes, plan_ngrams
from ..motif_memory.state import NO_CONTINUOUS_BATCHING, MemoryState
from ..motif_memory.ways.kept_fold import fold_memory, memories_of, unfold_memory
from .adapters import check_adapters, record_settings
from .attention import GengramAttention
from .inputs import check_engine, check_inputs, integer_ids, pool_hidden_states, sequence_starts, token_mask
from .losses import IGNORED, load_balancing_loss, mean_over_step, router_z_loss, share_of_step
from .parallel import prepare_to_spread
from .quantization import warn_of_untouched
from .quantized_experts import quantized_experts

logger = logging.get_logger(__name__)

# Transformers 5.24 renamed `past_key_values` to `cache`: in its functions and outputs, and where `generate` calls us.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def _one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given by its older or its newer name; the older one is deprecated where the library says so."""
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give only one of them.")
    if _CACHE == "cache" and not torch.compiler.is_compiling():
        words = "`past_key_values` is deprecated since Transformers 5.24. Use `cache` instead."
        warnings.warn(words, FutureWarning, stacklevel=3)
    return past_key_values


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


@dataclass
class GengramSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Outputs of `GengramForSequenceClassification`; the fields as in `GengramCausalLMOutput`."""

    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    memory_gates: tuple[torch.Tensor, ...] | None = None
    memory_residual_norms: tuple[torch.Tensor, ...] | None = None


@dataclass
class GengramTokenClassifierOutput(TokenClassifierOutput):
    """Outputs of `GengramForTokenClassification`; the fields as in `GengramCausalLMOutput`."""

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


def _is_of_torchao(weight: torch.Tensor) -> bool:
    """Whether a weight is of a class of torchao, which the compiler cannot be asked."""
    return not torch.compiler.is_compiling() and type(weight).__module__.startswith("torchao.")


class GengramExperts(MixtralExperts):
    """Mixtral's stacked experts; what products of many experts have no kernel for takes the eager loop instead.

    That is float64, matrices whose rows are not multiples of 16 bytes, and the tensor classes of torchao.
    """

    quantization: str | None = None  # "int8" or "int4": how the weights are kept

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.quantization is not None:
            return quantized_experts(self, hidden_states, top_k_index, top_k_weights)
        weights = (self.gate_up_proj, self.down_proj)
        is_supported = hidden_states.dtype != torch.float64 and all(
            weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights
        )
        config: Any = self.config
        is_torchao = any(_is_of_torchao(weight) for weight in weights)  # `generate` on a GPU asks for `batched_mm`
        if (config._experts_implementation == "grouped_mm" and not is_supported) or is_torchao:
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
        self.self_attn = GengramAttention(config, layer_idx)
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
        cache = past_key_values if cache is None else cache  # whatever the library calls it
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
            **{_CACHE: cache},
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
        "attentions": GengramAttention,
        "memory_gates": OutputRecorder(MotifMemory, index=MemoryOutput._fields.index("gate")),
        "memory_residual_norms": GengramResidualNorm,
    }

    # Set by the package; unset in the flat copies that it writes, which Transformers copies by itself.
    _remote_code_writer: Any = None  # (config, folder) -> None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A model with the weights of a folder or of the Hub; says so if a quantisation leaves most of them alone."""
        loaded = super().from_pretrained(*args, **kwargs)
        warn_of_untouched(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """As in Transformers, which calls it while loading; `mesh` is None where one process holds everything."""
        if mesh is not None:
            prepare_to_spread(model, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh)

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

    # PEFT reads and writes an adapter through these two and, for the library's own way, the third.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        record_settings(self, prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        check_adapters(self)
        super()._load_from_state_dict(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_adapter(*args, **kwargs)
        check_adapters(self)
        return loaded

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

    @property
    def memory(self) -> dict[int, MotifMemory]:
        """The memories by the number of their layer: `model.memory[2]["TATAAA"]` is a row, which can be replaced."""
        return {memory.layer_idx: memory for memory in memories_of(self)}

    def unfold_memory(self) -> "GengramPreTrainedModel":
        """Drop the folded tables; new ones are made when they repay themselves again. Returns the model."""
        unfold_memory(self)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "quantization", None) is not None:
            return  # numbers, which are always loaded
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
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {config.hidden_act!r}.")
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
            input_ids: (batch, length), of any integer dtype. Exactly one of `input_ids` and `inputs_embeds` must be
                given.
            attention_mask: (batch, past + length), 1 for tokens and 0 for padding on either side. Padding is neither
                attended to nor read by the memory.
            position_ids: (batch, length). Where they do not go on by one a new sequence begins: neither attention nor
                the memory looks across, and no cache is made. Without them a row is one sequence.
            past_key_values: a cache; build it with `DynamicCache(config=model.config)`. `cache`, the name that
                Transformers gives it since 5.24, means the same.
            use_cache: return a cache, the given one or a new one (defaults to `config.use_cache`).
            inputs_embeds: (batch, length, hidden) instead of ids. The memory reads the letters whose embedding rows
                occur exactly, any other vector is "not a letter"; `memory_input_ids` overrides this.
            memory_input_ids: (batch, length), the ids that the memory reads if they differ from `input_ids`.
            is_causal: whether to look back only (defaults to `config.is_causal`).
            output_memory_gates, output_memory_residual_norms: also return what the memory did.

        Raises:
            ValueError: if the arguments do not fit together or hold no token, the cache cannot hold the memory's
                states, or `is_causal=False` or several sequences in a row are combined with what they exclude.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        cache = _one_cache(past_key_values, cache)
        config = self.config
        is_causal = kwargs.setdefault("is_causal", config.is_causal)
        kwargs.setdefault("output_memory_residual_norms", getattr(config, "output_memory_residual_norms", False))
        if memory_input_ids is not None:
            memory_input_ids = integer_ids("memory_input_ids", memory_input_ids)  # type: ignore[assignment]
        if inputs_embeds is None:
            rows = getattr(self.embed_tokens, "num_embeddings", None)
            input_ids = integer_ids("input_ids", input_ids, rows)  # type: ignore[assignment]
            inputs_embeds = self.embed_tokens(input_ids)
        check_inputs(inputs_embeds, config.hidden_size, attention_mask, position_ids, memory_input_ids, cache)
        if config.memory_layers:
            check_engine(config._attn_implementation, position_ids)
        batch, length = inputs_embeds.shape[:2]
        if input_ids is not None and length > 1:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        sequences = self._sequences(position_ids, attention_mask, (batch, length), is_causal)
        if sequences is not None and cache is not None and is_causal:
            raise ValueError(
                "position_ids do not go on by one, so the row holds several sequences, which no cache can continue; "
                "call with use_cache=False and without a cache."
            )
        if not is_causal:
            if config.memory_pooling == "as_trained":
                raise ValueError('memory_pooling="as_trained" is causal; use "exact" with is_causal=False.')
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError("is_causal=False sees the whole sequence at once; call without past_key_values.")
            cache, use_cache = None, False
        elif use_cache and cache is None and sequences is None:
            cache = DynamicCache(config=config)

        segments = position_ids  # where the memory must not look across, and how far back it may look
        if config.memory_pooling == "as_trained":
            segments = None
        elif sequences is not None:
            places = torch.arange(length, device=sequences.device)
            segments = places - torch.searchsorted(sequences, sequences)  # type: ignore[assignment]
        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            places = torch.arange(length, device=inputs_embeds.device) + past_seen_tokens
            position_ids = places.unsqueeze(0)  # type: ignore[assignment]

        masks = self._masks(inputs_embeds, attention_mask, position_ids, sequences, cache, is_causal)
        memory_layers = [layer for layer in config.memory_layers if layer < config.num_hidden_layers]
        memory_plan = memory_state = codes = None
        if memory_layers:
            memory_state = MemoryState.of(cache, self.memory_config, memory_layers)
            codes = self._letter_codes(input_ids if memory_input_ids is None else memory_input_ids, inputs_embeds)
            exists = masks.get("linear_attention")
            if exists is not None:
                codes = codes.masked_fill(~exists.to(device=codes.device, dtype=torch.bool), 0)
            memory_plan = plan_ngrams(
                codes, self.memory_config, segments, exists, memory_state, is_causal=is_causal, are_known=True
            )

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
                **{_CACHE: cache},  # by the library's name: gradient checkpointing looks for it
                **kwargs,
            )
        if memory_state is not None:
            memory_state.advance_letters(codes)
        hidden_states = self.norm(hidden_states)
        return GengramModelOutput(last_hidden_state=hidden_states, **{_CACHE: cache if use_cache else None})

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: Any,
        sequences: torch.Tensor | None,
        cache: Cache | None,
        is_causal: bool,
    ) -> dict[str, Any]:
        """What attention may look at, and which tokens of this pass are there; as `generate` prepares it."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            _CACHE: cache,
            "position_ids": position_ids,
        }
        exists = create_recurrent_attention_mask(**arguments)
        if sequences is not None and (attention_mask is not None or not is_causal):  # else the library sees it
            sequences = sequences.expand(inputs_embeds.shape[0], -1)
            arguments["and_mask_function"] = packed_sequence_mask_function(sequences)
        return {"full_attention": create_causal_mask(**arguments), "linear_attention": exists}

    def _sequences(
        self, position_ids: torch.Tensor | None, attention_mask: Any, shape: tuple[int, int], is_causal: bool
    ) -> torch.Tensor | None:
        """Number of the sequence that each token belongs to, (batch or 1, length); None if a row holds one.

        Masks with more than two dimensions are the caller's own: then it is up to them.
        """
        is_compiling = torch.compiler.is_compiling()  # then the causal mask alone looks at positions
        batch, length = shape
        mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
        if position_ids is None or length == 1 or (is_compiling and (is_causal or mask is not None)):
            return None
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return None
        starts = sequence_starts(position_ids, None if mask is None else mask[:, -length:])
        if not is_compiling and not bool(starts.any()):
            return None
        if self.config.memory_pooling == "as_trained":
            logger.warning_once(
                "position_ids put several sequences into one row. Attention keeps them apart, but "
                'memory_pooling="as_trained" reads across, as the original does; "exact" does not.'
            )
        if "flash" in (self.config._attn_implementation or "") and (mask is not None or batch > 1):
            raise ValueError(
                "flash attention keeps several sequences of one row apart only if the batch is that row and has no "
                'attention_mask; use attn_implementation="sdpa".'
            )
        return starts.cumsum(-1)

    def is_padding(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Which tokens are `config.pad_token_id`, or exactly its row of the embedding; bool (batch, length)."""
        padding = self.config.pad_token_id
        if input_ids is not None:
            return torch.zeros_like(input_ids, dtype=torch.bool) if padding is None else input_ids == padding
        assert inputs_embeds is not None
        if padding is None:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        row = self.embed_tokens(torch.tensor([padding], device=inputs_embeds.device))
        return (inputs_embeds == row.to(inputs_embeds.device)).all(-1)

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


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None: for others the configuration decides."""
    return {name: value for name, value in arguments.items() if value is not None}


def _integer_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels in a dtype that losses take; numbers with a fraction are left as they are."""
    return labels if labels.dtype.is_floating_point else labels.long()


class _Head:
    """What all heads share: the router's losses, and the outputs of the model beside their own."""

    config: GengramConfig

    def _with_router_losses(
        self,
        outputs: GengramModelOutput,
        attention_mask: Any,
        loss: torch.Tensor | None,
        share: torch.Tensor | None,
    ) -> dict[str, Any]:
        """`loss`, with the router's losses added if its logits are there, and what else a head returns.

        Args:
            outputs: of the model.
            attention_mask: as given; padding is left out of the router's losses if it is (batch, past + length).
            loss: this pass's part in the mean over an optimizer step.
            share: of the step's labels in this pass, from `share_of_step`.
        """
        config = self.config
        found: dict[str, Any] = {
            "loss": loss,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "router_logits": outputs.router_logits,
            "memory_gates": outputs.memory_gates,
            "memory_residual_norms": outputs.memory_residual_norms,
        }
        if not outputs.router_logits:
            return found
        mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            last: Any = outputs.last_hidden_state
            mask = attention_mask[:, -last.shape[1] :]
        aux_loss = load_balancing_loss(outputs.router_logits, config.num_experts_per_tok, mask)
        z_loss = router_z_loss(outputs.router_logits, mask)
        if loss is not None:
            router_loss = config.router_aux_loss_coef * aux_loss + config.router_z_loss_coef * z_loss
            router_loss = router_loss.to(loss.device)
            found["loss"] = loss + (router_loss if share is None else router_loss * share.to(loss.device))
        return found | {"aux_loss": aux_loss, "z_loss": z_loss}


class GengramForCausalLM(_Head, GengramPreTrainedModel, GenerationMixin):
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
            num_items_in_batch: as `Trainer` passes it on, the labels of a whole optimizer step; the loss, the
                router's included, is then this pass's part in the mean over the step.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        cache = _one_cache(past_key_values, cache)
        outputs: GengramModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{_CACHE: cache},
            **_given(output_router_logits=output_router_logits),
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states: Any = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, keep, :])
        loss = share = None
        if labels is not None:
            labels = _integer_labels(labels)  # type: ignore[assignment]
            shifted = kwargs.get("shift_labels")
            counted = labels[..., 1:] if shifted is None else shifted
            share = share_of_step(counted, num_items_in_batch)
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            loss = mean_over_step(loss, counted, share)
        return GengramCausalLMOutput(
            logits=logits,
            **{_CACHE: getattr(outputs, _CACHE)},
            **self._with_router_losses(outputs, attention_mask, loss, share),
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if "prepare_inputs_for_generation" in self.__dict__ and "cache" in inputs:
            # PEFT's prompts stand in front of this method and look for the cache under its older name.
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching; only for models without a memory, as `init_continuous_batching`."""
        self._check_continuous_batching()
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers.

        Raises:
            ValueError: if the model has a memory, for whose state the pages of continuous batching have no place.
        """
        self._check_continuous_batching()
        return super().init_continuous_batching(*args, **kwargs)

    def _check_continuous_batching(self) -> None:
        if self.config.memory_layers:
            raise ValueError(NO_CONTINUOUS_BATCHING)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in `GenerationMixin`; with `assistant_early_exit=n` the first n layers draft what the whole model checks.

        Raises:
            ValueError: if there are no such layers.
        """
        layers = self.config.num_hidden_layers
        generation_config = kwargs.get("generation_config") or self.generation_config
        drafting = kwargs.get("assistant_early_exit", getattr(generation_config, "assistant_early_exit", None))
        if drafting is not None and not 1 <= drafting <= layers:
            raise ValueError(f"assistant_early_exit must lie in 1..{layers} (num_hidden_layers), got {drafting}.")
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.config.num_hidden_layers = layers  # which drafting changes, and does not restore after an error


class GengramForMaskedLM(_Head, GengramPreTrainedModel):
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
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        kwargs["is_causal"] = False
        outputs: GengramModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **_given(output_router_logits=output_router_logits),
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = share = None
        if labels is not None:
            labels = _integer_labels(labels)  # type: ignore[assignment]
            if self.training and input_ids is not None and not torch.compiler.is_compiling():
                self._look_for_foreign_tokens(input_ids, labels)
            share = share_of_step(labels, num_items_in_batch)
            loss = mean_over_step(self.loss_function(logits, labels, self.vocab_size, **kwargs), labels, share)
        return GengramMaskedLMOutput(logits=logits, **self._with_router_losses(outputs, attention_mask, loss, share))

    def _look_for_foreign_tokens(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Say so if bases are hidden behind tokens that no sequence holds, which makes training worse, not wrong."""
        letters = torch.tensor(self.config.memory_token_ids, device=input_ids.device)
        hidden = input_ids[labels.to(input_ids.device) != IGNORED]
        others = hidden[~torch.isin(hidden, letters)]  # the mask alone, if all is well
        if others.numel() and bool((others != others[0]).any()):
            logger.warning_once(
                "Bases are hidden behind several tokens that are no bases, as by DataCollatorForLanguageModeling, "
                "which draws from the whole vocabulary. Use gengram.data_preparation.DataCollatorForGenomeModeling "
                "with a mask_probability, or give random_replace_prob=0."
            )


class GengramForSequenceClassification(_Head, GengramPreTrainedModel):
    """Gengram with a linear head on one vector per sequence: logits (batch, num_labels).

    The vector is the hidden state of the last token, or what `config.classifier_pooling` says.
    """

    def __init__(self, config: GengramConfig):
        super().__init__(config)
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
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GengramSequenceClassifierOutput:
        """Logits of each sequence's classes, and the loss if labels are given; other arguments as in `GengramModel`.

        Args:
            attention_mask: (batch, past + length), 0 for padding: it decides what is pooled. Without it a token is
                padding if it is `config.pad_token_id` or, among `inputs_embeds`, exactly that row of the embedding.
                A sequence of padding has the vector 0.
            labels: (batch,) classes or, for regression, numbers; (batch, num_labels) for several of either.

        Raises:
            ValueError: if the mask is not (batch, past + length).
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        cache = _one_cache(past_key_values, cache)
        outputs: GengramModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **{_CACHE: cache},
            **_given(output_router_logits=output_router_logits),
            **kwargs,
        )
        hidden_states: Any = outputs.last_hidden_state
        pooling = self.config.classifier_pooling
        is_padding = self.model.is_padding(input_ids, inputs_embeds).to(hidden_states.device)
        mask = token_mask(attention_mask, is_padding, f'classifier_pooling="{pooling}"')
        logits = self.score(pool_hidden_states(hidden_states, mask, pooling))
        loss = share = None
        if labels is not None:
            labels = _integer_labels(labels)
            share = share_of_step(labels, num_items_in_batch)
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = mean_over_step(loss, labels, share)
        return GengramSequenceClassifierOutput(
            logits=logits,
            **{_CACHE: getattr(outputs, _CACHE)},
            **self._with_router_losses(outputs, attention_mask, loss, share),
        )


class GengramForTokenClassification(_Head, GengramPreTrainedModel):
    """Gengram with a linear head on every base: logits (batch, length, num_labels)."""

    def __init__(self, config: GengramConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GengramModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GengramTokenClassifierOutput:
        """Logits of each base's classes, and the loss if labels (batch, length; -100: no loss) are given."""
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        cache = _one_cache(past_key_values, cache)
        outputs: GengramModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **{_CACHE: cache},
            **_given(output_router_logits=output_router_logits),
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = share = None
        if labels is not None:
            labels = _integer_labels(labels)
            share = share_of_step(labels, num_items_in_batch)
            loss = mean_over_step(self.loss_function(logits, labels, self.config), labels, share)
        return GengramTokenClassifierOutput(
            logits=logits, **self._with_router_losses(outputs, attention_mask, loss, share)
        )


__all__ = [
    "GengramForCausalLM",
    "GengramForMaskedLM",
    "GengramForSequenceClassification",
    "GengramForTokenClassification",
    "GengramModel",
    "GengramPreTrainedModel",
]
