"""What the memories of one pass of the host share: letters, segments, padding and state."""

import threading
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_motif_memory import MotifMemoryConfig
from ..definition import NgramPlan, SpelledPlan
from ..plan import plan_ngrams
from .state_in_cache import GraftState, state_in
from .token_letters import Spelling

_MOST_EARLIER = 64  # calls of layers


class HostPass:
    """One call of the host.

    Args:
        input_ids: (batch, length).
        attention_mask: of the call: (batch, past + length), 1 for tokens and 0 for padding; or what the host makes of
            it, (batch, 1 or heads, length, past + length).
        position_ids: (batch or 1, length), if the caller gave them; a new segment begins where they do not go on.
        past: tokens in the cache that the call goes on from, None if it cannot say.
        spelling: letters of the tokens.
        is_causal: whether a window looks back only.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        past: int | torch.Tensor | None,
        spelling: Spelling,
        is_causal: bool,
    ):
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.position_ids = position_ids
        self.past = past
        self.spelling = spelling
        self.is_causal = is_causal
        self.state: GraftState | None = None
        self.ids: torch.Tensor | None = None
        self.has_run: set[int] = set()  # which memories were computed
        self._plans: dict[torch.device, NgramPlan | SpelledPlan] = {}

    def plan(
        self, config: MotifMemoryConfig, cache: Any, device: torch.device
    ) -> tuple[NgramPlan | SpelledPlan, GraftState | None]:
        """The plan of this pass on a device, and the state that the cache carries; made at the first memory."""
        if device not in self._plans:
            self.state = state_in(cache, config) if self.is_causal else None
            if self.state is not None:
                self.state.keep_in_step(self.past)
            ids = self.spelling.known(self.input_ids)
            exists = _exists(self.attention_mask, ids.shape, self.past)
            if exists is not None:
                ids = torch.where(exists.to(ids.device), ids, -1)
            self.ids = ids
            self._plans[device] = _plan(
                ids.to(device),
                config,
                None if exists is None else exists.to(device),
                self._runs_of_positions(self.state is not None and self.state.has_history(0), device),
                self.state,
                self.spelling.to(device),
                self.is_causal,
            )
        return self._plans[device], self.state

    def _runs_of_positions(self, continues: bool, device: torch.device) -> torch.Tensor | None:
        """Earlier tokens of the same segment, (batch or 1, length), by where the positions do not go on."""
        if self.position_ids is None or self.position_ids.dim() != 2:
            return None
        positions = self.position_ids.to(device)
        places = torch.arange(positions.shape[1], device=device)
        starts = torch.where(positions[:, 1:] != positions[:, :-1] + 1, places[1:], 0)
        starts = torch.nn.functional.pad(starts, (1, 0)).cummax(1).values
        behind = places - starts
        # What goes on from a cache has as many tokens behind it as its first position says.
        return behind + positions[:, :1] * (starts == 0) if continues else behind

    def finish(self) -> None:
        """Keep the letters of this pass, once all memories have read those before it."""
        if self.state is not None and self.ids is not None:
            self.state.advance_ids(self.ids)


def _exists(mask: Any, shape: torch.Size, past: int | torch.Tensor | None) -> torch.Tensor | None:
    """Which of the pass's tokens are no padding, (batch, length); None: all."""
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = next((value for value in mask.values() if isinstance(value, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor) or mask.dim() < 2:
        return None
    batch, length = shape
    if mask.dim() == 2:
        return mask.index_select(-1, _columns(mask, length, past)).bool()
    if mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    seen = seen.flatten(1, -3) if seen.dim() > 4 else seen
    return seen.index_select(-1, _columns(seen, length, past)).any(-2).any(1).expand(batch, -1)  # seen by any token


def _columns(mask: torch.Tensor, length: int, past: int | torch.Tensor | None) -> torch.Tensor:
    """Which columns of a mask are those of the pass's tokens.

    They stand behind those of the cache. Behind them a static cache has room for tokens to come; and in front some may
    be missing, which a layer with a sliding window has forgotten.
    """
    width = mask.shape[-1]
    last = width - length
    first = last if past is None else torch.as_tensor(past, device=mask.device).clamp(max=last)
    return torch.arange(length, device=mask.device) + first


def _plan(
    ids: torch.Tensor,
    config: MotifMemoryConfig,
    exists: torch.Tensor | None,
    positions: torch.Tensor | None,
    state: GraftState | None,
    spelling: Spelling,
    is_causal: bool,
) -> NgramPlan | SpelledPlan:
    if spelling.is_of_single_bases:
        before = None if state is None else spelling.letter_codes(state.ids(ids))
        return plan_ngrams(
            spelling.letter_codes(ids), config, positions, exists, before, is_causal=is_causal, are_known=True
        )
    # Tokens of several bases: windows over the letters, one after another, of which each token reads that of its last.
    known = ids if state is None else torch.cat([state.ids(ids), ids], dim=1)
    codes, last, counts = spelling.spelled(known)
    letter_positions = None
    if positions is not None:
        earlier = known.shape[1] - ids.shape[1]
        behind = positions.expand(ids.shape[0], -1)
        if earlier:
            before = torch.arange(-earlier, 0, device=ids.device) + behind[:, :1]
            behind = torch.cat([before, behind], dim=1)
        letter_positions = _positions_of_letters(behind, last, counts, codes.shape[1])
    letters = plan_ngrams(codes, config, letter_positions, is_causal=is_causal, are_known=True)
    no_letters = torch.zeros_like(ids)
    tokens = plan_ngrams(no_letters, config, positions, exists, no_letters[:, :0], is_causal=is_causal, are_known=True)
    return SpelledPlan(letters, last[:, known.shape[1] - ids.shape[1] :], tokens)


def _positions_of_letters(
    behind: torch.Tensor, last: torch.Tensor, counts: torch.Tensor, letters: int
) -> torch.Tensor:
    """Earlier letters of the same segment, (batch, letters), from earlier tokens of it, (batch, tokens)."""
    first = last - counts + 1
    starts = torch.zeros(last.shape[0], letters, dtype=torch.int64, device=last.device)
    begins = torch.where(behind <= 0, first, 0)
    starts.scatter_(1, first, begins)
    return torch.arange(letters, device=last.device) - starts.cummax(1).values


class PassOfThread(threading.local):
    """The pass that the host is in, for each thread of its own; a copy is in none."""

    def __init__(self) -> None:
        self.current: HostPass | None = None  # in each thread from the start, as compiled code looks for it

    def __deepcopy__(self, memo: Any) -> "PassOfThread":
        return PassOfThread()

    def __reduce__(self) -> Any:
        return PassOfThread, ()


class EarlierPasses:
    """Passes of which layers may be computed again in the backward pass, by a wrapper around them; a copy has none.

    A layer is then called with what it was called with before, from whatever thread and while the host is in no pass.
    The newest are kept.
    """

    def __init__(self) -> None:
        self._passes: dict[tuple[Any, ...], HostPass] = {}

    def __deepcopy__(self, memo: Any) -> "EarlierPasses":
        return EarlierPasses()

    def __reduce__(self) -> Any:
        return EarlierPasses, ()

    def remember(self, layer: int, hidden_states: torch.Tensor, now: HostPass) -> None:
        """Note the pass in which a layer is called with these states."""
        key = self._key(layer, hidden_states)
        self._passes.pop(key, None)  # so that it is the newest
        self._passes[key] = now
        if len(self._passes) > _MOST_EARLIER:
            del self._passes[next(iter(self._passes))]

    def find(self, layer: int, hidden_states: torch.Tensor) -> HostPass | None:
        """The newest pass in which a layer was called with these states."""
        return self._passes.get(self._key(layer, hidden_states))

    @staticmethod
    def _key(layer: int, hidden_states: torch.Tensor) -> tuple[Any, ...]:
        """States that are kept for the backward pass stay where they are."""
        return layer, hidden_states.device, hidden_states.data_ptr(), hidden_states.shape
