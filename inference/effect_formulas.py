"""The numbers of an `Effect` from what a model puts out for rows that hold the alleles; see `effects.py`.

Rows hold the same places of windows, up to the windows' last, and may be filled up behind. Results are float64 where
the device has it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .effects import Reading


class RowPairs(NamedTuple):
    """Which rows are compared, and where their alleles are; tensors of (pairs,), places counted within rows.

    Args:
        reference, alternative: the rows.
        first_difference: the first place at which both rows differ, or what a model makes of them.
        last_reference, last_alternative: places of the alleles' last bases, 0 or more, maybe beyond the row.
        length: letters of either row; what is behind is filling.
    """

    reference: torch.Tensor
    alternative: torch.Tensor
    first_difference: torch.Tensor
    last_reference: torch.Tensor
    last_alternative: torch.Tensor
    length: torch.Tensor

    def behind(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places from the alleles' last bases on, in reference rows and in alternative rows, and which of them exist.

        Each is (pairs, most places); equal columns are equal letters of the genome, but for the alleles themselves.
        """
        counts = self.length - torch.maximum(self.last_reference, self.last_alternative)  # (pairs,)
        steps = torch.arange(max(int(counts.max()), 1), device=counts.device)
        exist = steps < counts.unsqueeze(1)
        last = (self.length - 1).unsqueeze(1)
        of_reference = (self.last_reference.unsqueeze(1) + steps).minimum(last)
        of_alternative = (self.last_alternative.unsqueeze(1) + steps).minimum(last)
        return of_reference, of_alternative, exist

    def are_letters(self, places: int) -> torch.Tensor:
        """Which of a row's places are no filling: (pairs, places)."""
        return torch.arange(places, device=self.length.device) < self.length.unsqueeze(1)

    def may_differ(self, places: int) -> torch.Tensor:
        """Which of a row's places are letters from the first difference on: (pairs, places)."""
        each = torch.arange(places, device=self.length.device)
        return (each >= self.first_difference.unsqueeze(1)) & self.are_letters(places)


def row_pairs(
    readings: Sequence[Reading],
    references: Sequence[int],
    alternatives: Sequence[int],
    split: int,
    device: torch.device,
) -> RowPairs:
    """Pairs of rows that hold the windows of readings from the place `split` on."""
    columns = [
        references,
        alternatives,
        [reading.first_difference - split for reading in readings],
        [reading.last_reference - split for reading in readings],
        [reading.last_alternative - split for reading in readings],
        [len(reading.reference) - split for reading in readings],
    ]
    return RowPairs(*(torch.tensor(column, device=device) for column in columns))


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def log_likelihood_ratios(log_probabilities: torch.Tensor, are_counted: torch.Tensor, pairs: RowPairs) -> torch.Tensor:
    """Sum over the places that count of log P(alternative), less that of log P(reference): (pairs,), nats.

    Of two rows in which other numbers of places count, the last of the one that has more do not.

    Args:
        log_probabilities: (rows, length) of the rows' own letters.
        are_counted: (rows, length) bool: bases that are predicted.
    """
    letters = pairs.are_letters(are_counted.shape[1])
    of_rows = [are_counted[rows] & letters for rows in (pairs.reference, pairs.alternative)]
    fewest = torch.minimum(*(counted.sum(1) for counted in of_rows)).unsqueeze(1)
    sums = [
        log_probabilities[rows].masked_fill(~(counted & (counted.cumsum(1) <= fewest)), 0)
        for rows, counted in zip((pairs.reference, pairs.alternative), of_rows, strict=True)
    ]
    return (sums[1] - sums[0]).masked_fill(~pairs.may_differ(are_counted.shape[1]), 0).sum(1)


def divergences(log_probabilities: torch.Tensor, pairs: RowPairs) -> torch.Tensor:
    """Jensen-Shannon divergences summed over the places from the alleles' last bases on: (pairs,), nats; nan of none.

    JSD(P, Q) = (KL(P | M) + KL(Q | M)) / 2 with M = (P + Q) / 2 (Lin 1991, doi:10.1109/18.61115).

    Args:
        log_probabilities: (rows, length, letters) of the next letter.
    """
    of_reference, of_alternative, exist = pairs.behind()
    p = log_probabilities[pairs.reference.unsqueeze(1), of_reference]  # (pairs, places, letters)
    q = log_probabilities[pairs.alternative.unsqueeze(1), of_alternative]
    mixed = torch.logaddexp(p, q) - math.log(2)
    each = ((p.exp() * (p - mixed)).sum(-1) + (q.exp() * (q - mixed)).sum(-1)) / 2
    return _nan_where_none(each.clamp(min=0).masked_fill(~exist, 0).sum(1), exist)


def embedding_distances(hidden: torch.Tensor, pairs: RowPairs, split: int) -> torch.Tensor:
    """Euclidean distance of the window's mean and the last base of the allele, as one vector: (pairs,); nan of none.

    Args:
        hidden: (rows, length, hidden).
        split: how many places of the windows stand before the rows; they are the same.
    """
    of_reference, of_alternative, exist = pairs.behind()
    work = widest(hidden.device)
    changed = _differences(hidden, pairs.reference, pairs.alternative)  # (pairs, length, hidden)
    same = ~pairs.may_differ(hidden.shape[1])
    of_window = changed.masked_fill(same.unsqueeze(-1), 0).sum(1, dtype=work)  # (pairs, hidden)
    of_window = of_window / (split + pairs.length).unsqueeze(1)
    reference = hidden[pairs.reference, of_reference[:, 0]].to(work)
    of_allele = hidden[pairs.alternative, of_alternative[:, 0]].to(work) - reference
    return _nan_where_none(torch.cat([of_window, of_allele], dim=1).norm(dim=1), exist)


def memory_changes(residuals: Sequence[torch.Tensor], pairs: RowPairs) -> torch.Tensor:
    """Norm over places from the alleles' last bases on of what is added differently, mean of layers: (pairs,).

    Args:
        residuals: of each memory, (rows, length, hidden).
    """
    of_reference, of_alternative, exist = pairs.behind()
    norms = []
    for residual in residuals:
        index = (of_reference.to(residual.device), of_alternative.to(residual.device))
        changed = _differences(residual, pairs.reference, pairs.alternative, index).square()  # (pairs, places, hidden)
        squares = changed.sum(-1, dtype=widest(residual.device)).to(exist.device)
        norms.append(squares.masked_fill(~exist, 0).sum(1).sqrt())
    return _nan_where_none(torch.stack(norms).mean(0), exist)


def _differences(
    values: torch.Tensor,
    reference: torch.Tensor,
    alternative: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Alternative rows less reference rows, in at least float32, at all places or at these of either."""
    rows = [row.to(values.device) for row in (reference, alternative)]
    if places is None:
        first, second = (values[row] for row in rows)
    else:
        first, second = (values[row.unsqueeze(1), place] for row, place in zip(rows, places, strict=True))
    work = torch.promote_types(values.dtype, torch.float32)
    return second.to(work) - first.to(work)


def _nan_where_none(values: torch.Tensor, exist: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~exist[:, 0], math.nan)
