"""Gengram model configuration."""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.mixtral.configuration_mixtral import MixtralConfig

from ..motif_memory.configuration_motif_memory import (
    EPSILONS,
    MotifMemoryConfig,
    check_integer,
    check_memory_fields,
    check_number,
    checked_list,
    shown,
    states_needed,
)

if TYPE_CHECKING:  # what a field holds once it is filled in
    _Int = int
    _Ints = list[int]
else:  # what may be given
    _Int = int | None
    _Ints = list[int] | tuple[int, ...] | None

SEQUENCE_POOLINGS = ("mean", "max", "last", "centre")

# Bounds of fields, far beyond any model: what is outside is a mistake, or an attack on whoever loads the file.
_INTEGERS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**24),
    "intermediate_size": (1, 2**24),
    "num_hidden_layers": (1, 2**12),
    "num_attention_heads": (1, 2**20),
    "max_position_embeddings": (1, 2**31 - 1),
}
_NUMBERS = {
    "initializer_range": (0.0, 1e3),
    "attention_dropout": (0.0, 1.0),
    "router_aux_loss_coef": (0.0, 1e6),
    "router_z_loss_coef": (0.0, 1e6),
    "router_jitter_noise": (0.0, 1.0),
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_OUTPUT_SWITCHES = ("output_memory_gates", "output_memory_residual_norms")
_OF_THE_CLASS = ("attribute_map", "base_config_key", "sub_configs_defaults", "keys_to_ignore_at_inference")


def _plain_errors(cls: type) -> type:
    """Let a wrong type be a `ValueError` in one line, as all other mistakes in a configuration are."""
    init = cls.__init__

    @functools.wraps(init)
    def plain_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            words = " ".join(str(error).split()).replace("TypeError: ", "").replace("ValueError: ", "")
            raise ValueError(words if len(words) <= 400 else f"{words[:400]}...") from error

    cls.__init__ = plain_init
    return cls


@_plain_errors
@strict
class GengramConfig(PreTrainedConfig):
    r"""
    What a Gengram model is: a Mixtral-like decoder plus a memory of k-mers on a few layers.

    The defaults describe the released 10B model (12 layers, hidden 4096, 8 experts of which 2 are used, context 8192).
    Layers are counted from 0 here; the original Megatron arguments count them from 1.

    Args:
        vocab_size (`int`, defaults to 128): Rows of the embedding; the ten tokens of the nucleotide alphabet, six
            specials of Megatron, and padding rows.
        hidden_size (`int`, defaults to 4096): Width of the residual stream.
        intermediate_size (`int`, defaults to 8192): Width of each expert (or of the dense feed-forward).
        num_hidden_layers (`int`, defaults to 12): Decoder layers.
        num_attention_heads (`int`, defaults to 16): Query heads.
        num_key_value_heads (`int`, *optional*, defaults to 8): Key and value heads; 1 is multi-query, `None` means as
            many as query heads.
        head_dim (`int`, *optional*): Width of a head; `None` means `hidden_size // num_attention_heads`.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gated feed-forward.
        max_position_embeddings (`int`, defaults to 8192): Context length in tokens.
        initializer_range (`float`, defaults to 0.01): Standard deviation of new weights.
        rms_norm_eps (`float`, defaults to 1e-5): Epsilon of the backbone's RMSNorms.
        use_cache (`bool`, defaults to `True`): Return a key/value cache.
        pad_token_id (`int`, *optional*, defaults to 0): `[PAD]`.
        bos_token_id (`int`, *optional*): Unset: the authors train without a start token.
        eos_token_id (`int`, *optional*): Unset: generation ends at the length that was asked for.
        tie_word_embeddings (`bool`, defaults to `False`): Share the embedding with the language-model head.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention weights.
        rope_parameters (`dict`, *optional*): Rotary embedding; `{"rope_type": "default", "rope_theta": 10000.0}`.
        num_local_experts (`int`, defaults to 8): Experts per layer; 0 or 1 is a dense feed-forward.
        num_experts_per_tok (`int`, defaults to 2): Experts used per token.
        norm_topk_prob (`bool`, defaults to `True`): Expert weights sum to one over the chosen experts (softmax after
            top-k). `False` is Megatron's `--moe-router-pre-softmax`.
        output_router_logits (`bool`, defaults to `False`): Return router logits and add the router losses.
        router_aux_loss_coef (`float`, defaults to 0.001): Weight of the load-balancing loss.
        router_z_loss_coef (`float`, defaults to 0.001): Weight of the router z-loss.
        router_jitter_noise (`float`, defaults to 0.0): Multiplicative noise on the router's input in training.
        is_causal (`bool`, defaults to `True`): `False` is bidirectional use: full attention, a memory window centred
            on the base and a symmetric short convolution. `GengramForMaskedLM` always works so.
        classifier_dropout (`float`, *optional*): Dropout before the token-classification head.
        classifier_pooling (`str`, defaults to `"last"`): What the sequence-classification head reads of a sequence's
            last hidden states: the `"last"` one, the one in the `"centre"` (the earlier of two), their `"mean"` or
            their `"max"`. A causal model has seen the whole sequence only at the last token, but little of what lies
            far before it decides there: `"mean"` and `"max"` suit motifs, `"centre"` suits sequences that are aligned
            to a site.
        memory_layers (`list[int]`, *optional*): Decoder layers with a memory, counted from 0. `None` means
            `[2, 5, 9]`, as far as these layers exist; `[]` is a model without memory.
        memory_ngram_sizes (`list[int]`, *optional*, defaults to `[1, 2, 3, 4, 5, 6]`): k of the k-mers, in any order;
            each has a table of `5**k` rows.
        memory_embedding_dim (`int`, defaults to 1024): Width of one table.
        memory_window (`int`, defaults to 21): Bases that a k-mer must lie within to be pooled.
        memory_token_ids (`list[int]`, *optional*, defaults to `[8, 5, 6, 7, 9]`): Token ids of A, C, G, T, N, in this
            order: the digits 0..4 of a table row.
        memory_conv_kernel (`int`, defaults to 4): Taps of the short depthwise convolution; 0 is none.
        memory_conv_dilation (`int`, *optional*): Distance of the taps in bases; `None` means the largest k.
        memory_norm_eps (`float`, defaults to 1e-5): Epsilon of the memory's two RMSNorms.
        memory_pooling (`str`, defaults to `"exact"`): `"exact"` takes each window mean in at least float32;
            `"as_trained"` repeats the original's order of operations (differences of prefix sums in the dtype of the
            activations), to reproduce published low-precision numbers. See `docs/numerics.md`.

    Raises:
        `ValueError`: if fields have wrong types, are out of bounds or contradict each other; the message says what was
            expected, what came, what to do.

    Example:

    ```python
    >>> from gengram import GengramConfig
    >>> config = GengramConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    ...                        head_dim=16, memory_layers=[1, 2], memory_embedding_dim=8)
    >>> config.memory_conv_dilation
    6

    ```
    """

    model_type = "gengram"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        *("past_key_values", "cache", "aux_loss", "z_loss", "router_logits", "memory_gates", "memory_residual_norms")
    ]
    default_theta = 10000.0
    attribute_map = {"num_experts": "num_local_experts"}  # noqa: RUF012

    # Mixtral's plans fit the same module names; the memory is replicated on every rank.
    base_model_pp_plan = MixtralConfig.base_model_pp_plan

    vocab_size: int = 128
    hidden_size: int = 4096
    intermediate_size: int = 8192
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: _Int = 8
    head_dim: _Int = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.01
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    attention_dropout: float | int = 0.0
    rope_parameters: RopeParameters | dict | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    is_causal: bool = True
    classifier_dropout: float | int | None = None
    classifier_pooling: str = "last"
    memory_layers: _Ints = None
    memory_ngram_sizes: _Ints = None
    memory_embedding_dim: int = 1024
    memory_window: int = 21
    memory_token_ids: _Ints = None
    memory_conv_kernel: int = 4
    memory_conv_dilation: _Int = None
    memory_norm_eps: float = 1e-5
    memory_pooling: str = "exact"

    def __post_init__(self, **kwargs):
        for derived in ("layer_types", "number_of_conv_states"):  # computed below, never read back
            kwargs.pop(derived, None)
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        self._refuse_unknown_names(kwargs)
        self._check_fields_of_the_library(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads when head_dim is not given, got "
                    f"{self.hidden_size} and {self.num_attention_heads}; give head_dim, or change one of them."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.memory_layers is None:
            self.memory_layers = [layer for layer in (2, 5, 9) if layer < self.num_hidden_layers]
        if self.memory_ngram_sizes is None:
            self.memory_ngram_sizes = [1, 2, 3, 4, 5, 6]
        if self.memory_token_ids is None:
            self.memory_token_ids = [8, 5, 6, 7, 9]
        self.memory_layers = sorted(self.memory_layers)
        self.memory_ngram_sizes = list(self.memory_ngram_sizes)
        self.memory_token_ids = list(self.memory_token_ids)
        if self.memory_conv_dilation is None and self.memory_ngram_sizes:
            self.memory_conv_dilation = max(self.memory_ngram_sizes)
        self.validate_architecture()  # here, so that the caller sees a plain ValueError
        self.validate_memory()
        super().__post_init__(**kwargs)
        self.validate_rotary_embedding()

    def _refuse_unknown_names(self, names: dict[str, Any]) -> None:
        """Refuse names that look like misspelt fields, or belong to the class; others are kept, as is usual."""
        known = list(GengramConfig.__annotations__)
        for name in names:
            is_memory = name.startswith("memory_")
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if is_memory else 0.9)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            if is_memory:
                fields_of_memory = ", ".join(field for field in known if field.startswith("memory_"))
                raise ValueError(
                    f"GengramConfig has no field {shown(name)}{hint} Its memory fields are {fields_of_memory}."
                )
            if nearest:
                raise ValueError(f"GengramConfig has no field {shown(name)}{hint}")
            if name in _OF_THE_CLASS or (name.startswith("base_model_") and name.endswith("_plan")):
                raise ValueError(f"{name} belongs to the class GengramConfig and cannot be given.")
        if names.get("per_layer_config") is not None:
            raise ValueError("Gengram's layers are all alike; per_layer_config cannot be given.")

    def _check_fields_of_the_library(self, others: dict[str, Any]) -> None:
        """Refuse labels, dtypes and switches that Transformers would stumble over, or count up to for hours."""
        if others.get("num_labels", 0) is None:
            del others["num_labels"]  # as if it were not given
        if "num_labels" in others:
            check_integer("num_labels", others["num_labels"], 1, 2**16)
        for name in ("id2label", "label2id"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, dict) or not 1 <= len(value) <= 2**16:
                raise ValueError(f"{name} must be a dictionary of 1 to {2**16} labels, got {shown(value)}.")
        try:
            numbers = sorted(int(index) for index in self.id2label or {})
        except (TypeError, ValueError):
            numbers = [-1]
        if numbers != list(range(len(numbers))):
            raise ValueError(f"id2label must name the classes 0, 1, 2, ..., got {shown(self.id2label)}.")
        for name, value in (("dtype", self.dtype), ("torch_dtype", others.get("torch_dtype"))):
            if value is not None and not _is_dtype(value):
                raise ValueError(f'{name} must be a dtype of PyTorch, such as "bfloat16", got {shown(value)}.')
        if self.problem_type not in (
            *(None, "regression", "single_label_classification", "multi_label_classification"),
        ):
            raise ValueError(
                "problem_type must be regression, single_label_classification or multi_label_classification, got "
                f"{shown(self.problem_type)}."
            )
        if self.architectures is not None and not _are_strings(self.architectures):
            raise ValueError(f"architectures must be a list of names, got {shown(self.architectures)}.")
        switches = ("return_dict", "is_encoder_decoder", "output_attentions", *_OUTPUT_SWITCHES)
        for name, value in [(name, others.get(name, getattr(self, name, None))) for name in switches]:
            if not isinstance(value, bool | None):
                raise ValueError(f"{name} must be true or false, got {shown(value)}.")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder must be false: Gengram is a decoder.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, but fields among the arguments are there before anything is derived from them."""
        names = {*GengramConfig.__annotations__, *cls.attribute_map}
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        for alias, name in cls.attribute_map.items():
            if alias in given and name in given and given[alias] != given[name]:
                raise ValueError(f"{alias} and {name} are two names of one field; give only one of them.")
            if alias in given:
                given[name] = given.pop(alias)
        return super().from_dict({**config_dict, **given}, **kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism cuts the layers: as Mixtral's, or with a dense feed-forward."""
        return self._plan_of_layers() | self.__dict__.get("base_model_tp_plan", {})

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """What is added to the plan, as Transformers 5.18 does for tied embeddings."""
        of_layers = self._plan_of_layers()
        self.__dict__["base_model_tp_plan"] = {name: plan[name] for name in plan if name not in of_layers}

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """How expert parallelism spreads the experts: as Mixtral's, or not at all with a dense feed-forward."""
        return self._plan_of_experts() | self.__dict__.get("base_model_ep_plan", {})

    @base_model_ep_plan.setter
    def base_model_ep_plan(self, plan: dict[str, str]) -> None:
        """What is added to the plan, as Transformers 5.18 does for the scales of weights in float8."""
        of_experts = self._plan_of_experts()
        self.__dict__["base_model_ep_plan"] = {name: plan[name] for name in plan if name not in of_experts}

    def to_dict(self) -> dict[str, Any]:
        """All fields; plans are no part of them."""
        return {name: value for name, value in super().to_dict().items() if name != "base_model_ep_plan"}

    def _plan_of_experts(self) -> dict[str, str]:
        plan: Any = MixtralConfig.base_model_ep_plan
        return dict(plan) if self.num_local_experts > 1 else {}

    def _plan_of_layers(self) -> dict[str, str]:
        if self.num_local_experts > 1:
            return MixtralConfig.base_model_tp_plan
        plan = {name: style for name, style in MixtralConfig.base_model_tp_plan.items() if ".mlp." not in name}
        dense = (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise"))
        return plan | {f"layers.*.mlp.{name}": style for name, style in dense}

    def _memory_fields(self) -> dict:
        """The fields of the memory by their names in `MotifMemoryConfig`."""
        return {field.name: getattr(self, f"memory_{field.name}") for field in fields(MotifMemoryConfig)}

    @property
    def memory(self) -> MotifMemoryConfig:
        """The memory's own configuration; on disk its fields are flat, with `memory_` in front."""
        return MotifMemoryConfig(**self._memory_fields())

    @property
    def number_of_conv_states(self) -> int:
        """States per memory layer, under the name that Transformers' caches look for."""
        return len(states_needed(self.memory_window, self.memory_conv_kernel, self.memory_pooling))

    @property
    def layer_types(self) -> list[str]:
        """Kind of each layer's cache; `"hybrid"` adds `number_of_conv_states` states to keys and values."""
        with_states = set(self.memory_layers) if self.number_of_conv_states else set()
        return ["hybrid" if layer in with_states else "full_attention" for layer in range(self.num_hidden_layers)]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do in the package, whose saved models bring their source code; a copy in a folder registers."""
        if not cls.__module__.startswith("gengram."):
            super().register_for_auto_class(auto_class)

    # `strict` calls every method whose name starts with "validate" again on demand, as in `save_pretrained`.
    def validate_architecture(self):
        for name, bounds in _INTEGERS.items():
            check_integer(name, getattr(self, name), *bounds)
        for name, bounds in _NUMBERS.items():
            check_number(name, getattr(self, name), *bounds)
        if self.classifier_dropout is not None:
            check_number("classifier_dropout", self.classifier_dropout, 0.0, 1.0)
        check_number("rms_norm_eps", self.rms_norm_eps, *EPSILONS, "positive")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        check_integer("num_key_value_heads", groups, 1, 2**20)
        if heads % groups:
            default = type(self).num_key_value_heads
            hint = f" ({default} is the default; give num_key_value_heads too)" if groups == default else ""
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {groups}{hint}."
            )
        check_integer("head_dim", self.head_dim, None, 2**24)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary embeddings turn pairs), got {self.head_dim}.")
        check_integer("num_local_experts", self.num_local_experts, 0, 2**12, "0 or 1 (dense) or the number of experts")
        if self.num_local_experts > 1 and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok must lie in 1..{self.num_local_experts} (num_local_experts), got "
                f"{shown(self.num_experts_per_tok)}."
            )
        check_integer("num_experts_per_tok", self.num_experts_per_tok, 0, 2**12)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must lie in 0..{self.vocab_size - 1} (vocab_size), got {shown(token)}.")
        if self.classifier_pooling not in SEQUENCE_POOLINGS:
            raise ValueError(
                f"classifier_pooling must be one of {', '.join(SEQUENCE_POOLINGS)}, got "
                f"{shown(self.classifier_pooling)}."
            )

    def validate_rotary_embedding(self):
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        kind = rope.get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(_ROPE_TYPES)}, got {shown(kind)}.")
        for name, value in rope.items():
            where = f"{name} of rope_parameters"
            if name == "rope_theta":
                check_number(where, value, 1.0, 1e15)
            elif name == "partial_rotary_factor" and value != 1:
                raise ValueError(f"{where} must be 1: heads are turned as a whole; got {shown(value)}.")
            elif name in ("short_factor", "long_factor"):
                is_list = isinstance(value, Sequence) and not isinstance(value, str)
                if not is_list or len(value) != self.head_dim // 2:
                    raise ValueError(f"{where} must be a list of head_dim // 2 numbers, got {shown(value)}.")
                for factor in value:
                    check_number(where, factor, 1e-6, 1e6)
            elif name not in ("rope_type", "type", "truncate") and value is not None:
                check_number(where, value, 0.0 if name.startswith("mscale") else 1e-6, 1e9)
        try:
            self.validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    def validate_memory(self):
        checked_list("memory_layers", self.memory_layers)
        out_of_range = [layer for layer in self.memory_layers if not 0 <= layer < self.num_hidden_layers]
        if out_of_range:
            wrong = ", ".join(map(shown, out_of_range[:10]))
            raise ValueError(
                f"memory_layers must lie in 0..{self.num_hidden_layers - 1}, got {wrong} "
                "(the original configuration counts layers from 1, this one from 0)."
            )
        if len(set(self.memory_layers)) != len(self.memory_layers):
            raise ValueError(f"memory_layers must not repeat a layer, got {shown(self.memory_layers)}.")
        check_memory_fields(
            self._memory_fields(), prefix="memory_", without="; for a model without memory set memory_layers=[]"
        )
        ids = checked_list("memory_token_ids", self.memory_token_ids)
        if len(ids) != 5 or len(set(ids)) != 5:
            letters = "those of A, C, G, T, N"
            raise ValueError(f"memory_token_ids must be five different ids, {letters}, got {shown(ids)}.")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise ValueError(f"memory_token_ids must lie in 0..{self.vocab_size - 1} (vocab_size), got {shown(ids)}.")
        if self.memory_pooling == "as_trained" and not self.is_causal:
            raise ValueError(
                'memory_pooling="as_trained" repeats the original, which is causal; use "exact" with is_causal=False.'
            )


def _is_dtype(value: Any) -> bool:
    """Whether a value is, or names, a dtype of PyTorch."""
    import torch

    return isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)


__all__ = ["GengramConfig"]
