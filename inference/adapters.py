"""Low-rank adapters (LoRA) that PEFT saved in a folder of their own, and the model that they change."""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..modeling_gengram.adapters import forget_classes, names_of_classes
from ..support.errors import InputError, MissingExtraError, quoted
from ..support.printable import printable
from .model_folder import ADAPTER, Adapters

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_OUTER = "base_model.model."  # what PEFT puts before the names of a model's weights
_NAME = "default"  # of the adapter in the model
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


class ReadAdapters(NamedTuple):
    """What the folder of adapters holds."""

    adapters: Adapters
    config: Any  # PEFT's
    weights: dict[str, torch.Tensor]  # by PEFT's names: `_OUTER`, and that in the model that they were trained in


def classes_of(adapters: Adapters) -> dict[int, str] | None:
    """The names of the classes that adapters were trained with, if they say them, as those of Gengram models do."""
    return names_of_classes(adapters.content)


def read_adapters(adapters: Adapters) -> ReadAdapters:
    """The configuration and the weights of adapters.

    Raises:
        InputError: if they are damaged, are no changes of weights, or of a kind that the installed PEFT does not know.
        MissingExtraError: without PEFT.
    """
    folder = printable(adapters.folder)
    try:
        from peft import PeftConfig, __version__, load_peft_weights
    except ImportError:
        raise MissingExtraError(f"{folder} holds adapters, which need peft: pip install peft") from None
    try:
        config = PeftConfig.from_pretrained(str(adapters.folder))
        config.inference_mode = True
        is_prompt = config.is_prompt_learning
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{folder}/{ADAPTER}: expected adapters that peft {__version__} knows, got something else "
            f"({type(error).__name__}: {printable(str(error))}); install the version that wrote them."
        ) from None
    if is_prompt:
        raise InputError(
            f"{folder}: expected adapters that change a model's weights, such as LoRA, got {config.peft_type.value}."
        )
    if not any((adapters.folder / name).is_file() for name in _WEIGHTS):
        raise InputError(f"{folder}: expected the weights of adapters in {' or '.join(_WEIGHTS)}, got neither.")
    try:
        weights = load_peft_weights(str(adapters.folder), device="cpu")
    except Exception as error:  # of any kind: a broken pickle can raise a KeyError
        raise InputError(f"{folder}: its weights are damaged ({printable(str(error))}); fetch them again.") from None
    return ReadAdapters(adapters, config, weights)


def with_adapters(model: Any, read: ReadAdapters, needs_head: bool = True) -> Any:
    """The model with adapters merged into its weights, all of which must find their place in it.

    Merged, it is a model like any other, for reports and folded tables too; it computes the same up to the rounding of
    the merged weights. Into quantised weights nothing can be merged: there the adapters stay beside them.

    Args:
        model: of any class that has the body of the model that they were trained in.
        read: the adapters.
        needs_head: whether what they change of the model's head counts, too.

    Raises:
        InputError: if they do not fit, or change something to what is not a number.
    """
    from peft import PeftModel, set_peft_model_state_dict

    folder, kind = printable(read.adapters.folder), type(model).__name__
    body = f"{model.base_model_prefix}."
    has_body = model.base_model is not model
    were_beside_a_head = any(name.startswith(_OUTER + body) for name in read.weights)
    target = model.base_model if has_body and not were_beside_a_head else model
    changed, weights = target, read.weights
    if not needs_head and target is not model.base_model:  # nothing of the head, which may have other classes
        forget_classes(read.config)
        changed = model.base_model
        weights = {name: weight for name, weight in weights.items() if name.startswith(_OUTER + body)}
    names = {name.rpartition(".")[2] for name, _ in changed.named_modules()}
    kept = [name for name in read.config.modules_to_save or () if name.rpartition(".")[2] in names]
    read.config.modules_to_save = kept or None
    try:
        peft_model = PeftModel(target, read.config, _NAME)
        found: Any = set_peft_model_state_dict(peft_model, weights, _NAME)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{folder}: expected adapters of {kind}, which cannot be made of what is there "
            f"({type(error).__name__}: {printable(str(error))})."
        ) from None
    unexpected = {name.removeprefix(_OUTER) for name in found.unexpected_keys}
    parameters = dict(peft_model.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in parameters.items() if name not in found.missing_keys}
    missing = {
        name
        for name in found.missing_keys
        if _NAME in name.split(".")
        and id(parameters.get(name)) not in there
        and (changed is target or name.startswith(_OUTER + body))
    }
    strangers = unexpected | missing  # without what is tied to one that is there
    if strangers:
        is_classifier = read.config.task_type in _CLASSIFIERS
        what = "those of a classifier" if is_classifier else quoted(sorted(strangers), limit=3)
        raise InputError(
            f"{folder}: expected adapters of {kind}, got {what}, which are not in both. Do they belong to another "
            "model, or to one with another head?"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        return model.eval()
    _untie(target)
    try:
        peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"{folder}: merged into {kind}, its adapters do not give numbers ({error}).") from None
    return model.requires_grad_(True)


def _untie(model: nn.Module) -> None:
    """Give a module that shares a weight with one under adapters (tied embeddings) its own, which is not changed."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    for weight, sharing in names.items():
        if len(sharing) > 1 and any(".base_layer." in name for name in sharing):
            for name in sharing[1:]:
                place, _, last = name.rpartition(".")
                setattr(model.get_submodule(place), last, nn.Parameter(weight.detach().clone()))
