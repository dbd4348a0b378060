"""K-mers put together to motifs, false-discovery rates by hand, and known motifs where JASPAR is installed."""

import numpy as np
import pytest

from gengram.inference.motif_matches import discovery_rates, known_motifs, matches, motifs_of


def test_kmers_that_are_alike_are_one_motif():
    found = motifs_of([("TGACTCA", 3.0), ("GACTCAT", 2.0), ("TGACTCT", 1.0), ("TATAAA", 1.0), ("AC", 9.0)])
    assert [motif.members for motif in found] == [("TGACTCA", "GACTCAT", "TGACTCT"), ("TATAAA",)]
    counts = found[0].counts
    assert counts.shape == (8, 4) and counts.sum(1).tolist() == [4, 6, 6, 6, 6, 6, 6, 2]
    assert counts[6].tolist() == [5, 0, 0, 1]
    assert np.allclose(found[0].shares.sum(1), 1)


def test_kmers_with_n_and_short_ones_are_left_out():
    assert motifs_of([("NNNNNN", 1.0), ("ACGT", 1.0)]) == []


def test_false_discovery_rates_are_expected_over_found():
    own, chance = np.array([0.001, 0.5, 0.02]), np.array([0.01, 0.3, 0.6, 0.9])
    # At 0.001 none of four; at 0.02 one of four, of three queries, over two found; at 0.5 two of four over three.
    assert discovery_rates(own, chance).tolist() == pytest.approx([0, 0.5 * 3 / 3, 0.25 * 3 / 2])
    assert discovery_rates(np.array([0.2, 0.1]), np.array([0.15] * 3)).tolist() == [1, 0]
    assert (discovery_rates(np.array([0.9, 0.9]), np.array([0.1])) <= 1).all()


@pytest.mark.slow
def test_the_shape_of_ap1_is_found():
    pytest.importorskip("pyjaspar")
    pytest.importorskip("memelite")
    known = known_motifs("vertebrates")
    found = matches(motifs_of([("TGACTCA", 1.0), ("TATAAA", 1.0), ("GGGCGG", 1.0)]), known).to_pylist()
    best = {row["query"]: row for row in found if row["false_discovery_rate"] is not None}
    assert best["TGACTCA"]["name"].upper().startswith(("JUN", "FOS", "ATF", "BATF"))
    assert best["TATAAA"]["name"] == "TBP" and best["GGGCGG"]["name"].startswith(("KLF", "SP"))
