"""What parts of a model put out in a pass, seen from outside."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..motif_memory.ways.kept_fold import memories_of
from .effect_formulas import RowPairs, embedding_distances, memory_changes


class Seen:
    """What parts of a model put out in its last pass.

    Args:
        needs_hidden: the name of a model that must show its last hidden states, or None.

    `hidden` are these, (batch, length, hidden); `residuals` what each memory added to the residual stream, as large.
    """

    def __init__(self, needs_hidden: str | None) -> None:
        self.needs_hidden = needs_hidden
        self.hidden: torch.Tensor | None = None
        self.residuals: list[torch.Tensor] = []


@contextlib.contextmanager
def seen(model: Any, hidden: bool, residuals: bool) -> Iterator[Seen]:
    """A block in which the parts that are asked for are seen in every pass."""
    found = Seen(type(model).__name__ if hidden else None)
    hooks = []

    def see_hidden(_module: Any, _inputs: Any, outputs: Any) -> None:
        found.hidden = outputs[0]

    def see_residual(_module: Any, _inputs: Any, outputs: Any) -> None:
        found.residuals.append(outputs.residual)

    def start(_module: Any, _inputs: Any) -> None:
        found.hidden, found.residuals = None, []

    hooks.append(model.register_forward_pre_hook(start))
    if hidden:
        hooks.append(model.base_model.register_forward_hook(see_hidden))
    if residuals:
        hooks += [memory.register_forward_hook(see_residual) for memory in memories_of(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def distances_of_parts(parts: Seen, pairs: RowPairs, skipped: int, split: int = 0) -> dict[str, torch.Tensor]:
    """`embedding_distance` and `memory_change` of an `Effect`, (pairs,) each, of the parts that were seen.

    Args:
        parts: of the pass of these rows.
        pairs: the rows that are compared.
        skipped: how many places stand in front of the rows' letters.
        split: how many places of the windows stand before the rows.

    Raises:
        ValueError: if hidden states were to be seen, and the model does not compute them in its body.
    """
    if parts.needs_hidden is not None and parts.hidden is None:
        raise ValueError(
            f"expected a model whose head calls its body, got {parts.needs_hidden}, which does not show its last "
            'hidden states; leave the score "embedding" out.'
        )
    found = {}
    if parts.hidden is not None:
        found["embedding_distance"] = embedding_distances(parts.hidden[:, skipped:], pairs, split)
    if parts.residuals:
        found["memory_change"] = memory_changes([residual[:, skipped:] for residual in parts.residuals], pairs)
    return found
