"""Benchmarks are run rarely, so what they import is checked here: it is there, without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PLACES = ["crds", "operator", "cli", "workers", "bench", "tests/api", "tests/workers", "tests/unit"]
"""Where the modules of this repository are imported from."""
BENCHES = sorted((REPO / "bench").glob("*.py"))


def files_of(module: str) -> list[Path]:
    """Return the files that a module may be: helpers of two layers of tests may have one name."""
    paths = [REPO / place / Path(*module.split(".")) for place in PLACES]
    found = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return [file for file in found if file.is_file()]


def is_ours(module: str) -> bool:
    return module.startswith("distill_") or bool(files_of(module.partition(".")[0]))


def names_in(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that a module's statements define, also those inside of `if` and `try`."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from ((one.asname or one.name).partition(".")[0] for one in names)
            case ast.Assign(targets=targets):
                yield from (node.id for one in targets for node in ast.walk(one) if isinstance(node, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If() | ast.Try():
                for part in (statement.body, statement.orelse):
                    yield from names_in(part)
            case ast.With():
                yield from names_in(statement.body)


def has(module: str, name: str) -> bool:
    """Return whether a module of this repository has a name, or a module by it."""
    defined = (names_in(ast.parse(file.read_text()).body) for file in files_of(module))
    return bool(files_of(f"{module}.{name}")) or any(name in names for names in defined)


def missing(source: str) -> list[str]:
    """Return what the source takes of this repository's modules that is not there."""
    tree = ast.parse(source)
    wanted, modules = set[tuple[str, str]](), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and is_ours(node.module):
            wanted |= {(node.module, one.name) for one in node.names}
        elif isinstance(node, ast.Import):
            modules |= {one.asname: one.name for one in node.names if one.asname and is_ours(one.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            wanted.add((modules[node.value.id], node.attr))
    return sorted(f"{module}.{name}" for module, name in wanted if not has(module, name))


@pytest.mark.parametrize("bench", BENCHES, ids=lambda file: file.stem)
def test_what_a_benchmark_imports_is_there(bench: Path) -> None:
    assert missing(bench.read_text()) == []


def test_what_is_not_there_is_found() -> None:
    gone = "import conftest as servers\nfrom distill_api.job import parse_job, gone\nservers.lost, servers.ROOT\n"
    assert missing(gone) == ["conftest.lost", "distill_api.job.gone"]
    assert missing("from distill_api.nowhere import anything\nfrom distill_api import job") == [
        "distill_api.nowhere.anything"
    ]
