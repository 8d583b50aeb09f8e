"""The embedded cluster comes up over whatever an earlier one left, and goes without a trace.

A second, small cluster is brought up beside the developer's: its own state folder, network namespace, addresses, node
and cgroup. Nothing here touches the first one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600, func_only=True)]

DEV = Path(__file__).parents[2] / "dev"
CACHE = Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache/distillation-operator"))
IMAGE = "local.test/python-base:1"
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cluster:
    state: Path = CACHE / "e2e"  # on the disk of the images, so that layers are linked
    netns: str = "distill-e2e"
    net: str = "10.210"
    cgroup: str = "distill-e2e"

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "DISTILL_CLUSTER_STATE": str(self.state),
            "DISTILL_CLUSTER_NETNS": self.netns,
            "DISTILL_CLUSTER_NET": self.net,
            "DISTILL_CLUSTER_NODE": "e2e-node",
            "DISTILL_CLUSTER_CGROUP": self.cgroup,
            "KUBECONFIG": str(self.state / "pki/admin.conf"),
            "PATH": f"{CACHE / 'bin'}:{os.environ['PATH']}",
        }

    def run(self, *command: str | Path, seconds: float = 480) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def up(self) -> str:
        return self.run(DEV / "cluster/up.sh")

    def down(self, *options: str) -> str:
        return self.run(DEV / "cluster/down.sh", *options)

    def start_pod(self, name: str, *command: str) -> None:
        image = (f"--image={IMAGE}", "--image-pull-policy=IfNotPresent")
        self.run("kubectl", "run", name, *image, "--restart=Never", "--command", "--", *command)

    def runs_a_pod(self, name: str) -> None:
        """Its image is there, the cluster's DNS answers it, and its log comes back."""
        lookup = "import socket; print(socket.gethostbyname('kubernetes.default.svc.cluster.local'))"
        self.start_pod(name, "python3", "-c", lookup)
        self.run("kubectl", "wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=300s")
        assert self.run("kubectl", "logs", name).strip() == f"{self.net}.32.1"

    def daemons(self) -> dict[str, int]:
        return {file.stem: int(file.read_text().split()[0]) for file in (self.state / "run").glob("*.pid")}

    def processes(self) -> set[int]:
        """Every process below the cluster's cgroup, in any hierarchy."""
        pids: set[int] = set()
        for root in [CGROUPS, *CGROUPS.iterdir()]:
            for file in (root / self.cgroup).rglob("cgroup.procs"):
                pids.update(int(pid) for pid in file.read_text().split())
        return pids

    def shims(self) -> set[int]:
        return {pid for pid in self.processes() if command_of(pid).startswith("/usr/bin/containerd-shim")}

    def mounts(self) -> list[str]:
        points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [point for point in points if point.startswith(f"{self.state}/") or point == f"/run/netns/{self.netns}"]

    def kill_hard(self) -> None:
        """What a pulled plug would do to the daemons; what pods ran is left to itself."""
        for pid in {*self.daemons().values(), *self.shims()}:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in self.daemons().values()))

    def layers(self) -> list[Path]:
        return [Path(note["folder"]) for note in json.loads((self.state / "images.json").read_text()).values()]


def base_layer(cluster: Cluster) -> Path:
    return next(layer for layer in cluster.layers() if (layer / "usr").is_dir())


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def beside() -> Iterator[Cluster]:
    """A running second cluster that has the base image; gone afterwards, whatever the tests did to it."""
    cluster = Cluster()
    try:
        cluster.up()
        cluster.run(DEV / "images.sh", "base", seconds=1800)
        yield cluster
    finally:
        cluster.down("--purge")


def test_up_on_a_running_cluster_changes_nothing(beside: Cluster) -> None:
    before = beside.daemons()
    assert "cluster runs already" in beside.up()
    assert beside.daemons() == before
    assert len(before) == 8


def test_one_dead_daemon_is_started_again_and_the_pods_stay(beside: Cluster) -> None:
    beside.start_pod("stays", "sleep", "1000")
    beside.run("kubectl", "wait", "pod/stays", "--for=condition=Ready", "--timeout=300s")
    os.kill(beside.daemons()["kubelet"], signal.SIGKILL)
    beside.up()
    what = "jsonpath={.status.phase} {.status.containerStatuses[0].restartCount}"
    assert beside.run("kubectl", "get", "pod", "stays", "-o", what) == "Running 0"


def test_it_comes_up_again_after_a_hard_kill_of_everything(beside: Cluster) -> None:
    beside.kill_hard()
    assert beside.mounts(), "the kill should have left mounts, or this shows nothing"
    assert beside.processes(), "the kill should have left the processes of pods"
    # The kernel gave a daemon's number to somebody else in the meantime.
    with subprocess.Popen(["sleep", "1000"]) as innocent:
        (beside.state / "run/kubelet.pid").write_text(f"{innocent.pid} 12345\n")
        beside.up()
        assert innocent.poll() is None
        innocent.kill()
    beside.runs_a_pod("after-the-kill")


def test_a_layer_that_vanished_is_noticed_and_made_again(beside: Cluster) -> None:
    beside.down()
    shutil.rmtree(base_layer(beside).parent)
    assert "has lost the layer" in beside.up()
    beside.run(DEV / "images.sh", "base")
    beside.runs_a_pod("after-the-layer")


def test_contents_that_vanished_are_noticed_and_made_again(beside: Cluster) -> None:
    beside.down()
    for blob in list((beside.state / "containerd/io.containerd.content.v1.content/blobs/sha256").iterdir())[:3]:
        blob.unlink()
    assert "has lost contents" in beside.up()
    beside.run(DEV / "images.sh", "base")
    beside.runs_a_pod("after-the-contents")


def test_a_layer_that_was_half_deleted_by_a_killed_process_is_noticed(beside: Cluster) -> None:
    base = base_layer(beside)
    beside.kill_hard()
    shutil.rmtree(base / "usr/lib/python3")
    assert "has lost files" in beside.up()
    beside.run(DEV / "images.sh", "base")
    beside.runs_a_pod("after-half-a-layer")


def test_down_leaves_no_process_mount_namespace_interface_route_or_cgroup(beside: Cluster) -> None:
    beside.start_pod("still-running", "sleep", "1000")
    beside.run("kubectl", "wait", "pod/still-running", "--for=condition=Ready", "--timeout=300s")
    beside.down()
    assert beside.processes() == set()
    everywhere = {pid: command_of(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()}
    assert [command for command in everywhere.values() if f"{beside.state}/" in command] == []
    assert beside.mounts() == []
    assert not Path(f"/run/netns/{beside.netns}").exists()
    assert not Path(f"/sys/class/net/v{beside.netns}").exists()
    assert beside.run("ip", "route", "show", "root", f"{beside.net}.0.0/16") == ""
    assert [root for root in [CGROUPS, *CGROUPS.iterdir()] if (root / beside.cgroup).exists()] == []


def test_down_without_a_cluster_is_no_error(beside: Cluster) -> None:
    beside.down()
