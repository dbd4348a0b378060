"""Attention of a Gengram model: Mixtral's, where a GPU computes it right."""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.integrations import sdpa_attention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, apply_rotary_pos_emb, repeat_kv

_FEWEST_QUERIES = 32  # of a block of PyTorch's memory-efficient kernel; the other blocks have a multiple of it
_MOST_OF_A_MASK = 2**32  # entries of a mask, with its rows padded to 16, from which on the kernel reads wrong rows
_PACKS_HEADS = hasattr(sdpa_attention, "pack_gqa")  # Transformers 5.24 does, for a single query


class GengramAttention(MixtralAttention):
    """Mixtral's attention; on GPUs around two faults of PyTorch, by which rows of a pass read the masks of others.

    If all query heads share one head of keys and values, and the last block of queries holds a single one, PyTorch's
    memory-efficient kernel goes over heads instead of queries, but not in the mask: one of 32 lengths is wrong in its
    last token (pytorch/pytorch issue 191937, mended upstream in August 2026). It does so only where the heads of keys
    and of values are repeated without a copy; here values are copied.

    And it reads wrong rows of masks with more than 2**32 entries (issue 187227, mended in PyTorch 2.13): here such
    queries are read in parts, except by compiled code.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Mixtral's, hidden states (batch, length, hidden) of which some may be in a cache already."""
        if attention_mask is None or not self._may_be_misread(hidden_states, attention_mask):
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = functools.partial(
            F.scaled_dot_product_attention,
            key=repeat_kv(key, self.num_key_value_groups),
            value=value.repeat_interleave(self.num_key_value_groups, dim=1),
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
        )
        if torch.compiler.is_compiling() or query.shape[2] * _padded(key.shape[2]) <= _MOST_OF_A_MASK:
            found = attend(query, attn_mask=attention_mask)
        else:
            rows = max(_MOST_OF_A_MASK // _padded(key.shape[2]), 1)
            parts = zip(query.split(rows, dim=2), _rows_of(attention_mask, query, rows), strict=True)
            found = torch.cat([attend(part, attn_mask=mask) for part, mask in parts], dim=2)
        return self.o_proj(found.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    def _may_be_misread(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> bool:
        if not hidden_states.is_cuda or self.config._attn_implementation != "sdpa":
            return False
        length, is_compiled = hidden_states.shape[1], torch.compiler.is_compiling()  # compiled code is for any length
        if not is_compiled and length * _padded(attention_mask.shape[-1]) > _MOST_OF_A_MASK:
            return True
        is_spread = dist.is_available() and dist.is_initialized()  # then a process may hold one of several heads
        if self.config.num_key_value_heads > 1 and not is_spread:
            return False
        is_packed = length == 1 and _PACKS_HEADS and not is_compiled  # then nothing is repeated
        return is_compiled or (length % _FEWEST_QUERIES == 1 and not is_packed)


def _padded(keys: int) -> int:
    """Entries of a mask's row, as PyTorch lays it out."""
    return -(-keys // 16) * 16


def _rows_of(mask: torch.Tensor, query: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
    """A mask (..., length or 1, keys) in parts of so many queries."""
    return mask.expand(*mask.shape[:-2], query.shape[2], -1).split(rows, dim=-2)
