"""A k-mer that decides a label is what contributions put first, on a model that learned it."""

import numpy as np
import pytest
from example_scripts import load_example

pytest.importorskip("captum")
planted_motif = load_example("analysis/planted_motif.py")
MOTIF, LENGTH = "TGACTC", 40


def test_every_second_sequence_holds_the_motif_once_and_the_others_all_but_one_base_of_it():
    digits, starts = planted_motif.planted(np.random.default_rng(1), 20, LENGTH, MOTIF)
    texts = ["".join("ACGT"[digit] for digit in row) for row in digits]
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        here = text[start : start + len(MOTIF)]
        assert (text.count(MOTIF), sum(a != b for a, b in zip(here, MOTIF, strict=True))) == ((1, 0), (0, 1))[row % 2]


@pytest.mark.slow
def test_contributions_put_the_motif_first_in_99_of_100_sequences():
    generator = np.random.default_rng(0)
    held_out, _ = planted_motif.planted(generator, 400, LENGTH, MOTIF)
    model = planted_motif.new_model(MOTIF, LENGTH, 0)
    planted_motif.train(model, generator, MOTIF, LENGTH, 300)
    found = planted_motif.by_contributions(model, held_out[::2])
    assert sum(planted_motif.first_kmer(each) == MOTIF for each in found) >= 198
