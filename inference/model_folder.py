"""The folder of a model: which files of it matter, and what can be wrong with it before Transformers opens it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..support.errors import InputError, quoted, shortened
from ..support.input_file import read_text, shown_name
from ..support.lfs_pointer import POINTER_BYTES, refuse_lfs_pointer

ADAPTER = "adapter_config.json"  # of PEFT
_JSON = (
    *("config.json", ADAPTER, "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
_WEIGHTS = ("*.safetensors", "*.bin")
# Endings of what decides what a model computes: weights, configuration, code and the tokenizer's files.
_ENDINGS = (".safetensors", ".bin", ".pt", ".json", ".py", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")
# What `Trainer` leaves beside a model to go on with training: large, and nothing that a model is loaded from.
_OF_TRAINING = {
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt"),
    *("training_args.bin", "trainer_state.json"),
}
_OF_MEGATRON = ("latest_checkpointed_iteration.txt", ".metadata", "mp_rank_*")  # in a checkpoint, or an iteration's
_MOST_BYTES = 1 << 28  # of a JSON file; a tokenizer's can be large


class Adapters(NamedTuple):
    """A folder that holds low-rank adapters (LoRA) and not the model that they change."""

    folder: Path
    base: str  # folder or Hub id of that model
    revision: str | None  # of a model on the Hub
    content: dict[str, Any]  # of its adapter_config.json

    def loading_of_base(self, loading: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `from_pretrained` for that model; a `revision` among `loading` is its own."""
        return {**loading, "revision": loading.get("revision") or self.revision}


def adapters_in(name: str | Path) -> Adapters | None:
    """The adapters that a folder holds; None if it holds none.

    The place of their model counts from the working directory, as PEFT has it, or else from the folder.

    Raises:
        InputError: if the folder does not say which model that is, or holds a model beside its adapters.
    """
    folder = Path(name)
    path = folder / ADAPTER
    if not path.is_file():
        return None
    config = _read_json(path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise InputError(
            f"{shown_name(path)}: expected the model that the adapters belong to as base_model_name_or_path, got "
            f"{shortened(base)}; write its folder there."
        )
    if (folder / "config.json").exists():
        raise InputError(
            f"{shown_name(name)} holds a model and adapters, which Transformers would put on top of it. If they are "
            f"merged into it already, delete {ADAPTER}; else move the adapters to a folder of their own."
        )
    place = Path(base).expanduser()
    base = next((str(each) for each in (place, folder / place) if each.is_dir()), base)
    if Path(base).resolve() == folder.resolve() or (Path(base) / ADAPTER).exists():
        raise InputError(f"{shown_name(name)} holds adapters of {shown_name(base)}, which are adapters, too.")
    return Adapters(folder, base, revision or None, config)


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that decide what its model computes, by their names in it, sorted.

    Of adapters also those of the folder of their model, as `base: NAME`. Other checkpoints of a training
    (`checkpoint-500`), adapters in folders below and hidden files are no part of the model.

    Raises:
        InputError: see `adapters_in`.
    """
    adapters = adapters_in(folder)
    of_base = {} if adapters is None else model_files(Path(adapters.base))
    found = {f"base: {name}": path for name, path in of_base.items()}
    others = {path.parent for path in folder.rglob(ADAPTER)} - {folder}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        is_other = is_hidden or inside.parts[0].startswith("checkpoint-") or path.name in _OF_TRAINING
        is_other = is_other or not others.isdisjoint(path.parents)
        if path.suffix in _ENDINGS and not is_other and path.is_file():
            found[inside.as_posix()] = path
    return found


def check_model_folder(name: str | Path) -> None:
    """Refuse a folder that cannot be loaded; what is no path is left to the Hub.

    Raises:
        InputError: if a file in it is a Git LFS pointer, or no JSON although its name says so; if `name` is a file, or
            a checkpoint of Megatron, which has to be converted.
        FileNotFoundError: if `name` is a path and there is nothing.
        OSError: if a file cannot be read.
    """
    folder = Path(name)
    if not folder.exists() and not _may_be_on_the_hub(str(name)):
        raise FileNotFoundError(f"{shown_name(name)}: no such model folder, and no name of a model on the Hub.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{shown_name(name)} is a file, expected the folder of a model.")
    if not (folder / "config.json").exists() and any(path for each in _OF_MEGATRON for path in folder.glob(each)):
        raise InputError(
            f"{shown_name(name)} is a checkpoint of Megatron, expected the folder of a model; convert it first: "
            f"gengram convert to-hf {shown_name(name)} OUTPUT"
        )
    for path in (folder / each for each in _JSON):
        if path.exists():
            _read_json(path)
    adapters = adapters_in(folder)
    if adapters is not None:
        try:
            check_model_folder(adapters.base)
        except FileNotFoundError:
            raise InputError(
                f"{shown_name(name)} holds adapters of {shown_name(adapters.base)}, and there is no such folder here; "
                f"write where it is into {shown_name(folder / ADAPTER)} as base_model_name_or_path."
            ) from None
    elif not (folder / "config.json").exists():
        named = sorted(str(path.parent) for path in folder.glob(f"*/{ADAPTER}"))
        if named:
            raise InputError(f"{shown_name(name)} holds no model, expected a folder of adapters: {quoted(named)}.")
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        if path.is_file():
            with open(path, "rb") as file:
                refuse_lfs_pointer(file.read(POINTER_BYTES), shown_name(path), InputError)


def _may_be_on_the_hub(name: str) -> bool:
    """Whether this is `MODEL` or `ORG/MODEL`, as names on the Hub are."""
    return name.count("/") < 2 and not name.startswith((".", "~", "/")) and (os.sep == "/" or os.sep not in name)


def _read_json(path: Path) -> dict[str, Any]:
    text = read_text(path, "JSON", _MOST_BYTES)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown_name(path)}: expected JSON, got something else ({error}); fetch it again.") from None
    if not isinstance(found, dict):
        raise InputError(f"{shown_name(path)}: expected a JSON object, got {shortened(found)}; fetch it again.")
    return found
