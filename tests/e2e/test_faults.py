"""What a job stands on goes: API server, node, the head of its Ray, the room on its volume. Nothing is played."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import CACHE, DEV, LABEL_JOB, Jobs, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

NODE = "node1"
CHILDREN = ("deployments", "rayclusters", "jobs", "services", "configmaps", "secrets", "networkpolicies")
STEPS = 10_000
"""So many that the job does not end before the last fault; other tests show how one ends."""
ROOM_MIB = 32
LEFT_BYTES = 512 * 1024
"""Lines of the run fit into it, a checkpoint does not."""


def daemon(action: str, name: str) -> None:
    run(DEV / "cluster" / "daemon.sh", action, name)


def steps_in(run_folder: Path) -> list[int]:
    """Of metrics.jsonl: what the trainer has done, whether or not anybody can say so."""
    file = run_folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [x["step"] for x in map(json.loads, lines) if x["kind"] == "step"]


@contextmanager
def timed(what: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    print(f"\n{what}: {time.monotonic() - begin:.0f} s", end="", flush=True)


def whole(checkpoint: Path) -> bool:
    sizes = json.loads((checkpoint / "files.json").read_text())
    return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())


@pytest.fixture
def small(jobs: Jobs) -> Iterator[Path]:
    """The folder behind a claim `small` of 32 MiB; below the cluster's own, so that down.sh clears it after a kill."""
    folder = CACHE / "cluster" / "small-output"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m,uid=1000,gid=1000,mode=755", "small-output", folder)
    try:
        run(DEV / "cluster" / "volume.sh", jobs.namespace, "small", folder, f"{ROOM_MIB}Mi")
        yield folder
        jobs.kubectl("delete", "persistentvolumeclaim", "small", "--wait")
        jobs.kubectl("delete", "persistentvolume", f"{jobs.namespace}-small", "--wait")
    finally:
        run("umount", folder)
        folder.rmdir()


def test_a_job_outlives_the_api_server_its_node_and_its_ray_head(jobs: Jobs) -> None:
    """Each of them in turn; none costs an attempt, a step is counted once, and no child is made twice."""
    name = "outlives"
    folder = jobs.output / name
    of_job = f"{LABEL_JOB}={name}"
    jobs.arithmetic(name, schedule={"steps": STEPS, "checkpointEverySteps": 50}, evaluation=[])

    def children() -> dict[str, str]:
        kinds = ",".join(CHILDREN)
        found = json.loads(jobs.kubectl("get", kinds, "-l", of_job, "-o", "json"))["items"]
        return {f"{x['kind']}/{x['metadata']['name']}": x["metadata"]["uid"] for x in found}

    def trains(seconds: float = 480) -> None:
        target = jobs.step(name) + 3
        jobs.wait(f"step {target} in the status", lambda: jobs.step(name) >= target, seconds)

    def ready(role: str) -> str:
        return str(jobs.condition(name, f"{role}Ready")["status"])

    def all_ready(seconds: float = 480) -> None:
        jobs.wait("every role is ready", lambda: jobs.condition(name, "Ready").get("status") == "True", seconds)

    with timed("apply to the third step"):
        trains()
    before = children()

    with timed("API server away, and until status goes on"):
        daemon("stop", "kube-apiserver")
        done = len(steps_in(folder))
        jobs.wait("steps without an API server", lambda: len(steps_in(folder)) >= done + 3, 240)
        daemon("start", "kube-apiserver")
        trains()
        all_ready()

    with timed("node lost"):
        daemon("stop", "kubelet")
        node_ready = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
        jobs.wait("the node is lost", lambda: jobs.kubectl("get", "node", NODE, "-o", node_ready) == "Unknown", 240)
        jobs.wait("the status says so", lambda: ready("Trainer") == "False", 240)
        assert jobs.condition(name, "Succeeded")["reason"] == "Running", "pods that nobody hears of may be well"
    with timed("node back, until every role is ready and trains"):
        daemon("start", "kubelet")
        all_ready()
        trains()

    of_head = f"{of_job},ray.io/node-type=head"
    [head] = jobs.names("pods", of_head)
    with timed("Ray head killed, until engines serve again"):
        jobs.kubectl("delete", head, "--grace-period=0", "--force", "--wait=false")
        jobs.wait("the status says so", lambda: ready("Rollout") == "False", 240)
        jobs.wait("another head", lambda: jobs.names("pods", of_head) not in ([], [head]), 240)
        all_ready()
        trains()

    status = jobs.status(name)
    assert (status["attempts"], status["restarts"]) == (1, 0), jobs.picture()
    assert jobs.condition(name, "Succeeded")["reason"] == "Running"
    done = steps_in(folder)
    assert len(done) > 12 and done == list(range(1, len(done) + 1))
    assert all(before.get(child) == uid for child, uid in children().items()), "no child was made again"
    jobs.delete(name)


@pytest.mark.soak
def test_a_full_output_volume_is_named_and_with_room_again_the_job_goes_on(jobs: Jobs, small: Path) -> None:
    name = "fills"
    folder, ballast = small / name, small / "ballast"
    changes: dict[str, Any] = {"schedule": {"steps": 15, "checkpointEverySteps": 5, "keepLast": 1}, "evaluation": []}
    jobs.arithmetic(name, output={"volume": {"claimName": "small"}}, **changes)
    latest = folder / "checkpoints" / "latest"
    with timed("apply to a checkpoint"):
        jobs.wait("a first checkpoint", latest.exists, 480)
    ballast.write_bytes(bytes(shutil.disk_usage(small).free - LEFT_BYTES))

    with timed("volume full, until the attempt has ended"):
        jobs.wait("the attempt ends", lambda: jobs.status(name).get("restarts") == 1, 240)
    trainer, summary = jobs.condition(name, "TrainerReady"), jobs.condition(name, "Succeeded")
    assert (trainer["status"], trainer["reason"]) == ("False", "VolumeFull"), jobs.picture()
    assert (summary["status"], summary["reason"]) == ("Unknown", "Restarting")
    # What found no room first, a checkpoint or a line beside it, is chance.
    for words in (
        "attempt 1 failed (1 of 3 allowed): the output volume is full: ",
        "No space left on device",
        "remove what nobody needs under /output (0 of 32 MiB are free), or enlarge the volume",
    ):
        assert words in summary["message"]
    events = json.loads(jobs.kubectl("get", "events", "-o", "json"))["items"]
    assert [e["type"] for e in events if e["reason"] == "VolumeFull"] == ["Warning"]
    kept = latest.read_text()
    assert whole(folder / "checkpoints" / kept), "the last checkpoint is as it was"

    ballast.unlink()
    with timed("room again, until the job has succeeded"):
        assert jobs.finish(name)["status"] == "True", jobs.picture()
    status = jobs.status(name)
    assert (status["attempts"], status["restarts"], status["progress"]["step"]) == (2, 1, 15)
    assert steps_in(folder) == list(range(1, 16))
    assert f"resumed from /output/{name}/checkpoints/{kept}" in (folder / "logs" / "rank-0.log").read_text()
    assert [x.name for x in (folder / "checkpoints").glob("step-*")] == ["step-000015"]
    jobs.delete(name)
