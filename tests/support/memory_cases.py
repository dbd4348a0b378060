"""Random instances of the memory's inputs: sizes in any order, segments, padding, history, non-letters."""

import dataclasses
import random
from dataclasses import dataclass

import torch

from gengram.motif_memory.definition import MemoryLayer, NgramPlan, letter_codes, plan_windows

LETTERS = [8, 5, 6, 7, 9]


@dataclass
class MemoryCase:
    """One memory layer's weights and inputs, float64."""

    plan: NgramPlan
    tokens: torch.Tensor  # (batch, context + length)
    segments: torch.Tensor | None  # (batch, context + length)
    tables: list[torch.Tensor]
    key_weight: torch.Tensor
    value_weight: torch.Tensor
    hidden_states: torch.Tensor
    norm_weight: torch.Tensor
    conv_weight: torch.Tensor | None  # (hidden, taps)
    dilation: int
    reach_back: int
    history: torch.Tensor | None
    is_causal: bool

    @property
    def sizes(self) -> list[int]:
        return list(self.plan.ngram_sizes)

    @property
    def weights(self) -> list[torch.Tensor]:
        """All that may need gradients."""
        conv = [] if self.conv_weight is None else [self.conv_weight]
        return [*self.tables, self.key_weight, self.value_weight, self.hidden_states, self.norm_weight, *conv]

    @property
    def layer(self) -> MemoryLayer:
        """Norms and convolution."""
        return MemoryLayer(self.norm_weight, 1e-5, self.conv_weight, self.dilation, self.reach_back)

    def to(self, device: torch.device) -> "MemoryCase":
        """This instance, moved to a device."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                setattr(self, field.name, value.to(device))
        self.tables = [table.to(device) for table in self.tables]
        self.plan = NgramPlan(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self.plan))
        return self


def random_case(
    seed: int,
    *,
    hidden: int = 4,
    width: int = 3,
    largest: int = 3,
    length: int | None = None,
    context: bool = True,
    endings: int | None = None,
    taps: int | None = None,
    segment: int = 17,
) -> MemoryCase:
    """The instance of a seed.

    Args:
        endings: how many of the largest n-grams a window holds.
        taps: of the convolution.
        segment: tokens of each, where there are segments.
    """
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = [choose.randint(1, largest) for _ in range(choose.randint(1, 3))]
    window = max(sizes) + choose.randint(0, 9)
    if endings is not None:
        window = max(sizes) + endings - 1
    length = choose.randint(1, 40) if length is None else length
    is_causal = choose.random() < 0.5
    before = window - 1 if context and is_causal and choose.random() < 0.5 else 0
    total = before + length
    tokens = torch.tensor(LETTERS)[torch.randint(5, (2, total), generator=generator)]
    tokens = torch.where(torch.rand(2, total, generator=generator) < choose.choice([0.0, 0.05, 0.3]), 3, tokens)
    segments = behind = ahead = None
    if choose.random() < 0.5:
        segments = (torch.arange(total) // segment).expand(2, -1)
        behind = (torch.arange(total) % segment).expand(2, -1)
        ahead = (segment - 1 - behind).minimum(torch.arange(total).flip(0))[:, before:]
    exists = torch.rand(2, length, generator=generator) < 0.9 if choose.random() < 0.3 else None
    plan = plan_windows(
        letter_codes(tokens, LETTERS),
        sizes,
        window,
        context=before,
        is_causal=is_causal,
        behind=behind,
        ahead=None if is_causal else ahead,
        exists=exists,
    )
    drawn, dilation = choose.choice([0, 1, 2, 4]), choose.randint(1, 3)
    taps = drawn if taps is None else taps
    reach = max(taps - 1, 0) * dilation
    return MemoryCase(
        plan=plan,
        tokens=tokens,
        segments=segments,
        tables=[normal(5**n, width) for n in sizes],
        key_weight=normal(hidden, width * len(sizes)),
        value_weight=normal(hidden, width * len(sizes)),
        hidden_states=normal(2, length, hidden),
        norm_weight=normal(hidden),
        conv_weight=normal(hidden, taps) if taps else None,
        dilation=dilation,
        reach_back=reach if is_causal else reach - reach // 2,
        history=normal(2, reach, hidden) if context and is_causal and reach and choose.random() < 0.5 else None,
        is_causal=is_causal,
    )
