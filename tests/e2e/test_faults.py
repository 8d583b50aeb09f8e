"""What a job stands on goes: its pods, API server, node, Ray's head, the room on its volume. Nothing is played.

Jobs that come to no step run beside the others' restarts, in which a processor is idle.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import CACHE, CHILDREN, DEV, LABEL_JOB, LABEL_ROLE, SYSTEM, Jobs, run, timed

from run_evidence import steps_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600, func_only=True)]

NODE = "node1"
STEPS = 10_000
"""So many that the job does not end before the last fault; test_job.py shows how one ends."""
SMALL: dict[str, Any] = {"promptsPerStep": 16, "samplesPerPrompt": 2}
"""Quick steps: what is waited for is that some are done."""
ROOM_MIB = 32
LEFT_BYTES = 512 * 1024
"""Lines of the run fit into it, a checkpoint does not."""
BAD = {
    "no-model": "spec.student.model: /models/nowhere is no Hugging Face checkpoint",
    "no-prompts": "/models/nowhere.jsonl: does not exist",
}
"""Jobs whose trainer finds what is wrong, and what it says."""


@contextmanager
def without(daemon: str) -> Iterator[None]:
    """One daemon of the cluster is stopped meanwhile."""
    run(DEV / "cluster" / "daemon.sh", "stop", daemon)
    try:
        yield
    finally:
        run(DEV / "cluster" / "daemon.sh", "start", daemon)


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


class BadInput:
    """The jobs that cannot begin, applied once: the test before theirs does it where a processor is idle."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs, self._applied = jobs, False

    def apply(self) -> None:
        if self._applied:
            return
        self._applied = True
        self._jobs.arithmetic("no-model", student={"model": "/models/nowhere"})
        self._jobs.arithmetic("no-volume", output={"volume": {"claimName": "absent"}})
        # The student has no chat template, which would be said first.
        nowhere = {"path": "/models/nowhere.jsonl", "applyChatTemplate": False}
        self._jobs.arithmetic("no-prompts", data={"prompts": nowhere})

    def wait_until_ended(self) -> None:
        for name in BAD:
            self._jobs.finish(name)


@pytest.fixture(scope="module")
def bad_input(jobs: Jobs) -> BadInput:
    return BadInput(jobs)


