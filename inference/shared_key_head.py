"""Models whose query heads share one head of keys: what PyTorch gets wrong of them on a GPU, and a way around it.

See `modeling_gengram/attention.py`, which goes around it for Gengram's own models.
"""

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

_WRONG = 0.01  # numbers of about 1 that are further apart than this are no roundings


def read_masks_right(model: Any, device: torch.device) -> None:
    """Have a model compute its attention eagerly if PyTorch would read the masks of such a model wrong there."""
    config = model.config.get_text_config()
    if config.model_type == "gengram" or not shares_one_key_head(config) or config._attn_implementation != "sdpa":
        return
    if misreads_masks(device):
        model.set_attn_implementation("eager")
        logger.warning(
            "%s has one head of keys and values for all of attention, for which this PyTorch (%s) reads masks wrong "
            "on %s (pytorch/pytorch issue 191937). Its attention is computed eagerly, which is slower.",
            type(model).__name__,
            torch.__version__,
            device,
        )


def shares_one_key_head(config: Any) -> bool:
    """Whether a configuration says, by any of its usual names, that all query heads share one head of keys."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    is_single = bool(getattr(config, "multi_query", False)) and not getattr(config, "new_decoder_architecture", False)
    return (heads == 1 or is_single) and getattr(config, "num_attention_heads", 1) > 1


@functools.lru_cache
def misreads_masks(device: torch.device) -> bool:
    """Whether the last of 65 queries sees what only the first may see, if heads are repeated without a copy."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 65, 16, generator=generator).to(device)
    key, value = (torch.randn(2, 1, 65, 16, generator=generator).to(device).expand(-1, 4, -1, -1) for _ in range(2))
    mask = torch.ones(65, 65, dtype=torch.bool, device=device).tril().expand(2, 1, -1, -1)
    with torch.no_grad():
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        right = F.scaled_dot_product_attention(query, key.contiguous(), value.contiguous(), attn_mask=mask)
    return bool((found - right).abs().max() > _WRONG)
