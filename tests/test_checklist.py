"""`docs/checklist.md` names tests that exist for each item of the reliability checklist; so do other documents."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ITEMS = 37


def named() -> dict[int, list[tuple[str, str]]]:
    """The (file, test) pairs of each item."""
    text = (ROOT / "docs" / "checklist.md").read_text()
    parts = re.split(r"^### (\d+)\. ", text, flags=re.MULTILINE)[1:]
    numbers = [int(number) for number in parts[::2]]
    assert numbers == list(range(1, ITEMS + 1)), numbers
    return {
        n: re.findall(r"^- `(tests/\S+\.py)::(\w+)`$", body, re.M) for n, body in zip(numbers, parts[1::2], strict=True)
    }


@cache
def cases_in(file: str) -> frozenset[str]:
    path = ROOT / file
    assert path.exists(), f"{file} is named in the documents and does not exist"
    found = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    return frozenset(node.name for node in found if node.name.startswith("test_"))


@pytest.mark.parametrize("item", range(1, ITEMS + 1))
def test_every_item_is_held_by_tests_that_exist(item):
    tests = named()[item]
    assert tests, f"item {item} names no test"
    missing = [f"{file}::{test}" for file, test in tests if test not in cases_in(file)]
    assert not missing, f"item {item} names tests that do not exist: {missing}"


def test_every_line_that_names_a_test_is_read():
    text = (ROOT / "docs" / "checklist.md").read_text()
    assert text.count("::") == sum(map(len, named().values()))


def test_no_test_written_for_the_checklist_is_left_out_of_it():
    file = "tests/privacy/test_checklist_items.py"
    assert cases_in(file) == {test for tests in named().values() for where, test in tests if where == file}


@cache
def every_case() -> frozenset[str]:
    files = [str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")]
    return frozenset().union(*map(cases_in, files))


@pytest.mark.parametrize("page", ["guarantees", "sharp-edges", "log"])
def test_every_test_that_a_document_names_exists(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert sorted(set(re.findall(r"`(test_\w+)`", text)) - every_case()) == []
    assert [path for path in re.findall(r"`(tests/[\w/.]+)`", text) if not (ROOT / path).exists()] == []


def test_every_row_under_a_heading_test_names_one():
    """In docs/guarantees.md; a file of tests counts."""
    tables = (ROOT / "docs" / "guarantees.md").read_text().split("| test |\n")[1:]
    rows = [row for table in tables for row in table.split("\n\n")[0].splitlines()[1:]]
    assert len(rows) > 30
    assert [row for row in rows if "test" not in row.rsplit("|", 2)[1]] == []
