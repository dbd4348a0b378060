"""What a graft remembers while its host decodes: kept in the host's cache, reordered, cropped and reset with it."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..configuration_motif_memory import MotifMemoryConfig
from ..state import MemoryState

_ATTRIBUTE = "motif_memory_state"
_LACKS_STATE = "motif_memory_lacks_state"
MOST_CROPPED = 512  # tokens that a cache can take back: what a graft keeps beyond what it reads


class _Pieces:
    """Tensors (batch, positions, width) in pieces as they came, joined only when they are read."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.length = 0
        self.is_whole = True  # nothing was dropped

    def append(self, new: torch.Tensor, kept: int) -> None:
        """Add positions, and drop old pieces that the last `kept` positions do without."""
        self.is_whole &= new.shape[1] <= kept
        self.pieces.append(new[:, -kept:].clone() if new.shape[1] > kept else new)
        self.length += self.pieces[-1].shape[1]
        while self.length - self.pieces[0].shape[1] >= kept:
            self.length -= self.pieces.pop(0).shape[1]
            self.is_whole = False

    def last(self, needed: int) -> torch.Tensor | None:
        """At least the last `needed` positions, or all; None if there are none."""
        taken, first = 0, len(self.pieces)
        while first and taken < needed:
            first -= 1
            taken += self.pieces[first].shape[1]
        found = self.pieces[first:] or self.pieces[-1:]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0] if found else None

    def copied(self) -> "_Pieces":
        """The same tensors, with a life of their own: none of them is ever written to."""
        new = copy.copy(self)
        new.pieces = list(self.pieces)
        return new

    def crop(self, tokens: int) -> None:
        """Forget the last positions."""
        left = tokens
        while self.pieces and left >= self.pieces[-1].shape[1]:
            left -= self.pieces.pop().shape[1]
        if left and self.pieces:
            self.pieces[-1] = self.pieces[-1][:, :-left]
        self.length = sum(piece.shape[1] for piece in self.pieces)

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change every piece."""
        self.pieces = [change(piece) for piece in self.pieces]

    @property
    def is_begun(self) -> bool:
        """Whether there are any."""
        return bool(self.pieces)

    def reset(self) -> None:
        """Forget everything."""
        self.pieces, self.length, self.is_whole = [], 0, True


class _Window:
    """The last positions of a tensor (batch, positions, width), always as many and at the same place in memory.

    So a compiled step, or a CUDA graph, finds them where it left them.
    """

    def __init__(self, positions: int, empty: int):
        self.length, self.empty = positions, empty  # `empty` stands where nothing came yet
        self.is_whole = True  # nothing can be forgotten
        self.is_begun = False
        self.tensor: torch.Tensor | None = None

    def append(self, new: torch.Tensor, kept: int) -> None:
        """Add positions; the oldest go."""
        if self.tensor is None or self.tensor.shape[0] != new.shape[0]:
            self._place(new.new_full((new.shape[0], self.length, new.shape[2]), self.empty))
        assert self.tensor is not None
        joined = torch.cat([self.tensor, new.to(self.tensor.dtype)], dim=1)
        self.tensor.copy_(joined[:, joined.shape[1] - self.length :])
        self.is_begun = True

    def last(self, needed: int) -> torch.Tensor | None:
        """All positions; None before the first."""
        return self.tensor if self.is_begun else None

    def copied(self) -> "_Window":
        """The same numbers at another place."""
        new = copy.copy(self)
        if self.tensor is not None:
            new._place(self.tensor.clone())
        return new

    def crop(self, tokens: int) -> None:
        """Only nothing can be forgotten."""
        if tokens:
            raise ValueError(
                f"a motif memory beside a static cache was asked to forget {tokens} tokens, which are not kept; use a "
                "DynamicCache."
            )

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the rows."""
        if self.tensor is None:
            return
        changed = change(self.tensor)
        if changed.shape == self.tensor.shape:
            self.tensor.copy_(changed)
        else:
            self._place(changed)

    def reset(self) -> None:
        """Begin again, at the same place."""
        self.is_begun = False
        if self.tensor is not None:
            self.tensor.fill_(self.empty)

    def _place(self, tensor: torch.Tensor) -> None:
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)
        self.tensor = tensor


