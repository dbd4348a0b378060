"""How much of one split stands in another: a FracMinHash sketch of the k-mers of both strands."""

import numpy as np

from ..sequences.alphabet import OTHER, base_digits

_AT_ONCE = 1 << 17  # bases, of which about 100 bytes each are in memory
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


class KmerSketch:
    """The sketch of any number of runs of bases, in bounded memory.

    Args:
        scale: one in so many k-mers is kept. It is doubled whenever more than `most` are, so a sketch of much sequence
            has a larger one in the end.
        most: k-mers that are kept.
    """

    def __init__(self, scale: int, most: int = 1 << 22):
        self.scale, self.most = scale, most
        self._text = bytearray()  # of which the k-mers are not yet counted
        self._kept = np.empty(0, dtype=np.uint64)  # sorted, each once
        self._found: list[np.ndarray] = []

    def add(self, text: str) -> None:
        """Add the next bases of the current run."""
        for start in range(0, len(text), _AT_ONCE):
            self._text += text[start : start + _AT_ONCE].encode("ascii", "replace")
            if len(self._text) >= _AT_ONCE:
                self._count()

    def end_run(self) -> None:
        """No k-mer reaches from what was added before to what comes next."""
        self._text += b"N"

    def kmers(self, scale: int | None = None) -> np.ndarray:
        """The sketch, sorted, at `scale` (a multiple of its own), or at its own."""
        self._count()
        self._merge()
        return self._kept if scale in (None, self.scale) else sketch(self._kept, int(scale or 1))

    def _count(self) -> None:
        self._found.append(sketch(canonical_kmers(self._text.decode("ascii")), self.scale))
        del self._text[: max(0, len(self._text) - KMER + 1)]
        if sum(map(len, self._found)) > self.most // 4:
            self._merge()

    def _merge(self) -> None:
        self._kept = np.unique(np.concatenate([self._kept, *self._found]))
        self._found = []
        while len(self._kept) > self.most:
            self.scale *= 2
            self._kept = sketch(self._kept, self.scale)


def shares_in(outer: KmerSketch, others: dict[str, KmerSketch]) -> dict[str, float]:
    """Which share of the k-mers of each of `others` is in `outer` too, at the largest scale of the two."""
    found = {}
    for name, inner in others.items():
        scale = max(inner.scale, outer.scale)
        found[name] = containment(inner.kmers(scale), outer.kmers(scale))
    return found
