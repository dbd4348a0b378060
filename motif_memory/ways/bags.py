"""Window features as means of bags of rows: some fifteen operations, for GPUs, where each costs a launch."""

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ..definition import NgramPlan

_TOKENS_AT_A_TIME = 2**16  # bounds the memory for the rows' numbers


def features_by_bags(tables: Sequence[torch.Tensor], plan: NgramPlan) -> torch.Tensor:
    """`window_features`, rounded once to the dtype of the tables.

    All tables are one table here, with a row behind the last that stands for "no n-gram" and is in no mean.
    """
    width, none = tables[0].shape[1], sum(len(table) for table in tables)
    rows = torch.cat([*tables, tables[0].new_zeros(1, width)])
    parts = [rows.new_zeros(len(plan.grams), 0, width * len(tables))]
    for bags in _bags(plan, none):
        means = F.embedding_bag(bags.flatten(0, 2), rows, mode="mean", padding_idx=none)
        parts.append(means.view(*bags.shape[:2], -1))
    return parts[-1] if len(parts) <= 2 else torch.cat(parts[1:], dim=1)


def _bags(plan: NgramPlan, none: int) -> Iterator[torch.Tensor]:
    """Rows of the joint table in every window, int32 (batch, positions, sizes, window), piece by piece."""
    sizes, powers, offsets, is_inside, places = _constants(plan.ngram_sizes, plan.window, plan.grams.device)
    ids = torch.where(plan.runs.unsqueeze(-1) >= sizes, plan.grams.unsqueeze(-1) % powers + offsets, none)
    first = plan.context + plan.reach_ahead - (plan.window - 1)  # the first place of the first window
    missing = max(-first, 0)
    ids = F.pad(ids, (0, 0, missing, plan.reach_ahead), value=none)[:, first + missing :]
    places = places + plan.reach_ahead
    behind, ahead = plan.behind_current(), plan.ahead
    piece = max(_TOKENS_AT_A_TIME // max(len(ids), 1), 1)
    for begin in range(0, plan.length, piece):
        end = min(begin + piece, plan.length)
        inside = is_inside
        if behind is not None:
            inside = inside & (places >= -behind[:, begin:end, None, None])
        if ahead is not None:
            inside = inside & (places <= ahead[:, begin:end, None, None])
        yield torch.where(inside, ids[:, begin : end + plan.window - 1].unfold(1, plan.window, 1), none)


@functools.cache
def _constants(sizes: tuple[int, ...], window: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Sizes, their powers and tables' first rows; which places of a window hold an n-gram's end; the places."""
    with torch.inference_mode(False):
        rows = [5**size for size in sizes]
        offsets = [sum(rows[:index]) for index in range(len(sizes))]
        numbers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (sizes, rows, offsets)]
        places = torch.arange(window, dtype=torch.int32, device=device)
        return *numbers, places >= numbers[0].unsqueeze(-1) - 1, places - (window - 1)
