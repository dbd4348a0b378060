"""Grafted memories as a small folder of their own."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..configuration_motif_memory import MotifMemoryConfig
from ..module import MotifMemory
from .attach import IN_CONFIG, attach_memory, attached_memories, base_model_of, graft_of
from .layer import CHILD, GRAFT
from .token_letters import token_letters_of

CONFIG_FILE, WEIGHTS_FILE = "motif_memory.json", "motif_memory.safetensors"


def save_memory(model: Any, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None) -> None:
    """Save the memories of a model, without the model.

    Weights that FSDP spreads over processes are gathered, so call this in all of them; the first one writes.

    Args:
        model: with memories attached.
        folder: to be made, or in which files of the same names are replaced.
        push_to_hub: whether to upload the folder.
        repo_id: to where; by default the folder's name.

    Raises:
        ValueError: if the model has no memory, or one with an adapter in it.
    """
    graft, folder = graft_of(model), Path(folder)
    memories = attached_memories(model)
    for layer, memory in memories.items():
        _check_plain(layer, memory)
    weights = {
        f"{layer}.{name}": _gathered(value.detach()).contiguous().clone()
        for layer, memory in memories.items()
        for name, value in memory.state_dict().items()
    }
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    host = base_model_of(model)
    fields = {
        **graft.to_dict(),
        "token_letters": graft.token_letters,
        "host": {
            "name": getattr(host.config, "_name_or_path", "") or None,
            "revision": getattr(host.config, "_commit_hash", None),
            "model_type": getattr(host.config, "model_type", None),
            "hidden_size": host.config.get_text_config().hidden_size,
        },
    }
    save_file(weights, folder / f"{WEIGHTS_FILE}.partial", metadata={"format": "pt"})
    (folder / f"{WEIGHTS_FILE}.partial").replace(folder / WEIGHTS_FILE)
    (folder / f"{CONFIG_FILE}.partial").write_text(json.dumps(fields, indent=1) + "\n")
    (folder / f"{CONFIG_FILE}.partial").replace(folder / CONFIG_FILE)
    if push_to_hub:
        api = HfApi()
        repo = api.create_repo(repo_id or folder.name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
            commit_message="Motif memory",
        )


def _check_plain(layer: str, memory: MotifMemory) -> None:
    """Refuse memories with something put into them, which a memory that is loaded would lack."""
    with torch.device("meta"):
        plain = MotifMemory(memory.config, memory.norm_q.weight.shape[0], layer_idx=0, initializer_range=None)
    if others := sorted(memory.state_dict().keys() ^ plain.state_dict().keys()):
        raise ValueError(
            f"the memory in front of {layer} has other weights than its own ({', '.join(others[:3])}): merge an "
            "adapter first (merge_and_unload), or train the memory whole (modules_to_save=['motif_memory'])."
        )


def _gathered(weight: torch.Tensor) -> torch.Tensor:
    """A weight with the parts that other processes hold."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def load_memory(model: Any, folder: str | Path, *, tokenizer: Any = None, revision: str | None = None) -> Any:
    """Load memories into a model, attaching them if it has none; the model is changed and returned.

    Args:
        model: the host they were trained in.
        folder: what `save_memory` wrote, or `model.save_pretrained` of a model with memories, or a name on the Hub.
        tokenizer: the host's; needed for a folder of `save_pretrained`, which has no list of letters.
        revision: of a name on the Hub.

    Raises:
        ValueError: if the memories belong to another host, or a file is damaged.
        OSError: if there is no such folder.
    """
    place = Path(folder)
    if not place.is_dir():
        place = Path(snapshot_download(str(folder), revision=revision))
    fields, weights = _read(place)
    config = _checked(fields, place)
    host = base_model_of(model)
    _check_host(host, fields, place)
    letters = fields.get("token_letters")
    if letters is not None and tokenizer is not None and _differ(letters, token_letters_of(tokenizer)):
        raise ValueError(
            f"{place} was trained with a vocabulary whose tokens spell other bases than those of "
            f"{type(tokenizer).__name__}; give the tokenizer of that model, or none."
        )
    if getattr(host, GRAFT, None) is None:
        attach_memory(
            model,
            config,
            layers=fields["layers"],
            tokenizer=tokenizer,
            token_letters=letters,
            is_causal=fields["is_causal"],
        )
    memories, graft = attached_memories(model), graft_of(model)
    is_same = list(memories) == fields["layers"] and graft.config == config
    if not is_same or graft.is_causal != fields["is_causal"] or _differ(letters, graft.token_letters):
        raise ValueError(
            f"{place} holds memories for the layers {fields['layers']}, of another configuration, direction or "
            f"vocabulary than those that the model has at {list(memories)}; take these out first with detach_memory."
        )
    expected = {f"{layer}.{name}" for layer, memory in memories.items() for name in memory.state_dict()}
    if weights.keys() != expected:
        wrong = sorted(weights.keys() ^ expected)
        raise ValueError(
            f"{place}: expected the weights of the memories, but these are missing or too many: {wrong[:5]}."
        )
    for layer, memory in memories.items():
        memory.load_state_dict({name: weights[f"{layer}.{name}"] for name in memory.state_dict()})
    return model


