"""Effects of changes by a causal model: what windows share is read once, and many are read at a time.

What stands left of a change is the same with all alleles. Windows of one length that are changed at about the same
place are split at the same place, so that their beginnings make one batch, and their ends, of all alleles, another.
Not on a CPU, the windows may also be of about one length: short ends are filled up behind, which a causal model does
not see.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .base_tokens import BaseTokens
from .effect_formulas import RowPairs, divergences, log_likelihood_ratios, row_pairs, widest
from .effects import Effect, Reading
from .parts import Seen, distances_of_parts, seen
from .shared_prefix import CausalReader, branched

# Windows are split at a multiple of this, less one: substitutions in the middle of windows of an even length are split
# at the same place on both strands.
_SPLIT = 16
# Numbers are about the same if they have the same number of bits and the same first ones, so many: with 2, the largest
# is less than half as large again as the smallest.
_LEADING_BITS = 2


class _Unit(NamedTuple):
    """Readings of one reference window that are split at one place."""

    split: int  # places before it are shared
    members: list[int]  # indices of readings


class Branch(NamedTuple):
    """Ends of windows, and what the model made of them.

    Args:
        members: the reading of each pair.
        pairs: the rows that hold its two windows.
        split: where the rows begin in their windows.
        skipped: tokens that the model read in front of the rows' letters.
        ids: (rows, length) letters, short rows filled up behind.
        logits: (rows, length, vocabulary) after each letter.
        last: (rows, 1, vocabulary) before the first letter; None at the start of a window.
    """

    members: list[int]
    pairs: RowPairs
    split: int
    skipped: int
    ids: torch.Tensor
    logits: torch.Tensor
    last: torch.Tensor | None


class CausalEffects:
    """Effects by a causal model.

    Args:
        model: causal language model, in `eval()`.
        tokens: of its tokenizer.
        scores: names of `SCORES`.
        tokens_per_pass: how many tokens, those in caches included, are in memory at once; two windows in any case.
    """

    def __init__(self, model: Any, tokens: BaseTokens, scores: Sequence[str], tokens_per_pass: int):
        self.reader = CausalReader(model, tokens)
        self.tokens, self.scores, self.tokens_per_pass = tokens, scores, tokens_per_pass

    def measure(self, readings: Sequence[Reading]) -> list[Effect]:
        """The effect of each reading; what is computed together does not change a number beyond rounding."""
        found: list[Effect] = [Effect()] * len(readings)
        with seen(self.reader.model, "embedding" in self.scores, "memory" in self.scores) as parts:
            for branch in self.branches(readings):
                for member, effect in self._effects_of(branch, parts):
                    found[member] = effect
        return found

    def branches(self, readings: Sequence[Reading]) -> Iterator[Branch]:
        """The ends of all windows, from where they are split on, and what the model made of them; in any order."""
        groups: dict[tuple[int, ...], list[list[_Unit]]] = defaultdict(list)
        for units in self._units(readings):
            groups[self._key(readings, units)].append(units)
        for references in groups.values():
            if len(references[0]) == 1:
                split = min(unit.split for (unit,) in references)
                references = [[unit._replace(split=split)] for (unit,) in references]
            for batch in self._batches(readings, references):
                yield from self._read(readings, batch)

    def _key(self, readings: Sequence[Reading], units: list[_Unit]) -> tuple[int, ...]:
        """References of one key are read side by side: of one length and with the same splits, or about so."""
        length, splits = len(readings[units[0].members[0]].reference), [unit.split for unit in units]
        if len(units) == 1 and self._fills_up:
            return _leading_bits(length), _leading_bits((splits[0] + 1) // _SPLIT)
        return (length, *splits)

    @property
    def _fills_up(self) -> bool:
        """Whether windows of about one length are read side by side: a CPU would take longer for the filling."""
        return self.reader.device.type != "cpu" and self.reader.can_continue

    def _rows_at_once(self, length: int) -> int:
        return max(2, self.tokens_per_pass // (len(self.tokens.before) + length))

    def _units(self, readings: Sequence[Reading]) -> Iterator[list[_Unit]]:
        """The units of each reference window, by their splits."""
        windows: dict[bytes, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, reading in enumerate(readings):
            windows[reading.reference.tobytes()][self._split(reading)].append(index)
        for by_split in windows.values():
            units = []
            for split, members in sorted(by_split.items()):
                most = self._rows_at_once(len(readings[members[0]].reference)) - 1
                units += [_Unit(split, members[i : i + most]) for i in range(0, len(members), most)]
            yield units

    def _split(self, reading: Reading) -> int:
        """Before which place a window is split; not at all (0) if little would be saved."""
        if not self.reader.can_continue:
            return 0
        last = len(reading.reference) - 1  # of windows that are equal
        common = min(reading.first_difference, reading.last_reference, reading.last_alternative, last)
        return max(0, (common + 1) // _SPLIT * _SPLIT - 1)

    def _batches(self, readings: Sequence[Reading], references: list[list[_Unit]]) -> Iterator[list[list[_Unit]]]:
        """References that are read side by side, so many that the rows of all their units find room in every step."""
        longest = max(len(readings[units[0].members[0]].reference) for units in references)
        batch: list[list[_Unit]] = []
        most = 0
        for units in references:
            rows = 1 + max(len(unit.members) for unit in units)
            if batch and most + rows > self._rows_at_once(longest):
                yield batch
                batch, most = [], 0
            batch.append(units)
            most += rows
        if batch:
            yield batch

    def _read(self, readings: Sequence[Reading], batch: list[list[_Unit]]) -> Iterator[Branch]:
        """One batch: the trunks of its references grow from split to split, and branch at each."""
        shared = batch[0][-1].split
        trunks = torch.from_numpy(np.stack([readings[units[0].members[0]].reference[:shared] for units in batch]))
        cache, last, done = None, None, 0
        for step, unit in enumerate(batch[0]):
            if unit.split > done:
                ids = self._ids(trunks[:, done : unit.split], is_start=done == 0)
                trunk = self.reader.read(ids, cache, keeps_cache=True)
                cache, last, done = trunk.cache, trunk.logits[:, -1:], unit.split
            yield self._branch(readings, [units[step] for units in batch], cache, last, done)

    def _ids(self, ids: torch.Tensor, is_start: bool) -> torch.Tensor:
        """Ids on the device, after what the tokenizer puts in front of a sequence."""
        if is_start and self.tokens.before:
            before = torch.tensor(self.tokens.before).expand(len(ids), -1)
            ids = torch.cat([before, ids], dim=1)
        return ids.to(self.reader.device)

    def _branch(
        self, readings: Sequence[Reading], units: list[_Unit], cache: Any, last: torch.Tensor | None, split: int
    ) -> Branch:
        """The ends of all windows of units.

        Args:
            cache, last: of the windows' beginnings, one row per unit, and the logits after them; None without any.
            split: where the ends begin.
        """
        ends = _ends_of(readings, units, split, self.tokens.bases[0], self.reader.device)
        ids = self._ids(ends.letters, is_start=split == 0)
        logits = self.reader.read(ids, None if cache is None else branched(cache, ends.owners)).logits
        skipped = ids.shape[1] - ends.letters.shape[1]
        last = None if last is None else last[ends.owners]
        return Branch(ends.members, ends.pairs, split, skipped, ids[:, skipped:], logits[:, skipped:], last)

    def _effects_of(self, branch: Branch, parts: Seen) -> Iterator[tuple[int, Effect]]:
        _, pairs, split, skipped, ids, logits, last = branch
        own = _own_log_probabilities(logits, ids, last)
        are_counted = ids != self.tokens.other
        if last is None:
            are_counted[:, 0] = False  # nothing predicts the first
        found = {"llr": log_likelihood_ratios(own, are_counted, pairs)}
        if "jsd" in self.scores:
            bases = logits[..., list(self.tokens.bases)].to(widest(logits.device))
            found["jsd"] = divergences(bases.log_softmax(-1), pairs)
        found |= distances_of_parts(parts, pairs, skipped, split)
        numbers = torch.stack(list(found.values()), dim=1).tolist()
        for member, row in zip(branch.members, numbers, strict=True):
            yield member, Effect(**dict(zip(found, row, strict=True)))


class _Ends(NamedTuple):
    """Ends of windows: of each unit that of the reference, and those of its readings' alternatives behind it."""

    letters: torch.Tensor  # (rows, length), short rows filled up behind
    owners: torch.Tensor  # (rows,) the unit of each
    members: list[int]  # the reading of each pair
    pairs: RowPairs


