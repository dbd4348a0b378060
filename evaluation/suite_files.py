"""Suites in YAML files.

Every value is the text that was written, and means what its field's type says: `no` as a class is `no`, `010` is
`010`, and `3e-4` as a number is 0.0003. YAML by itself reads them as false, 8 and a word.
"""

import functools
import operator
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import yaml

from ..support.errors import InputError, quoted, shortened
from ..support.input_file import read_text, shown_name
from .suite import ClassificationTask, FineTuningOptions, LikelihoodTask, Source, Suite, Task, VariantTask

BUILT_IN = Path(__file__).parent / "suites"
_KINDS: dict[str, type] = {
    "classification": ClassificationTask,
    "variants": VariantTask,
    "likelihood": LikelihoodTask,
}


def read_suite(name: str | Path) -> Suite:
    """A suite of this package by its name, or one of a YAML file, in which every value means the text that is written.

    Raises:
        InputError: if the file is not YAML, or a field is unknown, missing, there twice or of the wrong kind; the
            message names the file, the task and the field.
        FileNotFoundError: if there is no such file and no suite of that name.
    """
    built_in = {found.stem: found for found in BUILT_IN.glob("*.yaml")}
    path = built_in.get(str(name)) or Path(name)
    if not path.is_file():
        known = sorted(built_in)
        raise FileNotFoundError(
            f"no suite {quoted([str(name)], known)}; give a YAML file or one of {', '.join(known)}."
        )
    content = _read_yaml(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("tasks"), list) or not content["tasks"]:
        raise InputError(
            f"{shown_name(path)}: expected name, description and a list of tasks, got {shortened(content)}."
        )
    known = ["name", "description", "tasks"]
    unknown = [key for key in content if key not in known]
    if unknown:
        raise InputError(
            f"{shown_name(path)}: unknown fields: {quoted(map(str, unknown), known)}; known are {', '.join(known)}."
        )
    tasks = []
    for number, given in enumerate(content["tasks"], start=1):
        try:
            tasks.append(_task(given, number))
        except ValueError as error:
            raise InputError(f"{shown_name(path)}: {error}") from None
    names = [task.name for task in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{shown_name(path)}: two tasks have the same name: {quoted(repeated)}.")
    try:
        suite_name = _text(content.get("name", path.stem))
        described = content.get("description", "")
        lines = described.split("\n") if isinstance(described, str) else [described]
        description = [_text(line) for line in lines if line]
    except ValueError as error:
        raise InputError(f"{shown_name(path)}: name and description: {error}.") from None
    return Suite(suite_name, "\n".join(description), tuple(tasks))


def _task(content: Any, number: int) -> Task:
    """A task of its fields; `number` stands for its name where it has none."""
    if not isinstance(content, Mapping):
        raise InputError(f"task {number}: expected its fields, got {shortened(content)}.")
    given = dict(content)
    of = f"task {shortened(given.get('name', number))}: "
    kind_name = given.pop("kind", "classification")
    if not isinstance(kind_name, str) or kind_name not in _KINDS:
        raise InputError(f"{of}expected a kind of {list(_KINDS)}, got {shortened(kind_name)}.")
    kind = _KINDS[kind_name]
    known = {found.name: found for found in fields(kind)}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(
            f"{of}unknown fields: {quoted(map(str, unknown), list(known))}; known are {', '.join(known)}."
        )
    required = [
        name
        for name, found in known.items()
        if found.default is MISSING and found.default_factory is MISSING and name not in given
    ]
    if required:
        raise InputError(f"{of}lacks {', '.join(required)}.")
    hints = get_type_hints(kind)
    read = {}
    for name, value in given.items():
        try:
            read[name] = _parsed(value, hints[name])
        except ValueError as error:
            raise InputError(f"{of}{name}: {error}.") from None
    task: Task = kind(**read)
    return task


def _parsed(value: Any, kind: Any) -> Any:
    """What the text of a field means, by the type that the field is declared with."""
    if types.NoneType in get_args(kind):
        if value in ("", "null", "~"):
            return None
        kind = functools.reduce(operator.or_, [part for part in get_args(kind) if part is not types.NoneType])
    return _PARSERS[kind](value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError(f"expected text without control characters, got {shortened(value)}")
    return value


def _whole_number(value: Any) -> int:
    try:
        return int(_text(value))
    except ValueError:
        raise InputError(f"expected a whole number, got {shortened(value)}") from None


def _number(value: Any) -> float:
    try:
        return float(_text(value))
    except ValueError:
        raise InputError(f"expected a number, got {shortened(value)}") from None


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise InputError(f"expected true or false, got {shortened(value)}")
    return words[value.lower()]


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"expected a list, as [A, B], got {shortened(value)}")
    return tuple(dict.fromkeys(map(_text, value)))


def _options(value: Any) -> dict[str, Any]:
    """Fields of `FineTuningOptions`; unknown names are left to the task."""
    if not isinstance(value, Mapping):
        raise InputError(f"expected options, as {{epochs: 3}}, got {shortened(value)}")
    hints = get_type_hints(FineTuningOptions)
    found = {}
    for name, text in value.items():
        try:
            found[name] = _parsed(text, hints[name]) if name in hints else text
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
    return found


def _source(value: Any) -> Any:
    """A file, `{CLASS: FASTA, ...}`, or `{repo: ORG/NAME, split: ...}`."""
    if not isinstance(value, Mapping):
        return _text(value)
    if not value or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise InputError(
            f"expected a file, {{CLASS: FASTA, ...}} or {{repo: ..., split: ...}}, got {shortened(value)}"
        )
    return {_text(name): _text(text) for name, text in value.items()}


_PARSERS: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    int: _whole_number,
    float: _number,
    bool: _truth,
    tuple[str, ...]: _words,
    dict[str, Any]: _options,
    Source: _source,
}


class _TextLoader(yaml.SafeLoader):
    """Scalars as text; a key that is there twice is an error. Anchors and merges (`<<`) work as usual."""

    yaml_implicit_resolvers: ClassVar = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds: mappings, lists and text."""
    text = read_text(path, "YAML")
    try:
        return yaml.load(text, _TextLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{shown_name(path)}{line}: expected YAML, got {error.problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{shown_name(path)}: expected YAML, got {' '.join(str(error).split())[:200]}.") from None
