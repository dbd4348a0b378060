"""Hidden states of many sequences by any model, each as if it were alone."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .base_tokens import padding_id
from .loaded_model import LoadedModel

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 16384
_TOKENS_OF_A_THREAD = 2048  # on a processor: more at once leave its caches and are slower
_PROBE = "ACGTTGCAAGTCCTGAATTCGGAC"
# Share of a typical number that two ways of computing it may differ by: some last places, in sums of another order.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
_ROUNDING_OF_HALVES = 5e-2


class Tokens(Protocol):
    """What has to be known of a tokenizer; `BaseTokens` has it."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int | None

    def encode(self, sequence: str) -> np.ndarray:
        """Ids of a sequence without those around it, (length,) int64."""


class HiddenStates:
    """A model as a function of token ids.

    What cannot be read from a configuration is found by trial on a few short sequences: whether the model sees what is
    behind a token, how many hidden states it gives, and with which padding a sequence's numbers stay what they are
    without. Padding stands behind the sequence; if neither an attention mask nor its absence makes it harmless,
    only sequences of one length are computed together.

    Args:
        loaded: the model.
        tokens: of its tokenizer.
        batch_tokens: most tokens at once, padding included; a longer sequence is computed alone.

    Raises:
        ValueError: if the model gives no hidden states, or has an encoder and a decoder.
    """

    def __init__(self, loaded: LoadedModel, tokens: Tokens, batch_tokens: int = TOKENS_AT_ONCE):
        self.tokens = tokens
        self._model, self._device = loaded.model, loaded.device
        if self._device.type == "cpu":
            batch_tokens = min(batch_tokens, _TOKENS_OF_A_THREAD * torch.get_num_threads())
        self.batch_tokens = batch_tokens
        if getattr(loaded.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"expected an encoder or a decoder, got {type(loaded.model).__name__}, which is both: it is not clear "
                "which of its hidden states are wanted."
            )
        parameters = inspect.signature(loaded.model.forward).parameters
        self._takes_mask = "attention_mask" in parameters
        self._options = {"use_cache": False} if "use_cache" in parameters else {}
        probe = tokens.encode(_PROBE)[: max(2, (loaded.context - len(tokens.before) - len(tokens.after)) // 2)]
        self._filler = padding_id(tokens.pad, 0, loaded.model)
        self.layers, self.width = self._layers_and_width(probe)
        self.sees_both_sides = self._looks_ahead(probe)
        if not self.sees_both_sides:
            self._filler = int(probe[0])  # as good as any, and Transformers does not ask for a mask
        self.padding = self._harmless_padding(probe)

    def layer(self, number: int) -> int:
        """The layer from 0 (the embedding) on, also of a negative number (-1 is the last).

        Raises:
            ValueError: if there is none.
        """
        if not -self.layers <= number < self.layers:
            raise ValueError(
                f"expected a layer in 0..{self.layers - 1} (0 is the embedding; -1 is the last), got {number}."
            )
        return number % self.layers

    def of(
        self, sequences: Sequence[np.ndarray], layers: Sequence[int]
    ) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
        """Hidden states of sequences of ids, batch by batch, sequences of similar length together.

        Args:
            sequences: ids without those around them, (length,) each.
            layers: from 0 on.

        Yields:
            which sequences these are, and for each layer (sequences, longest, hidden); those of a sequence stand at
            the start, and behind them is what has no meaning.
        """
        around = len(self.tokens.before) + len(self.tokens.after)
        lengths = [len(ids) + around for ids in sequences]
        for rows in _batches(lengths, self.batch_tokens, self.padding == "none"):
            states = self._states(self._batch([sequences[row] for row in rows]), self.padding == "masked", layers)
            first, longest = len(self.tokens.before), lengths[rows[0]] - around
            yield rows, {layer: found[:, first : first + longest] for layer, found in states.items()}

    def _batch(self, sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids with those around them and padding, and the mask: (sequences, longest)."""
        before, after = self.tokens.before, self.tokens.after
        whole = [np.concatenate([before, ids, after]) if before or after else ids for ids in sequences]
        longest = max(map(len, whole))
        ids = np.full((len(whole), longest), self._filler, dtype=np.int64)
        mask = np.zeros((len(whole), longest), dtype=np.int64)
        for row, own in enumerate(whole):
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
        return torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device)

    @torch.inference_mode()
    def _states(
        self, batch: tuple[torch.Tensor, torch.Tensor], is_masked: bool, layers: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        last = self.layers - 1
        outputs = self._outputs(batch, is_masked, output_hidden_states=any(layer != last for layer in layers))
        found = {layer: outputs.hidden_states[layer] for layer in layers if layer != last}
        if last in layers:
            found[last] = _last_hidden_state(outputs)
        return found

    def _outputs(self, batch: tuple[torch.Tensor, torch.Tensor], is_masked: bool, **options: Any) -> Any:
        ids, mask = batch
        if is_masked:
            options["attention_mask"] = mask
        try:
            return self._model(input_ids=ids, **self._options, **options)
        except torch.OutOfMemoryError as error:
            rows, length = ids.shape
            raise ValueError(
                f"{self._device} has too little memory for {rows} x {length:,} tokens at once: lower --batch-tokens "
                f"(now {self.batch_tokens:,}), or the context ({error})."
            ) from None

    # ---- what is found by trial

    @torch.inference_mode()
    def _layers_and_width(self, probe: np.ndarray) -> tuple[int, int]:
        outputs = self._outputs(self._batch([probe]), False, output_hidden_states=True)
        states = getattr(outputs, "hidden_states", None)
        if not states and getattr(outputs, "last_hidden_state", None) is None:
            raise ValueError(
                f"expected a model that gives hidden states, got {type(self._model).__name__}, which gives none."
            )
        return len(states or (None,)), _last_hidden_state(outputs).shape[-1]

    def _looks_ahead(self, probe: np.ndarray) -> bool:
        changed = probe.copy()
        changed[-1] = next(token for token in self.tokens.encode(_PROBE) if token != probe[-1])
        one, other = self._last_states([probe, changed], is_masked=False)
        return _differ(one[:-1], other[:-1])

    def _harmless_padding(self, probe: np.ndarray) -> str:
        alone = self._last_states([probe], is_masked=False)[0]
        longer = np.concatenate([probe, probe[: len(probe) // 2 + 1]])
        for padding in ("plain", "masked")[: 1 + self._takes_mask]:
            found = self._last_states([probe, longer], padding == "masked")[0]
            if not _differ(alone, found[: len(probe)]):
                return padding
        logger.info("Padding changes what %s computes: lengths are not mixed.", type(self._model).__name__)
        return "none"

    def _last_states(self, sequences: Sequence[np.ndarray], is_masked: bool) -> torch.Tensor:
        layer, first = self.layers - 1, len(self.tokens.before)
        states = self._states(self._batch(sequences), is_masked, [layer])[layer]
        return states[:, first : states.shape[1] - len(self.tokens.after)]


def _last_hidden_state(outputs: Any) -> torch.Tensor:
    last = getattr(outputs, "last_hidden_state", None)
    return outputs.hidden_states[-1] if last is None else last


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are apart by more than rounding; medians, because a few channels may be huge."""
    allowed = _ROUNDING.get(one.dtype, _ROUNDING_OF_HALVES)
    one, other = one.double(), other.double()
    return bool((one - other).abs().median() > allowed * one.abs().median())


def _batches(lengths: Sequence[int], most: int, equal_only: bool) -> Iterator[list[int]]:
    """Rows of similar length, the longest first, that are at most `most` when padded to the longest."""
    chosen: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[chosen[0]] if chosen else 0
        if chosen and (longest * (len(chosen) + 1) > most or (equal_only and lengths[row] != longest)):
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen
