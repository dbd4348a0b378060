"""Letters that are not certain: a model reads mixtures of A, C, G, T and N, differentiably.

What a model looks up for a letter becomes the mean over the letters with their weights, and what its memory looks up
for a k-mer the mean over all 5^k k-mers, each with the product of its letters' weights. It is the one function that is
linear in each position's weights and equal to the lookup where every letter is certain (the multilinear extension).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..motif_memory.ways.kept_fold import memories_of
from .base_tokens import BaseTokens
from .offloaded import plain_weight_at_hand

LETTERS = 5  # A, C, G, T and N, in the order of the memory's digits

_MOST_KMERS = 2**22  # looked up at once
_ROUNDING = 4  # a weight of so many units in the last place of 1 is none

_Kmers = tuple[torch.Tensor, torch.Tensor]  # their rows in a table, and their weights


@contextlib.contextmanager
def soft_letters(model: Any, letters: torch.Tensor, tokens: BaseTokens) -> Iterator[None]:
    """Within the block, a pass of the model reads mixtures of letters where its ids are those of the bases.

    Hooks on the input embedding and on the tables of the memories replace what these look up. So the model has to read
    ids of (batch, before + length + after): `tokens.before`, one base for each of the letters, and `tokens.after`.

    Args:
        model: any model of Transformers whose input embedding looks up one row per id.
        letters: (batch, length, 5), weights of A, C, G, T and N.
        tokens: of the model's tokenizer.
    """
    embedding = model.get_input_embeddings()
    ids = torch.tensor([*tokens.bases, tokens.other], device=letters.device)
    with contextlib.ExitStack() as hooks:
        rows = embedding(ids)  # (5, hidden)
        _replace(hooks, embedding, lambda: letters.to(rows.dtype) @ rows, tokens)
        for memory in memories_of(model):
            for table, size in zip(memory.embeddings, memory.config.ngram_sizes, strict=True):
                with plain_weight_at_hand(table, nn.Embedding):  # checks it; gradients need the weight itself
                    rows_of = functools.partial(soft_rows, table.weight, letters, size)
                _replace(hooks, table, rows_of, tokens)
        yield


def _replace(hooks: contextlib.ExitStack, module: Any, rows: Any, tokens: BaseTokens) -> None:
    """Have `module` return these rows for the bases, and what it looks up for the tokens around them."""

    def replaced(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        found = rows().to(output.dtype)
        end = output.shape[1] - len(tokens.after)  # in front there may be room for earlier tokens
        return torch.cat([output[:, : end - found.shape[1]], found, output[:, end:]], dim=1)

    hooks.callback(module.register_forward_hook(replaced).remove)


def soft_rows(table: torch.Tensor, letters: torch.Tensor, size: int) -> torch.Tensor:
    """Mean row of the k-mers that end at each position: (batch, length, width), with first derivatives.

    K-mers of which two letters or more have no weight change neither the mean nor its first derivatives, and are left
    out. So of the 5^k k-mers, 4k + 1 are read where all letters are certain. The first `size - 1` positions have no
    k-mer; what is returned for them means nothing.

    Args:
        table: (5**size, width); the last letter of a k-mer is the least significant digit of its row.
        letters: (batch, length, 5), weights of A, C, G, T and N.
        size: k.
    """
    order = letters.detach().abs().argsort(dim=-1, descending=True, stable=True)
    weights = letters.gather(-1, order)
    tiny = _ROUNDING * torch.finfo(letters.dtype).eps
    present = max(1, int((weights.detach().abs() > tiny).sum(-1).max()))
    kept = LETTERS if torch.is_grad_enabled() and letters.requires_grad else present

    def rows_of(order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, products = _kmers(order, weights, present)
        means = F.embedding_bag(
            rows.flatten(0, 1), table, mode="sum", per_sample_weights=products.flatten(0, 1).to(table.dtype)
        )
        return means.view(*rows.shape[:2], -1)

    per_position = present**size + size * (kept - present) * present ** (size - 1)
    step = max(1, _MOST_KMERS // (len(letters) * per_position))
    order, weights = (_letters_of_kmers(each[..., :kept], size) for each in (order, weights))
    blocks = list(zip(order.split(step, dim=1), weights.split(step, dim=1), strict=True))
    if len(blocks) == 1:
        return rows_of(order, weights)
    return torch.cat([checkpoint(rows_of, *block, use_reentrant=False) for block in blocks], dim=1)


def _letters_of_kmers(x: torch.Tensor, size: int) -> torch.Tensor:
    """(batch, length, letters) as (batch, length, size, letters): of the k-mer that ends there, its last letter first.

    Zeros stand in front of the sequence.
    """
    return F.pad(x, (0, 0, size - 1, 0)).unfold(1, size, 1).transpose(2, 3).flip(2)


def _kmers(order: torch.Tensor, weights: torch.Tensor, present: int) -> _Kmers:
    """The k-mers of which at most one letter is absent, each (batch, positions, k-mers).

    Args:
        order: (batch, positions, k, letters): digits, the last letter of a k-mer first.
        weights: of the same shape.
        present: how many of the letters, from the first, may have weight.
    """
    start = torch.zeros_like(order[:, :, 0, :1]), torch.ones_like(weights[:, :, 0, :1])
    all_present, one_absent = start, (start[0][..., :0], start[1][..., :0])
    for back in range(order.shape[2]):
        digits, factors = order[:, :, back] * LETTERS**back, weights[:, :, back]
        here, gone = (digits[..., :present], factors[..., :present]), (digits[..., present:], factors[..., present:])
        one_absent = _joined(_longer(one_absent, here), _longer(all_present, gone))
        all_present = _longer(all_present, here)
    return _joined(all_present, one_absent)


def _longer(kmers: _Kmers, letters: _Kmers) -> _Kmers:
    """Each of the k-mers with each of the letters in front."""
    rows, products = kmers
    digits, factors = letters
    longer = rows.unsqueeze(-1) + digits.unsqueeze(-2), products.unsqueeze(-1) * factors.unsqueeze(-2)
    return longer[0].flatten(-2), longer[1].flatten(-2)


def _joined(some: _Kmers, others: _Kmers) -> _Kmers:
    return torch.cat([some[0], others[0]], dim=-1), torch.cat([some[1], others[1]], dim=-1)
