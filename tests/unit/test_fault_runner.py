"""Faults come when their schedule says, what is away comes back, and processes are known by their pods."""

from functools import partial
from pathlib import Path

import pytest

from fault_runner import RESTORE_SECONDS, Fault, FaultRunner, NotYet
from fault_schedule import Disturbance, FaultSchedule, Target
from pod_processes import PodProcess, main_processes, pod_processes


class Cluster:
    """A cluster on a clock of its own, of which some things may be unable to happen."""

    def __init__(self, *disturbances: Disturbance) -> None:
        self.now = 100.0
        self.done: list[str] = []
        self.absent: set[str] = set()
        self.runner = FaultRunner(
            FaultSchedule(0, 1, disturbances), self.happen, clock=lambda: self.now, sleep=self.pass_by
        )

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def happen(self, disturbance: Disturbance) -> Fault:
        target = disturbance.target
        self.do(f"{target} ends")
        back = partial(self.do, f"{target} is back") if disturbance.away_seconds else None
        return Fault(f"killed {target}", back)

    def do(self, what: str) -> None:
        if what in self.absent:
            raise NotYet(what)
        self.done.append(what)

    def at(self, seconds: float, step: int) -> list[str]:
        """Return what happens then."""
        self.now, before = 100.0 + seconds, len(self.done)
        self.runner.advance(step)
        return self.done[before:]


def disturbance(target: Target, step: int, delay: float, away: float = 0.0) -> Disturbance:
    return Disturbance(target, step, delay, 0.5, away)


def test_a_disturbance_waits_for_its_step_and_then_its_delay_and_the_next_for_it() -> None:
    cluster = Cluster(disturbance(Target.TRAINER, 2, 5.0), disturbance(Target.ENGINE, 2, 3.0))
    assert cluster.at(50, 1) == []
    assert cluster.at(60, 2) == []
    assert cluster.at(64.9, 3) == []
    # A trainer that starts again from a checkpoint is at an earlier step, which is not asked for any more.
    assert cluster.at(65, 3) == ["trainer ends"]
    assert cluster.at(66, 3) == []
    assert cluster.at(68, 3) == []
    assert cluster.at(69, 3) == ["engine ends"]
    assert cluster.at(100, 9) == []
    assert cluster.runner.missed == []
    assert cluster.runner.said == ["65.0 s, step 3: killed trainer", "69.0 s, step 3: killed engine"]


def test_what_is_not_there_is_killed_as_soon_as_it_is() -> None:
    cluster = Cluster(disturbance(Target.TEACHER, 0, 1.0))
    cluster.absent = {"teacher ends"}
    assert cluster.at(0, 0) == []
    assert cluster.at(30, 0) == []
    assert [d.target for d in cluster.runner.missed] == [Target.TEACHER]
    cluster.absent = set()
    assert cluster.at(31, 0) == ["teacher ends"]


def test_a_daemon_comes_back_after_its_time_and_is_not_killed_again_before() -> None:
    twice = disturbance(Target.API_SERVER, 0, 1.0, 20.0), disturbance(Target.API_SERVER, 0, 1.0, 4.0)
    cluster = Cluster(*twice)
    assert [cluster.at(0, 0), cluster.at(1, 0)] == [[], ["kube-apiserver ends"]]
    assert [cluster.at(2, 0), cluster.at(10, 0)] == [[], []]
    assert cluster.at(21, 0) == ["kube-apiserver is back", "kube-apiserver ends"]
    assert cluster.at(25, 0) == ["kube-apiserver is back"]


def test_a_run_is_resumed_once_the_api_server_is_there_again() -> None:
    cluster = Cluster(disturbance(Target.RUN, 0, 0.0, 5.0))
    assert cluster.at(0, 0) == ["run ends"]
    cluster.absent = {"run is back"}
    assert cluster.at(6, 0) == []
    cluster.absent = set()
    assert cluster.at(7, 0) == ["run is back"]


def test_restore_brings_everything_back_at_once_the_daemons_first() -> None:
    cluster = Cluster(disturbance(Target.RUN, 0, 0.0, 50.0), disturbance(Target.KUBELET, 0, 0.0, 60.0))
    assert [cluster.at(0, 0), cluster.at(1, 0)] == [["run ends"], ["kubelet ends"]]
    cluster.runner.restore()
    assert cluster.done[2:] == ["kubelet is back", "run is back"]
    cluster.runner.restore()
    assert len(cluster.done) == 4


