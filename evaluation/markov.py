"""Markov models of bases: the baseline that a language model of DNA has to beat."""

from collections.abc import Iterable, Sequence

import numpy as np

HIGHEST_ORDER = 13  # 4**14 counts of 8 bytes are 2 GB


class MarkovModel:
    """Distribution of the next base given the last `order` bases, with interpolated counts.

    With c the counts of the training sequences, and P_-1 = 1/4,

        P_k(b | last k bases) = (c(last k, b) + strength * P_{k-1}(b | last k-1)) / (c(last k) + strength)

    that is, each order is the Dirichlet prior of the next one (MacKay and Peto 1995, section 3). A base whose context
    is cut short, by the start or by anything that is not A, C, G or T, is predicted by the longest order that fits.

    Args:
        order: number of bases of context, 0 to 13.

    Raises:
        ValueError: if the order is out of range.

    Example:

    ```python
    >>> import numpy as np
    >>> from gengram.evaluation.markov import MarkovModel
    >>> model = MarkovModel(2)
    >>> model.count([np.array([0, 1, 2, 3] * 100)])
    >>> bits, bases = model.evaluate([np.array([0, 1, 2, 3] * 10)], strength=1.0)
    >>> bases, bits / bases < 0.2
    (39, True)

    ```
    """

    def __init__(self, order: int):
        if not 0 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order must lie in 0..{HIGHEST_ORDER}, got {order}.")
        self.order = order
        self.counts = np.zeros(4 ** (order + 1), dtype=np.int64)  # of (order + 1)-mers, last base least
        self._short = [np.zeros(4 ** (k + 1), dtype=np.int64) for k in range(order)]  # of contexts that were cut short
        self._tables: tuple[float, list[np.ndarray]] | None = None

    def count(self, sequences: Iterable[np.ndarray]) -> None:
        """Add training sequences: arrays of digits 0..3 for A, C, G, T, anything else for other tokens."""
        self._tables = None
        for digits in sequences:
            codes, contexts = self._contexts(digits)
            np.add.at(self.counts, codes[contexts == self.order], 1)
            for k, short in enumerate(self._short):
                np.add.at(short, codes[contexts == k] % len(short), 1)

    def _contexts(self, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Code of the (order + 1)-mer that ends at each base, and how many bases of context it has; -1: no base."""
        digits = np.asarray(digits).astype(np.int64)
        is_base = (digits >= 0) & (digits < 4)
        index = np.arange(len(digits))
        last_other = np.maximum.accumulate(np.where(is_base, -1, index)) if len(digits) else index
        contexts = np.minimum(index - last_other - 1, self.order)
        codes = np.zeros(len(digits), dtype=np.int64)
        clean = np.where(is_base, digits, 0)
        for back in range(min(self.order + 1, len(digits))):
            codes[back:] += clean[: len(digits) - back] << (2 * back)
        return codes, contexts

    def log2_probabilities(self, digits: np.ndarray, strength: float) -> np.ndarray:
        """log2 of the probability of each base given those before it; nan where there is no base.

        Args:
            digits: (length,) 0..3 for A, C, G, T, anything else for other tokens.
            strength: of the prior, above 0, in counts.
        """
        codes, contexts = self._contexts(digits)
        result = np.full(len(codes), np.nan)
        tables = self._probabilities(strength)
        for k in range(self.order + 1):
            here = contexts == k
            result[here] = np.log2(tables[k][codes[here] % len(tables[k])])
        return result

    def _probabilities(self, strength: float) -> list[np.ndarray]:
        """Tables of P_k for k = 0..order, each (4**(k + 1),)."""
        if strength <= 0:
            raise ValueError(f"strength must be above 0, got {strength}.")
        if self._tables is not None and self._tables[0] == strength:
            return self._tables[1]
        counts = [self.counts]
        for k in range(self.order - 1, -1, -1):  # a k-mer is counted where its longer context is, or was cut short
            counts.insert(0, counts[0].reshape(4, -1).sum(0) + self._short[k])
        tables = []
        below = np.full(4, 0.25)
        for count in counts:
            by_context = count.reshape(-1, 4)  # (contexts, next base)
            prior = np.tile(below.reshape(-1, 4), (len(by_context) * 4 // len(below), 1))
            tables.append(
                ((by_context + strength * prior) / (by_context.sum(1, keepdims=True) + strength)).reshape(-1)
            )
            below = tables[-1]
        self._tables = (strength, tables)
        return tables

    def evaluate(self, sequences: Iterable[np.ndarray], strength: float, skip: int = 1) -> tuple[float, int]:
        """Sum of bits and number of bases, leaving out the first `skip` tokens of each sequence.

        A causal language model does not predict the first token; leaving it out makes the sums comparable.
        """
        bits, bases = 0.0, 0
        for digits in sequences:
            found = -self.log2_probabilities(digits, strength)[skip:]
            found = found[~np.isnan(found)]
            bits += float(found.sum())
            bases += len(found)
        return bits, bases

    def choose_strength(
        self, sequences: Sequence[np.ndarray], grid: Sequence[float] = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
    ) -> float:
        """The strength of the grid with the fewest bits on development sequences.

        Raises:
            ValueError: if these hold no bases to choose by, or none were counted.
        """
        found = {strength: self.evaluate(sequences, strength) for strength in grid}
        if not any(bases for _, bases in found.values()) or not any(map(np.any, [self.counts, *self._short])):
            raise ValueError(
                "expected bases both in the sequences that are counted and in those to choose by, got none."
            )
        return min(grid, key=lambda strength: found[strength][0])
