"""Puts memories in front of layers of any model of Transformers, and takes them out again."""

import copy
import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..configuration_motif_memory import MotifMemoryConfig
from ..module import MotifMemory
from ..ways.kept_fold import memories_of
from .direction import looks_back_only
from .layer import (
    CHILD,
    GRAFT,
    cache_among,
    check_caches,
    check_forward,
    hooks_of,
    host_class,
    put_in,
    refuse_continuous_batching,
    take_out,
    tie,
    tokens_in,
    untie,
)
from .pass_of_host import EarlierPasses, HostPass, PassOfThread
from .state_in_cache import follow
from .token_letters import Spelling, check_token_letters, token_letters_of

IN_CONFIG = "motif_memory"  # in the host's configuration, so that it is saved with it


class Graft:
    """What ties the memories to their host.

    Args:
        config: of the memories.
        layers: names of the layers, relative to the base model.
        token_letters: the bases that each token spells.
        is_causal: whether windows look back only.
    """

    def __init__(
        self, config: MotifMemoryConfig, layers: Sequence[str], token_letters: Sequence[str], is_causal: bool
    ):
        self.config = config
        self.layers = tuple(layers)
        self.token_letters = list(token_letters)
        self.is_causal = is_causal
        self._names: dict[type, tuple[str, ...]] = {}  # of the arguments of the host's `forward`
        self._spellings: dict[torch.device, Spelling] = {}
        self._passes = PassOfThread()
        self._earlier = EarlierPasses()

    def current_pass(self) -> HostPass | None:
        """The pass that the host is in."""
        return self._passes.current

    def pass_of_layer(self, layer: int, hidden_states: Any) -> HostPass | None:
        """The pass that the host is in; in none, the one in which the layer had these states before."""
        now = self.current_pass()
        if isinstance(hidden_states, torch.Tensor):
            if now is None:
                return self._earlier.find(layer, hidden_states)
            self._earlier.remember(layer, hidden_states, now)
        return now

    def begin(self, host: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> HostPass:
        """Note what the memories read in a call of the host.

        Raises:
            ValueError: if the host is called without ids, or with a cache that cannot keep the memories' state.
        """
        names = self._names.get(host_class(type(host)), ())
        given = {names[place]: argument for place, argument in enumerate(arguments[: len(names)])} | options
        input_ids = given.get("input_ids", arguments[0] if arguments else None)
        if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
            raise ValueError(
                f"{type(host).__name__} has a motif memory, which reads letters: give input_ids, not inputs_embeds, "
                "or take the memory out with detach_memory(model)."
            )
        cache = cache_among(arguments, options)
        if self.is_causal:
            check_caches(given)
            if cache is not None:
                follow(cache, self.config)
        now = HostPass(
            input_ids,
            given.get("attention_mask"),
            given.get("position_ids"),
            tokens_in(cache),
            self._spelling(input_ids.device),
            self.is_causal,
        )
        self._passes.current = now
        return now

    def know(self, kind: Any) -> None:
        """Learn the names of the arguments with which a host is called."""
        names = list(inspect.signature(kind.forward).parameters.values())[1:]
        self._names[kind] = tuple(one.name for one in names if one.kind is one.POSITIONAL_OR_KEYWORD)

    def end(self) -> None:
        """The call has ended."""
        self._passes.current = None

    def _spelling(self, device: torch.device) -> Spelling:
        if device not in self._spellings:
            self._spellings[device] = Spelling.of(self.token_letters).to(device)
        return self._spellings[device]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the letters of the tokens."""
        return {"config": self.config.to_dict(), "layers": list(self.layers), "is_causal": self.is_causal}


def attach_memory(
    model: Any,
    config: MotifMemoryConfig,
    *,
    layers: Sequence[int | str],
    tokenizer: Any = None,
    token_letters: Sequence[str] | None = None,
    is_causal: bool | None = None,
) -> Any:
    """Put a motif memory in front of layers of a model of Transformers; the model is changed and returned.

    The model computes exactly what it did before until the memories are trained: their value projections start at 0.
    While it decodes, what the memories remember is kept in the model's own cache.

    Args:
        model: a decoder or an encoder, with any head or none.
        config: of the memories; hidden size, dtype and device come from the model.
        layers: numbers of the layers, counted from 0, or their names, such as `"encoder.layer.3"`.
        tokenizer: the model's, from which it is learnt which bases each token spells: one, k-mers, or byte pairs. The
            feature of a token of several bases is that of its last one.
        token_letters: the bases of each token, `""` for none, instead of a tokenizer.
        is_causal: whether a window looks back only, or is centred; by default as the model does, which is found by
            reading two short texts.

    Raises:
        ValueError: if the layers cannot be found, have a memory already, or no token spells DNA.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from gengram import GengramTokenizer, MotifMemoryConfig, attach_memory
    >>> sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> config = MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=8, window=9)
    >>> model = attach_memory(model, config, layers=[1, 3], tokenizer=GengramTokenizer())
    """
    host = base_model_of(model)
    if getattr(host, GRAFT, None) is not None:
        raise ValueError(f"{type(host).__name__} has a motif memory already; take it out first with detach_memory.")
    if getattr(host.config, "is_encoder_decoder", False):
        raise ValueError(f"expected a decoder or an encoder, got {type(host).__name__}, which is both.")
    if token_letters is None:
        if tokenizer is None:
            raise ValueError("expected a tokenizer, or token_letters: the string of bases that each token spells.")
        token_letters = token_letters_of(tokenizer)
    embedding = model.get_input_embeddings()
    letters = check_token_letters(token_letters, getattr(embedding, "num_embeddings", None))
    names = _layer_names(host, layers)
    chosen = [host.get_submodule(name) for name in names]
    if is_causal is None:
        bases = [index for index, spelled in enumerate(letters) if spelled]
        is_causal = looks_back_only(host, chosen, bases or range(2), _device_of_ids(embedding))
    if config.pooling == "as_trained" and not is_causal:
        raise ValueError('pooling="as_trained" is causal; use "exact" for a model that looks both ways.')
    if config.pooling == "as_trained" and not all(len(spelled) <= 1 for spelled in letters):
        raise ValueError('pooling="as_trained" needs tokens of single bases; use "exact" for tokens of several.')
    graft = Graft(config, names, letters, is_causal)
    text_config = host.config.get_text_config()
    memories = []
    for index, layer in enumerate(chosen):
        like = next((weight for weight in layer.parameters() if weight.is_floating_point()), None)
        memory = MotifMemory(config, text_config.hidden_size, layer_idx=index, initializer_range=None)
        _initialise(memory, getattr(text_config, "initializer_range", None) or 0.02)
        if like is not None:
            memory.to(device=_device_of_layer(layer, like), dtype=like.dtype)
        memories.append(memory.train(layer.training))
    for layer, memory in zip(chosen, memories, strict=True):
        put_in(layer, memory, graft)
    for caller in _callers(host, names):
        tie(caller, graft)
        graft.know(host_class(type(caller)))
    for generator in _generators(model):
        generator.init_continuous_batching = refuse_continuous_batching
    setattr(_own_config(model, host), IN_CONFIG, graft.to_dict())
    return model


def detach_memory(model: Any) -> Any:
    """Take the memories out; the model is changed and returned.

    Raises:
        ValueError: if it has none.
    """
    graft, host = graft_of(model), base_model_of(model)
    for caller in _callers(host, graft.layers):
        untie(caller)
    for name in graft.layers:
        take_out(host.get_submodule(name))
    for generator in _generators(model):
        vars(generator).pop("init_continuous_batching", None)
    if hasattr(host.config, IN_CONFIG):
        delattr(host.config, IN_CONFIG)
    return model


def graft_of(model: Any) -> Graft:
    """What `attach_memory` made.

    Raises:
        ValueError: if the model has no memory that was attached.
    """
    graft = getattr(base_model_of(model), GRAFT, None)
    if graft is None:
        raise ValueError(f"{type(model).__name__} has no motif memory that was attached; see attach_memory.")
    return graft


def attached_memories(model: Any) -> dict[str, MotifMemory]:
    """The memories of a model, by the names of their layers."""
    host = base_model_of(model)
    return {name: memories_of(getattr(host.get_submodule(name), CHILD))[0] for name in graft_of(model).layers}


def base_model_of(model: Any) -> Any:
    """The part of a model that reads ids and holds the layers, whatever is around it (a head, an adapter of PEFT)."""
    while True:
        inner = getattr(model, "base_model", model)
        if inner is model:
            break
        model = inner
    if not hasattr(model, "get_input_embeddings") and hasattr(model, "model"):  # PEFT's tuner around the model
        return base_model_of(model.model)
    if not hasattr(model, "config"):
        raise ValueError(f"expected a model of Transformers, got a {type(model).__name__}.")
    return model


def _own_config(model: Any, host: Any) -> Any:
    """The host's configuration, as a copy that no other model has: what is noted in it is saved with this model."""
    shared, own = host.config, copy.copy(host.config)
    for module in (host, *(model.modules() if isinstance(model, nn.Module) else ())):
        if vars(module).get("config") is shared:
            module.config = own
    return own


