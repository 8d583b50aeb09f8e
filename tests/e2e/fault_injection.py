"""Faults as a cluster has them: its daemons, and the processes of its pods, are killed or stopped."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from conftest import CACHE, DEV, run

from distill_cli.cluster import Cluster
from distill_cli.failure import CommandFailed
from fault_runner import Fault, NotYet
from fault_schedule import DAEMONS, Disturbance, Target
from pod_processes import PodProcess, main_processes, pod_processes

PODS = {
    Target.TRAINER: "{job}-trainer-.*",
    Target.ENGINE: "{job}-rollout-.*worker.*",
    Target.TEACHER: "{job}-teacher-.*",
    Target.RAY_HEAD: "{job}-rollout-.*head.*",
    Target.OPERATOR: "distillation-operator-.*",
}


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


def trainer_processes(job: str) -> list[PodProcess]:
    """Return the processes of a job's trainers: launchers and ranks, of all attempts."""
    return [p for p in pod_processes(PODS[Target.TRAINER].format(job=job)) if "distill_workers." in p.command]


def ranks(job: str) -> list[PodProcess]:
    """Return the ranks of a job's trainers, without their launchers."""
    return [p for p in trainer_processes(job) if "distill_workers.trainer" in p.command]


class ClusterFaults:
    """The faults of one job on the cluster."""

    def __init__(self, cluster: Cluster, job: str) -> None:
        self._cluster, self._job = cluster, job

    def happen(self, disturbance: Disturbance) -> Fault:
        """Make a disturbance happen. Raises NotYet."""
        target, seconds = disturbance.target, f"for {disturbance.away_seconds:.1f} s"
        if target in DAEMONS:
            daemon("kill", target)
            return Fault(f"killed {target} {seconds}", lambda: daemon("start", target))
        if target is Target.RUN:
            self._suspend(True)
            return Fault(f"suspended {seconds}", lambda: self._suspend(False))
        victims = main_processes(pod_processes(PODS[target].format(job=self._job)))
        if not victims:
            raise NotYet(f"no {target} runs")
        victim = victims[int(disturbance.share * len(victims))]
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            raise NotYet(f"the {target} has just ended") from None
        return Fault(f"killed {target}: {victim}")

    def _suspend(self, value: bool) -> None:
        try:
            self._cluster.patch_job(self._job, {"spec": {"suspend": value}})
        except CommandFailed as error:
            raise NotYet(str(error)) from None
