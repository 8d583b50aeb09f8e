"""`distill run`: what it shows, and that a run can be stopped, taken up again, and ended by a guard."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import MODELS, REPO, arithmetic
from test_rewards_function import is_running

from distill_api.job import parse_job
from distill_api.protocol import ExitCode, Phase, ProgressReport
from distill_api.spec.guards import GuardAction
from distill_api.spec.job_spec import Schedule
from distill_api.status import EvaluationScore, GuardEvent, Progress
from distill_cli.main import main
from distill_cli.run_folder import folder_snapshot, tail_of
from distill_cli.snapshot import Curves, Snapshot
from distill_cli.views.progress import Plain, panel, view
from distill_workers.local.run import LocalRun, with_volumes
from distill_workers.run_folder.run_folder import RunFolder

EXAMPLE = REPO / "examples" / "arithmetic-cpu.yaml"
SMALL = ("spec.rollout.promptsPerStep=8", "spec.rollout.samplesPerPrompt=2")


def command(output: Path, name: str, *more: str, settings: tuple[str, ...] = ()) -> list[str]:
    """`distill run` of the arithmetic example on this machine."""
    volumes = ["--volume", f"/models={MODELS}", "--volume", f"/output={output}"]
    changes = [part for setting in (f"metadata.name={name}", *SMALL, *settings) for part in ("--set", setting)]
    return ["run", "-f", str(EXAMPLE), *volumes, *changes, *more]


def cli(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distill_cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not ((folder / "metrics.jsonl").exists() and len(lines(folder / "metrics.jsonl", "step")) >= step):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_ctrl_c_leaves_a_checkpoint_resume_goes_on_from_it_and_no_process_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stopped"
    few = "spec.evaluation.heldout.maxPrompts=8"
    first = cli(*command(tmp_path, "stopped", settings=(few, "spec.schedule.steps=100000")))
    wait_for_step(folder, 3, first)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=180)
    assert first.returncode == ExitCode.TEMPORARY, out + err
    assert "stopping with a checkpoint" in out and "--resume goes on from there" in err
    saved = int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert saved >= 3

    short = (few, f"spec.schedule.steps={saved + 2}")
    assert main(command(tmp_path, "stopped", settings=short)) == 1
    assert f"holds a run at step {saved}" in capsys.readouterr().err

    second = cli(*command(tmp_path, "stopped", "--resume", settings=short))
    out, err = second.communicate(timeout=300)
    assert second.returncode == ExitCode.DONE, out + err
    assert [line["step"] for line in lines(folder / "metrics.jsonl", "step")] == list(range(1, saved + 3))
    assert {line["step"] for line in lines(folder / "samples.jsonl", "rollout")} == set(range(1, saved + 3))
    assert f"step {saved + 2}/{saved + 2}" in out and "report.html" in out
    assert (folder / "model" / "config.json").exists() and (folder / "report.html").stat().st_size > 10_000
    written = b"".join(events.read_bytes() for events in (folder / "tensorboard").glob("events.out.tfevents.*"))
    assert b"train/reverse_kl" in written and b"evaluation/heldout/score" in written
    end = time.monotonic() + 60  # what Ray has started ends a little after it
    while left := subprocess.run(["pgrep", "-fa", str(tmp_path)], capture_output=True, text=True, check=False).stdout:
        assert time.monotonic() < end, left
        time.sleep(0.1)

    capsys.readouterr()
    assert main(["watch", str(folder)]) == ExitCode.DONE
    assert f"step {saved + 2}/{saved + 2}" in capsys.readouterr().out
    assert main(["samples", str(folder)]) == 0
    assert f"step {saved + 2}, first, " in capsys.readouterr().out
    assert main(["export", str(folder), str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "model.safetensors").stat().st_size > 10_000
    assert "torch" in json.loads((folder / "run.json").read_text())["versions"]


@pytest.mark.timeout(600)
def test_a_guard_rolls_back_to_the_best_checkpoint_and_at_last_stops_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "guarded"
    guard = "{name: long, watch: response-length, above: 0.5, patience: 7, maxTimes: 1, action: roll-back}"
    settings = (
        f"spec.guards=[{guard}]",
        "spec.rollout.promptsPerStep=16",
        "spec.schedule={steps: 40, checkpointEverySteps: 2, evaluateEverySteps: 2, keepLast: 20}",
        "spec.evaluation.heldout.reward.source=none",
        "spec.evaluation.heldout.scoreTeacher=false",
        "spec.evaluation.heldout.maxPrompts=32",
    )
    run = cli(*command(tmp_path, "guarded", settings=settings))
    out, err = run.communicate(timeout=300)
    assert run.returncode == ExitCode.DONE, out + err
    back, stop = lines(folder / "metrics.jsonl", "guard")
    best = back["step"]
    assert back["action"] == "roll-back" and back["at_step"] == 7 and best in (2, 4, 6)
    assert stop["action"] == "stop" and stop["at_step"] == stop["step"] == best + 7
    assert [s["step"] for s in lines(folder / "metrics.jsonl", "step")] == list(range(1, best + 8))
    assert [s["step"] for s in lines(folder / "rolled-back.jsonl", "step")] == list(range(best + 1, 8))
    state = json.loads((folder / "state.json").read_text())
    assert state["result"]["stoppedBy"] == "long" and state["result"]["step"] == state["result"]["bestStep"]
    assert [e["action"] for e in state["progress"]["guardEvents"]] == ["roll-back", "stop"]
    assert "guard long stopped the run after step" in out and "roll-back" in out
    gaps = [step["trainer_engine_gap"] for step in lines(folder / "metrics.jsonl", "step")]
    assert max(gaps) < 1e-3, "engines and trainer went back to the same weights"


class NoTeacher:
    """These runs come to no step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.port = 1

    def start(self) -> None: ...

    def exit_code(self) -> None: ...

    def stop(self) -> None: ...


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A trainer that does not end when asked, nor does what its reward has started; the file has their process ids once
    they run."""
    mark = tmp_path / "pid"
    script = f"""