def _callers(host: Any, layers: Sequence[str]) -> list[Any]:
    """The host, and models within it around all of the layers, such as the `OPTDecoder` that OPT's heads call."""
    return [
        module
        for name, module in host.named_modules()
        if (module is host or isinstance(module, PreTrainedModel))
        and all(f".{layer}".startswith(f".{name}") for layer in layers)
    ]


def _generators(model: Any) -> list[Any]:
    """What of a model can be asked to generate."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if isinstance(module, GenerationMixin)]


def _device_of_layer(layer: Any, weight: torch.Tensor) -> torch.device:
    """Where a layer computes, also if its weights are elsewhere until then."""
    devices = [getattr(hook, "execution_device", None) for hook in hooks_of(layer)]
    place = next((device for device in devices if device is not None), None)
    return torch.device(place) if weight.device.type == "meta" and place is not None else weight.device


def _device_of_ids(embedding: Any) -> torch.device:
    """Where a host takes its ids; the CPU if its weights are elsewhere until they are needed."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return torch.device("cpu")
    is_fetched = weight.device.type == "meta" and hasattr(embedding, "_hf_hook")
    return torch.device("cpu") if is_fetched else weight.device


def _initialise(memory: MotifMemory, std: float) -> None:
    memory.reset_parameters(std)
    nn.init.zeros_(memory.value_proj.weight)