def _differ(letters: list[str] | None, others: list[str]) -> bool:
    """Whether tokens spell other bases; a vocabulary may be filled up with tokens that spell none."""
    return letters is not None and any(one != other for one, other in zip_longest(letters, others, fillvalue=""))


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if (place / CONFIG_FILE).is_file():
        return _json(place / CONFIG_FILE), _tensors([place / WEIGHTS_FILE], "")
    config = _json(place / "config.json") if (place / "config.json").is_file() else {}
    if IN_CONFIG not in config:
        raise FileNotFoundError(
            f"{place}: expected {CONFIG_FILE} of save_memory, or a config.json with {IN_CONFIG!r} of save_pretrained."
        )
    found = _tensors(sorted(place.glob("*.safetensors")), f".{CHILD}.")
    layers = config[IN_CONFIG]["layers"]
    names = _names_in_file({name.partition(f".{CHILD}.")[0] for name in found}, layers)
    weights = {}
    for name, value in found.items():
        before, _, after = name.partition(f".{CHILD}.")
        if before in names:
            weights[f"{names[before]}.{after}"] = value
    return config[IN_CONFIG], weights


def _names_in_file(prefixes: set[str], layers: list[str]) -> dict[str, str]:
    """Which layer each name in a file is of: saving puts something in front, or renames what a layer is in."""
    found = {}
    for layer in layers:
        ends = [layer, ".".join(layer.split(".")[-2:]), layer.split(".")[-1]]
        for end in ends:
            fitting = [prefix for prefix in prefixes if prefix == end or prefix.endswith(f".{end}")]
            if len(fitting) == 1:
                found[fitting[0]] = layer
                break
    return found


def _checked(fields: dict[str, Any], place: Path) -> MotifMemoryConfig:
    """The configuration of the memories, if all fields are of the right kind."""
    where = place / (CONFIG_FILE if (place / CONFIG_FILE).is_file() else "config.json")
    for name, kind in (("config", dict), ("layers", list), ("is_causal", bool)):
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{where}: expected {name} to be a {kind.__name__}, got {fields.get(name)!r}.")
    try:
        return MotifMemoryConfig(**fields["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: config cannot be used: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected an object, got a {type(fields).__name__}.")
    return fields


def _tensors(paths: list[Path], containing: str) -> dict[str, Any]:
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found.update({name: file.get_tensor(name) for name in file.keys() if containing in name})
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}.") from None
    return found


def _check_host(host: Any, fields: dict[str, Any], place: Path) -> None:
    wanted = fields.get("host") or {}
    hidden = host.config.get_text_config().hidden_size
    if wanted.get("hidden_size") not in (None, hidden):
        raise ValueError(
            f"{place} was trained in {wanted.get('name') or 'a model'} with hidden size {wanted['hidden_size']}, but "
            f"this {type(host).__name__} has {hidden}."
        )
