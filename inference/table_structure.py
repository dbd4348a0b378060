"""What the rows of a memory's tables know by themselves: reverse complements, the genetic code, and how much they say.

Statistics are permutation tests with effect sizes, and intervals are of 95 %: percentiles of permutations, or of
bootstrap samples of pairs.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..sequences.alphabet import BASES, reverse_complement
from ..support.bootstrap import bootstrap
from ..support.errors import MissingExtraError
from .offloaded import plain_weight_at_hand

LONGEST_SIZE = 8  # of k-mers: 65,536
CODONS = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"  # amino acids in the order of ACGT

_AT_ONCE = 4096  # rows that are projected


def kmers_of(size: int) -> list[str]:
    """All k-mers of A, C, G and T, in the order of the alphabet."""
    return ["".join(letters) for letters in itertools.product(BASES, repeat=size)]


def sizes_of(memory: Any) -> list[int]:
    """The sizes of a memory's k-mers that are looked at."""
    return [size for size in memory.config.ngram_sizes if size <= LONGEST_SIZE]


def rows_of(memory: Any, size: int) -> np.ndarray:
    """Rows of all k-mers of a size in the order of `kmers_of`, (4**size, width) float64."""
    digits = np.array(list(itertools.product(range(len(BASES)), repeat=size)))
    places = torch.from_numpy(digits @ 5 ** np.arange(size - 1, -1, -1))
    with plain_weight_at_hand(memory.embeddings[list(memory.config.ngram_sizes).index(size)], nn.Embedding) as table:
        return table[places.to(table.device)].double().cpu().numpy()


def value_norms(memory: Any, size: int) -> np.ndarray:
    """Norm of what each k-mer alone adds where the gate is open, without the convolution: (4**size,)."""
    index = list(memory.config.ngram_sizes).index(size)
    rows = rows_of(memory, size)
    width = rows.shape[1]
    with plain_weight_at_hand(memory.value_proj, nn.Linear) as weight:
        matrix = weight[:, index * width : (index + 1) * width].double().cpu().numpy()
    parts = [rows[start : start + _AT_ONCE] @ matrix.T for start in range(0, len(rows), _AT_ONCE)]
    return np.concatenate([np.linalg.norm(part, axis=1) for part in parts])


def symmetry(memory: Any, size: int, permutations: int = 1000) -> dict[str, Any]:
    """How alike the rows of reverse complements are, beside partners that hold as many G and C.

    Alike is the cosine, from the rows' mean. K-mers that are their own reverse complement are left out.

    Returns:
        `pairs`; `cosine_within_pairs` with its interval over pairs; `cosine_of_matched_partners` with that over
        permutations within the classes of equal G and C; `effect_size`, the difference in standard deviations of a
        matched partner's cosine; `p_value`, one-sided.
    """
    kmers = kmers_of(size)
    place = {kmer: index for index, kmer in enumerate(kmers)}
    pairs = np.array([(place[kmer], place[other]) for kmer in kmers if kmer < (other := reverse_complement(kmer))])
    rows, generator = _directions(rows_of(memory, size)), np.random.default_rng(0)
    content = np.array([kmer.count("G") + kmer.count("C") for kmer in kmers])[pairs[:, 0]]
    classes = [np.flatnonzero(content == value) for value in np.unique(content)]
    first, second = rows[pairs[:, 0]], rows[pairs[:, 1]]
    own = np.einsum("ij,ij->i", first, second)
    means: list[float] = []
    others: list[np.ndarray] = []
    for _ in range(permutations):
        partner = np.arange(len(pairs))
        for members in classes:
            partner[members] = generator.permutation(members)
        others = [*others[-9:], np.einsum("ij,ij->i", first, second[partner])]
        means.append(others[-1].mean())
    spread = np.concatenate(others).std()
    middle = float(np.mean(means))
    return {
        "pairs": len(pairs),
        "cosine_within_pairs": bootstrap(lambda chosen: own[chosen].mean(), len(own)).round(4).tolist(),
        "cosine_of_matched_partners": [round(value, 4) for value in (middle, *_interval(means))],
        "effect_size": bootstrap(lambda chosen: (own[chosen].mean() - middle) / spread, len(own)).round(3).tolist(),
        "p_value": _p_value(float(own.mean()), means),
    }


