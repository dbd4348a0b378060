"""Weights that accelerate keeps elsewhere until they are computed with, on disk for one (`device_map="auto"`)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from ..support.errors import InputError


@contextlib.contextmanager
def weight_at_hand(module: Any) -> Iterator[torch.Tensor]:
    """A block in which the weight of a module can be read, wherever it is kept.

    Args:
        module: without children, such as an `nn.Embedding`.

    Raises:
        InputError: if the weight was not loaded at all.
    """
    with align_module_device(module):
        weight = module.weight.detach()
        if weight.is_meta:
            raise InputError(
                f"the weight of a {type(module).__name__} is on the meta device; load the model's weights."
            )
        yield weight


def plain_weight_at_hand(module: Any, kind: type[nn.Module]) -> contextlib.AbstractContextManager[torch.Tensor]:
    """A block with the weight of a module of this kind, which nothing changes on its way.

    Raises:
        ValueError: if it is another, such as one that adapters are around, whose weight is only a part of what counts.
    """
    if type(module) is not kind:
        got = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ValueError(
            f"expected a memory of plain {kind.__name__} modules, got a {got}: merge adapters or load the model "
            "unquantised first."
        )
    return weight_at_hand(module)


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model belong: where its first weights are, or are brought to."""
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            brought = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            return weight.device if brought is None or not weight.is_meta else torch.device(brought)
    return torch.device("cpu")
