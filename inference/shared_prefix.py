"""Texts that begin alike: what they share is computed once, and the model's cache of it is handed to all of them."""

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..motif_memory.grafts.state_in_cache import separate
from .base_tokens import BaseTokens, padding_id

logger = logging.getLogger(__name__)

# What Transformers and models with code of their own call a cache, newest name first.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# How far logits may be apart with and without a cache, in standard deviations of logits: some roundings of the model's
# dtype, but no more than this.
_ROUNDINGS, _MOST_APART = 256, 0.05
_PROBE_LENGTH, _PROBE_SPLIT, _PROBE_PADDED = 45, 29, 11
_PASS = 512  # one more pass is made if it spares so many tokens of padding


class Pass(NamedTuple):
    """What a model made of a batch: logits (batch, length, vocabulary), and its cache if that was asked for."""

    logits: torch.Tensor
    cache: Any = None


class CausalReader:
    """A causal model that reads texts from the start, or on from a cache.

    Args:
        model: of Transformers, in `eval()`.
        tokens: of its tokenizer.
    """

    def __init__(self, model: Any, tokens: BaseTokens):
        self.model, self.tokens = model, tokens
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self._cache_name = next((name for name in _CACHE_NAMES if name in parameters), None)
        self._takes_use_cache = "use_cache" in parameters or takes_any
        self._takes_positions = "position_ids" in parameters or takes_any
        self._can_continue: bool | None = None
        self._padding: str | None = None

    @property
    def device(self) -> torch.device:
        """Where ids have to be."""
        return next(self.model.parameters()).device

    def read(
        self, ids: torch.Tensor, cache: Any = None, keeps_cache: bool = False, mask: torch.Tensor | None = None
    ) -> Pass:
        """Logits after each token of `ids` (batch, length), which follow what is in the cache.

        Args:
            ids: (batch, length).
            cache: of the tokens before.
            keeps_cache: whether the pass returns one.
            mask: (batch, tokens in the cache + length), 0 where a row is padded in front; see `padding`.
        """
        options: dict[str, Any] = {"use_cache": keeps_cache or cache is not None} if self._takes_use_cache else {}
        if cache is not None:
            options[str(self._cache_name)] = cache
        if mask is not None:
            options["attention_mask"] = mask
            if self.padding == "masked, with positions":
                options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs = self.model(input_ids=ids, **options)
        logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        kept = next((outputs[name] for name in _CACHE_NAMES if name in outputs), None) if keeps_cache else None
        return Pass(logits, kept)

    def read_side_by_side(self, texts: Sequence[Sequence[int]]) -> tuple[Pass, torch.Tensor]:
        """Texts of any lengths, padded in front: what follows their last tokens, with a cache; and the mask.

        Short texts begin later: the first passes read the longest texts only, beside one row of nothing but padding,
        whose cache is handed to those that come in.

        Args:
            texts: ids of each, one or more.
        """
        return self._side_by_side(texts, _PASS)

    def _side_by_side(self, texts: Sequence[Sequence[int]], worth: int) -> tuple[Pass, torch.Tensor]:
        longest = max(map(len, texts))
        first = np.array([longest - len(text) for text in texts])
        ids = np.full((len(texts) + 1, longest), self.filler)
        for row, text in enumerate(texts):
            ids[row, first[row] :] = text
        mask = torch.from_numpy(np.arange(longest) >= np.append(first, longest)[:, None]).long()
        columns, places = torch.from_numpy(ids).to(self.device), mask.to(self.device)
        ends = _ends_of_passes(first, longest, worth)
        cache, earlier = None, [len(texts)]
        for start, end in zip([0, *ends], ends, strict=False):
            rows = np.flatnonzero(first < end).tolist() + ([] if end == longest else [len(texts)])
            if cache is not None:
                of_padding = earlier.index(len(texts))
                owners = [earlier.index(row) if row in earlier else of_padding for row in rows]
                cache = branched(cache, torch.tensor(owners, device=self.device))
            found = self.read(columns[rows, start:end], cache, keeps_cache=True, mask=places[rows, :end])
            cache, earlier = found.cache, rows
        return found, places[:-1]

    @property
    def can_continue(self) -> bool:
        """Whether a text that is continued from a cache gets the logits of the whole text; tried once."""
        if self._can_continue is None:
            reason = self._why_not()
            self._can_continue = not reason
            logger.info(
                "%s: what texts share is %s",
                type(self.model).__name__,
                f"not reused, {reason}" if reason else "reused",
            )
        return self._can_continue

    @property
    def padding(self) -> str:
        """How texts of other lengths can stand side by side, padded in front; tried once.

        "masked", "masked, with positions" that count from the first token that is not padding; or "" if neither gives
        a text the logits that it has alone, whole and continued from a cache.
        """
        if self._padding is None:
            ways = ["masked", *(["masked, with positions"] if self._takes_positions else [])]
            self._padding = next((way for way in ways if self.can_continue and self._is_harmless(way)), "")
        return self._padding

    def _is_harmless(self, padding: str) -> bool:
        generator = torch.Generator().manual_seed(1)
        ids = torch.tensor(self.tokens.bases)[torch.randint(4, (2, _PROBE_LENGTH), generator=generator)].to(
            self.device
        )
        alone = self.read(ids[1:, _PROBE_PADDED:]).logits[:, _PROBE_SPLIT - _PROBE_PADDED - 1 :]
        texts = [ids[0, :_PROBE_SPLIT].tolist(), ids[1, _PROBE_PADDED:_PROBE_SPLIT].tolist()]
        self._padding = padding
        found = []
        try:
            for worth in (1, _PROBE_LENGTH * _PROBE_LENGTH):  # in two passes, and in one
                start, mask = self._side_by_side(texts, worth)
                mask = torch.cat([mask, mask.new_ones(2, _PROBE_LENGTH - _PROBE_SPLIT)], dim=1)
                end = self.read(ids[:, _PROBE_SPLIT:], start.cache, mask=mask)
                found.append(torch.cat([start.logits[1:, -1:], end.logits[1:]], dim=1))
        except Exception:  # of any kind: what a model of others does with a mask is up to its code
            return False
        finally:
            self._padding = None
        return _are_alike(torch.stack(found), alone)

    @property
    def filler(self) -> int:
        """The id of padding."""
        return padding_id(self.tokens.pad, self.tokens.bases[0], self.model)

    def _why_not(self) -> str:
        if self._cache_name is None or not self._takes_use_cache:
            return "its forward takes no cache"
        generator = torch.Generator().manual_seed(0)
        letters = torch.tensor(self.tokens.bases)[torch.randint(4, (3, _PROBE_LENGTH), generator=generator)]
        letters[1:2, :_PROBE_SPLIT] = letters[:1, :_PROBE_SPLIT]
        ids = letters.to(self.device)
        owners = torch.tensor([0, 0, 1], device=self.device)
        try:
            whole = self.read(ids).logits
            trunk = self.read(ids[[0, 2], :_PROBE_SPLIT], keeps_cache=True)
            if trunk.cache is None:
                return "it returns no cache"
            again = []
            for _ in range(2):  # the second time, the first must have left no traces
                branch = branched(trunk.cache, owners)
                again.append(self.read(ids[:, _PROBE_SPLIT:], branch).logits)
        except Exception as error:  # of any kind: a cache that cannot do this is another model's, or its own code's
            return f"its cache cannot be shared ({type(error).__name__}: {error})"
        if not _are_alike(torch.stack(again), whole[:, _PROBE_SPLIT:]):
            return "its logits are others when a text is continued from a cache"
        return ""


