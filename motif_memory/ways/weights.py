"""The weights of a memory where they can be read past the modules that hold them."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as all_modules

from ..definition import MemoryLayer, at_least_float32

_PLAIN = (nn.Parameter, torch.Tensor, FakeTensor)


class Weights(NamedTuple):
    """All weights of one memory."""

    tables: list[torch.Tensor]  # (5**n, width) per size
    key: torch.Tensor  # (hidden, features)
    value: torch.Tensor
    norm_q: torch.Tensor  # (hidden,)
    norm_k: torch.Tensor
    taps: torch.Tensor | None  # (hidden, 1, taps)
    norm_eps: float
    dilation: int

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor."""
        taps = [] if self.taps is None else [self.taps]
        return [*self.tables, self.key, self.value, self.norm_q, self.norm_k, *taps]

    def stamp(self) -> tuple[Any, ...]:
        """Changes when a weight is replaced, and with most writes in place: cheap, but no proof of the opposite."""
        weights = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in self.tensors()]
        return (*weights, self.norm_eps, self.dilation)

    def layer(self, is_causal: bool) -> MemoryLayer:
        """Norms and convolution as numbers."""
        work = at_least_float32(self.norm_q.dtype)
        norm_weight = self.norm_q.to(work) * self.norm_k.to(work)
        if self.taps is None:
            return MemoryLayer(norm_weight, self.norm_eps, None)
        taps = self.taps.squeeze(1).to(work)
        layer = MemoryLayer(norm_weight, self.norm_eps, taps, self.dilation)
        return layer._replace(reach_back=conv_reach_back(layer.reach, is_causal))


def conv_reach_back(reach: int, is_causal: bool) -> int:
    """How far the first tap looks back: all the way, or half of it for bidirectional use."""
    return reach if is_causal else reach - reach // 2


def weights_at_hand(memory: Any, device: torch.device) -> tuple[Weights | None, str | None]:
    """The weights of a `MotifMemory`, or why they cannot be read past the modules that hold them."""
    if memory.config.pooling == "as_trained":
        return None, 'memory_pooling="as_trained" repeats the original\'s operations in their order'
    if (
        all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    ):
        return None, "hooks for all modules are registered, which would not be called"
    parts = memory._modules  # past `__getattr__`, whose time would be felt in decoding
    embeddings, projections = list(parts["embeddings"]._modules.values()), (parts["key_proj"], parts["value_proj"])
    norms = [parts["norm_q"], parts["norm_k"]]
    short_conv = parts.get("short_conv")
    norm_type, short_conv_type, conv_type = memory.part_types
    expected = [(m, nn.Embedding) for m in embeddings] + [(m, nn.Linear) for m in projections]
    expected += [(m, norm_type) for m in norms]
    conv = None
    if short_conv is not None:
        conv = short_conv._modules.get("conv")
        expected += [(short_conv, short_conv_type), (conv, conv_type)]
    for module, kind in expected:
        if type(module) is not kind:
            return None, "a part of the memory is wrapped by adapters or replaced; merge adapters first"
    for module, _ in expected:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return None, "a part of the memory has hooks, which would not be called"
        if _has_own_forward(module):
            return None, "a part of the memory has a forward of its own, which would not be called"
    for projection in projections:
        if projection._parameters.get("bias") is not None:
            return None, "a projection of the memory has a bias"
    for table in embeddings:
        if table.max_norm is not None:
            return None, "a table of the memory bounds the norm of its rows"
    if norms[0].eps != norms[1].eps:
        return None, "the two norms of the memory have different epsilons"
    holders = (*embeddings, *projections, *norms, *(() if conv is None else (conv,)))
    found: list[Any] = []
    for module in holders:
        found.append(module._parameters.get("weight"))
        if found[-1] is None:
            return None, "the memory's weights are not parameters of its modules"
    tables = len(embeddings)
    weights = Weights(
        found[:tables],
        found[tables],
        found[tables + 1],
        found[tables + 2],
        found[tables + 3],
        None if conv is None else found[tables + 4],
        norms[0].eps,
        1 if conv is None else conv.dilation,
    )
    for weight in weights.tensors():
        if weight.is_meta:
            return None, "the memory's weights are offloaded; load them onto a device first"
        if type(weight) not in _PLAIN:
            return None, f"the memory's weights are of a special kind, {type(weight).__name__}"
        if weight.device != device or not weight.numel():
            return None, "the memory's weights are distributed over devices"
    return weights, None


def _has_own_forward(module: nn.Module) -> bool:
    """Whether something replaced the module's `forward`; accelerate does so harmlessly where nothing is offloaded."""
    if "forward" not in module.__dict__:
        return False
    hook = getattr(module, "_hf_hook", None)
    return hook is None or getattr(hook, "offload", True)
