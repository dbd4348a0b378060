"""Whether a host looks back only: found by trial, and by what its layers say where it cannot be tried."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .layer import states_of

_TOKENS, _BEFORE = 8, 2  # of a text whose tokens behind the first two change
# How much of the later outputs' change may reach the earlier ones in a host that looks back only: rounding, in sums of
# another order. Those that look both ways let through some hundredths and more, unless their weights are very small.
_ROUNDING = 1e-3


def looks_back_only(host: Any, layers: Sequence[nn.Module], tokens: Sequence[int], device: torch.device) -> bool:
    """Whether no output of a host depends on later tokens.

    Args:
        host: the base model.
        layers: those that get a memory.
        tokens: two ids or more of its vocabulary.
        device: of its ids.

    Raises:
        ValueError: if it cannot be found out, or the layers take tokens before rows of the batch.
    """
    with _shapes_of_states(layers) as shapes:
        leak = _leak(host, tokens, device)
    if any(shape[:2] == (_TOKENS, 1) for shape in shapes):
        raise ValueError(
            f"the layers of {type(host).__name__} take (length, batch, hidden), where a motif memory needs (batch, "
            "length, hidden)."
        )
    if leak is not None and (leak == 0 or leak > _ROUNDING):
        return leak == 0
    said = _as_they_say(host, layers)  # in a host whose weights are small, attention changes little
    if said is not None:
        return said
    if leak is not None:
        return True
    raise ValueError(
        f"whether {type(host).__name__} looks back only could not be found out: say is_causal=True (a decoder) or "
        "is_causal=False (an encoder)."
    )


@torch.no_grad()
def _leak(host: Any, tokens: Sequence[int], device: torch.device) -> float | None:
    """How much earlier outputs change with later tokens, in parts of how much later ones do; None if not tried."""
    if device.type == "meta" or len(tokens) < 2:
        return None
    texts = [[tokens[0], tokens[1], *[token] * (_TOKENS - _BEFORE)] for token in tokens[:2]]
    try:
        with _as_it_was(host):
            one, other = (_states(host(input_ids=torch.tensor([text], device=device))) for text in texts)
    except Exception:  # of any kind: what a host does with a text without its other inputs is up to its code
        return None
    if one is None or other is None or one.shape != other.shape or one.shape[1] != _TOKENS:
        return None
    change = (one.double() - other.double()).abs()
    most = float(change[:, _BEFORE:].max())
    if not 0 < most < float("inf"):  # it says the same of all texts, or nothing
        return None
    return float(change[:, :_BEFORE].max()) / most


@contextlib.contextmanager
def _shapes_of_states(layers: Sequence[nn.Module]) -> Iterator[list[torch.Size]]:
    """Shapes of what the layers are given first, meanwhile."""
    shapes: list[torch.Size] = []

    def look(layer: nn.Module, arguments: Any, options: Any) -> None:
        given = states_of(arguments, options)
        if isinstance(given, torch.Tensor):
            shapes.append(given.shape)

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def _states(output: Any) -> torch.Tensor | None:
    """(1, length, ...) of what a base model returned."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    is_usable = isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() >= 3
    return first if is_usable else None


@contextlib.contextmanager
def _as_it_was(host: nn.Module) -> Iterator[None]:
    """The host in evaluation; afterwards in the modes, and with the random numbers to come, that it had."""
    training = {module: module.training for module in host.modules()}
    attention: Any = getattr(host, "attention_type", None)  # BigBird changes it for good when it reads a short text
    try:
        with torch.random.fork_rng(devices=[]):
            host.eval()
            yield
    finally:
        for module, was in training.items():
            module.training = was
        if isinstance(attention, str) and host.attention_type != attention:
            host.set_attention_type(attention)  # type: ignore[operator]


def _as_they_say(host: Any, layers: Sequence[nn.Module]) -> bool | None:
    """By `is_causal` of the attention in the layers; then by whether the host is a decoder."""
    said = [getattr(module, "is_causal", None) for layer in layers for module in layer.modules()]
    kinds = {kind for kind in said if isinstance(kind, bool)}
    if kinds:
        return True in kinds
    config: Any = host.config
    is_generator = any("CausalLM" in name or "LMHead" in name for name in getattr(config, "architectures", None) or ())
    return True if is_generator or getattr(config, "is_decoder", False) else None
