"""How much memory a model needs, computed from its configuration: nothing is loaded, weights exist as shapes only."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

EXPERTS = {"int8": (1.0, 1), "int4": (0.5, 32)}  # bytes per weight of the numbers, and which part of rows has a scale


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a causal language model needs for inference.

    Args:
        dtype: Of weights, cache and activations.
        parameters: Numbers in the model.
        weights: All weights in `dtype`.
        weights_by_experts: The same with the experts kept in 8 or 4 bits; empty for a model without experts.
        weights_by_both: The same with the attention in 8 bits beside such experts.
        cache: Attention's keys and values, and the memory's state, when `length` tokens were read.
        activations: The largest that a prompt of `length` tokens holds at once, read in one pass (an estimate: what
            the mixture of experts keeps between its two products, where most is).
        step_activations: The same for one token.
        folds: The memory's tables, projected in advance; optional, and faster.
    """

    dtype: str
    batch: int
    length: int
    parameters: int
    weights: int
    weights_by_experts: dict[str, int]
    weights_by_both: dict[str, int]
    cache: int
    activations: int
    step_activations: int
    folds: int

    def as_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return asdict(self)

    def summary(self) -> str:
        """The numbers in a few lines for people."""
        lines = [
            f"memory for {self.batch} x {self.length:,} tokens in {self.dtype} (computed, not measured; GB: 1e9 bytes)"
        ]
        rows = [("weights", self.weights)]
        rows += [(f"  with experts in {kind}", size) for kind, size in self.weights_by_experts.items()]
        rows += [(f"  and attention in int8, experts {kind}", size) for kind, size in self.weights_by_both.items()]
        rows += [
            ("cache", self.cache),
            ("activations, prompt in one pass", self.activations),
            ("activations, one token", self.step_activations),
            ("folded memory, if folded", self.folds),
            ("in all, unquantised, not folded", self.weights + self.cache + self.activations),
        ]
        for kind, size in self.weights_by_experts.items():
            rows.append((f"  with experts in {kind}", size + self.cache + self.activations))
        return "\n".join([*lines, *(f"  {name:<39} {size / 1e9:8.2f} GB" for name, size in rows)])


def memory_needs(config: Any, dtype: torch.dtype, batch: int, length: int) -> MemoryNeeds:
    """What a model of this configuration needs.

    Args:
        config: a `GengramConfig`; how its folder keeps the experts does not matter.
        dtype: of weights, cache and activations.
        batch: sequences that are read at once.
        length: tokens of each.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    attention = [weight for name, weight in model.named_parameters() if ".self_attn." in name]
    parameters, size = model.num_parameters(), dtype.itemsize
    kinds = EXPERTS if experts else ()
    kept = {kind: parameters * size - _saved(experts, kind, size) for kind in kinds}
    return MemoryNeeds(
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        length=length,
        parameters=parameters,
        weights=parameters * size,
        weights_by_experts=kept,
        weights_by_both={kind: kept[kind] - _saved(attention, "int8", size) for kind in kinds},
        cache=batch * _cache_bytes(config, size, length),
        activations=_activation_bytes(config, size, batch * length),
        step_activations=_activation_bytes(config, size, batch),
        folds=len(_memory_layers(config)) * _fold_bytes(config),
    )


def _saved(weights: list[torch.Tensor], kind: str, size: int) -> int:
    """Bytes by which quantised weights need less than weights of `size` bytes."""
    per_weight, group = EXPERTS[kind]
    count = sum(weight.numel() for weight in weights)
    scales = sum(weight.numel() // (weight.shape[-1] if kind == "int8" else group) for weight in weights)
    return (count - scales) * size - int(count * per_weight)


def _memory_layers(config: Any) -> list[int]:
    return [layer for layer in config.memory_layers if layer < config.num_hidden_layers]


def _cache_bytes(config: Any, size: int, length: int) -> int:
    """Of one sequence: keys and values, the memory's convolution (float32), and the letters of its window."""
    attention = 2 * config.num_key_value_heads * config.head_dim * size * length * config.num_hidden_layers
    reach = (config.memory_conv_kernel - 1) * config.memory_conv_dilation if config.memory_conv_kernel else 0
    state = config.hidden_size * reach * max(size, 4) + (config.memory_window - 1) * torch.int64.itemsize
    return attention + state * len(_memory_layers(config))


def _activation_bytes(config: Any, size: int, tokens: int) -> int:
    """The residual stream, its norm, and the feed-forward: its inputs, gate and up, the activation and the product.

    The stream is held four times: embeddings, before the layer, within it, and what a memory adds. Beside
    `benchmarks/ten_billion.py` this is 1 % too little.
    """
    used = config.num_experts_per_tok if config.num_local_experts > 1 else 1
    inputs = config.hidden_size if config.num_local_experts > 1 else 0
    return tokens * size * (5 * config.hidden_size + used * (inputs + 4 * config.intermediate_size))


def _fold_bytes(config: Any) -> int:
    """Keys and values of one layer: rows of the tables A, C and B (motif_memory/README.md), in 16 bits."""
    largest = max(config.memory_ngram_sizes)
    rows = 5**largest + sum(5**n for n in range(1, largest)) + 5 ** (largest - 1)
    return 2 * rows * config.hidden_size * torch.float16.itemsize
