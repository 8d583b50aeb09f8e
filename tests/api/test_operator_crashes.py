"""The operator dies at whatever it has just done, again and again: the end is the same as without.

Exhaustively: in every story, after every single write, so that each process does one thing and is followed by one that
knows nothing. The reconciler and the API server are real, the clock is the test's. And with kill -9 of the real
process, at the moments that a watcher can catch.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client, config
from operator_world import JOBS, Json, Kubelet, Trainer, World

from distill_operator.distillationjob.controller import JobController
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.client import KubernetesCluster
from distill_operator.runtime.events import EventRecorder
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import Retry
from distill_operator.settings import Settings

pytest_plugins = ["operator_fixtures"]
pytestmark = pytest.mark.usefixtures("kuberay")

MOST_KILLS = 25


def picture(world: World) -> Any:
    """Whatever the operator may have changed; what the kubelet changes is left out."""
    children = {key: child["metadata"]["annotations"] for key, child in world.children().items()}
    return children, world.job().get("status")


def outcome(world: World) -> Any:
    """What is left, and what was said."""
    status = world.job()["status"]
    events = world.api.items(world.path("/apis/events.k8s.io/v1/namespaces/{ns}/events"))
    return {
        "children": sorted(world.children()),
        "conditions": {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]},
        "attempts": status["attempts"],
        "restarts": status["restarts"],
        "events": Counter(e["reason"] for e in events),
    }


def through_kills(world: World, reached: Callable[[], bool], rng: random.Random) -> int:
    """Starts the operator and kills it at each change that is seen, until the goal is reached."""
    for kills in range(MOST_KILLS):
        operator = world.operator()
        before = picture(world)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not reached() and picture(world) == before:
            time.sleep(0.01)
        if reached():
            operator.kill()
            return kills
        assert picture(world) != before, f"nothing happens\n{operator.log()}"
        time.sleep(rng.choice([0.0, 0.02, 0.1]))
        operator.kill()
    raise AssertionError(f"not reached with {MOST_KILLS} kills: {world.job()['status']}")


def reason(world: World, wanted: str) -> Callable[[], bool]:
    return lambda: bool(world.condition("Succeeded")["reason"] == wanted)


def running(world: World, attempt: int) -> Callable[[], bool]:
    return lambda: reason(world, "Running")() and world.job()["status"]["attempts"] == attempt


def released(world: World) -> Callable[[], bool]:
    held = {"Deployment", "RayCluster"}
    return lambda: reason(world, "Completed")() and not held & {kind for kind, _ in world.children()}


LOST = Trainer(exit_code=75, message='{"reason": "EnginesLost", "message": "lost", "step": 1}')
WRONG = Trainer(exit_code=78, message='{"reason": "PreflightFailed", "message": "other tokenizer", "step": 0}')
Step = tuple[Callable[[World, Kubelet], Any], Callable[[World], Any]]
"""What somebody does, and what must come of it."""


def nothing(world: World, kubelet: Kubelet) -> None:
    pass


def spec(**changes: Any) -> Callable[[World, Kubelet], Any]:
    return lambda world, _: world.api.merge(world.path(JOBS, "job"), {"spec": changes})


def trainer(attempt: int, does: Trainer) -> Callable[[World, Kubelet], Any]:
    return lambda _, kubelet: kubelet.trainers.update({attempt: does})


def says(kind: str, wanted: str) -> Callable[[World], Any]:
    return lambda world: world.condition(kind)["reason"] == wanted


def runs(attempt: int) -> Callable[[World], Any]:
    return lambda world: running(world, attempt)()


def ended(wanted: str) -> Callable[[World], Any]:
    """With every accelerator released."""
    held = {"Deployment", "RayCluster"}
    return lambda world: says("Succeeded", wanted)(world) and not held & {kind for kind, _ in world.children()}


def bare(world: World) -> bool:
    return says("Succeeded", "Suspended")(world) and not world.pods()


STORIES: dict[str, tuple[Json, Sequence[Step]]] = {
    "fails, is suspended, resumed, and completes": (
        {},
        [
            (trainer(1, LOST), says("Succeeded", "Restarting")),
            (nothing, runs(2)),
            (spec(suspend=True), bare),
            (spec(suspend=False), runs(3)),
            (trainer(3, Trainer(exit_code=0)), ended("Completed")),
        ],
    ),
    "fails for good": ({"backoffLimit": 0}, [(trainer(1, LOST), ended("BackoffLimitExceeded"))]),
    "is configured wrongly": ({}, [(trainer(1, WRONG), ended("PreflightFailed"))]),
    "runs out of time": ({"activeDeadlineSeconds": 30}, [(nothing, runs(1)), (nothing, ended("DeadlineExceeded"))]),
    "gets a second engine": (
        {},
        [
            (nothing, runs(1)),
            (
                spec(rollout={"replicas": 2}),
                lambda world: "2 of 2" in world.condition("RolloutReady")["message"],
            ),
        ],
    ),
    "completes and is removed": (
        {"ttlSecondsAfterFinished": 5},
        [(trainer(1, Trainer(exit_code=0)), lambda world: not world.api.items(world.path(JOBS)))],
    ),
    "waits for its volume": (
        {"output": {"volume": {"claimName": "late"}}},
        [
            (nothing, says("TrainerReady", "VolumeNotBound")),
            (lambda world, _: world.claim("late"), runs(1)),
        ],
    ),
    "is invalid": ({"trustRemoteCode": True}, [(nothing, says("Succeeded", "InvalidSpec"))]),
}


class Killed(BaseException):
    """The process is gone."""


class Mortal:
    """The cluster of a process that may die of each of its writes."""

    WRITES = ("apply", "delete", "patch_status", "create_event", "patch_event")

    def __init__(self, cluster: KubernetesCluster, *, deadly: bool) -> None:
        self.cluster, self.deadly = cluster, deadly
        self.writes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.cluster, name)
        if name not in self.WRITES:
            return found

        async def write(*arguments: Any, dry_run: bool = False, **more: Any) -> Any:
            made = await found(*arguments, **more, **({"dry_run": True} if dry_run else {}))
            if not dry_run:
                self.writes.append(f"{name} {json.dumps(arguments, default=str)[:120]}")
                if self.deadly:
                    raise Killed
            return made

        return write


class Life:
    """One operator after the other, on a clock of its own."""

    def __init__(self, world: World, kubelet: Kubelet, cluster: Mortal) -> None:
        self.world, self.kubelet, self.cluster = world, kubelet, cluster
        self.now = datetime.now(UTC)
        self.kills = 0
        self.begin()

    def begin(self) -> None:
        self.cache = Cache(self.cluster, OWNERSHIP, [self.world.namespace])  # type: ignore[arg-type]
        events = EventRecorder(self.cluster, "test/operator", "test", lambda: self.now)  # type: ignore[arg-type]
        poller = ProgressPoller(1.0, lambda _: None)
        settings = Settings(workers_image="registry.test/workers:1")
        self.reconciler = JobController(self.cache, settings, events, poller, JobRegistry(), lambda: self.now)

    async def turn(self) -> None:
        """One look of the operator, one of everybody else; time passes when neither did anything."""
        before = len(self.cluster.writes)
        again: float | None = 0.0
        try:
            await self.cache.sync()
            again = await self.reconciler.reconcile(Key(Kind.DISTILLATION_JOB, self.world.namespace, "job"))
        except Killed:
            self.kills += 1
            self.begin()
        except Retry:
            pass
        self.kubelet.once()
        if again and len(self.cluster.writes) == before:
            self.now += timedelta(seconds=again)


async def tell(world: World, kubeconfig: Path, story: str, *, deadly: bool) -> tuple[Any, list[str], int]:
    """What is left in the end, every write on the way, and how often the operator died."""
    configuration = client.Configuration()
    await config.load_kube_config(config_file=str(kubeconfig), client_configuration=configuration)
    cluster = KubernetesCluster(client.ApiClient(configuration), OWNERSHIP.field_manager)
    kubelet = Kubelet(world, run=False)
    wanted, steps = STORIES[story]
    world.claim()
    world.submit(**wanted)
    life = Life(world, kubelet, Mortal(cluster, deadly=deadly))
    for act, reached in steps:
        act(world, kubelet)
        for _ in range(150):
            await life.turn()
            if reached(world):
                break
        else:
            raise AssertionError(f"not reached: {life.cluster.writes[-10:]}")
    # What was held back is written, and then nothing more.
    for _ in range(4):
        await life.turn()
    writes = list(life.cluster.writes)
    for _ in range(3):
        await life.turn()
    assert life.cluster.writes == writes, "nothing is written at the end"
    await cluster.close()
    left = outcome(world) if world.api.items(world.path(JOBS)) else {"children": sorted(world.children())}
    jobs = Counter(name for name, _ in kubelet.seen_trainer_jobs)
    assert set(jobs.values()) <= {1}, "one trainer Job per attempt"
    return {**left, "trainer jobs": jobs}, writes, life.kills


@pytest.mark.parametrize("story", STORIES)
def test_an_operator_that_dies_of_every_single_write_reaches_the_same_end(
    story: str, world: World, crds_installed: Any, operator_kubeconfig: Path, tmp_path: Path
) -> None:
    whole, writes, _ = asyncio.run(tell(world, operator_kubeconfig, story, deadly=False))
    other = f"{world.namespace}-mortal"
    crds_installed.kubectl("create", "namespace", other)
    mortal = World(world.api, other, operator_kubeconfig, tmp_path)
    found, died, kills = asyncio.run(tell(mortal, operator_kubeconfig, story, deadly=True))
    assert found == whole
    assert kills == len(died) >= min(len(writes), 8)


def test_killing_the_operator_at_what_it_has_just_done_changes_nothing(world: World, kubelet: Kubelet) -> None:
    """The job fails once, is suspended and resumed, and completes."""
    rng = random.Random(7)
    world.claim()
    kubelet.trainers = {1: Trainer(exit_code=75, message='{"reason": "EnginesLost", "message": "lost", "step": 1}')}
    world.submit()

    kills = through_kills(world, reason(world, "Restarting"), rng)
    kills += through_kills(world, running(world, attempt=2), rng)
    world.api.merge(world.path(JOBS, "job"), {"spec": {"suspend": True}})
    kills += through_kills(world, lambda: reason(world, "Suspended")() and not world.pods(), rng)
    world.api.merge(world.path(JOBS, "job"), {"spec": {"suspend": False}})
    kills += through_kills(world, running(world, attempt=3), rng)
    kubelet.trainers[3] = Trainer(exit_code=0)
    kills += through_kills(world, released(world), rng)

    assert kills >= 5
    found = outcome(world)
    assert (found["attempts"], found["restarts"]) == (3, 1)
    assert sorted(name for name, _ in kubelet.seen_trainer_jobs) == [f"job-trainer-{n}" for n in (1, 2, 3)]
    assert found["children"] == [
        ("ConfigMap", "job-job"),
        ("Job", "job-trainer-3"),
        ("NetworkPolicy", "job-traffic"),
        ("Service", "job-teacher"),
        ("Service", "job-trainer"),
    ]
    assert found["conditions"]["Succeeded"] == ("True", "Completed")
    assert found["conditions"]["Complete"] == ("True", "Completed")
    assert found["conditions"]["Ready"] == ("True", "Completed")
    assert found["conditions"]["TrainerReady"] == ("False", "ReleasedAfterFinish")
    # Each turn is announced once, whichever process did it. The first attempt may fail before it was seen running.
    events = found["events"]
    assert 2 <= events.pop("Running") <= 3
    assert events == {"Restarting": 1, "EnginesLost": 1, "Suspended": 1, "Completed": 1}
