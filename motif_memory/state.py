"""What decoding must know of earlier tokens, and where Transformers' caches keep it."""

import functools
import logging
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from .configuration_motif_memory import MotifMemoryConfig
from .definition import MemoryOutput

logger = logging.getLogger(__name__)


NO_CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch) keeps attention's keys and values in pages, where the state of the motif "
    "memory has no place. Use generate(), which takes prompts of different lengths padded on the left."
)


class MemoryState:
    """Letters of the last tokens, and for each memory layer the last inputs of its convolution.

    A pass reads the state while it computes; `advance_letters` and `advance` are called after, by whoever called the
    memory. This class keeps tensors of its own; `CacheState` keeps them in a cache of Transformers.

    Example:

    >>> import torch
    >>> from gengram.motif_memory import MemoryState, MotifMemoryConfig
    >>> state = MemoryState(MotifMemoryConfig(ngram_sizes=(1, 2), embedding_dim=4, window=5))
    >>> state.letters(torch.ones(1, 3, dtype=torch.int64)).shape  # of at most four earlier tokens; none so far
    torch.Size([1, 0])
    >>> state.advance_letters(torch.ones(1, 3, dtype=torch.int64))
    >>> state.letters(torch.ones(1, 1, dtype=torch.int64)).shape
    torch.Size([1, 3])
    """

    def __init__(self, config: MotifMemoryConfig):
        self.config = config
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    @staticmethod
    def of(cache: Any, config: MotifMemoryConfig, layers: Sequence[int]) -> "CacheState | None":
        """The state that a cache of Transformers holds for the memories of these layers; None without a cache.

        Raises:
            ValueError: if the cache has no room for it.
        """
        return None if cache is None else CacheState(cache, config, layers)

    @property
    def keeps_all(self) -> bool:
        """Whether all inputs of the convolution must be handed over, to take tokens back later."""
        return False

    @property
    def owner(self) -> Any:
        """What the state lives and dies with."""
        return self

    def has_history(self, layer: int) -> bool:
        """Whether tokens came before this pass."""
        return any((place, name) in self._kept for place in (layer, 0) for name in self.config.states)

    def letters(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of the tokens before `codes` (batch, length): of `window - 1`, or of all if there are fewer."""
        kept = self._read("letter_codes", 0)
        return codes.new_zeros(codes.shape[0], 0) if kept is None else kept.squeeze(-1)

    def conv_inputs(self, layer: int) -> torch.Tensor | None:
        """The last inputs of a layer's convolution, (batch, `conv_context`, hidden); None before the first token."""
        if not self.config.conv_context:
            return None
        kept = self._read("conv_inputs", layer)
        return None if kept is None else _last(kept, self.config.conv_context)

    def prefix_sums(self, layer: int) -> torch.Tensor | None:
        """Prefix sums (batch, at most `window`, features) at the last positions, of `as_trained` pooling."""
        return self._read("prefix_sums", layer)

    def advance_letters(self, codes: torch.Tensor) -> None:
        """Keep the letters of this pass, (batch, length)."""
        self._write("letter_codes", 0, codes.unsqueeze(-1), self.config.context)

    def advance(self, layer: int, output: MemoryOutput) -> None:
        """Keep what a layer's memory made of this pass."""
        if self.config.conv_context:
            self._write("conv_inputs", layer, output.gated, self.config.conv_context)
        if output.prefix_sums is not None:
            self._write("prefix_sums", layer, output.prefix_sums, self.config.window)

    # Where the states are: (batch, positions, width).

    def _read(self, name: str, layer: int) -> torch.Tensor | None:
        return self._kept.get((layer, name))

    def _write(self, name: str, layer: int, new: torch.Tensor, most: int) -> None:
        kept = self._kept.get((layer, name))
        joined = new if kept is None else torch.cat([kept, new.to(kept.dtype)], dim=1)
        self._kept[layer, name] = joined[:, max(joined.shape[1] - most, 0) :]


def _last(kept: torch.Tensor, most: int) -> torch.Tensor:
    """The last `most` positions of (batch, positions, width), zeros in front where there are fewer."""
    missing = most - kept.shape[1]
    return F.pad(kept, (0, 0, missing, 0)) if missing > 0 else kept[:, kept.shape[1] - most :]


class CacheState(MemoryState):
    """The state in a cache whose layers keep convolution states, so that it is reordered, cropped and reset with it.

    Every layer keeps its own copy of the letters, as the caches expect.
    """

    def __init__(self, cache: Any, config: MotifMemoryConfig, layers: Sequence[int]):
        super().__init__(config)
        self.cache, self.layers = cache, tuple(layers)
        if config.states:
            _make_room(cache, self.layers, len(config.states))
            if getattr(cache, "offloading", False):
                _keep_states_in_place([cache.layers[layer] for layer in self.layers])

    @property
    def keeps_all(self) -> bool:
        return any(bool(getattr(self.cache.layers[layer], "record_past", False)) for layer in self.layers)

    @property
    def owner(self) -> Any:
        return self.cache

    def has_history(self, layer: int) -> bool:
        return bool(self.config.states) and any(self.cache.layers[layer].has_previous_state.values())

    def advance_letters(self, codes: torch.Tensor) -> None:
        for layer in self.layers if self.config.context else ():
            self._write("letter_codes", layer, codes.unsqueeze(-1), self.config.context)

    def letters(self, codes: torch.Tensor) -> torch.Tensor:
        most = self.config.context
        kept = self._read("letter_codes", self.layers[0])
        past = 0 if kept is None else self.cache.get_seq_length()
        if torch.compiler.is_compiling() or not isinstance(past, int):  # a compiled graph has one shape
            past = most
        if kept is None:
            return codes.new_zeros(codes.shape[0], min(past, most))
        return _last(kept, min(past, most)).squeeze(-1)

    def _read(self, name: str, layer: int) -> torch.Tensor | None:
        kept = self.cache.layers[layer]
        index = self.config.states.index(name)
        return kept.conv_states[index].transpose(1, 2) if kept.has_previous_state[index] else None

    def _write(self, name: str, layer: int, new: torch.Tensor, most: int) -> None:
        index = self.config.states.index(name)
        self.cache.update_conv_state(new.transpose(1, 2), layer, state_idx=index, conv_kernel_size=most)


def _keep_states_in_place(layers: Sequence[Any]) -> None:
    """Let layers of a cache that wait in the CPU's memory take keys and values there only.

    Such a cache brings a layer back for its attention, and the memory reads its states before that.
    """
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    for layer in layers:
        of_states = LinearAttentionCacheLayerMixin
        kinds: list[Any] = [kind for kind in type(layer).__mro__ if not issubclass(kind, of_states)]
        if kind := next((kind for kind in kinds if hasattr(kind, "offload")), None):  # none: it keeps no keys
            layer.offload, layer.prefetch = MethodType(kind.offload, layer), MethodType(kind.prefetch, layer)


def _make_room(cache: Any, layers: Sequence[int], states: int) -> None:
    """Let a cache that was built without a configuration keep the memory's states, in place.

    Keys and values that it holds already have no letters: prompts, as prefix tuning trains them. The memory then
    begins behind them as at the start of a sequence.

    Raises:
        ValueError: if the cache is of a kind without such layers.
    """
    without = [layer for layer in layers if layer >= len(cache.layers) or not _keeps_states(cache.layers[layer])]
    if not without:
        return
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

    plain = all(type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer) for layer in cache.layers)
    if type(cache) is not DynamicCache or not plain:
        raise ValueError(
            f"the cache has no room for the memory of layer {without[0]}: expected one built for this model, got "
            f"{type(cache).__name__} without its configuration. Build it with "
            "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)."
        )
    cache.layers += [DynamicLayer() for _ in range(len(cache.layers), max(without) + 1)]
    for layer in without:
        old: Any = cache.layers[layer]
        cache.layers[layer] = new = LinearAttentionAndFullAttentionLayer(number_of_states=states)
        if old.is_initialized:
            new.update(old.keys, old.values)
    if cache.get_seq_length() > 0:
        _say_once(
            f"a cache of {cache.get_seq_length()} positions came without the letters at these positions, as prompts "
            "of prefix tuning do: the memory begins behind them. If this model filled the cache, keep the cache "
            "itself, or build the new one with DynamicCache(config=model.config)."
        )


def _keeps_states(layer: Any) -> bool:
    return hasattr(layer, "conv_states")


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
