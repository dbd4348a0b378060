"""What a model is given: checked, and read as which tokens are there and which sequences share a row."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..configuration.configuration_gengram import SEQUENCE_POOLINGS
from ..motif_memory.definition import at_least_float32, can_be_read


def integer_ids(name: str, ids: Any, rows: int | None = None) -> torch.Tensor:
    """Ids (batch, length) in a dtype that embeddings take.

    Args:
        name: of the argument, for messages.
        ids: of any integer dtype.
        rows: how many ids there are; None if any will do.

    Raises:
        ValueError: for anything else, and for ids out of range (on a GPU only those of several tokens are looked at,
            since that waits for it; another one ends the program there).
    """
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            f'{name} must be a tensor, got a {type(ids).__name__}; the tokenizer takes return_tensors="pt".'
        )
    if ids.dim() != 2:
        raise ValueError(f"{name} must be (batch, length), got {tuple(ids.shape)}.")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}.")
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.long()
    is_cheap = ids.device.type == "cpu" or ids.shape[1] > 1
    if rows is not None and ids.numel() and is_cheap and can_be_read(ids):
        least, most = (int(bound) for bound in ids.aminmax())
        if least < 0 or most >= rows:
            raise ValueError(f"{name} must lie in 0..{rows - 1} (the rows of the embedding), got {least}..{most}.")
    return ids


_ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}  # names of their attention, by which they run any model


def check_engine(implementation: str | None, position_ids: Any) -> None:
    """Refuse what a serving engine asks of a model with a memory and cannot give it: the letters of earlier passes.

    The engines keep attention's keys and values by themselves and call the model without a cache. The memory then sees
    the tokens of this pass only: whole prompts are right, their continuation is not.

    Args:
        implementation: of attention.
        position_ids: of this pass, (1, tokens) or (tokens,); several sequences in a row.

    Raises:
        ValueError: if a sequence does not begin in this pass, or it cannot be seen whether it does.
    """
    engine = _ENGINES.get((implementation or "").removeprefix("paged|"))
    if engine is None:
        return
    advice = (
        f"{engine} keeps no state for the motif memory, so that only whole prompts can be read there (embeddings, "
        "scores): one pass each, without chunked prefill, prefix caching, CUDA graphs and compilation. To generate, "
        "use model.generate or `gengram generate`."
    )
    if position_ids is None or not can_be_read(position_ids):
        raise ValueError(f"it cannot be seen here where sequences begin. {advice}")
    positions = position_ids.reshape(-1)
    is_start = torch.ones_like(positions, dtype=torch.bool)
    is_start[1:] = positions[1:] != positions[:-1] + 1
    if bool((positions[is_start] != 0).any()):
        raise ValueError(f"this pass continues a sequence whose earlier bases the motif memory does not see. {advice}")


def check_inputs(
    inputs_embeds: torch.Tensor,
    hidden_size: int,
    attention_mask: Any,
    position_ids: Any,
    memory_input_ids: Any,
    cache: Cache | None,
) -> None:
    """Refuse what does not fit together, in the words of the caller's arguments.

    Args:
        inputs_embeds: as given, or of the ids that were given.
        hidden_size: the width that they must have.
        attention_mask, position_ids, memory_input_ids: as given; None for what was not.
        cache: whose length the attention mask must cover too.

    Raises:
        ValueError: says what was expected and what came.
    """
    shape = tuple(inputs_embeds.shape)
    if len(shape) != 3 or shape[2] != hidden_size:
        raise ValueError(f"inputs_embeds must be (batch, length, {hidden_size}), got {shape}.")
    batch, length = shape[:2]
    if not torch.compiler.is_compiling() and not batch * length:
        raise ValueError(f"expected at least one sequence with one token, got (batch, length) = {shape[:2]}.")
    if memory_input_ids is not None and memory_input_ids.shape != shape[:2]:
        raise ValueError(
            f"memory_input_ids must be (batch, length) = {shape[:2]}, as the input is, got "
            f"{tuple(memory_input_ids.shape)}."
        )
    if position_ids is not None:
        if not isinstance(position_ids, torch.Tensor) or position_ids.dtype.is_floating_point:
            kind = getattr(position_ids, "dtype", type(position_ids).__name__)
            raise ValueError(f"position_ids must be a tensor of integers, got {kind}.")
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
            raise ValueError(
                f"position_ids must be (batch, length) = {shape[:2]} or (1, {length}), got "
                f"{tuple(position_ids.shape)}."
            )
    _check_mask(attention_mask, batch, length, cache)


def _check_mask(attention_mask: Any, batch: int, length: int, cache: Cache | None) -> None:
    if attention_mask is None or isinstance(attention_mask, dict) or hasattr(attention_mask, "mask_mod"):
        return  # `generate` prepares a dictionary when it compiles, flexible attention has masks of its own
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask must be a tensor, got a {type(attention_mask).__name__}.")
    past: Any = 0 if cache is None else cache.get_seq_length()
    known = isinstance(past, int) and not getattr(cache, "is_compileable", False) and not torch.compiler.is_compiling()
    expected = f"({batch}, {past + length if known else 'past + length'})"
    words = f"attention_mask must be (batch, past + length) = {expected}, 1 for tokens and 0 for padding"
    got = tuple(attention_mask.shape)
    if attention_mask.dim() == 4:
        if got[0] not in (1, batch) or got[2] != length or (known and got[3] < past + length):
            raise ValueError(f"{words}, or (batch, heads, length, past + length), got {got}.")
        return
    if attention_mask.dim() != 2 or got[0] != batch or (known and got[1] != past + length):
        raise ValueError(f"{words}, got {got}.")
    if length > 1 and attention_mask.dtype != torch.bool and can_be_read(attention_mask):
        if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
            raise ValueError(
                f"{words}, got values from {attention_mask.min().item():g} to {attention_mask.max().item():g}. "
                "Masks that are added to attention scores have four dimensions."
            )


def sequence_starts(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Where a new sequence begins inside a row, bool (batch or 1, length): where positions do not go on by one.

    Args:
        position_ids: (batch or 1, length).
        attention_mask: (batch, length), or None; padding, whose positions mean nothing, begins nothing.
    """
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is None:
        return starts
    exists = attention_mask.to(device=starts.device, dtype=torch.bool)
    both = exists.clone()
    both[:, 1:] &= exists[:, :-1]
    return starts & both


