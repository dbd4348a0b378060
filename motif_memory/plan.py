"""From token ids to the n-grams of every window: once per pass, for all memory layers."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from .configuration_motif_memory import MotifMemoryConfig
from .definition import NgramPlan, can_be_read, plan_windows
from .state import MemoryState
from .ways.choose import choose_kernels
from .ways.operators import letter_codes as letter_codes_operator
from .ways.operators import ngram_rows_and_runs


def letter_codes(input_ids: torch.Tensor, letters: Sequence[int]) -> torch.Tensor:
    """Letter of each token: 1..5 for the ids of A, C, G, T, N in `letters`, 0 for any other token.

    Args:
        input_ids: (batch, length).
        letters: the five ids, in the order of the tables' digits.

    Returns:
        int64 (batch, length).

    Raises:
        ValueError: if `letters` are not five ids.
    """
    if len(letters) != 5 or not all(isinstance(letter, int) for letter in letters):
        raise ValueError(f"expected the five token ids of A, C, G, T and N, got {letters!r}.")
    return letter_codes_operator(input_ids, letters)


def plan_ngrams(
    codes: torch.Tensor,
    config: MotifMemoryConfig,
    positions: torch.Tensor | None = None,
    exists: torch.Tensor | None = None,
    state: MemoryState | torch.Tensor | None = None,
    *,
    is_causal: bool = True,
    are_known: bool = False,
) -> NgramPlan:
    """Which n-grams each window holds. Changes nothing: `state.advance_letters(codes)` is up to the caller.

    Args:
        codes: int64 (batch, length) from `letter_codes`, of this pass.
        config: sizes of the n-grams, and the window.
        positions: (batch or 1, length); where they start again at 0 a new segment begins, which sees nothing of what
            is before. None: each row is one segment.
        exists: (batch, length), true (or 1) for tokens and false for padding, as Transformers' masks; None: all exist.
        state: what is known of earlier tokens, or their codes, (batch, `config.context`) or (batch, 0); None: nothing
            came before.
        is_causal: the window is the last `config.window` tokens if true, else centred on the position.
        are_known: whether `codes` come from `letter_codes` for certain, and need not be looked at.

    Raises:
        ValueError: if `codes` are no letter codes (on a GPU only those of several tokens are looked at, since that
            waits for it).
    """
    is_cheap = codes.device.type == "cpu" or codes.shape[1] > 1
    if not are_known and codes.numel() and is_cheap and can_be_read(codes):
        least, most = (int(bound) for bound in codes.aminmax())
        if least < 0 or most > 5:
            raise ValueError(f"expected letter codes 0..5 from letter_codes, got {least}..{most}: token ids?")
    length, context = codes.shape[1], 0
    if exists is not None:
        exists = exists.to(device=codes.device, dtype=torch.bool)
        codes = codes.masked_fill(~exists, 0)
    if state is not None and config.context:
        earlier_codes = state if isinstance(state, torch.Tensor) else state.letters(codes)
        context = earlier_codes.shape[1]
        codes = torch.cat([earlier_codes, codes], dim=1)
    behind = ahead = None
    if positions is not None:
        behind = positions.expand(codes.shape[0], -1)
        if context:
            earlier = torch.arange(-context, 0, device=behind.device) + behind[:, :1]
            behind = torch.cat([earlier, behind], dim=1)
        if not is_causal:
            is_last = F.pad(behind[:, 1:] != behind[:, :-1] + 1, (0, 1), value=True)
            index = torch.arange(length, device=behind.device)
            ends = torch.where(is_last, index, length).flip(1).cummin(1).values.flip(1)
            ahead = ends - index
    native = choose_kernels(codes.device, (torch.float32,), 16)[0] == "native"
    return plan_windows(
        codes,
        config.ngram_sizes,
        config.window,
        context=context,
        is_causal=is_causal,
        behind=behind,
        ahead=ahead,
        exists=exists,
        rows_and_runs=partial(ngram_rows_and_runs, native=native),
    )
