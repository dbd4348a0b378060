"""A model of Transformers on its device, with its tokenizer."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import find_adapter_config_file, logging

from ..motif_memory.grafts.attach import IN_CONFIG
from ..motif_memory.grafts.layer import CHILD
from ..motif_memory.grafts.saved_memory import load_memory
from ..support.errors import InputError, quoted
from ..support.printable import printable
from .adapters import classes_of, read_adapters, with_adapters
from .model_folder import ADAPTER, Adapters, adapters_in, check_model_folder
from .shared_key_head import read_masks_right

logger = logging.get_logger(__name__)

UNKNOWN_CONTEXT = 10**9  # tokens, if nothing says how many a model can read
HEADS: dict[str | None, Any] = {
    None: AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
    "labels": AutoModelForTokenClassification,
}
# What names of classes say of their heads.
_LANGUAGE_MODELS = {"MaskedLM": "masked", "CausalLM": "causal", "LMHead": "causal"}
_CLASSIFIERS = {"ForSequenceClassification": "classes", "ForTokenClassification": "labels"}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be asked (`eval()`, on its device), and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model is, and inputs have to be."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """How many tokens the model can read at once."""
        return context_length(self.model.config, self.tokenizer)


def load_model(
    name: str,
    head: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
    **loading: Any,
) -> LoadedModel:
    """Any model that the library's Auto classes load, and its tokenizer.

    Args:
        name: folder or Hub id.
        head: `None` for hidden states, the language model: `causal` or `masked`, or a classifier: `classes` of
            sequences or `labels` of tokens.
        dtype: of the weights and activations.
        device: where to run; by default the first GPU if there is one.
        loading: further arguments of `from_pretrained`, as `revision` and `trust_remote_code`.

    Raises:
        ValueError: if there is no such head or device, or the model was not saved with this head.
        OSError: if there is no such model.
    """
    if head not in HEADS:
        raise ValueError(f"expected a head of {list(HEADS)}, got {head!r}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    model = load_whole(HEADS[head], name, dtype=dtype, **loading)
    if head == "causal" and head_of(model.config) == "masked":
        raise ValueError(
            f"{printable(name)} predicts masked bases from both sides; expected a causal model, which predicts the "
            "next base from those before it."
        )
    return LoadedModel(model.to(device).eval(), load_tokenizer(name, **loading))


def check_device(device: str) -> None:
    """Refuse what cannot be computed on.

    Raises:
        ValueError: if PyTorch knows no such device, or has none of it here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a PyTorch without CUDA asserts that it has it
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise ValueError(f"device: expected one that is here ({there}), got {device!r} ({error}).") from None


def load_config(name: str, **loading: Any) -> Any:
    """A model's configuration; errors name the file that is wrong.

    Raises:
        OSError, ValueError: of Transformers, if there is none, or none of a kind that it knows.
    """
    check_model_folder(name)
    adapters = adapters_in(name)
    if adapters is not None:
        with _naming(adapters):
            config = load_config(adapters.base, **adapters.loading_of_base(loading))
        if classes := classes_of(adapters):
            config.id2label, config.label2id = classes, {name: number for number, name in classes.items()}
        return config
    try:
        return AutoConfig.from_pretrained(name, **loading)
    except OSError as error:
        if Path(name).exists():
            raise
        places = {key: value for key, value in where_it_is(loading).items() if key != "trust_remote_code"}
        if find_adapter_config_file(name, **places) is not None:
            raise InputError(
                f"{printable(name)} holds adapters, which are read from a folder: hf download {printable(name)} "
                "--local-dir FOLDER, and give FOLDER as the model."
            ) from None
        raise OSError(f"{printable(name)}: there is no such folder here, and on the Hub: {error}") from None


def load_tokenizer(name: str, **loading: Any) -> Any:
    """A model's tokenizer, which reads bases; errors name the file that is wrong.

    Raises:
        InputError: if its files do not belong together or are damaged, so that it cannot be made or reads no bases.
        OSError, ValueError: of Transformers, if there is none, or none of a kind that it knows.
    """
    check_model_folder(name)
    adapters = adapters_in(name)
    if adapters is not None and not (Path(name) / "tokenizer_config.json").exists():
        with _naming(adapters):
            return load_tokenizer(adapters.base, **adapters.loading_of_base(loading))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **loading)
        tokenizer("ACGTN")
    except (OSError, ValueError):
        raise
    except Exception as error:  # of any kind: tokenizers raises a bare one, Transformers a KeyError
        raise InputError(
            f"{printable(name)}: its tokenizer cannot be used ({type(error).__name__}: {printable(str(error))}); "
            "tokenizer.json or tokenizer_config.json is damaged or incomplete: fetch them again."
        ) from None
    return tokenizer


