"""Shares by k-mer over sequences, beside a table that is grouped row by row."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from tiny_models import random_ids, tiny_model
from tolerances import SHARES_FP64

from gengram import GengramForCausalLM, explain_memory
from gengram.inference.kmer_totals import KmerTotals


@pytest.mark.parametrize("positions", [None, [5, 6, 7, 20]])
def test_totals_are_those_of_the_rows(positions):
    model = tiny_model(GengramForCausalLM, memory_layers=[2]).double()
    batches = [explain_memory(model, random_ids(3, 30, seed=seed), target="residual_norm") for seed in (1, 2)]
    totals, expected, places = KmerTotals(), defaultdict(lambda: defaultdict(float)), defaultdict(set)
    chosen = None if positions is None else np.isin(np.arange(30), positions)
    for number, found in enumerate(batches):
        totals.add(found, chosen)
        for row in found.table.to_pylist():
            if positions is None or row["position"] in positions:
                expected[row["kmer"]][number, row["sequence"]] += row["contribution"]
                places[row["kmer"]].add((number, row["sequence"], row["start"]))
    table = {row["kmer"]: row for row in totals.table.to_pylist()}
    assert table.keys() == expected.keys()
    for kmer, sums in expected.items():
        values, row = np.array(list(sums.values())), table[kmer]
        assert (row["sequences"], row["occurrences"]) == (len(values), len(places[kmer]))
        assert row["contribution"] == pytest.approx(values.sum(), rel=SHARES_FP64)
        assert row["mean"] == pytest.approx(values.mean(), rel=SHARES_FP64)
        if len(values) > 1:
            error = values.std(ddof=1) / len(values) ** 0.5
            assert row["standard_error"] == pytest.approx(error, rel=SHARES_FP64, abs=SHARES_FP64)
        else:
            assert row["standard_error"] is None
    means = [abs(row["mean"]) for row in totals.table.to_pylist()]
    assert means == sorted(means, reverse=True)


def test_shares_of_bases_add_up_too():
    found = explain_memory(tiny_model(GengramForCausalLM), random_ids(2, 30), layer=0, target="base:actual")
    by_base = torch.tensor(found.by_base()).sum(1)
    torch.testing.assert_close(by_base, found.total.sum(1), rtol=SHARES_FP64, atol=SHARES_FP64)
    one = np.zeros(30)
    for row in found.table.to_pylist():
        if row["sequence"] == 1:
            one[row["start"] : row["start"] + len(row["kmer"])] += row["contribution"] / len(row["kmer"])
    np.testing.assert_allclose(found.by_base()[1], one, rtol=0, atol=SHARES_FP64)
