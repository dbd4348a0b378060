"""Window means in the original's order of operations: differences of prefix sums in the dtype of the tables."""

from typing import Any

import torch

from .definition import MemoryOutput, NgramPlan, shifted
from .state import MemoryState


def running_sum(x: torch.Tensor, initial: torch.Tensor | None = None) -> torch.Tensor:
    """Prefix sums along dim 1 in the dtype of `x`, as the original takes them on CUDA: every partial sum is rounded.

    Args:
        x: (batch, length, width).
        initial: (batch, width), the sum of what came before.

    CUDA's scan over an outer dimension is sequential per column in the dtype of its input. The CPU's scan accumulates
    half precision in float32, so there the steps are taken one by one: slow, and only for reproduction.
    """
    if initial is not None and x.shape[1]:
        x = torch.cat([(x[:, :1] + initial.unsqueeze(1)), x[:, 1:]], dim=1)
    if x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] == 0:
        return torch.cumsum(x, dim=1)
    sums = [x[:, 0]]
    for step in range(1, x.shape[1]):
        sums.append(sums[-1] + x[:, step])
    return torch.stack(sums, dim=1)


def features_as_trained(memory: Any, plan: NgramPlan, state: MemoryState | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenated window means (batch, length, features) as differences of prefix sums, and these sums.

    Args:
        memory: a `MotifMemory`; its tables are called.
        plan: which n-grams each window holds; causal.
        state: earlier prefix sums; None at the start.
    """
    sizes = range(len(plan.ngram_sizes))
    missing = [~plan.valid(index)[:, plan.context :, None] for index in sizes]
    embedded = [table(plan.rows(i)[:, plan.context :]) for i, table in enumerate(memory.embeddings)]
    rows = torch.cat([e.masked_fill(m, 0) for e, m in zip(embedded, missing, strict=True)], dim=-1)
    length, width = rows.shape[1], embedded[0].shape[-1]
    earlier = None if state is None else state.prefix_sums(memory.layer_idx)
    prefix = running_sum(rows, None if earlier is None else earlier[:, -1])
    joined = prefix if earlier is None else torch.cat([earlier, prefix], dim=1)
    means = []
    for index, size in enumerate(plan.ngram_sizes):
        part = slice(index * width, (index + 1) * width)
        endings = plan.window - size + 1
        if endings == 1:
            means.append(rows[..., part])
            continue
        total = prefix[..., part] - shifted(joined[..., part], endings)[:, -length:]
        means.append(total / plan.counts(index).clamp_min(1).unsqueeze(-1).to(total.dtype))
    return torch.cat(means, dim=-1), prefix


def memory_as_trained(
    memory: Any, hidden_states: torch.Tensor, plan: NgramPlan, state: MemoryState | None
) -> MemoryOutput:
    """The memory in the original's order of operations, and in the dtype of the hidden states throughout."""
    features, prefix = features_as_trained(memory, plan, state)
    key, value = memory.key_proj(features), memory.value_proj(features)
    output = memory.from_key_and_value(hidden_states, key, value, plan, state, work=hidden_states.dtype)
    return output._replace(prefix_sums=prefix)