def _ends_of_passes(first: np.ndarray, length: int, worth: int) -> list[int]:
    """Before which columns the passes end over rows whose texts begin at `first`; the last one at `length`.

    A pass ends where rows begin, if those that have not begun would have had so many columns of padding in it.
    """
    ends, start = [], 0
    for place in np.unique(first).tolist():
        if (place - start) * int((first >= place).sum()) >= worth:
            ends.append(place)
            start = place
    return [*ends, length]


def _are_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits (..., length, vocabulary) differ by no more than rounding, in each row by itself.

    Some may differ by more, as where a router chooses another expert. `expected` may lack leading dimensions.
    """
    apart = (found - expected).abs().float().flatten(-2)
    allowed = min(_ROUNDINGS * torch.finfo(expected.dtype).eps, _MOST_APART)
    return bool((apart.quantile(0.9, dim=-1) <= allowed * expected.float().std()).all())


def branched(cache: Any, rows: torch.Tensor) -> Any:
    """A cache whose rows are these of another, which stays as it is.

    Args:
        cache: of Transformers.
        rows: (new batch,) indices into its batch.
    """
    branch = copy.copy(cache)
    branch.layers = [_shallow_copy(layer) for layer in cache.layers]
    separate(branch)
    branch.reorder_cache(rows)  # selects into new tensors
    return branch


def _shallow_copy(layer: Any) -> Any:
    """A layer of a cache with containers of its own, which hold the same tensors."""
    new = copy.copy(layer)
    for name, value in vars(new).items():
        if isinstance(value, (dict, list)):
            setattr(new, name, copy.copy(value))
    return new
