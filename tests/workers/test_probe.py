"""The readiness probe is fast, and true."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import distill_workers.probe as probe


def run(address: str) -> tuple[int, str, float]:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "distill_workers.probe", "score", address], capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stderr, time.monotonic() - begin


def test_a_server_that_scores_is_ready(teacher_server: Any) -> None:
    code, error, _ = run(f"127.0.0.1:{teacher_server.port}")
    assert (code, error) == (0, "")


def test_a_port_where_nobody_listens_is_not_ready() -> None:
    code, error, seconds = run("127.0.0.1:1")
    assert code == 1 and "does not answer" in error
    assert seconds < 5


@pytest.mark.parametrize("arguments", [[], ["score"], ["score", "host"], ["health", "h:1"]])
def test_wrong_arguments_are_explained(arguments: list[str], capsys: Any) -> None:
    assert probe.main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_it_needs_the_standard_library_only() -> None:
    source = Path(probe.__file__)
    # -S leaves the installed packages out.
    command = [sys.executable, "-I", "-S", str(source), "score", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "does not answer" in done.stderr
