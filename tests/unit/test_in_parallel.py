"""Two processes run the tests of a layer together: each test once, whatever fails fails the layer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import os, pathlib, pytest
@pytest.fixture(scope="module", autouse=True)
def made():
    yield
    pathlib.Path(os.environ["REPORT"], f"torn-{{__name__}}").touch(exist_ok=False)
@pytest.mark.parametrize("i", range(3))
def test_it(i, made):
    pathlib.Path(os.environ["REPORT"], f"{{__name__}}-{{i}}").touch(exist_ok=False)
    assert {right}
"""


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    for name in ("claims", "report", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "tests" / "inner").mkdir()
    for number in range(6):
        (tmp_path / "tests" / f"test_{number}.py").write_text(MODULE.format(right=True))
    for number in range(6, 9):
        (tmp_path / "tests" / "inner" / f"test_{number}.py").write_text(MODULE.format(right=True))
    return tmp_path


def both(layer: Path) -> list[tuple[int, str]]:
    """Exit code and output of each of the two processes."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "in_parallel", "--rootdir", layer, layer / "tests"],
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT / "tests"),
                "DISTILL_TEST_PARALLEL": f"{number}:{layer / 'claims'}",
                "REPORT": str(layer / "report"),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [process.communicate()[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def test_each_test_runs_once_and_what_a_module_made_is_torn_down(layer: Path) -> None:
    found = both(layer)

    assert [code for code, _ in found] == [0, 0], found
    assert sum(int(n) for _, text in found for n in re.findall(r"(\d+) passed", text)) == 27
    expected = {f"test_{m}-{i}" for m in range(9) for i in range(3)} | {f"torn-test_{m}" for m in range(9)}
    assert {path.name for path in (layer / "report").iterdir()} == expected


def test_a_failure_is_told_by_the_process_that_found_it(layer: Path) -> None:
    (layer / "tests" / "test_3.py").write_text(MODULE.format(right="i != 1"))

    found = both(layer)

    assert sorted(code for code, _ in found) == [0, 1]
    assert any("FAILED" in text and "test_3.py::test_it[1]" in text for _, text in found)
    assert len(list((layer / "report").glob("test_*"))) == 27, "the others run all the same"


def test_what_failed_is_left_for_the_end_of_the_output(layer: Path) -> None:
    (layer / "tests" / "test_1.py").write_text("def test_it():\n    assert 'a long text ' * 100 == ''\n")
    (layer / "tests" / "test_2.py").write_text("import nothing_of_this_name\n")
    told = layer / "told"
    told.mkdir()
    pytest_once = [sys.executable, "-m", "pytest", "-q", "-p", "failures_last", "--continue-on-collection-errors"]

    subprocess.run(
        [*pytest_once, "--rootdir", layer, layer / "tests"],
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "tests"), "DISTILL_TEST_FAILURES": str(told), "REPORT": str(layer / "report")},
        stdout=subprocess.DEVNULL,
        check=False,
    )

    lines = "".join(file.read_text() for file in told.iterdir()).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) < 400, lines
    assert "test_2.py (collect): " in lines[0] and "nothing_of_this_name" in lines[0]
    assert "test_1.py::test_it (call): test_1.py:2: " in lines[1]