def load_whole(auto_class: Any, name: str, has_new_head: bool = False, **loading: Any) -> Any:
    """A model of which every weight is read, with the memories that were attached to it when it was saved.

    Transformers makes up what a file lacks, at random, and leaves out what does not fit; it says so in a warning only.

    Args:
        auto_class: whose `from_pretrained` is called.
        name: folder or Hub id; a folder may also hold low-rank adapters of a model, which is loaded from where it is.
        has_new_head: whether what stands on the model's body is to be trained, and may be missing.
        loading: further arguments of `from_pretrained`.

    Raises:
        InputError: if weights are missing, damaged, of another shape, or of layers that the model does not have.
        MissingExtraError: if a folder holds adapters, and PEFT is not installed.
        OSError: if there is no such model.
    """
    check_model_folder(name)
    adapters = adapters_in(name)
    if adapters is not None:
        return _load_adapted(auto_class, adapters, has_new_head, loading)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of the report on weights that are missing or left out, which are checked below
    try:
        model, found = auto_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **loading
        )
    except SafetensorError as error:
        raise InputError(f"{printable(name)}: its weights are damaged ({error}); fetch them again.") from None
    finally:
        logging.set_verbosity(verbosity)
    body = f"{model.base_model_prefix}."  # which the names of its weights begin with in a model with a head
    missing = {*found["missing_keys"], *(each[0] for each in found["mismatched_keys"])}
    if has_new_head:
        missing = {key for key in missing if key.startswith(body)}
    if has_new_head or auto_class is AutoModel:  # language models are saved without one; it makes no hidden states
        missing = {key for key in missing if "pooler" not in key}
    unexpected = found["unexpected_keys"]
    if hasattr(model.config, IN_CONFIG) and any(f".{CHILD}." in key for key in unexpected):
        tokenizer = load_tokenizer(name, **where_it_is(loading))
        load_memory(model, name, tokenizer=tokenizer, revision=loading.get("revision"))
        unexpected = [key for key in unexpected if f".{CHILD}." not in key]
    kinds = {_kind_of(key, body) for key in model.state_dict()}
    # Scales belong to weights that are quantised, and are read as such where config.json has a quantization_config.
    surplus = [key for key in unexpected if _kind_of(key.removesuffix("_scale"), body) in kinds]
    name, made_of = printable(name), f"weights of {type(model).__name__}"
    if missing:
        raise InputError(
            f"{name}: expected all {made_of}, got none of {quoted(sorted(missing), limit=3)}, which would be random. "
            "Is config.json that of another model, or was the model saved with another head?"
        )
    if surplus:
        raise InputError(
            f"{name}: expected {made_of} alone, got {quoted(sorted(surplus), limit=3)} of layers that it does not "
            "have by config.json, or that are quantised there. Is that of another model?"
        )
    read_masks_right(model, name)
    return model


def _load_adapted(auto_class: Any, adapters: Adapters, has_new_head: bool, loading: dict[str, Any]) -> Any:
    """The model that a folder of adapters is of, with these; its body also where they were trained beside a head."""
    of_base = adapters.loading_of_base(loading)
    with _naming(adapters):
        config = load_config(adapters.base, **where_it_is(of_base))
    head = _head_named(config, {**_LANGUAGE_MODELS, **_CLASSIFIERS})
    is_classifier = auto_class in (HEADS["classes"], HEADS["labels"])
    if is_classifier and not has_new_head and auto_class is not HEADS[head]:
        where = printable(adapters.folder)
        raise InputError(
            f"{where} holds adapters of a classifier, and its model, {printable(adapters.base)}, was saved without "
            f"such a head, so that the names of its classes are not known. Merge them: model = {auto_class.__name__}."
            f"from_pretrained({adapters.base!r}, num_labels=...); peft.PeftModel.from_pretrained(model, {where!r})."
            "merge_and_unload().save_pretrained(NEW)"
        )
    if is_classifier and not has_new_head and not classes_of(adapters):
        logger.warning(
            "%s: the names of classes are those of its model, %s.",
            printable(adapters.folder),
            printable(adapters.base),
        )
    read = read_adapters(adapters)
    needs_head = auto_class is not AutoModel and not has_new_head
    # A body is loaded with its head, beside which adapters are mostly trained.
    is_body_of_head = auto_class is AutoModel and head is not None
    with _naming(adapters):
        model = load_whole(HEADS[head] if is_body_of_head else auto_class, adapters.base, has_new_head, **of_base)
    changed = with_adapters(model, read, needs_head)
    return changed.base_model if is_body_of_head else changed


@contextlib.contextmanager
def _naming(adapters: Adapters) -> Iterator[None]:
    """A block in which the model of adapters is looked for, whose error says so if it is not found."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{printable(adapters.folder)} holds adapters of {printable(adapters.base)}, which cannot be loaded: "
            f"{error} Write where it is into {printable(adapters.folder / ADAPTER)} as base_model_name_or_path."
        ) from None


def where_it_is(loading: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where a model is, and not how it is loaded."""
    names = ("revision", "token", "trust_remote_code", "cache_dir")
    return {name: loading[name] for name in names if name in loading}


def _kind_of(key: str, body: str) -> str:
    """A weight's name without the numbers of its layer and expert, and without what the body is called."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key.removeprefix(body))


def head_of(config: Any) -> str | None:
    """Which language model was saved with a configuration: `causal`, `masked`, or None if that is no language model.

    The name of its class says it (`architectures`), or where a model's own code brings the class, what it is for.
    """
    return _head_named(config, _LANGUAGE_MODELS)


def any_head_of(config: Any) -> str | None:
    """Which of `HEADS` a model was saved with; None if it has none.

    Raises:
        InputError: if it was saved with another.
    """
    head = _head_named(config, {**_LANGUAGE_MODELS, **_CLASSIFIERS})
    others = [name for name in getattr(config, "architectures", None) or [] if "For" in name]
    if head is None and others:
        raise InputError(f"expected a language model, a classifier or a model without a head, got {quoted(others)}.")
    return head


def _head_named(config: Any, heads: dict[str, str]) -> str | None:
    """The head by the words that a class's name, or what it is for, has in it."""
    brought = getattr(config, "auto_map", None) or {}
    for architecture in getattr(config, "architectures", None) or []:
        purposes = [purpose for purpose, name in brought.items() if str(name).rpartition(".")[2] == architecture]
        for name in (architecture, *purposes):
            for word, head in heads.items():
                if word in name:
                    return head
    return None


def context_length(config: Any, tokenizer: Any) -> int:
    """How many tokens a model can read at once, by its configuration and tokenizer; or `UNKNOWN_CONTEXT`."""
    said = getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    return int(min(said, tokenizer.model_max_length, UNKNOWN_CONTEXT))
