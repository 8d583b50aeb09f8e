"""A pytest plugin: several processes run the tests of a layer together, each module in one of them.

dev/test.sh starts the processes with the same arguments, `-p in_parallel`, and in DISTILL_TEST_PARALLEL the number of
the process and a new folder. A process takes a module by making a file in that folder, when it has nothing else to do:
so both are busy to the end, whatever a machine's speed. Fixtures of the session exist once in each process that needs
them; the first process begins with the modules that use servers of the session, the second at the other end.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

VARIABLE = "DISTILL_TEST_PARALLEL"
SHARED = {"engine", "teacher_server"}
"""Fixtures of the session that take long to start."""
FIRST = ("test_engine_pool", "test_local_run", "test_run", "test_megatron_student", "test_generated_manifests")
"""The longest modules, longest first: what begins last must be short, or one process waits for the other."""


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """pytest's own loop, over the modules that this process gets."""
    told = os.environ.get(VARIABLE)
    if told is None or session.config.option.collectonly or session.testsfailed:
        return None
    number, folder = told.split(":", 1)
    modules = by_module(session.items)
    paths = order(modules)
    if int(number) % 2:
        paths.reverse()
    for path in paths:
        if not claim(Path(folder), path, session.config.rootpath):
            continue
        items = modules[path]
        # A test of another module: what belongs to this one is torn down, what belongs to the session is not. One of
        # another folder, if there is one: which module comes next is not known, and this folder may be left.
        others = [items[0] for other, items in modules.items() if other != path]
        after = next((test for test in others if test.path.parent != path.parent), others[0] if others else None)
        for item, following in zip(items, [*items[1:], after], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True


def by_module(items: list[pytest.Item]) -> dict[Path, list[pytest.Item]]:
    found: dict[Path, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(item.path, []).append(item)
    return found


def order(modules: dict[Path, list[pytest.Item]]) -> list[Path]:
    """The first process takes them from the front, the second from the end. The long ones stand at both ends."""
    shared = {path for path, items in modules.items() if any(SHARED & set(_fixtures(item)) for item in items)}

    def length(path: Path) -> tuple[int, str]:
        return (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), str(path))

    front = sorted((path for path in modules if path in shared), key=length)
    back = sorted((path for path in modules if path not in shared), key=length)
    return [*front, *reversed(back)]


def claim(folder: Path, module: Path, root: Path) -> bool:
    """True for the one process that asks first."""
    name = str(module.relative_to(root)).replace("/", "+")
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _fixtures(item: pytest.Item) -> Iterator[str]:
    yield from getattr(item, "fixturenames", ())
