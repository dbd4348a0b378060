"""Training through the tables: project the rows in use once per step, instead of every token.

The projections commute with the window mean (`../README.md`, "Folding"), so their cost can depend on the number
of distinct n-grams rather than on the number of tokens.
"""

from collections.abc import Sequence

import torch

from ..definition import NgramPlan
from .packed_tables import PackedTables, project_tables, table_sections


def used_rows(plan: NgramPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the largest n-gram that occur, int64 (rows,), and which of them each position reads.

    The second is int32 (batch, context + length). Positions without a valid n-gram read the first row; nothing counts
    it.
    """
    largest = max(plan.ngram_sizes)
    is_used = torch.zeros(5**largest, dtype=torch.bool, device=plan.grams.device)
    is_used[plan.grams[plan.runs >= largest].long()] = True
    is_used[0] = True  # never empty
    places = (is_used.cumsum(0) - 1).to(torch.int32)
    return is_used.nonzero().flatten(), places[plan.grams.long()].clamp_min(0)


def rows_to_project(ngram_sizes: Sequence[int]) -> int:
    """Table rows that are projected whatever the tokens are, plus all rows of the largest n-gram: an upper bound."""
    return table_sections(max(ngram_sizes)).oldest


def packed_rows(
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    plan: NgramPlan,
    used: torch.Tensor | None,
    slab_width: int | None = None,
) -> PackedTables:
    """Packed tables of one step, differentiable; `used` from `used_rows`, or None for all rows."""
    with torch.autocast(device_type=key_weight.device.type, enabled=False):
        rows = project_tables(tables, key_weight, value_weight, plan.ngram_sizes, plan.window, used, slab_width)
    return PackedTables(rows, 1.0)