def codon_structure(memory: Any, permutations: int = 1000) -> dict[str, dict[str, Any]]:
    """How well clusters of the rows of codons agree with amino acids, and with what synonymous codons share anyway.

    Clusters are as many as there are labels, by average linkage of cosines. Agreement is the adjusted Rand index and
    normalised mutual information, each beside that of permuted labels.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    check_clustering()
    from sklearn.cluster import AgglomerativeClustering

    kmers, generator = kmers_of(3), np.random.default_rng(0)
    rows = _directions(rows_of(memory, 3))
    labels: dict[str, Sequence[Any]] = {
        "amino acid": CODONS,
        "first two bases": [kmer[:2] for kmer in kmers],
        "G and C": [kmer.count("G") + kmer.count("C") for kmer in kmers],
    }
    result = {}
    for name, label in labels.items():
        _, numbers = np.unique(list(label), return_inverse=True)
        found = AgglomerativeClustering(len(set(numbers)), metric="cosine", linkage="average").fit_predict(rows)
        shuffled = [numbers, *(generator.permutation(numbers) for _ in range(permutations))]
        for score, values in zip(("ARI", "NMI"), agreements(np.array(shuffled), found), strict=True):
            result[f"{score}, {name}"] = {
                "value": round(float(values[0]), 4),
                "by_chance": [round(number, 4) for number in _interval(values[1:])],
                "p_value": _p_value(float(values[0]), values[1:]),
            }
    return result


def agreements(labels: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adjusted Rand index (Hubert and Arabie 1985), and mutual information over the mean of the two entropies.

    As scikit-learn's `adjusted_rand_score` and `normalized_mutual_info_score`, of many labellings at once.

    Args:
        labels: (labellings, items), of equal shares of each label.
        clusters: (items,).

    Returns:
        Two arrays (labellings,).
    """
    ones = (labels[..., None] == np.unique(labels)).astype(float)  # (labellings, items, labels)
    table = np.swapaxes(ones, 1, 2) @ (clusters[:, None] == np.unique(clusters))  # (labellings, labels, clusters)
    items, of_labels, of_clusters = len(clusters), table.sum(2)[0], table.sum(1)[0]

    def pairs(counts: np.ndarray) -> np.ndarray:
        return counts * (counts - 1) / 2

    together, one, other = pairs(table).sum((1, 2)), pairs(of_labels).sum(), pairs(of_clusters).sum()
    expected = one * other / pairs(np.array(items))
    rand = (together - expected) / ((one + other) / 2 - expected)
    ratio = table * items / np.outer(of_labels, of_clusters)
    information = (table / items * np.log(np.where(table == 0, 1, ratio))).sum((1, 2))
    entropies = [-(counts / items * np.log(counts / items)).sum() for counts in (of_labels, of_clusters)]
    return rand, information / np.mean(entropies)


def check_clustering() -> None:
    """Whether `codon_structure` can be computed.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("clusters of codons need scikit-learn: pip install 'gengram[evaluation]'") from error


def _directions(rows: np.ndarray) -> np.ndarray:
    """Rows less their mean, each of length 1; rows that are their mean stay 0."""
    rows = rows - rows.mean(0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths == 0, 1, lengths)


def _interval(values: Sequence[float] | np.ndarray) -> list[float]:
    return np.percentile(values, [2.5, 97.5]).tolist()


def _p_value(value: float, by_chance: Sequence[float] | np.ndarray) -> float:
    """One-sided, of a permutation test (Phipson and Smyth 2010)."""
    return (1 + int((np.array(by_chance) >= value).sum())) / (1 + len(by_chance))
