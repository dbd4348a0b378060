"""Reads what `gengram prepare` wrote."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from ..sequences.alphabet import digit_table
from ..tokenization.tokenization_gengram import GengramTokenizer


def digits_of(dataset: Dataset, rows_at_once: int = 4096) -> Iterator[np.ndarray]:
    """Examples as digits: 0..3 for A, C, G, T, 4 for other tokens; (length,) each."""
    table = digit_table(GengramTokenizer().nucleotide_ids[:4])
    for batch in dataset.select_columns("input_ids").with_format("numpy").iter(rows_at_once):
        for row in batch["input_ids"]:
            yield table[row]