def _ends_of(
    readings: Sequence[Reading], units: Sequence[_Unit], split: int, filler: int, device: torch.device
) -> _Ends:
    rows: list[np.ndarray] = []
    owners: list[int] = []
    members: list[int] = []
    references: list[int] = []
    alternatives: list[int] = []
    for owner, unit in enumerate(units):
        members += unit.members
        references += [len(rows)] * len(unit.members)
        rows.append(readings[unit.members[0]].reference[split:])
        alternatives += range(len(rows), len(rows) + len(unit.members))
        rows += [readings[member].alternative[split:] for member in unit.members]
        owners += [owner] * (1 + len(unit.members))
    pairs = row_pairs([readings[member] for member in members], references, alternatives, split, device)
    letters = np.full((len(rows), max(map(len, rows))), filler)
    for place, row in enumerate(rows):
        letters[place, : len(row)] = row
    return _Ends(torch.from_numpy(letters), torch.tensor(owners, device=device), members, pairs)


def _leading_bits(number: int) -> int:
    """A number that stands for all that are about the same."""
    dropped = max(number.bit_length() - _LEADING_BITS, 0)
    return number >> dropped << dropped


def _own_log_probabilities(logits: torch.Tensor, ids: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
    """log P of each letter given all before it: (rows, length); without meaning for the first of a window.

    Args:
        logits: (rows, length, vocabulary) after each letter.
        ids: (rows, length).
        last: (rows, 1, vocabulary) before the first letter; None at the start of a window.
    """
    before = torch.cat([logits[:, :1] if last is None else last, logits[:, :-1]], dim=1).to(widest(logits.device))
    return before.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
