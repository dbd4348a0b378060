"""Which k-mers matter over many sequences: shares added up by k-mer."""

from typing import Any

import numpy as np
import pyarrow as pa

from ..motif_memory.kmer_rows import LETTERS
from .explanation import Explanation

SCHEMA = pa.schema(
    [
        ("kmer", pa.string()),
        ("sequences", pa.int64()),
        ("occurrences", pa.int64()),
        ("contribution", pa.float64()),
        ("mean", pa.float64()),
        ("standard_error", pa.float64()),
    ]
)


class KmerTotals:
    """Shares of k-mers, added up over sequences.

    Example:

    >>> import gengram
    >>> from gengram.inference.kmer_totals import KmerTotals
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model = AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL).eval()
    >>> tokenizer, totals = AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL), KmerTotals()
    >>> for sequence in ("GGCTATAAAAGG", "CCATATAAATAG"):
    ...     totals.add(gengram.explain_memory(model, tokenizer(sequence)["input_ids"], target="residual_norm"))
    >>> totals.table.slice(0, 20)["sequences"].to_pylist()[0]
    2
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], np.ndarray] = {}  # by size and row: sequences, places, sum, sum of squares

    def add(self, explanation: Explanation, positions: Any = None) -> None:
        """Add all sequences of a batch.

        Args:
            explanation: of any target.
            positions: bool (batch, length) or (length,): which positions count, such as those inside an element; all
                by default.
        """
        sequence, position, size, end = explanation.places()
        shares = explanation.grid.shares[explanation.grid.is_there].cpu().numpy()
        if positions is not None:
            counted = np.broadcast_to(np.asarray(positions, dtype=bool), explanation.last.shape)[sequence, position]
            sequence, size, end, shares = sequence[counted], size[counted], end[counted], shares[counted]
        for index, length in enumerate(explanation.sizes):
            chosen = size == index
            rows = _rows(explanation.digits, sequence[chosen], end[chosen], length)
            places = end[chosen] + explanation.digits.shape[1] * sequence[chosen].astype(np.int64)
            self._add(length, rows, sequence[chosen], places, shares[chosen])

    def _add(
        self, length: int, rows: np.ndarray, sequence: np.ndarray, places: np.ndarray, shares: np.ndarray
    ) -> None:
        occurrences = np.unique(np.stack([rows, places]), axis=1)[0]  # a k-mer counts in many positions, but is once
        pairs, inverse = np.unique(np.stack([rows, sequence]), axis=1, return_inverse=True)
        sums = np.bincount(inverse.ravel(), weights=shares, minlength=pairs.shape[1])  # of a k-mer in a sequence
        unique, numbers = np.unique(pairs[0], return_inverse=True)
        counts = np.bincount(np.searchsorted(unique, occurrences), minlength=len(unique))
        columns = np.stack(
            [
                np.bincount(numbers, minlength=len(unique)),
                counts,
                np.bincount(numbers, weights=sums, minlength=len(unique)),
                np.bincount(numbers, weights=sums**2, minlength=len(unique)),
            ],
            axis=1,
        )
        for row, found in zip(unique.tolist(), columns, strict=True):
            self._found[length, row] = self._found.get((length, row), 0) + found

    @property
    def table(self) -> pa.Table:
        """A row for each k-mer, the largest mean contribution, either way, first.

        `occurrences` are places in sequences, `contribution` is the sum over all, `mean` that of a sequence that holds
        the k-mer, and `standard_error` that of this mean between sequences, null for one sequence.
        """
        words = [_word(row, length) for length, row in self._found]
        numbers = np.array(list(self._found.values())).reshape(-1, 4)
        sequences, occurrences, total, squares = numbers.T
        mean = total / np.maximum(sequences, 1)
        spread = np.maximum(squares - sequences * mean**2, 0) / np.maximum(sequences - 1, 1)
        error = np.sqrt(spread / np.maximum(sequences, 1))
        order = np.argsort(-np.abs(mean), kind="stable")
        columns: list[Any] = [
            pa.array([words[index] for index in order], pa.string()),
            pa.array(sequences[order].astype(np.int64)),
            pa.array(occurrences[order].astype(np.int64)),
            pa.array(total[order]),
            pa.array(mean[order]),
            pa.array(error[order], mask=sequences[order] < 2),
        ]
        return pa.table(columns, schema=SCHEMA)


def _rows(digits: np.ndarray, sequence: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """Row in its table of the k-mer that ends at each place."""
    rows = np.zeros(len(end), dtype=np.int64)
    for back in range(length):
        rows += digits[sequence, end - back].astype(np.int64) * 5**back
    return rows


def _word(row: int, length: int) -> str:
    return "".join(LETTERS[row // 5**back % 5] for back in reversed(range(length)))
