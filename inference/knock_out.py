"""Knocks k-mers out of a model's memories, to see what they caused."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..motif_memory.kmer_rows import place_of_kmer
from ..motif_memory.ways.kept_fold import memories_of
from ..sequences.alphabet import reverse_complement
from ..support.errors import InputError


def spelled_kmers(kmers: Sequence[str]) -> list[str]:
    """The k-mers in upper case, U as T, each once."""
    return list(dict.fromkeys(kmer.strip().upper().replace("U", "T") for kmer in kmers))


def kmers_to_knock_out(model: Any, kmers: Sequence[str], reverse_complements: bool = False) -> list[str]:
    """The k-mers in upper case, U as T, each once, with their reverse complements if these are wanted.

    Raises:
        InputError: if the model has no memory, or one that has no rows for a k-mer.
    """
    memories = memories_of(model)
    if not memories:
        raise InputError(f"{type(model).__name__} has no motif memory to knock k-mers out of.")
    wanted = spelled_kmers(kmers)
    for kmer in wanted:
        for memory in memories:
            try:
                place_of_kmer(kmer, memory.config.ngram_sizes)
            except ValueError as error:
                raise InputError(f"knock-out: {error}") from None
    if reverse_complements:
        wanted += [reverse_complement(kmer) for kmer in wanted]
    return list(dict.fromkeys(wanted))


@contextlib.contextmanager
def knocked_out(model: Any, kmers: Sequence[str], reverse_complements: bool = False) -> Iterator[list[str]]:
    """A block in which the rows of k-mers are 0 in all memories of a model, and their old selves behind it.

    A k-mer without its row still counts as one of its window: the mean over the window loses what it gave. Longer and
    shorter k-mers at the same place keep their rows.

    Args:
        model: with memories, Gengram's own or attached.
        kmers: of sizes that all the memories have.
        reverse_complements: whether to knock out theirs, too.

    Yields:
        The k-mers that are knocked out.

    Raises:
        InputError: as `kmers_to_knock_out` does.
    """
    wanted = kmers_to_knock_out(model, kmers, reverse_complements)
    memories = memories_of(model)
    before = [{kmer: memory[kmer] for kmer in wanted} for memory in memories]
    try:
        for memory in memories:
            for kmer in wanted:
                memory[kmer] = 0
        yield wanted
    finally:
        for memory, rows in zip(memories, before, strict=True):
            for kmer, row in rows.items():
                memory[kmer] = row
