"""Every path that a comment, a docstring or a document names exists, from the root or from the file's own folder."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest
from source_tree import ROOT, modules, repository_files

# Paths that are named but are not of this repository, as patterns, and where they are.
ELSEWHERE = {
    "megatron/*": "the authors' code (zhejianglab/Gengram)",
    "../shared/*": "data and recorded outputs beside the checkout",
    "motif_memory/ways/_native*.so": "the compiled library that setup.py leaves there",
    "gengram/motif_memory/ways/_native*.so": "the same in an installed package",
    "mp_rank_*/model_optim_rng.pt": "a file in Megatron's checkpoints",
    "demo/*": "the example files, where `gengram demo --output demo` puts them",
    "stage?/*": "outputs of docs/pretraining.md's commands, in the folder that these name",
    "../../gengram/default_model/README.md": "from examples/pretraining, where docs/pretraining.md's commands run",
}
EXTENSIONS = (
    "py md h cpp cu svg json jsonl yaml toml cfg in tsv csv txt fa fa.gz gtf.gz vcf bed pt safetensors parquet so"
).split()
PATH = re.compile(
    r"(?<![\w/.:$~}-])"  # not within a longer path, an address or a variable
    r"((?:\.{1,2}/)*[\w.*{},-]+(?:/[\w.*{},-]+)*/[\w.*{},-]*\.(?:" + "|".join(map(re.escape, EXTENSIONS)) + r"))"
    r"\b(?![\w/])"
)
LINK = re.compile(r"\]\(([^)\s]*)\)")
FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
NAME = re.compile(r"\bgengram(?:\.\w+)+(?!\S*/)")

FILES = set(repository_files())
FOLDERS = {str(folder) for name in FILES for folder in PurePosixPath(name).parents}
DOCUMENTS = [name for name in FILES if name.endswith(".md") and not (ROOT / name).is_symlink()]
SOURCES = [name for name in FILES if Path(name).suffix in (".py", ".h", ".cpp", ".cu", ".cfg", ".toml")]
SCRIPTS = [name for name in FILES if name.startswith(".ci/")]


def prose(name: str) -> Iterator[tuple[int, str]]:
    """What a file says to its readers: (line, text) of comments and docstrings, or of the whole document."""
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                yield node.body[0].lineno, ast.get_docstring(node, clean=False)
    elif name.endswith(".md"):
        yield 1, text
    else:
        for found in re.finditer(r"//[^\n]*" if Path(name).suffix in (".h", ".cpp", ".cu") else r"#[^\n]*", text):
            yield text.count("\n", 0, found.start()) + 1, found[0]


def found_in_prose(name: str, pattern: re.Pattern) -> Iterator[tuple[str, str]]:
    """Every match's first group (or the match), and where it is."""
    for line, text in prose(name):
        for found in pattern.finditer(text):
            yield found[found.re.groups and 1], f"{name}:{line + text.count(chr(10), 0, found.start())}"


def normal(path: str) -> str:
    """`docs/../csrc/README.md` is `csrc/README.md`."""
    parts: list[str] = []
    for part in PurePosixPath(path).parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def exists(path: str, name: str) -> bool:
    """Whether the repository has `path`, as seen from the root or from the folder of the file `name`.

    `*`, `...` and words in capitals (`benchmarks/NAME.py`) stand for anything; `{a,b}` for either.
    """
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces:
        return all(exists(path[: braces.start()] + word + path[braces.end() :], name) for word in braces[1].split(","))
    pattern = re.sub(r"\.\.\.|\b[A-Z]{3,}\b(?!\.md)", "*", path)
    for place in (pattern, f"{PurePosixPath(name).parent}/{pattern}"):
        place = normal(place)
        if place in FILES or place in FOLDERS:
            return True
        if "*" in place and any(fnmatchcase(file, place) for file in FILES):
            return True
    return False


@pytest.mark.parametrize("kind", ["documents", "sources", "scripts"])
def test_paths_exist(kind):
    names = {"documents": DOCUMENTS, "sources": SOURCES, "scripts": SCRIPTS}[kind]
    wrong = [
        f"{where}: {path}"
        for name in sorted(names)
        for path, where in found_in_prose(name, PATH)
        if not exists(path, name)
        and not re.match(r"[A-Z][A-Z0-9_]*/", path)  # OUTPUT/report.json: in a folder of the reader's
        and not any(fnmatchcase(path, pattern) for pattern in ELSEWHERE)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_row_of_paths_that_are_elsewhere_is_in_use():
    paths = {path for name in (*DOCUMENTS, *SOURCES, *SCRIPTS) for path, _ in found_in_prose(name, PATH)}
    assert [pattern for pattern in ELSEWHERE if not any(fnmatchcase(path, pattern) for path in paths)] == []


def headings(name: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    lines = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_of_documents_lead_somewhere():
    wrong = []
    for name in sorted(DOCUMENTS):
        for link, where in found_in_prose(name, LINK):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = normal(f"{PurePosixPath(name).parent}/{path}") if path else name
            if target not in FILES | FOLDERS or (anchor and anchor not in headings(target)):
                wrong.append(f"{where}: {link}")
    assert not wrong, "\n".join(wrong)


def test_folders_that_tables_of_documents_name_exist():
    written = {"adapter/"}  # by examples/fine_tuning, into the output folder
    wrong = [
        f"{where}: {path}"
        for name in sorted(DOCUMENTS)
        for path, where in found_in_prose(name, FOLDER)
        if path not in written and not exists(path, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_python_names_in_documents_and_comments_exist():
    wrong = []
    for name in sorted({*DOCUMENTS, *SOURCES} - {"tests/support/source_tree.py", "tests/rules/test_imports.py"}):
        for dotted, where in found_in_prose(name, NAME):
            parts = dotted.split(".")
            count = max(count for count in range(1, len(parts) + 1) if ".".join(parts[:count]) in modules())
            module, rest = modules()[".".join(parts[:count])], parts[count : count + 1]
            if rest and rest[0] not in ("py", "md") and not re.search(rf"\b{rest[0]}\b", module.read_text()):
                wrong.append(f"{where}: {dotted}")
    assert not wrong, "\n".join(wrong)


def test_the_search_finds_wrong_paths():
    text = (
        "see `docs/none.md`, (operators/x.py), ../nowhere/a.json and csrc/*.xyz/b.cu; not https://a.org/b.py or a.py"
    )
    assert PATH.findall(text) == ["docs/none.md", "operators/x.py", "../nowhere/a.json", "csrc/*.xyz/b.cu"]
    assert not any(exists(path, "README.md") for path in PATH.findall(text))
    assert exists("../csrc/README.md", "docs/numerics.md") and exists("benchmarks/NAME.py", "README.md")
    assert exists("csrc/{cpu,cuda}/kernels.h", "README.md") and not exists("csrc/{cpu,none}/kernels.h", "README.md")
