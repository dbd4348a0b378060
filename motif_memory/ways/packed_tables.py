"""The memory's projections folded into its tables: two matrix products become one sum of table rows.

`../README.md` ("Folding") has the algebra. The same packed tables serve inference (`pack_tables`, once) and training
(`table_major.py`, every step).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..definition import at_least_float32


class PackedTables(NamedTuple):
    """Projected tables of one memory layer; `rows` holds them times `scale`, a power of two."""

    rows: torch.Tensor  # (slabs, rows, slab width): columns 0..hidden-1 are keys, the others values
    scale: float


class Sections(NamedTuple):
    """Where the parts of packed tables begin: A at row 0, then C_(N-1) .. C_1, then B (`../README.md`)."""

    prefix: tuple[int, ...]  # first row of C_m at index m; C_N is A
    oldest: int  # first row of B
    rows: int


def table_sections(largest: int, top_rows: int | None = None) -> Sections:
    """The sections of packed tables for n-grams up to `largest`; `top_rows` is the size of A, 5^N unless given."""
    begin = 5**largest if top_rows is None else top_rows
    prefix = [0] * (largest + 1)
    for size in range(largest - 1, 0, -1):
        prefix[size] = begin
        begin += 5**size
    return Sections(tuple(prefix), begin, begin + (5 ** (largest - 1) if largest > 1 else 0))


def project_tables(
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    ngram_sizes: Sequence[int],
    window: int,
    used: torch.Tensor | None = None,
    slab_width: int | None = None,
) -> torch.Tensor:
    """Packed tables (slabs, rows, slab width), in at least float32, differentiable.

    Args:
        tables: one (5**n, width) per size.
        key_weight, value_weight: (hidden, sizes * width), the two projections.
        ngram_sizes: sizes n, in the order of the tables.
        window: tokens of the window.
        used: int64 (top rows,), the rows of the largest n-gram that section A is to hold; None is all of them.
        slab_width: columns that lie together in memory, a divisor of hidden; None is all of them.
    """
    weight = torch.cat([key_weight, value_weight])  # (2 * hidden, sizes * width)
    work = at_least_float32(weight.dtype)
    width = tables[0].shape[1]
    weight = weight.to(work).view(-1, slab_width or weight.shape[0], weight.shape[1])  # (slabs, slab width, features)
    largest = max(ngram_sizes)
    sections: list[torch.Tensor] = []  # C_1 .. C_N: sums over the sizes up to m, by the m-gram's row
    for m in range(1, largest + 1):
        rows = used if m == largest else None
        total: torch.Tensor | None = None
        for index, size in enumerate(ngram_sizes):
            if size == m:
                table = tables[index] if rows is None else F.embedding(rows, tables[index])
                part = weight[:, :, index * width : (index + 1) * width] / (window - m + 1)
                projected = table.to(work) @ part.transpose(1, 2)  # (slabs, rows, slab width)
                total = projected if total is None else total + projected
        if sections:
            shorter = sections[-1]  # row g of an m-gram ends in the (m - 1)-gram g mod 5^(m - 1)
            shorter = shorter.repeat(1, 5, 1) if rows is None else shorter[:, rows % 5 ** (m - 1)]
            total = shorter if total is None else total + shorter
        if total is None:
            total = weight.new_zeros(weight.shape[0], 5**m, weight.shape[1])
        sections.append(total)
    packed = sections[::-1]
    if largest > 1:
        oldest = sections[largest - 2]  # B[q] adds up C_m[q div 5^(N - 1 - m)]
        for m in range(1, largest - 1):
            longer = oldest.reshape(len(oldest), 5**m, -1, oldest.shape[2])
            oldest = (longer + sections[m - 1].unsqueeze(2)).flatten(1, 2)
        packed = [*packed, oldest]
    return torch.cat(packed, dim=1)


def pack_tables(
    tables: Sequence[torch.Tensor],
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    ngram_sizes: Sequence[int],
    window: int,
    dtype: torch.dtype = torch.float16,
    slab_width: int | None = None,
) -> PackedTables:
    """Packed tables for inference; arguments as in `project_tables`.

    Args:
        dtype: of the rows. In float16 they are scaled by a power of two so that no window can overflow. Rows that are
            not finite stay so.
    """
    packed = project_tables(tables, key_weight, value_weight, ngram_sizes, window, slab_width=slab_width)
    largest = packed.abs().nan_to_num_(0, 0, 0).max().item()
    scale = 1.0
    bound = largest * (window - max(ngram_sizes) + 2)  # of a window's sum
    if dtype == torch.float16 and bound > 0:
        while bound * scale > 2.0**15:
            scale /= 2
        while bound * scale < 2.0**14:
            scale *= 2
    return PackedTables((packed * scale).to(dtype), scale)
