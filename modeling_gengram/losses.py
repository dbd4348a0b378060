"""What the heads' losses share: a mean over an optimizer step's labels, and the router's two losses."""

from typing import Any

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

IGNORED = -100


def share_of_step(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | None:
    """Which share of an optimizer step's labels this pass holds; None if it is not said how many the step has.

    `Trainer` does not divide a loss by the number of its accumulation steps: it hands over how many labels the whole
    step has, over all accumulation steps and processes. A mean over a pass, times the share, adds up to a mean over
    the step, whatever the number of passes.

    Args:
        labels: any shape, -100 where there is no loss.
        num_items_in_batch: as `Trainer` passes it on.
    """
    if num_items_in_batch is None:
        return None
    items = torch.as_tensor(num_items_in_batch, device=labels.device)
    return labels.ne(IGNORED).sum() / items.clamp(min=1)


def mean_over_step(loss: torch.Tensor, labels: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    """This pass's part in a mean over a step: the mean of the pass (0 where it has no label) times its share."""
    loss = loss.masked_fill(labels.ne(IGNORED).sum().to(loss.device) == 0, 0.0)
    return loss if share is None else loss * share.to(loss.device)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], experts_per_token: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mixtral's load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4 to 6); 0 for a batch of padding.

    Args:
        router_logits: one (batch * length, experts) per layer.
        experts_per_token: experts that a token is sent to.
        attention_mask: (batch, length); padding is left out.
    """
    experts = router_logits[0].shape[-1]
    if attention_mask is None:
        return load_balancing_loss_func(router_logits, experts, experts_per_token)  # type: ignore[return-value]
    is_any = attention_mask.to(router_logits[0].device).bool().any()
    mask = attention_mask.to(is_any.device).bool() | ~is_any  # its division by the number of tokens needs one
    loss: Any = load_balancing_loss_func(router_logits, experts, experts_per_token, mask)
    return loss * is_any


def router_z_loss(router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens and layers of the router's squared log-partition (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        router_logits: one (batch * length, experts) per layer.
        attention_mask: (batch, length); padding is left out.
    """
    device = router_logits[0].device
    squares = torch.stack([torch.logsumexp(logits.to(device).float(), dim=-1).square() for logits in router_logits])
    if attention_mask is None:
        return squares.mean()
    weight = attention_mask.reshape(1, -1).to(device=device, dtype=squares.dtype)
    return (squares * weight).sum() / (weight.sum() * len(router_logits)).clamp_min(1)
