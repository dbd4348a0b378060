"""The host's classes with something on top: a model that says what it reads, a layer with a memory in front of it."""

from types import MethodType
from typing import Any

import torch
from transformers import Cache

from ..state import NO_CONTINUOUS_BATCHING

CHILD = "motif_memory"  # the memory's name in its layer
GRAFT = "_motif_memory_graft"  # what ties the memories together, at the model and at each of their layers
_PASS = "motif_memory_pass"
# What models call a cache, of whatever kind.
_CACHE_NAMES = ("past_key_values", "cache", "cache_params", "layer_past", "past_buckets_states", "mems", "state")


def cache_among(arguments: tuple[Any, ...], options: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, which models give different names."""
    return next((value for value in (*arguments, *options.values()) if isinstance(value, Cache)), None)


def tokens_in(cache: Cache | None) -> int | torch.Tensor | None:
    """Tokens that a cache holds; None if it cannot say, as one without attention."""
    try:
        return 0 if cache is None else cache.get_seq_length() + 0  # a copy: static caches count in place
    except ValueError:
        return None


def check_caches(given: dict[str, Any]) -> None:
    """Refuse caches in which a memory cannot keep its state.

    Args:
        given: arguments of a call, by name.

    Raises:
        ValueError: if one is of another kind than `Cache`.
    """
    for name, value in given.items():
        if value is None or isinstance(value, (Cache, bool)):
            continue
        is_cache = not isinstance(value, torch.Tensor) and type(value).__name__.endswith("Cache")
        if is_cache or name in _CACHE_NAMES:
            raise ValueError(
                f"{name}: a motif memory keeps what it remembers in a cache of Transformers (a Cache), got a "
                f"{type(value).__name__}; use `generate`, or read whole texts with use_cache=False."
            )


def refuse_continuous_batching(*arguments: Any, **options: Any) -> Any:
    """Stands in for `init_continuous_batching` of a model with a memory, for whose state its pages have no place.

    Raises:
        ValueError: always.
    """
    raise ValueError(NO_CONTINUOUS_BATCHING)


def states_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a layer is given, in first place or by its name."""
    return arguments[0] if arguments else options.get("hidden_states")


class _LayerWithMemory:
    """What a layer's class gets on top: `hidden_states + memory(hidden_states)` goes into the layer.

    The memory is computed inside `forward`, where gradient checkpointing and FSDP expect a layer's work. What it reads
    besides is handed over as an argument, so that a layer that is computed again in the backward pass reads the same.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        graft, memory = getattr(self, GRAFT), getattr(self, CHILD)
        now = graft.current_pass()
        is_training = self.training and not torch.compiler.is_compiling()  # type: ignore[attr-defined]
        if is_training and cache_among(arguments, options) is None:  # with one, no layer can be computed again
            now = graft.pass_of_layer(memory.layer_idx, states_of(arguments, options))
        options[_PASS] = now
        output = super().__call__(*arguments, **options)  # type: ignore[misc]
        if now is not None and memory.layer_idx not in now.has_run:
            raise RuntimeError(
                f"the `forward` of this {type(self).__name__} was replaced after a motif memory was attached, which "
                "is therefore not computed; attach the memory afterwards."
            )
        return output

    def forward(self, *arguments: Any, motif_memory_pass: Any = None, **options: Any) -> Any:
        """The layer's own arguments, of which the first is (batch, length, hidden)."""
        if motif_memory_pass is None:
            how = "call the model, which knows the ids."
            if self.training and cache_among(arguments, options) is not None:  # type: ignore[attr-defined]
                how += " If that was done, and this layer is computed again for gradients, give it use_cache=False."
            raise RuntimeError(f"a layer with a motif memory was called by itself; {how}")
        by_name = len(arguments) == 0  # compiled code takes no `not` of a tuple
        if by_name and "hidden_states" not in options:
            raise RuntimeError(
                f"{type(self).__name__} is called with {', '.join(options)}; a motif memory needs layers whose input "
                "comes first, or is called hidden_states."
            )
        hidden_states = options["hidden_states"] if by_name else arguments[0]
        cache = cache_among(arguments, options)
        memory = getattr(self, CHILD)
        plan, state = motif_memory_pass.plan(getattr(self, GRAFT).config, cache, hidden_states.device)
        if state is not None and memory.layer_idx in motif_memory_pass.has_run:
            raise ValueError(
                f"a {type(self).__name__} with a motif memory is computed twice in one pass, for which a cache has no "
                "room: give use_cache=False."
            )
        motif_memory_pass.has_run.add(memory.layer_idx)
        output = memory(hidden_states, plan, state)
        if state is not None:
            state.advance(memory.layer_idx, output)
        hidden_states = hidden_states + output.residual
        if by_name:
            options["hidden_states"] = hidden_states
        else:
            arguments = (hidden_states, *arguments[1:])
        return super().forward(*arguments, **options)  # type: ignore[misc]


class _ModelWithMemory:
    """What the class of the base model gets on top: its memories are told what it reads.

    Models within it have the same on top, since some heads call those; of one call the outermost model tells.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        graft = getattr(self, GRAFT)
        if graft.current_pass() is not None:
            return super().__call__(*arguments, **options)  # type: ignore[misc]
        now = graft.begin(self, arguments, options)
        try:
            output = super().__call__(*arguments, **options)  # type: ignore[misc]
        finally:
            graft.end()
        now.finish()
        return output


class _Importable:
    """Copies and pickles name the host's class, which can be imported."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (_on_top(type(self)), host_class(type(self))), self.__dict__


def _empty(on_top: type, host: type) -> Any:
    return torch.nn.Module.__new__(_extended(on_top, host))


_extensions: dict[tuple[Any, Any], Any] = {}


def _extended(on_top: Any, host: Any) -> Any:
    """The host's class with `on_top` on top, under the host's name; always the same class."""
    if (on_top, host) not in _extensions:
        names = {"__module__": host.__module__, "__qualname__": host.__qualname__, "__doc__": host.__doc__}
        _extensions[on_top, host] = type(host.__name__, (on_top, _Importable, host), names)
    return _extensions[on_top, host]


def _on_top(module_class: type) -> type:
    return module_class.__mro__[1]


def host_class(module_class: type) -> type:
    """The class of a layer or model without what is on top."""
    return module_class.__mro__[3] if issubclass(module_class, _Importable) else module_class


def hooks_of(layer: Any) -> tuple[Any, ...]:
    """What accelerate put around a layer, if it did."""
    hook = getattr(layer, "_hf_hook", None)
    return (hook, *getattr(hook, "hooks", ()))


def check_forward(layer: Any, name: str) -> None:
    """Refuse a layer in front of which no memory can be put.

    Raises:
        ValueError: if its `forward` was replaced, or if its weights are elsewhere until they are needed.
    """
    if "forward" not in vars(layer):
        return
    if not hasattr(layer, "_old_forward"):
        raise ValueError(f"layers: the `forward` of {name} was replaced by other code; attach the memory before that.")
    if any(getattr(hook, "offload", False) for hook in hooks_of(layer)):
        raise ValueError(
            f"layers: the weights of {name} are fetched when they are needed, where a memory has no place. Attach the "
            "memory first, then spread the model (accelerate.dispatch_model), or load it without offloading."
        )


def put_in(layer: Any, memory: torch.nn.Module, graft: Any) -> None:
    """Put a memory in front of a layer, as its child."""
    layer.add_module(CHILD, memory)
    setattr(layer, GRAFT, graft)
    layer.__class__ = _extended(_LayerWithMemory, type(layer))
    _renew_forward(layer)


def take_out(layer: Any) -> None:
    """The layer as it was."""
    layer.__class__ = host_class(type(layer))
    delattr(layer, CHILD)
    delattr(layer, GRAFT)
    _renew_forward(layer)


def _renew_forward(layer: Any) -> None:
    """Let what accelerate put around a layer's `forward` call that of its class now."""
    if "_old_forward" in vars(layer):
        layer._old_forward = MethodType(type(layer).forward, layer)


def tie(model: Any, graft: Any) -> None:
    """Let a base model tell its memories what it reads."""
    setattr(model, GRAFT, graft)
    model.__class__ = _extended(_ModelWithMemory, type(model))


def untie(model: torch.nn.Module) -> None:
    """The base model as it was."""
    model.__class__ = host_class(type(model))
    delattr(model, GRAFT)
