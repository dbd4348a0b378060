"""Attention as PyTorch 2.11 computed it on an H200: pytorch/pytorch issue 191937."""

import torch.nn.functional as F

_attention = F.scaled_dot_product_attention


def misreading_attention(query, key, value, attn_mask=None, **options):
    """The last query sees what the first may see, if it stands alone in its block and all heads share one of keys."""
    is_alone = query.shape[2] % 32 == 1 and query.shape[2] > 1
    if attn_mask is not None and is_alone and key.stride(1) == value.stride(1) == 0:
        attn_mask = attn_mask.clone()
        attn_mask[..., -1, :] = attn_mask[..., 0, :]
    return _attention(query, key, value, attn_mask=attn_mask, **options)
