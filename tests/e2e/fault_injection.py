"""Faults as a cluster has them: its daemons and the processes of its pods are killed, by their numbers on this machine.

A pod is known by the cgroup of its processes and by the HOSTNAME of its first one, so no API server is needed to find
them: it may be what is away.
"""

import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from conftest import CACHE, DEV, run

from distill_cli.cluster import Cluster
from distill_cli.failure import CommandFailed
from fault_schedule import DAEMONS, Disturbance, FaultSchedule, Target

_CONTAINER = re.compile(r"/pod([0-9a-f-]{36})/([0-9a-f]{64})")
_FIRST_PROCESS = 1
_OURS = re.compile(r"distill_workers|distill_operator|sglang|raylet|gcs_server")
"""Besides the first process of its container: what a kill may hit."""
PODS = {
    Target.TRAINER: "{job}-trainer-.*",
    Target.ENGINE: "{job}-rollout-.*worker.*",
    Target.TEACHER: "{job}-teacher-.*",
    Target.RAY_HEAD: "{job}-rollout-.*head.*",
    Target.OPERATOR: "distillation-operator-.*",
}


class NotYet(Exception):
    """Raised where a fault cannot be brought about now: what it is to hit is not there."""


@dataclass(frozen=True)
class PodProcess:
    """One process of a pod."""

    pid: int
    """On this machine."""
    inner: int
    """In its container."""
    pod: str
    uid: str
    """Of the pod."""
    command: str

    def __str__(self) -> str:
        return f"{self.pod}[{self.inner}] {self.command[:60]}"


def daemon(action: str, name: str) -> None:
    """stop, kill, start or restart a daemon of the cluster."""
    run(DEV / "cluster" / "daemon.sh", action, name)


def daemon_pid(name: str) -> int:
    return int((CACHE / "cluster" / "run" / f"{name}.pid").read_text().split()[0])


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process for a while: it hears nothing, and what it holds stays as it is."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile
            os.kill(pid, signal.SIGCONT)


def pod_processes(name: str) -> list[PodProcess]:
    """Return the living processes of all pods whose name matches, in the order of their numbers."""
    containers: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
    pods: dict[tuple[str, str], str] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        proc = Path("/proc", pid)
        try:
            container = _CONTAINER.search((proc / "cgroup").read_text())
            if container is None:
                continue
            status = (proc / "status").read_text()
            numbers = re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)
            if numbers is None or re.search(r"^State:\s+[ZX]", status, re.MULTILINE):
                continue
            key, inner = (container[1], container[2]), int(numbers[1])
            command = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            containers[key].append((int(pid), inner, command))
            # Of the first alone: SGLang and Ray write their titles over the environment of others.
            if inner == _FIRST_PROCESS:
                variables = (proc / "environ").read_bytes().split(b"\0")
                host = next((v.decode() for v in variables if v.startswith(b"HOSTNAME=")), "HOSTNAME=")
                pods[key] = host.removeprefix("HOSTNAME=")
        except OSError:
            continue  # it has ended meanwhile
    found = [
        PodProcess(pid, inner, pods[key], key[0], command)
        for key, members in containers.items()
        if re.fullmatch(name, pods.get(key, ""))
        for pid, inner, command in members
        if not command.startswith("/pause")
    ]
    return sorted(found, key=lambda process: process.pid)


def trainer_processes(job: str) -> list[PodProcess]:
    """Return the processes of a job's trainers: launchers and ranks, of all attempts."""
    return [p for p in pod_processes(PODS[Target.TRAINER].format(job=job)) if "distill_workers." in p.command]


def ranks(job: str) -> list[PodProcess]:
    """Return the ranks of a job's trainers, without their launchers."""
    return [p for p in trainer_processes(job) if "distill_workers.trainer" in p.command]


class FaultInjector:
    """Brings about what a schedule says, and starts and resumes again what nothing else does."""

    def __init__(self, cluster: Cluster, job: str, schedule: FaultSchedule) -> None:
        self._cluster, self._job, self._left = cluster, job, list(schedule.disturbances)
        self._began = time.monotonic()
        self._due: float | None = None
        """When the next disturbance is due; None while it waits for its step."""
        self._revivals: list[tuple[float, Target, Callable[[], None]]] = []
        self.said: list[str] = []
        """What was done, and when."""

    @property
    def over(self) -> bool:
        """Whether everything has happened, and everything is there again."""
        return not self._left and not self._revivals

    @property
    def missed(self) -> list[Disturbance]:
        """What has not happened."""
        return self._left

    def advance(self, step: int) -> None:
        """Do what is due, of a run that has done so many steps at most. Call it often."""
        now = time.monotonic()
        self._revive([r for r in self._revivals if r[0] <= now])
        if not self._left or step < self._left[0].step:
            return
        if self._due is None:
            self._due = now + self._left[0].delay_seconds
        if now < self._due:
            return
        try:
            self._say(step, self._happen(self._left[0]))
        except NotYet:
            return
        self._left.pop(0)
        self._due = None

    def restore(self) -> None:
        """Start and resume at once what is away."""
        # Of the daemons first: without them no job can be resumed.
        ordered = sorted(self._revivals, key=lambda r: r[1] not in DAEMONS)
        end = time.monotonic() + 120
        while self._revivals and time.monotonic() < end:
            self._revive([r for r in ordered if r in self._revivals])
            time.sleep(0.5)

    def _revive(self, due: list[tuple[float, Target, Callable[[], None]]]) -> None:
        for revival in due:
            try:
                revival[2]()
            except CommandFailed:
                continue  # the API server is away: at the next call
            self._revivals.remove(revival)

    def _happen(self, disturbance: Disturbance) -> str:
        target = disturbance.target
        if target in (x[1] for x in self._revivals):
            raise NotYet("it is away")
        if target in DAEMONS:
            daemon("kill", target)
            self._revive_in(disturbance, lambda: daemon("start", target))
            return f"killed {target} for {disturbance.away_seconds:.1f} s"
        if target is Target.RUN:
            self._suspend(True)
            self._revive_in(disturbance, lambda: self._suspend(False))
            return f"suspended for {disturbance.away_seconds:.1f} s"
        processes = pod_processes(PODS[target].format(job=self._job))
        victims = [p for p in processes if p.inner == _FIRST_PROCESS or _OURS.search(p.command)]
        if not victims:
            raise NotYet("it does not run")
        victim = victims[int(disturbance.share * len(victims))]
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            raise NotYet("it has just ended") from None
        return f"killed {target}: {victim}"

    def _suspend(self, value: bool) -> None:
        try:
            self._cluster.patch_job(self._job, {"spec": {"suspend": value}})
        except CommandFailed as error:
            if value:
                raise NotYet(str(error)) from None
            raise

    def _revive_in(self, disturbance: Disturbance, revive: Callable[[], None]) -> None:
        self._revivals.append((time.monotonic() + disturbance.away_seconds, disturbance.target, revive))

    def _say(self, step: int, what: str) -> None:
        self.said.append(f"{time.monotonic() - self._began:.1f} s, step {step}: {what}")