def token_mask(attention_mask: Any, is_padding: torch.Tensor, what_for: str) -> torch.Tensor:
    """Which tokens belong to their sequence, bool (batch, length).

    Args:
        attention_mask: (batch, past + length); it decides if it is given.
        is_padding: (batch, length), asked where there is no mask.
        what_for: the setting that needs it, for messages.

    Raises:
        ValueError: if the mask is not of two dimensions.
    """
    if attention_mask is None:
        return ~is_padding
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        got = tuple(attention_mask.shape) if hasattr(attention_mask, "shape") else f"a {type(attention_mask).__name__}"
        raise ValueError(f"{what_for} needs an attention_mask of (batch, length), got {got}.")
    return attention_mask[:, -is_padding.shape[1] :].to(device=is_padding.device, dtype=torch.bool)


def pool_hidden_states(hidden_states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per sequence: (batch, length, hidden) -> (batch, hidden).

    Args:
        hidden_states: (batch, length, hidden).
        mask: (batch, length), true (or 1) where a token belongs to the sequence, padding on either side false.
        pooling: the `"last"` token, the one in the `"centre"` (the earlier of two), or the `"mean"` or `"max"` of all;
            the mean is taken in at least float32. A sequence without tokens gets zeros.

    Raises:
        ValueError: if the pooling is not known.
    """
    mask = mask.to(device=hidden_states.device, dtype=torch.bool)
    there = mask.unsqueeze(-1)
    if pooling == "mean":
        total = hidden_states.to(at_least_float32(hidden_states.dtype)).masked_fill(~there, 0.0).sum(1)
        return (total / there.sum(1).clamp(min=1)).to(hidden_states.dtype)
    if pooling == "max":
        pooled = hidden_states.masked_fill(~there, torch.finfo(hidden_states.dtype).min).amax(1)
    elif pooling not in SEQUENCE_POOLINGS:
        raise ValueError(f"expected a pooling of {SEQUENCE_POOLINGS}, got {pooling!r}.")
    else:
        index = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, index, -1).amax(1)
        first = torch.where(mask, index, mask.shape[1]).amin(1)
        chosen = last if pooling == "last" else (first + last) // 2
        pooled = hidden_states[torch.arange(mask.shape[0], device=mask.device), chosen]
    return pooled.masked_fill(~there.any(1), 0.0)
