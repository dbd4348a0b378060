"""A pytest plugin that makes the first GPU the default device, so that tests written for any device run there.

    python -m pytest -p on_gpu tests/modeling_gengram tests/motif_memory

Tests whose models or tensors name the CPU stay on it.
"""

import torch


class _Generator(torch.Generator):
    """A generator of the default device, as tensors are made there."""

    def __new__(cls, device: str | torch.device = "cuda") -> "_Generator":
        return super().__new__(cls, device)


torch.Generator = _Generator  # type: ignore[misc]
torch.set_default_device("cuda")
