"""The launcher keeps the exit code that the operator decides by, and leaves no rank behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill_workers.launch import Ranks, rank_environment

CHILD = """
import os, signal, sys, time
rank, how = os.environ["RANK"], sys.argv[1:]
open(os.path.join(os.environ["NOTES"], "pid-" + rank), "w").write(str(os.getpid()))
def on_term(*_):
    open(os.path.join(os.environ["NOTES"], "term-" + rank), "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, on_term)
open(os.path.join(os.environ["NOTES"], "ready-" + rank), "w").close()
what = how[int(rank)]
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "wait": time.sleep(60)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)
time.sleep(0.3)
sys.exit(int(what))
"""
PARENT = """
import json, os, sys
import distill_workers.launch as launch
launch.GRACE_SECONDS = 1.0
how = json.loads(sys.argv[1])
environments = [launch.rank_environment(1, len(how), 0, n) for n in range(len(how))]
sys.exit(launch.Ranks([sys.executable, "-c", os.environ["CHILD"], *how], environments).run())
"""


def launch(how: list[str], notes: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CHILD": CHILD, "NOTES": str(notes)}
    return subprocess.Popen([sys.executable, "-c", PARENT, json.dumps(how)], env=environment)


def gone(notes: Path) -> bool:
    return not any(Path(f"/proc/{p.read_text()}").exists() for p in notes.glob("pid-*"))


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (["0", "0"], 0),
        (["78", "wait"], 78),
        (["wait", "75"], 75),
        (["3", "deaf"], 3),
        (["kill", "wait"], 75),
        (["0", "78"], 78),
    ],
)
def test_the_first_failure_ends_the_others_and_its_code_is_ours(how: list[str], code: int, tmp_path: Path) -> None:
    assert launch(how, tmp_path).wait(30) == code
    assert gone(tmp_path)


def test_sigterm_reaches_every_rank_and_their_code_is_kept(tmp_path: Path) -> None:
    process = launch(["wait", "wait"], tmp_path)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert sorted(p.name for p in tmp_path.glob("term-*")) == ["term-0", "term-1"]


def test_ranks_are_numbered_over_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "job-trainer-0-0.job-trainer")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert rank_environment(3, 2, 1, 1) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "job-trainer-0-0.job-trainer",
        "MASTER_PORT": "29500",
    }


def manifest(tmp_path: Path, **trainer: Any) -> Path:
    spec = {
        "accelerator": "none",
        "student": {"model": "/none"},
        "teacher": {"model": "/none"},
        "data": {"prompts": {"path": "/none"}},
        "schedule": {"steps": 1},
        "trainer": trainer,
    }
    job = {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": "j"},
        "spec": spec,
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    return path


def test_an_invalid_job_is_a_configuration_error_with_a_report(tmp_path: Path) -> None:
    report = tmp_path / "termination"
    done = subprocess.run(
        [sys.executable, "-m", "distill_workers.launch", "--job", str(manifest(tmp_path, gpusPerNode=0))],
        env={**os.environ, "DISTILL_TERMINATION_LOG": str(report)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78
    assert "gpusPerNode" in done.stderr
    assert json.loads(report.read_text())["reason"] == "ConfigurationError"


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_real_trainer_is_what_it_starts(tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import distill_workers.launch as module

    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *a: started.append(a) or (_ for _ in ()).throw(SystemExit(0)))
    monkeypatch.setattr(Ranks, "run", lambda self: started.append((None, self._command, self._environments[-1])) or 0)
    with contextlib.suppress(SystemExit):
        assert module.main(["--job", str(manifest(tmp_path, gpusPerNode=ranks))]) == 0
    [(_, command, environment)] = started
    assert command[1:] == ["-m", "distill_workers.trainer"]
    assert (environment["RANK"], environment["WORLD_SIZE"]) == (str(ranks - 1), str(ranks))
