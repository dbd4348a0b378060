"""Which room may import which: the table of the tree, and every import of the package read with `ast`."""

import ast
import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from source_tree import ROOT, modules, packages, repository_files

# A room and what it may import of the package: rooms, or one module of a room. Whatever lies in a room may import it.
MAY_IMPORT = {
    "support": set(),
    "sequences": {"support"},
    "tokenization": set(),
    "motif_memory": set(),
    "configuration": {"motif_memory.configuration_motif_memory"},
    "modeling_gengram": {"configuration", "motif_memory"},
    "inference": {"sequences", "motif_memory", "support"},
    "data_preparation": {"sequences", "tokenization", "support"},
    "evaluation": {"inference", "sequences", "data_preparation", "support"},
    "conversion_scripts": {"configuration", "tokenization", "support"},
    "gengram": {
        "configuration",
        "tokenization",
        "motif_memory",
        "modeling_gengram",
        "sequences",
        "inference",
        "data_preparation",
        "evaluation",
        "conversion_scripts",
        "support",
    },
}

# (module, what it imports beyond the table): the reason.
EXCEPTIONS = {
    ("inference.adapters", "modeling_gengram.adapters"): "what adapters of a Gengram model say of its classes",
    ("support.versions", "gengram._version"): "the version of a checkout, which is not installed",
    ("conversion_scripts.to_hf.write_folder", "modeling_gengram.remote_code"): "a written folder carries its sources",
    ("conversion_scripts.verify_conversion", "modeling_gengram.modeling_gengram"): "a folder is loaded to verify it",
    ("conversion_scripts.mapping.quantized", "modeling_gengram.quantization"): "the name of the format in config.json",
    ("conversion_scripts.mapping.quantized", "modeling_gengram.quantized_experts"): "the format of quantised experts",
    ("conversion_scripts.to_hf.job", "modeling_gengram.quantization"): "the config.json of quantised experts",
    ("conversion_scripts.convert_megatron_to_hf", "gengram.cli"): "`main` is `gengram convert to-hf`",
    (
        "conversion_scripts.convert_hf_to_megatron",
        "gengram.cli",
    ): "`main` is `gengram convert to-megatron`",
}

# Rooms (or modules) for which it matters what else they need, and the libraries that they may import anywhere.
LIBRARIES = {
    "motif_memory": {"torch"},
    "motif_memory.state": {"torch", "transformers"},  # adapters to caches
    "motif_memory.grafts": {"torch", "transformers", "safetensors", "huggingface_hub"},  # on models of Transformers
    "tokenization.byte_table": {"numpy"},  # text to bytes, without Hugging Face
    "tokenization.soft_mask": {"numpy"},
    "sequences": {"numpy"},
    "sequences.htslib": {"pysam"},
    "sequences.tables": {"pyarrow"},
}

# Modules that import one another inside functions, and why it is not cut.
CYCLES_IN_FUNCTIONS = {
    frozenset(
        {
            "gengram.cli",
            "gengram.commands.convert",
            "conversion_scripts.convert_megatron_to_hf",
            "conversion_scripts.convert_hf_to_megatron",
        }
    ): "the scripts' `main` hands over to the command, which calls the scripts",
}

FRONT_DOOR = "gengram"


class Import(NamedTuple):
    importer: str  # module, without the leading "gengram."; "gengram" is the front door's own
    imported: str  # likewise, or the name of a library
    place: str  # "module", "function" or "typing"
    line: int
    of_package: bool


def short(module: str) -> str:
    """`gengram.configuration.x` is `configuration.x`; modules of the folder gengram/ keep their name."""
    path = modules()[module].relative_to(ROOT)
    return module if path.parts[0] == FRONT_DOOR else module.removeprefix("gengram.")


def room(module: str) -> str:
    return module.split(".")[0]


def within(module: str, names: set[str]) -> bool:
    """Whether `module` is one of `names` or lies in one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def nodes_and_places(node: ast.AST, place: str = "module") -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        inside = place
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = "function"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = "typing"
        yield child, inside
        yield from nodes_and_places(child, inside)


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The module that `from ..x import y` in `module` names."""
    if node.level == 0:
        return node.module
    package = module if modules()[module].stem == "__init__" else module.rpartition(".")[0]
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


