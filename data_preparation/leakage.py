"""How much of one split stands in another: a FracMinHash sketch of the k-mers of both strands."""

import numpy as np

from ..sequences.alphabet import OTHER, base_digits

KMER = 31  # long enough to be nearly unique in a vertebrate genome, odd so that none is its own reverse complement


def canonical_kmers(sequence: str, k: int = KMER) -> np.ndarray:
    """The k-mers of A, C, G, T in `sequence`, each as the smaller of the codes of its two strands; uint64, k <= 31."""
    digits = base_digits(sequence)
    if len(digits) < k:
        return np.empty(0, dtype=np.uint64)
    is_letter = digits < OTHER
    forward = _rolling_codes(np.where(is_letter, digits, 0).astype(np.uint64), k)
    backward = _rolling_codes(np.where(is_letter, 3 - digits, 0).astype(np.uint64)[::-1], k)[::-1]
    letters = np.concatenate([[0], np.cumsum(is_letter)])
    is_valid = letters[k:] - letters[:-k] == k
    return np.minimum(forward, backward)[is_valid]


def _rolling_codes(digits: np.ndarray, k: int) -> np.ndarray:
    """Codes of base 4 of every window of k digits, most significant first; by binary doubling."""
    length = len(digits) - k + 1
    codes = np.zeros(length, dtype=np.uint64)
    power, width, done = digits, 1, 0  # `power` holds the codes of windows of `width` digits
    for bit in range(k.bit_length()):
        if k >> bit & 1:
            codes = (codes << np.uint64(2 * width)) | power[done : done + length]
            done += width
        if done < k:
            power = (power[: len(power) - width] << np.uint64(2 * width)) | power[width:]
            width *= 2
    return codes


def sketch(kmers: np.ndarray, scale: int) -> np.ndarray:
    """About one in `scale` of the different k-mers, always the same ones (FracMinHash, Irber et al. 2022)."""
    mixed = kmers.copy()  # the finaliser of splitmix64
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.unique(kmers[mixed <= np.uint64((2**64 - 1) // scale)])


def containment(inner: np.ndarray, outer: np.ndarray) -> float:
    """Share of the sketch `inner` that is in the sketch `outer`; nan if `inner` is empty."""
    return float(np.isin(inner, outer, assume_unique=True).mean()) if len(inner) else float("nan")
