"""Single-base changes of a region, and the windows in which they are compared with the reference.

Changes at neighbouring bases share one window, so that a model reads the reference once for all of them. The rule: a
region is cut into as few blocks of at most B bases as possible, of equal size but for one base. All changes of a block
[s, e) are made in a window of N bases of a contig of L bases, the block in its middle; at the ends of a contig it is
shifted, not shortened:

    first = clip((s + e) // 2 - N // 2, 0, L - N - d)
    reference window    G[first : first + N]
    substitution at p   G[first : p] + alternative + G[p + 1 : first + N]
    deletion of p       G[first : p] + G[p + 1 : first + N + 1]

d is 1 for deletions, which pull in one base from the right, and else 0. N is L - d where a contig is shorter. With
B = 1 these are the windows of `sequences.variants.variant_windows`. The last base of a contig has no deletion, as
there is nothing to pull in. What has a window of too few bases, as on a contig of a single one, is `too_short`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..sequences.alphabet import BASES
from ..sequences.variants import SCORED, has_only_nucleotides
from .effects import Change
from .variant_effects import SHORTEST_CONTEXT

DELETED = "-"


class Block(NamedTuple):
    """Neighbouring bases of a contig whose changes share a window: 0-based, half-open."""

    start: int
    end: int


class Mutation(NamedTuple):
    """A change of one base.

    Args:
        place: of the base on its contig, 0-based.
        reference, alternative: letters; `-` for a deletion.
        status: `scored`, or a word of `sequences.variants.REASONS`.
        change: both windows; None if the status is another.
    """

    place: int
    reference: str
    alternative: str
    status: str
    change: Change | None


def region_blocks(start: int, end: int, most: int) -> list[Block]:
    """A region in as few blocks of at most so many bases as possible.

    Example:

    >>> region_blocks(10, 17, 3)
    [Block(start=10, end=12), Block(start=12, end=14), Block(start=14, end=17)]
    """
    count = -(-(end - start) // most)
    bounds = [start + (end - start) * number // count for number in range(count + 1)]
    return [Block(*pair) for pair in itertools.pairwise(bounds)]


def shared_window(block: Block, length: int, context: int, deleted: int = 0) -> tuple[int, int]:
    """Where the window of a block starts and ends on its contig, without the base that a deletion pulls in.

    Args:
        block: of a contig.
        length: bases of the contig.
        context: N, at least the size of the block.
        deleted: 1 for deletions.
    """
    size = min(context, length - deleted)
    first = max(0, min(sum(block) // 2 - size // 2, length - size - deleted))
    return first, first + size


def mutations_of(
    fetch: Callable[[int, int], str],
    length: int,
    block: Block,
    places: Iterable[int],
    context: int,
    deletions: bool = False,
    shortest: int = SHORTEST_CONTEXT,
) -> Iterator[Mutation]:
    """All substitutions, and deletions if they are wanted, of some places of a block, by place and alternative.

    A letter other than A, C, G and T is not changed; it comes back with each base and the reason.

    Args:
        fetch: letters of the contig from a start to an end, in upper case.
        length: bases of the contig.
        block: whose window is read.
        places: within the block.
        context: bases of the window.
        deletions: whether single bases are deleted, too.
        shortest: bases of a window that a model says anything of.
    """
    first, last = shared_window(block, length, context)
    window = fetch(first, last)
    first_of_deletions, last_of_deletions = shared_window(block, length, context, deleted=1)
    longer = fetch(first_of_deletions, last_of_deletions + 1) if deletions else ""
    is_readable = has_only_nucleotides(window + longer)
    for place in places:
        index = place - first
        base = window[index]
        if not is_readable or base not in BASES:
            reason = "n_at_site" if is_readable else "foreign_letters"
            yield from (Mutation(place, base, other, reason, None) for other in BASES if other != base)
            continue
        for other in BASES:
            if other != base:
                changed = window[:index] + other + window[index + 1 :]
                yield _mutation(place, base, other, Change(window, changed, index), shortest)
        if deletions and place < length - 1:
            index = place - first_of_deletions
            changed = longer[:index] + longer[index + 1 :]
            yield _mutation(place, base, DELETED, Change(longer[:-1], changed, index, 1, 0), shortest)


def _mutation(place: int, base: str, other: str, change: Change, shortest: int) -> Mutation:
    is_too_short = len(change.reference) < shortest
    return Mutation(place, base, other, *(("too_short", None) if is_too_short else (SCORED, change)))