class GraftState(MemoryState):
    """Token ids and inputs of the convolutions of the last tokens.

    A decoding step costs the same, however much is kept. Beside a static cache no more is kept than is read.
    """

    def __init__(self, config: MotifMemoryConfig, is_static: bool = False):
        super().__init__(config)
        self.is_static = is_static
        self._pieces: dict[tuple[int, str], Any] = {}
        self._tokens = 0  # that were read
        self._before: int | None = None  # tokens in the cache when there was no state yet, if the cache counts them
        self._lacks = 0  # tokens that were taken back and should still be kept

    @property
    def keeps_all(self) -> bool:
        return not self.is_static  # another cache may be cropped at any time

    def has_history(self, layer: int) -> bool:
        return any(
            pieces.is_begun for (place, name), pieces in self._pieces.items() if place == layer or name == "ids"
        )

    def ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of the `window - 1` tokens before `ids` (batch, length), -1 where there is none."""
        most = self.config.context
        kept = self._read("ids", 0) if most else None
        if kept is None:
            return ids.new_full((ids.shape[0], most), -1)
        kept = kept[:, -most:, 0]
        missing = most - kept.shape[1]
        return torch.nn.functional.pad(kept, (missing, 0), value=-1) if missing else kept

    def keep_in_step(self, past: int | torch.Tensor | None) -> None:
        """Forget tokens that were taken out of the cache's layers, past the cache's own methods.

        Args:
            past: tokens that the cache held before the pass, None if it does not count them.

        Raises:
            ValueError: if more were taken out than are kept, or some were added that the memories have not read.
        """
        if self.is_static or not isinstance(past, int) or torch.compiler.is_compiling():
            return
        if self._before is None:
            self._before = past - self._tokens
        missing = self._before + self._tokens - past
        if missing < 0:
            raise ValueError(
                f"the cache holds {-missing} tokens more than its motif memories have read; begin with a new one."
            )
        if missing:
            self.crop(missing)

    def advance_ids(self, ids: torch.Tensor) -> None:
        """Keep the ids of this pass, (batch, length)."""
        if not self.is_static:  # a compiled step would be made anew for each number
            self._tokens += ids.shape[1]
        self._write("ids", 0, ids.unsqueeze(-1), self.config.context)

    def _read(self, name: str, layer: int) -> torch.Tensor | None:
        self._check_kept()
        pieces = self._pieces.get((layer, name))
        return None if pieces is None else pieces.last(self._needed(name))

    def _needed(self, name: str) -> int:
        return {"ids": self.config.context, "conv_inputs": self.config.conv_context}.get(name, self.config.window)

    def _write(self, name: str, layer: int, new: torch.Tensor, most: int) -> None:
        if (layer, name) not in self._pieces:
            empty = -1 if name == "ids" else 0
            self._pieces[layer, name] = _Window(self._needed(name), empty) if self.is_static else _Pieces()
        self._pieces[layer, name].append(new, most + MOST_CROPPED)

    def copied(self) -> "GraftState":
        """The same, for another cache with the same tokens."""
        new = copy.copy(self)
        new._pieces = {place: pieces.copied() for place, pieces in self._pieces.items()}
        return new

    def select(self, rows: torch.Tensor) -> None:
        """Rows of the batch, in this order."""
        for pieces in self._pieces.values():
            pieces.change(lambda piece: piece[rows.to(piece.device)])

    def repeat(self, repeats: int) -> None:
        """Every row of the batch so many times."""
        for pieces in self._pieces.values():
            pieces.change(lambda piece: piece.repeat_interleave(repeats, dim=0))

    def crop(self, tokens: int) -> None:
        """Forget the last tokens.

        Raises:
            ValueError: if that is more than is kept.
        """
        self._tokens -= tokens
        for (_, name), pieces in self._pieces.items():
            pieces.crop(tokens)
            if not pieces.is_whole:
                self._lacks = max(self._lacks, self._needed(name) - pieces.length)
        self._check_kept()

    def _check_kept(self) -> None:
        if self._lacks > 0:
            raise ValueError(
                f"a motif memory was asked to forget {self._lacks} tokens more than it keeps, which is what it reads "
                f"and {MOST_CROPPED} before; run the text that stays again, with a new cache."
            )

    def reset(self) -> None:
        """Forget everything."""
        self._tokens, self._before, self._lacks = 0, None, 0
        for pieces in self._pieces.values():
            pieces.reset()


class _FollowedCache:
    """What a cache class gets on top, so that the state follows what is done with the cache."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the cache's own class, which can be imported."""
        return _empty, (type(self).__mro__[2],), self.__dict__

    def _state(self) -> GraftState:
        return getattr(self, _ATTRIBUTE)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._state().select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._state().select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._state().repeat(repeats)

    def crop(self, *arguments: Any, **options: Any) -> None:
        before = int(self.get_seq_length())  # type: ignore[attr-defined]
        super().crop(*arguments, **options)  # type: ignore[misc]
        self._state().crop(before - int(self.get_seq_length()))  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._state().reset()


def _empty(cache_class: Any) -> Any:
    return object.__new__(_followed(cache_class))


_followed_classes: dict[Any, Any] = {}


def _followed(cache_class: Any) -> Any:
    if cache_class not in _followed_classes:
        names = {"__module__": cache_class.__module__}
        _followed_classes[cache_class] = type(cache_class.__name__, (_FollowedCache, cache_class), names)
    return _followed_classes[cache_class]


def separate(cache: Any) -> None:
    """Give a cache that was copied with `copy.copy` a state of its own."""
    if isinstance(cache, _FollowedCache):
        setattr(cache, _ATTRIBUTE, cache._state().copied())


def follow(cache: Any, config: MotifMemoryConfig) -> GraftState:
    """The state that a cache of Transformers carries; a cache without one gets an empty one.

    Raises:
        ValueError: if the cache is one of other memories, or none could be kept in it, since the model is compiled.
    """
    if isinstance(cache, _FollowedCache):
        state = getattr(cache, _ATTRIBUTE)
        if state.config != config:
            raise ValueError("the cache was filled with other motif memories; begin with a new one.")
        return state
    if getattr(cache, _LACKS_STATE, False):
        raise ValueError(
            "the cache was made inside a compiled model, where a motif memory cannot keep its state in it: read the "
            "prompt uncompiled, and go on from its cache; or use generate."
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "a compiled model with a motif memory was given a new cache: read the prompt uncompiled, and go on from "
            "its cache; or use generate."
        )
    state = GraftState(config, is_static=bool(getattr(cache, "is_compileable", False)))
    setattr(cache, _ATTRIBUTE, state)
    cache.__class__ = _followed(type(cache))
    return state


def state_in(cache: Any, config: MotifMemoryConfig) -> GraftState | None:
    """The state in a cache that a layer was given, see `follow`; None without a cache.

    A cache that the host made just now inside a compiled call gets none: its class cannot be changed there.
    """
    if cache is None:
        return None
    if torch.compiler.is_compiling() and not isinstance(cache, _FollowedCache):
        setattr(cache, _LACKS_STATE, True)
        return None
    return follow(cache, config)