def _layer_lists(host: Any) -> dict[str, nn.ModuleList]:
    """Lists of layers, by name: the outermost lists of as many modules as the configuration says, or all outermost."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in host.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module
    text_config = host.config.get_text_config()
    expected = getattr(text_config, "num_hidden_layers", None)
    fitting = {name: found for name, found in lists.items() if len(found) == expected}
    return fitting or lists


def _layer_names(host: Any, layers: Sequence[int | str]) -> list[str]:
    layers = [] if isinstance(layers, (str, int)) else list(layers)
    if not layers:
        raise ValueError("layers: expected a list of numbers or names of layers, got none.")
    numbers = [layer for layer in layers if not isinstance(layer, str)]
    names = [layer for layer in layers if isinstance(layer, str)]
    if numbers:
        lists = _layer_lists(host)
        if len(lists) != 1:
            found = ", ".join(f"{name} ({len(modules)} modules)" for name, modules in lists.items()) or "none"
            raise ValueError(
                f"layers: which of the lists of {type(host).__name__} holds its layers? Found: {found}. Give names, "
                "such as " + ", ".join(repr(f"{name}.0") for name in list(lists)[:3] or ["layers"]) + "."
            )
        (list_name, modules), *_ = lists.items()
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= number < len(modules):
                raise ValueError(
                    f"layers: {type(host).__name__} has layers 0..{len(modules) - 1} in {list_name}, got {number!r}."
                )
        names += [f"{list_name}.{number}" for number in numbers]
    for name in names:
        try:
            layer = host.get_submodule(name)
        except AttributeError:
            raise ValueError(f"layers: {type(host).__name__} has no module {name!r}.") from None
        if layer is host or isinstance(layer, nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"layers: expected names of layers, such as {name or 'layers'}.0, got {name!r}.")
        if hasattr(layer, CHILD):
            of = "; of a Gengram model, memory_layers in its configuration says which have one"
            raise ValueError(
                f"layers: {name} has a motif memory already, or a place for one ({CHILD})"
                f"{of if host.config.model_type == 'gengram' else ''}."
            )
        check_forward(layer, name)
    if len(set(names)) != len(names):
        raise ValueError(f"layers: expected each layer once, got {list(layers)}.")
    order = {name: place for place, (name, _) in enumerate(host.named_modules())}
    return sorted(names, key=order.__getitem__)
