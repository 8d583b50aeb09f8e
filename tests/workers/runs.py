"""Whole runs with real parts: the launcher, Megatron ranks, Ray, SGLang engines; a teacher that the tests share."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fork_servers
import yaml

from distill_api.protocol import ExitCode, ExitReport, Variable
from distill_workers.local.run import with_volumes
from distill_workers.serving.ports import reserve_port

REPO = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache" / "distillation-operator"))
MODELS = CACHE / "models"
HINTED_SUMS = {
    "path": "/models/arithmetic/test.jsonl",
    "answerField": "answer",
    "applyChatTemplate": False,
    "teacherPrompt": "{answer}+{prompt}",
}
CALCULATOR = REPO / "examples" / "calculator"
"""The environment and the agent of the calculator's examples."""


def arithmetic(output: Path, name: str, *, example: str = "arithmetic-cpu", **changes: Any) -> dict[str, Any]:
    """An example with its models on this machine; `changes` are merged into spec, two levels deep."""
    manifest = yaml.safe_load((REPO / "examples" / f"{example}.yaml").read_text())
    manifest["metadata"]["name"] = name
    for key, value in changes.items():
        old = manifest["spec"].get(key)
        manifest["spec"][key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return with_volumes(manifest, {"/models": str(MODELS), "/output": str(output), "/environment": str(CALCULATOR)})


def servers_of(folder: Path, engine: int = 0) -> set[int]:
    """Process ids of an engine's servers of a run folder: their log lies there, and is their output."""
    log = str(folder / "logs" / f"engine-{engine}.log")
    found = set()
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone meanwhile
            if os.readlink(f"/proc/{process}/fd/1") == log:
                found.add(int(process))
    return found


def rewind(folder: Path, step: int) -> None:
    """Leave the folder of a run that has ended as one that was killed after the checkpoint of `step` does."""
    checkpoints = folder / "checkpoints"
    for path in checkpoints.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (checkpoints / "latest").write_text(f"step-{step:06d}")
    shutil.rmtree(folder / "model")


@dataclass
class Outcome:
    code: int
    folder: Path
    report: ExitReport | None
    log: str

    def lines(self, kind: str) -> list[dict[str, Any]]:
        text = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, text) if line["kind"] == kind]


class Run:
    """One trainer pod as a child process, with the environment that the operator would give it."""

    def __init__(self, manifest: dict[str, Any], teacher: str, scratch: Path, **environment: str) -> None:
        self.folder = Path(manifest["spec"]["output"]["path"]) / manifest["metadata"]["name"]
        self.port = reserve_port()
        self._log = scratch / f"{manifest['metadata']['name']}-{self.port}.log"
        self._exit = scratch / f"exit-{self.port}.json"
        job = scratch / f"job-{self.port}.json"
        job.write_text(json.dumps(manifest))
        env = {
            **os.environ,
            Variable.JOB_FILE: str(job),
            Variable.TEACHER: teacher,
            Variable.MASTER_ADDR: "127.0.0.1",
            "MASTER_PORT": str(reserve_port()),
            Variable.POD_IP: "127.0.0.1",
            Variable.TERMINATION_LOG: str(self._exit),
            "DISTILL_PORT": str(self.port),
            **environment,
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distill_workers.launch"],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def step(self) -> int:
        try:
            return int(json.loads(self.get("/progress"))["progress"]["step"])
        except OSError:
            return 0

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        self.wait_until(f"step {step}", lambda: self.step() >= step, seconds)

    def wait_until(self, what: str, true: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.log()}"
            time.sleep(0.1)

    def kill(self) -> None:
        """As a node that goes: every process of the pod, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # Ranks that were forked (fork_servers.py) have sessions of their own, and end after it.
        fork_servers.wait_for_children_of(self.process.pid)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def wait(self, seconds: float = 1800) -> Outcome:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done after {seconds} s:\n{self.log()}") from None
        report = ExitReport.model_validate_json(self._exit.read_text()) if self._exit.exists() else None
        return Outcome(code, self.folder, report, self.log())


def twice(manifest: dict[str, Any], teacher: str, scratch: Path, step: int, **environment: str) -> list[Any]:
    """What a run has learnt, from end to end, and once more from its checkpoint of `step`: of each its steps (number,
    loss, reverse KL, norm of the gradient, lag of the teacher), a hash of its model, and its evaluations (step, reverse
    KL)."""
    found = []
    for _ in range(2):
        outcome = Run(manifest, teacher, scratch, **environment).wait()
        assert outcome.code == ExitCode.DONE, outcome.log
        model = hashlib.sha256((outcome.folder / "model" / "model.safetensors").read_bytes()).hexdigest()
        keys = ("step", "loss", "reverse_kl", "grad_norm", "teacher_lag")
        steps = [tuple(line[key] for key in keys) for line in outcome.lines("step")]
        found.append((steps, model, [(line["step"], line["reverse_kl"]) for line in outcome.lines("evaluation")]))
        rewind(outcome.folder, step)
    assert f"resumed from {outcome.folder / 'checkpoints' / f'step-{step:06d}'}" in outcome.log
    return found
