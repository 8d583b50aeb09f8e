"""The launcher keeps the exit code that the operator decides by, and leaves no rank behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_api.protocol import Variable
from distill_workers import stacks
from distill_workers.child_processes import ChildProcesses
from distill_workers.launch import rank_environment

CHILD = """
import os, signal, sys, time
rank, how = os.environ["RANK"], sys.argv[1:]
with open(os.path.join(os.environ["NOTES"], "new-" + rank), "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, os.path.join(os.environ["NOTES"], "pid-" + rank))
def on_term(*_):
    open(os.path.join(os.environ["NOTES"], "term-" + rank), "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, on_term)
open(os.path.join(os.environ["NOTES"], "ready-" + rank), "w").close()
what = how[int(rank)]
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "wait": time.sleep(60)
if what == "hang":
    from distill_workers import stacks
    def the_call_that_hangs():
        open(os.path.join(os.environ["NOTES"], "hangs-" + rank), "w").close()
        time.sleep(60)
    stacks.on_signal()
    the_call_that_hangs()
if what == "dies":
    from distill_workers import stacks
    def the_last_call():
        signal.raise_signal(signal.SIGUSR1)
    stacks.on_signal()
    the_last_call()
    os.kill(os.getpid(), signal.SIGKILL)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)
time.sleep(0.3)
sys.exit(int(what))
"""
PARENT = """
import json, os, sys
from distill_workers import child_processes, launch
child_processes.GRACE_SECONDS = float(os.environ["GRACE"])
how = json.loads(sys.argv[1])
command = [sys.executable, "-c", os.environ["CHILD"], *how]
environments = [launch.rank_environment(1, len(how), 0, n) for n in range(len(how))]
sys.exit(launch.exit_code(child_processes.ChildProcesses([(command, e) for e in environments]).run()))
"""


def launch(how: list[str], notes: Path, stderr: Any = None, grace: float = 20) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CHILD": CHILD, "NOTES": str(notes), "GRACE": str(grace)}
    return subprocess.Popen([sys.executable, "-c", PARENT, json.dumps(how)], env=environment, stderr=stderr)


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
    assert launch(how, tmp_path, grace=1 if "deaf" in how else 20).wait(60) == code
    assert gone(tmp_path)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_reaches_every_rank_and_their_code_is_kept(tmp_path: Path) -> None:
    process = launch(["wait", "wait"], tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert sorted(p.name for p in tmp_path.glob("term-*")) == ["term-0", "term-1"]


def test_sigusr1_of_the_launcher_writes_the_stacks_of_every_rank_which_go_on(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = launch(["hang", "hang"], tmp_path, log)
    wait_until(lambda: len(list(tmp_path.glob("hangs-*"))) == 2)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: all("in the_call_that_hangs\n" in of_rank(tmp_path, rank) for rank in "01"))
    assert process.poll() is None and not list(tmp_path.glob("term-*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75 and gone(tmp_path)
    line = re.compile(r'^  File "<string>", line \d+ in the_call_that_hangs$', re.MULTILINE)
    assert all(len(line.findall(of_rank(tmp_path, rank))) == 1 for rank in "01")


def of_rank(folder: Path, rank: str) -> str:
    """What the log has of the stacks of one rank, in one piece or in several."""
    pieces = (folder / "log").read_text().split("stacks of rank ")[1:]
    return "".join(piece.removeprefix(f"{rank}:\n") for piece in pieces if piece.startswith(f"{rank}:"))


def test_a_rank_that_cannot_have_its_launchers_file_writes_its_stacks_to_standard_error() -> None:
    code = "import signal\nfrom distill_workers import stacks\nstacks.on_signal()\nsignal.raise_signal(signal.SIGUSR1)"
    environment = {**os.environ, stacks.FILE: "/proc/1/fd/none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "in <module>" in done.stderr


def test_what_a_rank_wrote_of_its_stacks_before_it_was_killed_is_in_the_log(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = launch(["dies", "wait"], tmp_path, log)
    assert process.wait(60) == 75
    text = (tmp_path / "log").read_text()
    assert text.count("stacks of rank 0:\n") == 1 and text.count(" in the_last_call\n") == 1


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


def manifest(tmp_path: Path, accelerator: str = "none", **trainer: Any) -> Path:
    spec = {
        "accelerator": accelerator,
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


@pytest.mark.parametrize(
    ("accelerator", "ranks", "trainer"),
    [
        ("none", 1, "distill_workers.trainer_on_cpu"),
        ("none", 2, "distill_workers.trainer_on_cpu"),
        ("nvidia.com/gpu", 2, "distill_workers.trainer"),
    ],
)
def test_the_real_trainer_is_what_it_starts(
    tmp_path: Path, accelerator: str, ranks: int, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distill_workers.launch as module

    started: list[Any] = []
    monkeypatch.setattr(ChildProcesses, "run", lambda self: started.extend(self._commands) or 0)
    monkeypatch.setattr(module, "exit_on_signal", lambda: None)
    monkeypatch.setenv(Variable.JOB_FILE, "")  # main sets it for good
    assert module.main(["--job", str(manifest(tmp_path, accelerator, gpusPerNode=ranks))]) == 0
    assert [command[1:] for command, _ in started] == [["-m", trainer]] * ranks
    assert [environment["RANK"] for _, environment in started] == [str(rank) for rank in range(ranks)]
    assert {environment["WORLD_SIZE"] for _, environment in started} == {str(ranks)}


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = launch(["wait", "deaf"], tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    process.kill()
    process.wait()
    wait_until(lambda: gone(tmp_path))


AS_FIRST_PROCESS = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""In a PID namespace of its own, where a signal without a handler is ignored, as in a container."""
SLOW_IMPORT = "import time; open({mark!r}, 'w').close(); time.sleep(60)"


@pytest.mark.parametrize(
    ("module", "slow"),
    [("distill_workers.launch", "torch"), ("distill_workers.serve", "sglang"), ("distill_workers.launch", "pydantic")],
)
def test_sigterm_is_heard_while_trainer_and_teacher_still_import(module: str, slow: str, tmp_path: Path) -> None:
    """A package that takes a minute to import stands in for a cold disk."""
    importing = tmp_path / "importing"
    (tmp_path / slow).mkdir()
    (tmp_path / slow / "__init__.py").write_text(SLOW_IMPORT.format(mark=str(importing)))
    report, model = tmp_path / "termination", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    job = json.loads(manifest(tmp_path).read_text())
    job["spec"]["teacher"]["model"] = str(model)
    job["spec"]["output"] = {"path": str(tmp_path / "output")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "DISTILL_JOB_FILE": str(tmp_path / "job.json"),
        "DISTILL_TERMINATION_LOG": str(report),
    }
    command = [*AS_FIRST_PROCESS, sys.executable, "-m", module, *(["teacher"] if module.endswith("serve") else [])]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_until(importing.exists)
        [first] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        begin = time.monotonic()
        os.kill(int(first), signal.SIGTERM)
        process.wait(30)
        assert time.monotonic() - begin < 30  # the import would take a minute
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "output").exists()
    if slow == "torch":
        assert json.loads(report.read_text())["reason"] == "Stopped"
