"""Products of few tokens with quantised matrices on a GPU: one kernel of Triton, which PyTorch for CUDA brings along.

A decoding step reads its experts once, as they are stored, and nothing waits for the GPU, so that a CUDA graph can
record it.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Up to here each token reads its expert's matrix for itself; from here on floats are made of every expert once.
MOST_TOKENS = 64
_ROWS, _PLACES = 16, 256  # of a matrix, that a program takes at a time


def are_few_on_gpu(x: Tensor, copies: int = 1) -> bool:
    """Whether `products_of_few` takes these tokens (tokens, columns), each so many times."""
    has_kernel = triton is not None and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return has_kernel and x.is_cuda and x.shape[0] * copies <= MOST_TOKENS


if triton is not None:

    @triton.jit
    def _int8_kernel(
        x,
        numbers,
        scale,
        experts,
        result,
        matrices,
        rows: tl.constexpr,
        columns: tl.constexpr,
        row_block: tl.constexpr,
        column_block: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        expert = tl.load(experts + token).to(tl.int64)
        row = tl.program_id(1) * row_block + tl.arange(0, row_block)
        is_row = row < rows
        total = tl.zeros((row_block, column_block), dtype=tl.float32)
        if (expert >= 0) & (expert < matrices):
            matrix = numbers + expert * rows * columns
            for start in range(0, columns, column_block):
                column = start + tl.arange(0, column_block)
                is_column = column < columns
                value = tl.load(x + token * columns + column, mask=is_column, other=0).to(tl.float32)
                inside = is_row[:, None] & is_column[None, :]
                weight = tl.load(matrix + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0)
                total += weight.to(tl.float32) * value[None, :]
            sums = tl.sum(total, axis=1) * tl.load(scale + expert * rows + row, mask=is_row, other=0).to(tl.float32)
        else:
            sums = tl.sum(total, axis=1)
        tl.store(result + token * rows + row, sums.to(result.dtype.element_ty), mask=is_row)

    @triton.jit
    def _int4_kernel(
        x,
        numbers,
        scale,
        experts,
        result,
        matrices,
        rows: tl.constexpr,
        columns: tl.constexpr,
        row_block: tl.constexpr,
        byte_block: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        expert = tl.load(experts + token).to(tl.int64)
        row = tl.program_id(1) * row_block + tl.arange(0, row_block)
        is_row = row < rows
        total = tl.zeros((row_block, byte_block), dtype=tl.float32)
        if (expert >= 0) & (expert < matrices):
            wide = row.to(tl.int64)[:, None]
            matrix = numbers + expert * rows * (columns // 2)
            scales = scale + expert * rows * (columns // 32)
            for start in range(0, columns // 2, byte_block):
                place = start + tl.arange(0, byte_block)
                is_place = place < columns // 2
                low_column = place // 16 * 32 + place % 16
                low = tl.load(x + token * columns + low_column, mask=is_place, other=0).to(tl.float32)
                high = tl.load(x + token * columns + low_column + 16, mask=is_place, other=0).to(tl.float32)
                inside = is_row[:, None] & is_place[None, :]
                both = tl.load(matrix + wide * (columns // 2) + place[None, :], mask=inside, other=0).to(tl.int32)
                of_group = tl.load(scales + wide * (columns // 32) + (place // 16)[None, :], mask=inside, other=0)
                part = ((both & 15) - 8).to(tl.float32) * low[None, :]
                part += ((both >> 4) - 8).to(tl.float32) * high[None, :]
                total += part * of_group.to(tl.float32)
        tl.store(result + token * rows + row, tl.sum(total, axis=1).to(result.dtype.element_ty), mask=is_row)


def products_of_few(x: Tensor, numbers: Tensor, scale: Tensor, experts: Tensor) -> Tensor:
    """Each token times the transpose of its expert's matrix, (tokens, rows); 0 for an expert that is not there.

    Args:
        x: (tokens, columns).
        numbers, scale: stacked matrices in 8 or 4 bits (see `quantized_experts.py`).
        experts: (tokens,), which matrix each takes.
    """
    x, numbers, scale, experts = (part.contiguous() for part in (x, numbers, scale, experts))
    rows, columns = numbers.shape[1], x.shape[1]
    result = x.new_empty(len(x), rows)
    kernel: Any = _int8_kernel if numbers.dtype == torch.int8 else _int4_kernel
    if len(x):
        grid = (len(x), triton.cdiv(rows, _ROWS))
        with torch.cuda.device_of(x):  # the current one may be another
            kernel[grid](x, numbers, scale, experts, result, len(numbers), rows, columns, _ROWS, _PLACES)
    return result
