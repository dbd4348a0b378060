"""Trivial models of labelled sequences: counts of k-mers, and one-hot positions."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse

from ..sequences.alphabet import OTHER, base_digits
from ..support.errors import InputError


def kmer_counts(sequences: Sequence[str], largest: int) -> sparse.csr_matrix:
    """log(1 + count) of every k-mer of A, C, G, T, k = 1..largest: (sequences, sum of 4**k)."""
    offsets = np.cumsum([0] + [4**k for k in range(1, largest + 1)])
    columns, values, starts = [], [], [0]
    for sequence in sequences:
        digits = base_digits(sequence).astype(np.int64)
        found = []
        codes = np.zeros(len(digits), dtype=np.int64)
        is_valid = np.ones(len(digits), dtype=bool)
        for k in range(1, largest + 1):
            shifted, fits = np.zeros_like(codes), np.zeros_like(is_valid)
            firsts = digits[: max(0, len(digits) - k + 1)]  # first bases of the k-mers; none in a shorter sequence
            shifted[k - 1 :] = firsts % 4 * 4 ** (k - 1)
            fits[k - 1 :] = firsts < OTHER
            codes, is_valid = codes + shifted, is_valid & fits
            found.append(codes[is_valid] + offsets[k - 1])
        names, counts = np.unique(np.concatenate(found), return_counts=True)
        columns.append(names)
        values.append(np.log1p(counts))
        starts.append(starts[-1] + len(names))
    shape = (len(sequences), int(offsets[-1]))
    return sparse.csr_matrix((np.concatenate(values), np.concatenate(columns), starts), shape=shape)


def check_one_length(sequences: Sequence[str]) -> int:
    """The length that all sequences have.

    Raises:
        InputError: if they differ: then positions mean nothing.
    """
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) != 1:
        found = f"{min(lengths)} to {max(lengths)} bases" if lengths else "none"
        raise InputError(f"one-hot positions need sequences of one length, got {found}.")
    return lengths.pop()


def positional_one_hot(sequences: Sequence[str]) -> sparse.csr_matrix:
    """One column per position and base, (sequences, 4 * length).

    Raises:
        InputError: if the sequences differ in length.
    """
    length = check_one_length(sequences)
    digits = np.stack([base_digits(sequence).astype(np.int64) for sequence in sequences])  # (sequences, length)
    rows, places = np.nonzero(digits < OTHER)
    columns = places * 4 + digits[rows, places]
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(sequences), 4 * length))


FEATURES: dict[str, Callable[[Sequence[str]], sparse.csr_matrix]] = {
    "kmer": lambda sequences: kmer_counts(sequences, 6),
    "kmer4": lambda sequences: kmer_counts(sequences, 4),
    "positional": positional_one_hot,
}
