"""Models whose query heads share one head of keys: what PyTorch gets wrong of them on a GPU, and a way around it.

See `modeling_gengram/attention.py`, which goes around it for Gengram's own models.
"""

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)

_WRONG = 0.01  # numbers of about 1 that are further apart than this are no roundings


def read_masks_right(model: Any, name: str) -> None:
    """Have a model compute its attention eagerly where a GPU is there and PyTorch would misread the model's masks.

    Args:
        model: of Transformers; what is no Gengram model and has one head of keys and values in some layer is changed.
        name: of the model, as it is shown.
    """
    if not torch.cuda.is_available() or model.config.model_type == "gengram" or _implementation(model) != "sdpa":
        return
    if not any(shares_one_key_head(module) for module in model.modules()) or not misreads_masks(torch.device("cuda")):
        return
    model.set_attn_implementation("eager")
    what = f"PyTorch {torch.__version__} misreads masks on GPUs if all heads of attention share one head of keys"
    if _implementation(model) == "eager":
        then = "the attention of this model is computed eagerly, which is slower."
    else:
        then = "numbers of this model may be wrong there. Run it on the CPU, or with a later PyTorch."
    logger.warning("%s: %s (pytorch/pytorch issue 191937); %s", name, what, then)


def shares_one_key_head(attention: nn.Module) -> bool:
    """Whether several query heads of a module share its only head of keys, repeated as Transformers does."""
    groups = getattr(attention, "num_key_value_groups", 1)
    if not isinstance(groups, int) or groups < 2:
        return False
    keys, head_dim = getattr(attention, "k_proj", None), getattr(attention, "head_dim", None)
    if keys is not None and head_dim is not None:
        return bool(getattr(keys, "out_features", None) == head_dim)
    return groups == getattr(attention, "num_heads", None)


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


def _implementation(model: Any) -> str | None:
    """How a model computes attention, if it says so; of one with several parts the one that reads text."""
    try:
        config = model.config.get_text_config()
    except ValueError:  # several of them
        config = model.config
    return getattr(config, "_attn_implementation", None)