@functools.cache
def imports() -> tuple[Import, ...]:
    """All imports of the package, of its own modules and of libraries; the standard library is left out."""
    found = []
    for module, path in modules().items():
        for node, place in nodes_and_places(ast.parse(path.read_text(), path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = absolute(node, module)
                submodules = [f"{source}.{alias.name}" for alias in node.names]
                names = [name if name in modules() else source for name in submodules]
            else:
                continue
            for name in dict.fromkeys(names):
                if name in modules():
                    found.append(Import(short(module), short(name), place, node.lineno, True))
                elif room(name) not in sys.stdlib_module_names:
                    assert room(name) != "gengram", f"{path}:{node.lineno} imports {name}, which does not exist"
                    found.append(Import(short(module), room(name), place, node.lineno, False))
    return tuple(found)


def defines(source: str, name: str) -> bool:
    """Whether a module's text assigns, defines, imports or loads on demand `name`."""
    fields = ("name", "asname", "id", "value")  # of definitions, imports, assignments and strings
    return any(getattr(node, field, None) == name for node in ast.walk(ast.parse(source)) for field in fields)


def strongly_connected(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of two or more modules of which each reaches every other (Tarjan)."""
    index, low, stack, groups = {}, {}, [], set()

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for neighbour in edges.get(node, ()):
            if neighbour not in index:
                visit(neighbour)
            if neighbour in stack:
                low[node] = min(low[node], low[neighbour])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.add(frozenset(group))

    for node in list(edges):
        if node not in index:
            visit(node)
    return groups


def edges(*places: str) -> dict[str, set[str]]:
    """Who imports whom at these places; importing a module also runs the packages that it lies in."""
    found: dict[str, set[str]] = {}
    known = {short(module) for module in modules()}
    for entry in imports():
        if entry.of_package and entry.place in places:
            parts = entry.imported.split(".")
            run = {".".join(parts[:count]) for count in range(1, len(parts) + 1)} & known
            around = {name for name in run if within(entry.importer, {name})}
            found.setdefault(entry.importer, set()).update(run - around)
    return found


def test_no_room_imports_more_than_the_table_says():
    wrong = []
    for entry in imports():
        allowed = MAY_IMPORT[room(entry.importer)] | {room(entry.importer)}
        if entry.of_package and not within(entry.imported, allowed) and entry[:2] not in EXCEPTIONS:
            wrong.append(f"{entry.importer} imports {entry.imported} (line {entry.line}, {entry.place})")
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_in_use():
    assert EXCEPTIONS.keys() <= {entry[:2] for entry in imports()}


def test_the_table_names_every_room():
    assert set(MAY_IMPORT) == {folder.split("/")[0] for folder in packages().values()}


def test_the_table_itself_has_no_cycle():
    assert not strongly_connected({name: {room(module) for module in allowed} for name, allowed in MAY_IMPORT.items()})


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_of_what_can_be_used_alone(name):
    def narrowest_row(module: str) -> str:
        return max((row for row in LIBRARIES if within(module, {row})), default="", key=len)

    used = {entry.imported for entry in imports() if not entry.of_package and narrowest_row(entry.importer) == name}
    assert used <= LIBRARIES[name]


def test_the_front_door_imports_no_library_at_module_top():
    heavy = [entry for entry in imports() if room(entry.importer) == FRONT_DOOR and entry.place == "module"]
    assert {entry.imported for entry in heavy if not entry.of_package} == set()
    assert "gengram.cli" in {entry.importer for entry in heavy}


def test_modules_do_not_import_one_another_in_a_circle():
    assert strongly_connected(edges("module")) == set()


def test_circles_through_functions_are_those_that_are_known():
    assert strongly_connected(edges("module", "function")) == set(CYCLES_IN_FUNCTIONS)


KERNEL_BUILDER = "csrc/torch-ext/"  # a package that the builder of Hugging Face's kernels makes


def test_every_package_folder_is_in_setup_cfg_and_the_reverse():
    folders = {name.rpartition("/")[0] for name in repository_files() if name.endswith("/__init__.py")}
    others = ("tests/", KERNEL_BUILDER)
    assert {folder for folder in folders if not folder.startswith(others)} == set(packages().values())


def test_every_python_file_lies_in_a_package_or_among_scripts_and_tests():
    others = ("tests/", "benchmarks/", "examples/", KERNEL_BUILDER)
    files = {name for name in repository_files() if name.endswith(".py") and not name.startswith(others)}
    assert files - {"setup.py"} == {str(path.relative_to(ROOT)) for path in modules().values()}


def test_scripts_and_tests_import_what_exists():
    wrong = []
    for name in repository_files():
        if not name.endswith(".py") or name.split("/")[0] not in ("tests", "benchmarks", "examples"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text(), name)):
            if isinstance(node, ast.ImportFrom) and room(node.module or "") == "gengram":
                for alias in node.names:
                    if f"{node.module}.{alias.name}" not in modules() and not (
                        node.module in modules() and defines(modules()[node.module].read_text(), alias.name)
                    ):
                        wrong.append(f"{name}:{node.lineno}: {node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                ours = [alias.name for alias in node.names if room(alias.name) == "gengram"]
                wrong += [f"{name}:{node.lineno}: {module}" for module in ours if module not in modules()]
    assert not wrong, "\n".join(wrong)