def test_what_cannot_be_brought_back_is_named() -> None:
    cluster = Cluster(disturbance(Target.RUN, 0, 0.0, 50.0))
    assert cluster.at(0, 0) == ["run ends"]
    cluster.absent = {"run is back"}
    with pytest.raises(NotYet, match="run cannot be brought back"):
        cluster.runner.restore()
    assert cluster.now > 100 + RESTORE_SECONDS


UID, OTHER, CONTAINER, PAUSE = "1ad5b1c2-0000-4000-8000-0123456789ab", "9" * 8 + "-" + "9" * 27, "a" * 64, "b" * 64


def process(
    proc: Path, pid: int, inner: int, command: str, *, uid: str = UID, container: str = CONTAINER, **more: str
) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    groups = f"5:pids:/distill/kubepods/besteffort/pod{uid}/{container}\n0::/\n" if inner else "0::/distill/node\n"
    (folder / "cgroup").write_text(groups)
    (folder / "status").write_text(
        f"Name:\tx\nState:\t{more.get('state', 'S (sleeping)')}\nNSpid:\t7\t{pid}\t{inner}\n"
    )
    (folder / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    (folder / "environ").write_text(more.get("environ", "PATH=/bin\0HOSTNAME=run-trainer-1-0\0"))


def test_processes_are_found_by_the_name_of_their_pod(tmp_path: Path) -> None:
    process(tmp_path, 21, 1, "python3 -m distill_workers.launch")
    # Its title stands where its environment was.
    process(tmp_path, 9, 14, "sglang::scheduler", environ="sglang::scheduler")
    process(tmp_path, 30, 20, "python3 -m distill_workers.trainer", state="Z (zombie)")
    process(tmp_path, 20, 1, "/pause", container=PAUSE)
    process(
        tmp_path, 40, 1, "python3 -m distill_workers.serve teacher", uid=OTHER, environ="HOSTNAME=run-teacher-5d-x\0"
    )
    process(tmp_path, 50, 0, "kubelet")
    (tmp_path / "60").mkdir()
    (tmp_path / "self").mkdir()
    assert pod_processes("run-trainer-.*", tmp_path) == [
        PodProcess(9, 14, "run-trainer-1-0", UID, "sglang::scheduler"),
        PodProcess(21, 1, "run-trainer-1-0", UID, "python3 -m distill_workers.launch"),
    ]
    assert [p.uid for p in pod_processes("run-teacher-.*", tmp_path)] == [OTHER]
    assert pod_processes("other-trainer-.*", tmp_path) == []


RAY = "/opt/venv/lib/python3.11/site-packages/ray"
COMMANDS = {
    "bash -c -- ulimit -n 65536": False,
    f"/opt/venv/bin/python -u {RAY}/dashboard/agent.py --node-id=8a --gcs-address=x:6379": False,
    "python3 -m distill_workers.probe score 127.0.0.1:30000": False,
    "ray::DashboardAgent": False,
    "/opt/venv/bin/python3 -c from multiprocessing.spawn import spawn_main": False,
    "/opt/venv/bin/python3 -W ignore -m distill_workers.cpu.sglang_launch --model-path /models/x": True,
    "/opt/venv/bin/python3 -m distill_workers.trainer_on_cpu": True,
    "sglang::scheduler": True,
    "ray::Engine": True,
    f"{RAY}/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/ray/x": True,
    f"{RAY}/core/src/ray/gcs/gcs_server --log_dir=/tmp/ray/x": True,
    "/opt/venv/bin/python -m ray.util.client.server --address=10.200.16.9:6379": True,
}


def test_a_kill_may_hit_the_first_process_of_a_container_and_those_that_do_its_work() -> None:
    """Command lines of the embedded cluster."""
    found = [PodProcess(pid, 7 + pid, "x", UID, command) for pid, command in enumerate(COMMANDS)]
    assert [p.command for p in main_processes(found)] == [command for command, main in COMMANDS.items() if main]
    first = PodProcess(1, 1, "x", UID, "bash -c -- ulimit -n 65536")
    assert main_processes([first]) == [first]
