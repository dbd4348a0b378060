"""K-mers that matter, put together to motifs, and what is known of them: JASPAR, by Tomtom, with false discoveries.

Tomtom (Gupta et al. 2007, Genome Biology 8:R24; memelite's) gives the p-value of a motif's likeness with each motif of
the database, JASPAR CORE (pyjaspar ships it). How often so good a best match is found by chance is seen from the same
motifs with their places shuffled: at a p-value P, the false-discovery rate is the share of shuffled motifs whose best
match is at most P, divided by that of the motifs themselves.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..sequences.alphabet import BASES, base_digits
from ..support.errors import MissingExtraError

SHORTEST = 5  # letters of a k-mer that can be told from chance
SHUFFLES = 20
SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("matrix", pa.string()),
        ("name", pa.string()),
        ("p_value", pa.float64()),
        ("false_discovery_rate", pa.float64()),
        ("motifs_compared", pa.int64()),
    ]
)

_NEEDED = "known motifs need pyjaspar (JASPAR) and memelite (Tomtom): pip install pyjaspar memelite"
_PSEUDOCOUNT = 0.05  # of a letter, so that one k-mer is no certainty


class Motif(NamedTuple):
    """K-mers of one shape."""

    name: str  # its first k-mer
    members: tuple[str, ...]
    counts: np.ndarray  # (places, 4): weights of A, C, G and T

    @property
    def shares(self) -> np.ndarray:
        """(places, 4), each place adding up to 1."""
        counts = self.counts / self.counts.max() + _PSEUDOCOUNT
        return counts / counts.sum(1, keepdims=True)


def motifs_of(kmers: Sequence[tuple[str, float]]) -> list[Motif]:
    """K-mers put together with the first one that they are like: at most one letter differs, one letter moved at most.

    Args:
        kmers: with their weights, the most important first; those with N are left out.
    """
    kept = [(kmer, weight) for kmer, weight in kmers if set(kmer) <= set(BASES) and len(kmer) >= SHORTEST]
    found: list[list[tuple[str, float, int]]] = []
    for kmer, weight in kept:
        for group in found:
            shift = _shift(group[0][0], kmer)
            if shift is not None:
                group.append((kmer, weight, shift))
                break
        else:
            found.append([(kmer, weight, 0)])
    return [_motif(group) for group in found]


def _shift(seed: str, kmer: str) -> int | None:
    """Where a k-mer begins relative to the first one, if it is like it."""
    for shift in (0, 1, -1):
        start, end = max(0, shift), min(len(seed), shift + len(kmer))
        pairs = list(zip(seed[start:end], kmer[start - shift : end - shift], strict=True))
        wrong = sum(a != b for a, b in pairs)
        if len(pairs) >= SHORTEST - 1 and len(pairs) >= min(len(seed), len(kmer)) - 1 and wrong <= (shift == 0):
            return shift
    return None


def _motif(group: list[tuple[str, float, int]]) -> Motif:
    first = min(shift for _, _, shift in group)
    last = max(shift + len(kmer) for kmer, _, shift in group)
    counts = np.zeros((last - first, len(BASES)))
    for kmer, weight, shift in group:
        places = np.arange(len(kmer)) + shift - first
        counts[places, base_digits(kmer)] += abs(weight)
    return Motif(group[0][0], tuple(kmer for kmer, _, _ in group), counts)


def known_motifs(tax_group: str | None = None) -> dict[str, tuple[str, np.ndarray]]:
    """Names and shares (places, 4) of the motifs in JASPAR CORE by their matrix.

    Args:
        tax_group: such as vertebrates or fungi; all by default.

    Raises:
        MissingExtraError: if pyjaspar is not installed, or memelite, which these motifs are compared by.
    """
    try:
        from pyjaspar import jaspardb
    except ImportError as error:
        raise MissingExtraError(_NEEDED) from error
    if importlib.util.find_spec("memelite") is None:  # not imported: that takes seconds
        raise MissingExtraError(_NEEDED)
    options = {} if tax_group is None else {"tax_group": [tax_group]}
    found = {}
    for motif in jaspardb().fetch_motifs(collection="CORE", **options):
        counts = np.array([motif.counts[base] for base in BASES], dtype=float).T
        found[motif.matrix_id] = (motif.name, counts / counts.sum(1, keepdims=True))
    return found


def matches(motifs: Sequence[Motif], known: dict[str, tuple[str, np.ndarray]], best: int = 3) -> pa.Table:
    """The most similar known motifs of each, by p-value, with false-discovery rates.

    Args:
        motifs: from `motifs_of`.
        known: from `known_motifs`.
        best: how many for each.

    Raises:
        MissingExtraError: if memelite is not installed.
    """
    if not motifs or not known:
        return SCHEMA.empty_table()
    generator = np.random.default_rng(0)
    queries = [motif.shares for motif in motifs]
    shuffled = [generator.permutation(query) for query in queries for _ in range(SHUFFLES)]
    p_values = _p_values([*queries, *shuffled], [shares for _, shares in known.values()])
    own, by_chance = p_values[: len(queries)], p_values[len(queries) :].min(1)
    rates = discovery_rates(own.min(1), by_chance)
    rows, names = [], list(known.items())
    for motif, values, rate in zip(motifs, own, rates, strict=True):
        for rank, index in enumerate(np.argsort(values, kind="stable")[:best]):
            matrix, (name, _) = names[index]
            rows.append(
                {
                    "query": motif.name,
                    "matrix": matrix,
                    "name": name,
                    "p_value": float(values[index]),
                    "false_discovery_rate": float(rate) if rank == 0 else None,
                    "motifs_compared": len(known),
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def discovery_rates(p_values: np.ndarray, by_chance: np.ndarray) -> np.ndarray:
    """False-discovery rate at each p-value, which does not fall as the p-value grows: (queries,).

    It is never 0: of N shuffled motifs of which none is as alike, up to one in N + 1 may be (Phipson and Smyth 2010).

    Args:
        p_values: (queries,), of the best matches.
        by_chance: (shuffled queries,), likewise.
    """
    order = np.argsort(p_values, kind="stable")
    ranks = np.arange(1, len(p_values) + 1)
    as_alike = (by_chance[None] <= p_values[order, None]).sum(1)
    expected = (1 + as_alike) / (1 + len(by_chance)) * len(p_values)
    rates = np.minimum(1, expected / ranks)
    rates = np.minimum.accumulate(rates[::-1])[::-1]
    found = np.empty(len(p_values))
    found[order] = rates
    return found


def _p_values(queries: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
    try:
        from memelite import tomtom
    except ImportError as error:
        raise MissingExtraError(_NEEDED) from error
    found: Any = tomtom([query.T.copy() for query in queries], [target.T.copy() for target in targets], n_jobs=1)
    return np.asarray(found[0])
