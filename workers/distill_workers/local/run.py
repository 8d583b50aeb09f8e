"""`distill run`: all roles of a job on this machine, without Kubernetes. The same file, the same programs."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from distill_api import accelerator_environment
from distill_api.job import DistillationJob, parse_job
from distill_api.protocol import ExitCode, ExitReport, Phase, ProgressReport, Variable
from distill_api.spec.output import Output
from distill_workers import loopback
from distill_workers.child_processes import end_session, end_with_parent
from distill_workers.failures import is_full
from distill_workers.launch import exit_code
from distill_workers.local import machine
from distill_workers.local.devices import place_here
from distill_workers.local.placement import Placement
from distill_workers.model_folder import model_folder
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.serving import server_devices
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server_devices import CUDA
from distill_workers.teacher.local_servers import TeacherServers

T = TypeVar("T")

TRAINER = (sys.executable, "-m", "distill_workers.launch")
POLL_SECONDS = 1.0
STOP_SECONDS = 60.0
"""For the last checkpoint; a trainer that takes longer is killed."""
INTERRUPTED = 128 + signal.SIGINT


class RunExists(ValueError):
    """The folder holds a run, and nobody said that it is to go on."""


def with_volumes(manifest: dict[str, Any], volumes: dict[str, str]) -> dict[str, Any]:
    """The manifest with paths on mounted volumes replaced by local folders: {"/models": "/home/me/models"}."""

    def local(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: local(item) for key, item in value.items()}
        if isinstance(value, list):
            return [local(item) for item in value]
        if isinstance(value, str):
            if value.startswith("file:///"):
                return "file://" + local(value.removeprefix("file://"))
            for mount, folder in volumes.items():
                if value == mount or value.startswith(mount.rstrip("/") + "/"):
                    return folder.rstrip("/") + value[len(mount.rstrip("/")) :]
        return value

    spec = dict(manifest["spec"])
    spec["output"] = {"path": Output().path, **spec.get("output", {})}
    for part in ("student", "teacher", "teachers", "data", "evaluation", "output"):
        if part in spec:
            spec[part] = local(spec[part])
    if "environment" in spec.get("rollout", {}):
        spec["rollout"] = {**spec["rollout"], "environment": local(spec["rollout"]["environment"])}
    trainer = dict(spec.get("trainer", {}))
    # Every rank runs here, so the nodes become processes of one.
    trainer["gpusPerNode"] = trainer.pop("nodes", 1) * trainer.get("gpusPerNode", 1)
    return {**manifest, "spec": {**spec, "trainer": trainer}}


class LocalRun:
    """The teacher's servers and the trainer as child processes; the trainer makes the engines itself.

    The first SIGINT (Ctrl-C), SIGTERM or SIGHUP ends the trainer as Kubernetes would: with a checkpoint of the last
    whole step. A second SIGINT or SIGTERM ends everything at once, and so does the end of this process, however it
    comes.
    """

    def __init__(self, job: DistillationJob) -> None:
        self.job = job
        self.folder = RunFolder(job)
        self.interrupts = 0
        self._port = reserve_port()
        self._key = secrets.token_urlsafe(32)
        """Of this run: the servers' administration and Ray ask for it."""
        self._placement: Placement | None = None
        self._trainer: subprocess.Popen[bytes] | None = None
        # In memory: where the volume is full, a file would not say so.
        self._exit_file = os.fdopen(os.memfd_create("exit-report"), "rb")

    def claim(self, resume: bool) -> None:
        """Raises RunExists if the folder holds a run that is not to be resumed."""
        newest = self.folder.latest_checkpoint()
        if newest is not None and not resume:
            raise RunExists(
                f"{self.folder.root} holds a run at step {newest[1]['step']} of {self.job.spec.schedule.steps}: "
                "--resume goes on with it; for a new one choose another metadata.name or spec.output.path, "
                "or remove the folder"
            )

    def is_done(self) -> bool:
        """Return whether the folder holds this very job, and nothing of it is left to do."""
        try:
            report = ProgressReport.model_validate_json((self.folder.root / "state.json").read_text())
            there = parse_job(json.loads((self.folder.root / "run.json").read_text())["job"])
        except (OSError, ValueError, LookupError):
            return False
        published = all(place.done for place in report.publications)
        return report.phase is Phase.DONE and published and there == self.job

    def run(self, show: Callable[[ProgressReport], None], say: Callable[[str], None]) -> int:
        """Runs the job to its end and returns the trainer's exit code, or INTERRUPTED after a second Ctrl-C. `show`
        gets each new ProgressReport, `say` a sentence. Raises Failure for what keeps the job from beginning, and for a
        teacher that cannot be served."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGHUP:
                # A terminal that is closed says so twice, by the kernel and by the shell, and that is no second Ctrl-C.
                signal.signal(number, signal.SIG_IGN)
                before[signal.SIGHUP] = signal.SIG_IGN
            self.interrupts += 1
            if self.interrupts > 1:
                raise KeyboardInterrupt
            if self._trainer is not None:
                self._trainer.send_signal(signal.SIGTERM)

        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            handled.append(signal.SIGHUP)
        before: dict[int, Any] = {number: signal.signal(number, interrupt) for number in handled}
        try:
            return self._run(self._while_heard(show), self._while_heard(say))
        except KeyboardInterrupt:
            return INTERRUPTED
        except OSError as error:
            if not is_full(error):
                raise
            path = Path(error.filename or self.folder.root)
            inside = path.is_relative_to(self.folder.root)
            raise machine.full(path, "spec.output.path" if inside else "files for the time of the run") from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, show: Callable[[ProgressReport], None], say: Callable[[str], None]) -> int:
        spec = self.job.spec
        student, trainer = spec.student.model, spec.trainer
        model_folder(student, "spec.student.model")
        self._placement = place_here(
            spec,
            student,
            "spec.student.model",
            ranks=trainer.nodes * trainer.gpus_per_node,
            engines=spec.rollout.replicas,
            teachers=True,
        )
        machine.check_machine(self.folder.root)
        logs = self.folder.root / "logs"
        teachers = TeacherServers(spec, logs, self._placement.teachers if self._placement else None, self._key)
        logs.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="distill-") as scratch:
            manifest = Path(scratch) / "job.json"
            manifest.write_text(json.dumps(self.job.model_dump(mode="json", by_alias=True, exclude_none=True)))
            try:
                teachers.start()
                if self.interrupts:
                    return ExitCode.TEMPORARY
                with (logs / "trainer.log").open("ab") as log:
                    self._trainer = subprocess.Popen(
                        TRAINER,
                        env=self._environment(manifest, teachers.addresses),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=end_with_parent,
                    )
                return self._follow(teachers, show, say)
            finally:
                self._end_trainer()
                teachers.stop()

    def exit_report(self) -> ExitReport | None:
        """Return how the trainer said that it ended; None if it could not say."""
        self._exit_file.seek(0)
        try:
            return ExitReport.model_validate_json(self._exit_file.read())
        except ValueError:
            return None

    def _environment(self, manifest: Path, teachers: str) -> dict[str, str]:
        shared = accelerator_environment.of_every_role(self.job.spec, (os.environ,))
        return {
            **accelerator_environment.of_the_trainer(self.job.spec),
            **shared,
            **os.environ,
            **loopback.no_proxy(os.environ),
            # Both ends of a NCCL group must agree, also where a flag of SGLang goes before what the user has set.
            **{name: shared[name] for name in accelerator_environment.NCCL_AGREED if name in shared},
            **self._devices(),
            Variable.JOB_FILE: str(manifest),
            Variable.KEY: self._key,
            # The engines' Ray listens on this machine, and whoever reaches it runs what he likes.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._key,
            Variable.TEACHER: teachers,
            Variable.MASTER_ADDR: "127.0.0.1",
            "MASTER_PORT": str(reserve_port()),
            Variable.NODE_RANK: "0",
            Variable.POD_IP: "127.0.0.1",
            Variable.TERMINATION_LOG: f"/proc/{os.getpid()}/fd/{self._exit_file.fileno()}",
            "DISTILL_PORT": str(self._port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }

    def _devices(self) -> dict[str, str]:
        if self._placement is None:
            return {}
        return {
            CUDA: ",".join(self._placement.trainer),
            server_devices.ENGINES: server_devices.written(self._placement.engines),
        }

    def _while_heard(self, shown: Callable[[T], None]) -> Callable[[T], None]:
        """Return a function that shows what `shown` does, or nothing on a terminal that was closed."""

        def show(what: T) -> None:
            try:
                shown(what)
            except OSError:
                if not self.interrupts:
                    raise

        return show

    def _follow(
        self, teachers: TeacherServers, show: Callable[[ProgressReport], None], say: Callable[[str], None]
    ) -> int:
        """Return the exit code of the trainer. Raises Failure for a teacher that ends before it has served."""
        assert self._trainer is not None
        stopping, phase = False, Phase.STARTING
        while (code := self._trainer.poll()) is None:
            if self.interrupts and not stopping:
                stopping = True
                say("stopping with a checkpoint; Ctrl-C again ends at once")
            if (progress := self._progress()) is not None:
                phase = progress.phase
                show(progress)
            if not stopping:
                for sentence in teachers.restart_ended(served=phase is not Phase.STARTING):
                    say(sentence)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._trainer.wait(POLL_SECONDS)
        state = self.folder.root / "state.json"
        if code == ExitCode.DONE and state.exists():
            show(ProgressReport.model_validate_json(state.read_text()))
        return exit_code(code)

    def _progress(self) -> ProgressReport | None:
        try:
            return ProgressReport.model_validate_json(loopback.get(self._port, "/progress", 2.0))
        except (OSError, ValueError):
            return None  # not up yet, or just gone; or somebody else has the port

    def _end_trainer(self) -> None:
        """Asks it to end, unless a second Ctrl-C wants it at once; kills what is left of it."""
        if self._trainer is None or self._trainer.poll() is not None:
            return
        try:
            if self.interrupts < 2:
                self._trainer.send_signal(signal.SIGTERM)
                self._trainer.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._trainer.poll() is None:
                end_session(self._trainer.pid)
                self._trainer.wait()