import os, pathlib, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
started = subprocess.Popen(["sleep", "600"], process_group=0)
pathlib.Path({str(mark)!r}).write_text(f"{{os.getpid()}} {{started.pid}}")
time.sleep(600)
"""
    monkeypatch.setattr("distill_workers.local.run.TRAINER", (sys.executable, "-c", script))
    monkeypatch.setattr("distill_workers.local.run.POLL_SECONDS", 0.05)
    monkeypatch.setattr("distill_workers.teacher.local_servers.SGLangServer", NoTeacher)
    return mark


@pytest.mark.timeout(60)
def test_a_second_ctrl_c_ends_everything_at_once(
    tmp_path: Path, stubborn: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping, follow = threading.Event(), LocalRun._follow

    def followed(self: LocalRun, teachers: Any, show: Any, say: Callable[[str], None]) -> int:
        def said(sentence: str) -> None:
            say(sentence)
            stopping.set()

        return follow(self, teachers, show, said)

    def press() -> None:
        while not (stubborn.exists() and stubborn.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        stopping.wait(50)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LocalRun, "_follow", followed)
    keys = threading.Thread(target=press, daemon=True)
    keys.start()
    assert main(command(tmp_path, "stubborn")) == 130
    keys.join()
    said = capsys.readouterr()
    assert "stopping with a checkpoint; Ctrl-C again ends at once" in said.out
    assert "ended at once" in said.err
    trainer, started = stubborn.read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(trainer), 0)
    end = time.monotonic() + 10
    while is_running(started):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("field", ["spec.student.model", "spec.teacher.model"])
def test_a_model_that_is_not_here_hints_at_the_volume(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distill_workers.teacher.local_servers.SGLangServer", NoTeacher)
    settings = (f"{field}=/mounted/nowhere",)
    assert main(command(tmp_path, "mistyped", settings=settings)) == ExitCode.CONFIGURATION
    err = capsys.readouterr().err
    assert f"{field}: /mounted/nowhere is no Hugging Face checkpoint" in err and "--volume /mounted=FOLDER)" in err
    assert err.count("\n") == 1


def claimed(tmp_path: Path, step: int | None) -> None:
    folder = RunFolder(parse_job(arithmetic(tmp_path, "begun")))
    folder.claim()
    if step is not None:
        folder.publish_checkpoint(folder.checkpoint_aside(step), {"step": step}, Schedule(steps=20))


def test_a_folder_with_a_run_is_refused_without_resume_and_the_sentence_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed(tmp_path, 12)
    assert main(command(tmp_path, "begun")) == 1
    err = capsys.readouterr().err
    assert "begun holds a run at step 12 of 40: --resume goes on with it; for a new one choose another" in err
    assert err.count("\n") == 1


def test_a_bad_path_of_set_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "typo", settings=("spec.schedule.stepz=2",))) == 1
    assert capsys.readouterr().err == (
        "distill: --set spec.schedule.stepz=2: spec.schedule has no field stepz; did you mean steps?\n"
    )
    assert not (tmp_path / "typo").exists()


def test_a_bad_value_of_set_is_refused_as_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "typo", settings=("spec.schedule.steps=0",))) == 1
    assert "spec.schedule.steps: must be greater than or equal to 1 (got 0)" in capsys.readouterr().err


REPORT = ProgressReport(
    phase=Phase.TRAINING,
    progress=Progress(
        step=5,
        total_steps=40,
        reverse_kl="0.75000",
        reward="0.50000",
        estimated_remaining_seconds=3725,
        bottleneck="rollout",
        evaluations=[EvaluationScore(name="heldout", step=4, score="0.25000", reverse_kl="0.90000")],
        guard_events=[
            GuardEvent(
                guard="kl", step=5, action=GuardAction.ROLL_BACK, message="too high", time="2026-01-01T00:00:00Z"
            )
        ],
    ),
)


def test_a_pipe_gets_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Plain()
    for _ in range(2):
        plain.show(Snapshot(REPORT.phase, REPORT.progress))
    shown = capsys.readouterr().out
    assert shown.count("step 5/40, reverse KL 0.75000, reward 0.50000, 3725 s to go, rollout is slowest") == 1
    assert shown.count("step 4: heldout, score 0.25000") == 1
    assert shown.count("step 5: kl, roll-back: too high") == 1


def test_a_line_says_which_phase_the_step_has(capsys: pytest.CaptureFixture[str]) -> None:
    Plain().show(Snapshot(REPORT.phase, REPORT.progress.model_copy(update={"objective_phase": "warm-start"})))
    assert "step 5/40, phase warm-start, reverse KL 0.75000" in capsys.readouterr().out


def test_a_terminal_gets_a_panel_with_the_seconds_of_each_stage(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    step = {"kind": "step", "step": 5, "stages": {"rollout": 1.25, "weight_sync": 0.5}}
    metrics.write_text(json.dumps(step) + '\n{"kind": "evaluation", "step": 5}\n{"kind": "st')
    with Path(os.devnull).open("w") as sink:
        console = Console(file=sink, force_terminal=True, width=120, record=True)
        with view(console) as shown:
            for _ in range(2):
                shown.show(folder_snapshot(tmp_path, REPORT))
        console.print(panel(folder_snapshot(tmp_path, REPORT), 61))
        text = console.export_text()
    assert text.count("heldout, score 0.25000") == 1, "what scrolls by is said once"
    for expected in ("step 5/40", "0:01:01", "1:02:05 to go", "reverse KL 0.75000", "rollout 1.2 s", "weight sync 0.5"):
        assert expected in text
    assert tail_of(tmp_path / "none") == (Curves(), {})


def test_the_tools_of_an_environment_are_on_a_volume_too() -> None:
    environment = {"function": "my_envs:Calculator", "tools": "/envs/tools.json"}
    manifest = {"spec": {"rollout": {"replicas": 1, "environment": environment}}}
    found = with_volumes(manifest, {"/envs": "/home/me/envs"})["spec"]["rollout"]
    assert found == {"replicas": 1, "environment": {**environment, "tools": "/home/me/envs/tools.json"}}
