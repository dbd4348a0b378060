"""Rows of a memory's tables by their k-mers."""

from collections.abc import Sequence

LETTERS = "ACGTN"  # a letter's digit is its place here


def place_of_kmer(kmer: str, ngram_sizes: Sequence[int]) -> tuple[int, int]:
    """The table of a k-mer, by its place among the sizes, and its row there.

    Args:
        kmer: A, C, G, T and N in either case; N is a letter of its own, and stands for no other.
        ngram_sizes: of the memory.

    Raises:
        TypeError: if it is no string.
        ValueError: if there is no table for k-mers of this size, or a letter is another.

    Example:

    >>> from gengram.motif_memory.kmer_rows import place_of_kmer
    >>> place_of_kmer("CA", [1, 2])  # the last letter is the least significant digit
    (1, 5)
    """
    if not isinstance(kmer, str):
        raise TypeError(f"expected a k-mer such as 'TATAAA', got {kmer!r}.")
    letters = kmer.upper()
    if not letters or set(letters) - set(LETTERS):
        raise ValueError(f"expected a k-mer of the letters A, C, G, T and N, got {kmer[:80]!r}.")
    if len(letters) not in ngram_sizes:
        sizes = ", ".join(map(str, ngram_sizes))
        raise ValueError(
            f"expected a k-mer of a size that the memory has ({sizes}), got {kmer[:80]!r} with {len(kmer)} letters."
        )
    row = 0
    for letter in letters:
        row = row * len(LETTERS) + LETTERS.index(letter)
    return list(ngram_sizes).index(len(letters)), row
