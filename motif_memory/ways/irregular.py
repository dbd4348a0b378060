"""Windows that are not full of letters: the rows of packed tables, and their weights, that add up to them."""

import torch
import torch.nn.functional as F

from ..definition import NgramPlan
from .packed_tables import Sections


def is_regular(plan: NgramPlan) -> torch.Tensor:
    """Whether each position's window is full of letters, bool (batch, length): then it is one plain sum of rows."""
    ends = plan.runs[:, plan.context + plan.reach_ahead :]
    missing = plan.length - ends.shape[1]
    return F.pad(ends, (0, missing)) >= plan.window


def irregular_rows(
    plan: NgramPlan, top: torch.Tensor, sections: Sections, batch: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and weights whose sum is a window that is not full of letters.

    With w_n = L_n / count_n for the sizes n of the memory and 0 for others, an ending whose longest usable n-gram has
    size s adds w_s C_s and, for every m < s, (w_m - w_(m+1)) C_m.

    Args:
        plan: which n-grams each window holds.
        top: int32 (batch, context + length), row within A of every largest n-gram.
        sections: of the packed tables.
        batch, positions: int64 (places,), where.

    Returns:
        One entry per row read: the place, the row in the packed tables (both int64), and the weight (float64).
    """
    largest = max(plan.ngram_sizes)
    here = (positions + plan.context).unsqueeze(1)
    end = here + plan.reach_ahead
    begin = (end - plan.window + 1).clamp_min(0)
    stop = torch.full_like(end, plan.grams.shape[1])
    batch = batch.unsqueeze(1)
    if plan.behind is not None:
        begin = torch.maximum(begin, here - plan.behind[batch, here])
    if plan.ahead is not None:
        stop = torch.minimum(stop, here + plan.ahead[batch, positions.unsqueeze(1)] + 1)
    newest = end.clamp_max(plan.grams.shape[1] - 1)
    count = min(plan.window, plan.grams.shape[1])
    endings = newest - torch.arange(count, device=end.device)  # (places, at most window), the newest first
    is_inside = (endings >= begin) & (endings < stop)
    safe = endings.clamp(0, plan.grams.shape[1] - 1)
    longest = torch.minimum(plan.runs[batch, safe].long(), endings - begin + 1).clamp_max(largest)
    longest = longest.masked_fill(~is_inside, 0)  # size of the longest n-gram that ends here inside the window

    weights = torch.zeros(len(positions), largest + 2, dtype=torch.float64, device=end.device)
    for n in set(plan.ngram_sizes):
        weights[:, n] = (plan.window - n + 1) / (longest >= n).sum(1).clamp_min(1).double()
    sizes = torch.arange(1, largest + 1, device=end.device)  # (places, window, sizes) from here on
    shorter = (weights[:, 1 : largest + 1] - weights[:, 2:]).unsqueeze(1)
    full = weights[:, 1 : largest + 1].unsqueeze(1)
    longest = longest.unsqueeze(-1)
    factors = torch.where(sizes < longest, shorter, torch.where(sizes == longest, full, 0.0))
    grams = plan.grams[batch, safe].long().unsqueeze(-1)
    starts = torch.tensor(sections.prefix[1:], device=end.device)
    rows = grams % 5**sizes + starts
    rows[..., -1] = top[batch, safe].long()
    place, ending, size = factors.nonzero(as_tuple=True)
    return place, rows[place, ending, size], factors[place, ending, size]
