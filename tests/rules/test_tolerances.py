"""Tests take their tolerances from one table, tests/support/tolerances.py, in which every row has its reason."""

import ast
import re

import pytest
from source_tree import ROOT, repository_files

TABLE = "tests/support/tolerances.py"
ARGUMENTS = {"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol"}
TESTS = [name for name in repository_files() if name.startswith("tests/") and name.endswith(".py") and name != TABLE]


def tolerances_given(tree: ast.AST) -> list[tuple[str, ast.expr]]:
    """Every tolerance of a call or a dictionary, as its name and its value."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            keys = (key.value if isinstance(key, ast.Constant) else None for key in node.keys)
            found += zip(keys, node.values, strict=True)
    return [(name, value) for name, value in found if name in ARGUMENTS]


@pytest.mark.parametrize("name", TESTS)
def test_no_tolerance_is_a_number_of_its_own(name):
    numbers = [
        f"line {value.lineno}: {argument}={ast.unparse(value)}"
        for argument, value in tolerances_given(ast.parse((ROOT / name).read_text()))
        if any(isinstance(part, ast.Constant) and part.value != 0 for part in ast.walk(value))
    ]
    assert not numbers, f"{name}: take it from {TABLE}: {'; '.join(numbers)}"


def test_every_row_of_the_table_has_its_reason_above():
    lines = (ROOT / TABLE).read_text().splitlines()
    rows = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.Assign)]
    assert len(rows) > 20
    for row in rows:
        (name,) = row.targets
        assert name.id.isupper() and isinstance(row.value, ast.Constant)
        above = row.lineno - 2
        while lines[above] and not lines[above].startswith("#"):  # rows that share a reason
            above -= 1
        assert lines[above].startswith("# "), f"{name.id} has no reason"


def test_every_row_of_the_table_is_used():
    text = "\n".join((ROOT / name).read_text() for name in TESTS)
    rows = [node for node in ast.parse((ROOT / TABLE).read_text()).body if isinstance(node, ast.Assign)]
    assert [row.targets[0].id for row in rows if not re.search(rf"\b{row.targets[0].id}\b", text)] == []
