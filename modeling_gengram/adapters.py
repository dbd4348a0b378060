"""Settings that an adapter of PEFT was trained with, and the model that it is put into."""

import json
import os
from typing import Any

from transformers.utils import logging

from ..configuration.configuration_gengram import GengramConfig

logger = logging.get_logger(__name__)

# An adapter's file names its base model, but not how that was loaded: `from_pretrained(..., is_causal=False)` would be
# forgotten. PEFT saves a dictionary about the base model, `auto_mapping`, and reads none but its own entries.
_KEY = "gengram_settings"

# Fields that change no output, or only what training does.
_WITHOUT_EFFECT = {
    "vocab_size",  # a resized embedding is saved with the adapter
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
    "classifier_dropout",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
}
_NAMES = ("id2label", "label2id", "problem_type")  # the loss finds out the last one by itself
_OF_THE_TASK = ("num_labels", *_NAMES)
# Fields that are read in each pass, so that a model can take them over.
_TAKEN_OVER = ("classifier_pooling", "is_causal", "pad_token_id")


class _Noted(dict[str, Any]):
    """Settings noted by this process; those that a file brought are a plain dictionary until they are compared."""


def settings_of(config: GengramConfig) -> dict[str, Any]:
    """All fields that change what a model of these weights gives, as JSON has them."""
    names = [name for name in GengramConfig.__annotations__ if name not in _WITHOUT_EFFECT]
    found = {name: getattr(config, name) for name in (*names, *_OF_THE_TASK)}
    return dict(json.loads(json.dumps(found)))


def record_settings(model: Any, prefix: str) -> None:
    """Note the settings of a model in its adapters; called when weights are collected to be saved.

    Args:
        model: a Gengram model.
        prefix: of its weights' names.
    """
    adapters = getattr(model, "peft_config", None) or {}
    for adapter in adapters.values():
        facts = adapter.auto_mapping or {}
        if isinstance(facts.get(_KEY, _Noted()), _Noted):
            adapter.auto_mapping = {**facts, _KEY: _Noted(settings_of(model.config))}
    is_prompt = prefix == "base_model." and not adapters  # PEFT keeps prompts outside of the model
    if is_prompt or any(adapter.task_type is None for adapter in adapters.values()):
        _warn_of_what_is_lost(model)


def _warn_of_what_is_lost(model: Any) -> None:
    """Say which settings differ from the base model's folder, where an adapter cannot carry them."""
    folder = model.config.name_or_path
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return
    on_disk, here = settings_of(GengramConfig.from_pretrained(folder)), settings_of(model.config)
    changed = {name: value for name, value in here.items() if value != on_disk[name]}
    if changed:
        logger.warning_once(
            f"this adapter does not carry the settings in which the model differs from {folder}: {_listed(changed)}. "
            "Give them again when the base model is loaded; adapters that change weights and have a task_type carry "
            "them."
        )


def names_of_classes(adapter: dict[str, Any]) -> dict[int, str] | None:
    """The names of the classes that an adapter was trained with, if its file says them.

    Args:
        adapter: content of its file.
    """
    facts = adapter.get("auto_mapping")
    settings = facts.get(_KEY) if isinstance(facts, dict) else None
    names = settings.get("id2label") if isinstance(settings, dict) else None
    return _as_labels(names) if isinstance(names, dict) else None


def forget_classes(adapter: Any) -> None:
    """Let an adapter go into a model with other classes: without what was noted of its own."""
    facts = dict(adapter.auto_mapping or {})
    if isinstance(facts.get(_KEY), dict):
        facts[_KEY] = {name: value for name, value in facts[_KEY].items() if name not in _OF_THE_TASK}
        adapter.auto_mapping = facts


def check_adapters(model: Any) -> None:
    """Compare a model with the settings that its adapters were trained with; called when weights are loaded.

    What each pass reads from the configuration is taken over from the adapter, which is said.

    Raises:
        ValueError: if other settings differ, or those of several adapters do.
    """
    adapters = getattr(model, "peft_config", None) or {}
    for name, adapter in adapters.items():
        facts = dict(adapter.auto_mapping or {})
        trained = facts.pop(_KEY, None)
        if not isinstance(trained, dict) or isinstance(trained, _Noted):
            continue
        here = settings_of(model.config)
        changed = {field: trained[field] for field in here if field in trained and trained[field] != here[field]}
        said = {field: value for field, value in changed.items() if field not in _NAMES}
        instead = {field: here[field] for field in said}
        if said and (len(adapters) > 1 or not said.keys() <= set(_TAKEN_OVER)):
            raise ValueError(
                f"the adapter {name!r} was trained with {_listed(said)}, but this model has {_listed(instead)}. "
                f"Load the base model anew with the adapter's settings: from_pretrained(..., {_listed(said)})."
            )
        for field, value in changed.items():
            setattr(model.config, field, _as_labels(value) if field == "id2label" else value)
        if said:
            logger.warning(
                f"the adapter {name!r} was trained with {_listed(said)}. The model was loaded with "
                f"{_listed(instead)}, and now has the adapter's."
            )
        adapter.auto_mapping = facts or None  # noted again when it is saved


def _as_labels(names: dict[str, str]) -> dict[int, str]:
    return {int(index): name for index, name in names.items()}  # JSON has no numbers as keys


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
