"""Attention of a Gengram model: Mixtral's, where a GPU computes it right."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, apply_rotary_pos_emb, repeat_kv

_FEWEST_QUERIES = 32  # of a block of PyTorch's memory-efficient kernel; the other blocks have a multiple of it


class GengramAttention(MixtralAttention):
    """Mixtral's attention; on GPUs around a fault of PyTorch, by which one row of a pass may read the mask of another.

    If all query heads share one head of keys and values, and the last block of queries holds a single one, PyTorch's
    memory-efficient kernel goes over heads instead of queries, but not in the mask: one of 32 lengths is wrong in its
    last token (pytorch/pytorch issue 191937, mended upstream in August 2026). It does so only where the heads of keys
    and of values are repeated without a copy; here values are copied.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Mixtral's, hidden states (batch, length, hidden) of which some may be in a cache already."""
        if not self._may_be_misread(hidden_states, attention_mask):
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
        found = F.scaled_dot_product_attention(
            query,
            repeat_kv(key, self.num_key_value_groups),
            value.repeat_interleave(self.num_key_value_groups, dim=1),
            attn_mask=attention_mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return self.o_proj(found.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    def _may_be_misread(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        if not hidden_states.is_cuda or attention_mask is None or self.config._attn_implementation != "sdpa":
            return False
        is_spread = dist.is_available() and dist.is_initialized()  # then a process may hold one of several heads
        if self.config.num_key_value_heads > 1 and not is_spread:
            return False
        return (
            torch.compiler.is_compiling() or hidden_states.shape[1] % _FEWEST_QUERIES == 1
        )  # compiled for any length
