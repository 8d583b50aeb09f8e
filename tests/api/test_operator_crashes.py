"""kill -9 of the operator at whatever it has just done, again and again: the end is the same as without.

The exhaustive version, a crash after every single write, runs in memory (tests/unit/test_operator_convergence.py).
Here the process, the API server and the writes are real, and the moments are those that a watcher can catch.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from operator_world import JOBS, Kubelet, Trainer, World

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

    assert kills >= 8
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
    assert found["conditions"]["Ready"] == ("False", "ReleasedAfterFinish")
    # Each turn is announced once, whichever process did it. The first attempt may fail before it was seen running.
    events = found["events"]
    assert 2 <= events.pop("Running") <= 3
    assert events == {"Starting": 3, "Restarting": 1, "EnginesLost": 1, "Suspended": 1, "Completed": 1}
