"""The table of silent failures in docs/reliability.md is true: its tests are there, and its checks in the workers."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TESTS = REPO / "tests" / "workers"
LEAST_BEFORE = 29
"""Failures that are named before the first optimiser step."""


def rows() -> list[list[str]]:
    """Failure, report, check, when, test, TRL."""
    section = (REPO / "docs" / "reliability.md").read_text().split("## Thirty silent killers")[1].split("\n## ")[0]
    found = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found[2:]]


def test_there_are_thirty_and_nearly_all_are_named_before_the_first_step() -> None:
    assert len(rows()) == 30 and {len(row) for row in rows()} == {6}
    assert len({row[0] for row in rows()}) == 30
    assert sum(row[3].startswith("before") for row in rows()) >= LEAST_BEFORE


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_test_of_each_exists(row: list[str]) -> None:
    file, _, name = row[4].strip("`").partition("::")
    tree = ast.parse((TESTS / file).read_text())
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name.startswith("test_") and name in functions


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_names_a_check_that_the_workers_have(row: list[str]) -> None:
    code = "".join(path.read_text() for path in (REPO / "workers" / "distill_workers").rglob("*.py"))
    names = re.findall(r"`([A-Z][A-Za-z]+)`", row[2])
    assert names or row[2] == "the trainer's start"
    assert all(f'"{name}' in code for name in names), names
