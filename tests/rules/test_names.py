"""A public name means one thing: functions of one name take the same parameters, and no two classes share a name."""

import ast
from collections import defaultdict

from source_tree import modules

OPERATORS = "the function of the definition, and its PyTorch operator, which also takes the kernels to use"
# Names that stand for functions with different parameters: the modules, and the reason.
SHARED = {
    "letter_codes": ({"motif_memory.definition", "motif_memory.plan", "motif_memory.ways.operators"}, OPERATORS),
    "ngram_rows_and_runs": ({"motif_memory.definition", "motif_memory.ways.operators"}, OPERATORS),
    "window_features": ({"motif_memory.definition", "motif_memory.ways.operators"}, OPERATORS),
    "gated_memory": ({"motif_memory.definition", "motif_memory.ways.operators"}, OPERATORS),
    "folded_memory": ({"motif_memory.ways.folded", "motif_memory.ways.operators"}, OPERATORS),
}


def shared_names() -> dict[str, set[str]]:
    """Public names that several modules define with different parameters, or as classes, and these modules."""
    found: dict[str, list[tuple[str, tuple]]] = defaultdict(list)
    for module, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                kind = ("class", module)
            else:
                kind = tuple(argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg))
            found[node.name].append((module.removeprefix("gengram."), kind))
    return {
        name: {module for module, _ in places}
        for name, places in found.items()
        if len({kind for _, kind in places}) > 1
    }


def test_a_name_means_one_thing():
    allowed = {name: places for name, (places, _) in SHARED.items()}
    wrong = {name: places for name, places in shared_names().items() if not places <= allowed.get(name, set())}
    assert not wrong


def test_every_name_that_may_be_shared_is():
    assert SHARED.keys() <= shared_names().keys()
