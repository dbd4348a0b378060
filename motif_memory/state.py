"""What decoding must know of earlier tokens, and where Transformers' caches keep it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .configuration_motif_memory import MotifMemoryConfig
from .definition import MemoryOutput


class MemoryState:
    """Letters of the last tokens, and for each memory layer the last inputs of its convolution.

    A pass reads the state while it computes; `advance_letters` and `advance` are called after, by whoever called the
    memory. This class keeps tensors of its own; `CacheState` keeps them in a cache of Transformers.

    Example:

    >>> import torch
    >>> from gengram.motif_memory import MemoryState, MotifMemoryConfig
    >>> state = MemoryState(MotifMemoryConfig(ngram_sizes=(1, 2), embedding_dim=4, window=5))
    >>> state.letters(torch.ones(1, 3, dtype=torch.int64)).shape  # four earlier tokens, none of them known yet
    torch.Size([1, 4])
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
        """Codes of the `window - 1` tokens before `codes` (batch, length), 0 where there is none."""
        return self._last("letter_codes", 0, self.config.context, codes)

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

    def _last(self, name: str, layer: int, most: int, codes: torch.Tensor) -> torch.Tensor:
        kept = self._read(name, layer) if most else None
        if kept is None:
            return codes.new_zeros(codes.shape[0], most)
        return _last(kept, most).squeeze(-1)

    # Where the states are: (batch, positions, width).

    def _read(self, name: str, layer: int) -> torch.Tensor | None:
        return self._kept.get((layer, name))

    def _write(self, name: str, layer: int, new: torch.Tensor, most: int) -> None:
        kept = self._kept.get((layer, name))
        joined = new if kept is None else torch.cat([kept, new.to(kept.dtype)], dim=1)
        self._kept[layer, name] = _last(joined, most)


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
        for layer in self.layers if config.states else ():
            if len(cache.layers) <= layer or not hasattr(cache.layers[layer], "conv_states"):
                raise ValueError(
                    f"the cache has no room for the memory of layer {layer}: expected one built for this model, got "
                    f"{type(cache).__name__} without its configuration. Build it with "
                    "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)."
                )

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
        return self._last("letter_codes", self.layers[0], self.config.context, codes)

    def _read(self, name: str, layer: int) -> torch.Tensor | None:
        kept = self.cache.layers[layer]
        index = self.config.states.index(name)
        return kept.conv_states[index].transpose(1, 2) if kept.has_previous_state[index] else None

    def _write(self, name: str, layer: int, new: torch.Tensor, most: int) -> None:
        index = self.config.states.index(name)
        self.cache.update_conv_state(new.transpose(1, 2), layer, state_idx=index, conv_kernel_size=most)
