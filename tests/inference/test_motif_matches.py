"""K-mers put together to motifs, false-discovery rates by hand, and known motifs where JASPAR is installed."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from gengram.inference.motif_matches import discovery_rates, known_motifs, matches, motifs_of
from gengram.support.errors import MissingExtraError


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
    own, chance = np.array([0.001, 0.5, 0.02]), np.array([0.01, 0.3, 0.4, 0.45, 0.9, 0.9, 0.9, 0.9, 0.9])
    # Three queries times: at 0.001 none of nine, so one in ten, over one found; at 0.02 two in ten over two; at 0.5
    # five in ten over three.
    assert discovery_rates(own, chance).tolist() == pytest.approx([0.3 / 1, 1.5 / 3, 0.6 / 2])
    assert discovery_rates(np.array([0.2, 0.1]), np.array([0.15] * 3)).tolist() == [1, 0.5]
    assert (discovery_rates(np.array([0.9, 0.9]), np.array([0.1])) <= 1).all()


@pytest.mark.slow
def test_the_shape_of_ap1_is_found():
    pyjaspar = pytest.importorskip("pyjaspar")
    pytest.importorskip("memelite")
    known = known_motifs("vertebrates")
    found = matches(motifs_of([("TGACTCA", 1.0), ("TATAAA", 1.0), ("GGGCGG", 1.0)]), known).to_pylist()
    best = {row["query"]: row for row in found if row["false_discovery_rate"] is not None}
    like_ap1 = [row for row in found if row["query"] == "TGACTCA"]
    classes = [pyjaspar.jaspardb().fetch_motif_by_id(row["matrix"]).tf_class for row in like_ap1]
    assert all("bZIP" in words for each in classes for words in each)  # Maf, too: its longer motif holds the same
    assert {row["name"].upper() for row in like_ap1} & {"ATF3", "BATF", "BATF3", "FOSB", "JUN"}
    assert best["TGACTCA"]["false_discovery_rate"] < 0.05
    assert best["TATAAA"]["name"] == "TBP" and best["GGGCGG"]["name"].startswith(("KLF", "SP"))


def test_a_library_that_is_missing_is_said_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyjaspar", types.SimpleNamespace(jaspardb=None))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install pyjaspar memelite"):
        known_motifs()