def replace_pods(jobs: Jobs, selector: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Kill pods, and wait until those that come instead are ready: by then the killed ones have ended."""
    killed = set(jobs.names("pods", selector))
    assert killed, f"no pod {selector}"
    jobs.kill(selector)
    meanwhile()

    def others() -> bool:
        found = set(jobs.names("pods", selector))
        return bool(found) and not found & killed

    jobs.wait(f"other pods {selector}", others, 240)
    jobs.kubectl("wait", "pod", "-l", selector, "--for=condition=Ready", "--timeout=280s")


def delete_while_its_trainer_starts(jobs: Jobs, name: str = "leaves") -> None:
    """Also a trainer whose container has just been started receives its SIGTERM: else it would live for two minutes."""
    jobs.arithmetic(name, schedule={"steps": 2, "checkpointEverySteps": 2}, evaluation=[])
    jobs.wait("its trainer is being started", lambda: jobs.names("pods", f"{LABEL_JOB}={name},job-name"))
    jobs.delete(name)


def test_a_job_outlives_its_pods_the_api_server_its_node_and_its_ray_head(jobs: Jobs, bad_input: BadInput) -> None:
    """Each of them in turn; none costs an attempt, a step is counted once, and no child is made twice."""
    name = "outlives"
    folder = jobs.output / name
    of_job = f"{LABEL_JOB}={name}"

    def children() -> dict[str, str]:
        return {
            f"{x['kind']}/{x['metadata']['name']}": x["metadata"]["uid"] for x in jobs.of_job(",".join(CHILDREN), name)
        }

    def ready(role: str) -> str:
        return str(jobs.condition(name, f"{role}Ready")["status"])

    def all_ready(seconds: float = 480) -> None:
        jobs.wait("every role is ready", lambda: jobs.condition(name, "Ready").get("status") == "True", seconds)

    with timed("apply to the third step"):
        schedule = {"steps": STEPS, "checkpointEverySteps": 50}
        jobs.arithmetic(name, rollout=SMALL, schedule=schedule, evaluation=[])
        jobs.trains(name)
    before = children()

    with timed("operator killed, until the status goes on"):
        replace_pods(Jobs(SYSTEM, jobs.output), "app.kubernetes.io/name=distillation-operator")
        jobs.trains(name)
    with timed("teacher killed, until steps go on"):
        replace_pods(jobs, f"{of_job},{LABEL_ROLE}=teacher")
        jobs.trains(name)
    with timed("engine killed, until steps go on"):
        # For an engine the trainer waits without an end; for a teacher five minutes, which these might take away.
        replace_pods(jobs, f"{of_job},ray.io/node-type=worker", meanwhile=bad_input.apply)
        jobs.trains(name)
    with timed("until what cannot begin has ended"):
        delete_while_its_trainer_starts(jobs)
        bad_input.wait_until_ended()
    attempt = f"Job/{name}-trainer-1"
    assert children()[attempt] == before[attempt], "none of this may cost an attempt"

    with timed("API server away, and until status goes on"):
        with without("kube-apiserver"):
            done = len(steps_of(folder))
            jobs.wait("steps without an API server", lambda: len(steps_of(folder)) >= done + 3, 240)
        jobs.trains(name)
        all_ready()

    with timed("node lost"), without("kubelet"):
        node_ready = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
        jobs.wait("the node is lost", lambda: jobs.kubectl("get", "node", NODE, "-o", node_ready) == "Unknown", 240)
        jobs.wait("the status says so", lambda: ready("Trainer") == "False", 240)
        assert jobs.condition(name, "Succeeded")["reason"] == "Running", "pods that nobody hears of may be well"
    with timed("node back, until every role is ready and trains"):
        all_ready()
        jobs.trains(name)

    of_head = f"{of_job},ray.io/node-type=head"
    [head] = jobs.names("pods", of_head)
    with timed("Ray head killed, until engines serve again"):
        jobs.kubectl("delete", head, "--grace-period=0", "--force", "--wait=false")
        jobs.wait("the status says so", lambda: ready("Rollout") == "False", 240)
        jobs.wait("another head", lambda: jobs.names("pods", of_head) not in ([], [head]), 240)
        all_ready()
        jobs.trains(name)

    status = jobs.status(name)
    assert (status["attempts"], status["restarts"]) == (1, 0), jobs.picture()
    assert jobs.condition(name, "Succeeded")["reason"] == "Running"
    done = steps_of(folder)
    assert len(done) > 12 and done == list(range(1, len(done) + 1))
    assert all(before.get(child) == uid for child, uid in children().items()), "no child was made again"
    jobs.delete(name)


def test_bad_input_ends_in_a_condition_that_says_what_to_do_and_leaves_no_pod(jobs: Jobs, bad_input: BadInput) -> None:
    bad_input.apply()
    for name, sentence in BAD.items():
        failed = jobs.finish(name)
        assert failed["status"] == "False" and failed["reason"] == "ConfigurationError", jobs.picture()
        assert sentence in failed["message"]
        assert jobs.status(name)["restarts"] == 0
        running = ("-l", f"{LABEL_JOB}={name}", "--field-selector=status.phase=Running", "-o", "name")
        jobs.wait(f"no running pod of {name}", lambda r=running: not jobs.kubectl("get", "pods", *r), 60)
    waiting = jobs.condition("no-volume", "TrainerReady")
    assert waiting["reason"] == "VolumeNotBound" and "absent" in waiting["message"]
    assert not jobs.pods_of("no-volume")
    for name in (*BAD, "no-volume"):
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
    assert steps_of(folder) == list(range(1, 16))
    assert f"resumed from /output/{name}/checkpoints/{kept}" in (folder / "logs" / "rank-0.log").read_text()
    assert [x.name for x in (folder / "checkpoints").glob("step-*")] == ["step-000015"]
    jobs.delete(name)
