"""Never two trainers of a job, whatever is done to it: by their pods' timestamps, their processes, and what they wrote.

Seed 0 does it while the trainer trains, and holds the old one as a slow volume would, until the operator has said that
it waits for it; seed 1 while the trainer still imports. SOAK_SEED repeats one.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from conftest import LABEL_JOB, Jobs
from fault_injection import daemon_pid, frozen, ranks, trainer_processes
from trainer_watch import TrainerWatch

import soak
from distill_cli.cluster import connect
from run_evidence import step_problems, steps_of

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(3600, func_only=True)]

STEPS, STEPS_OF_A_LOST_NODE = 40, 120
"""It takes half a minute until a node counts as lost, in which a trainer goes on."""
SPEC: dict[str, Any] = {
    "rollout": {"promptsPerStep": 8, "samplesPerPrompt": 2},
    "evaluation": [],
    "backoffLimit": 10,
}
NODE = "node1"
WAITS = ("EarlierTrainerRuns", "PodLost")
IMPORT_SECONDS, STEP_SECONDS = 8.0, 3.0
"""The most that a trouble comes after a trainer's process, or after a step."""


def suspended_and_resumed(jobs: Jobs, name: str) -> None:
    """Within a second or so: as soon as the operator has noticed."""
    cluster, began = connect(jobs.namespace, None, None), time.monotonic()
    cluster.patch_job(name, {"spec": {"suspend": True}})
    while jobs.condition(name, "Suspended")["reason"] not in ("Suspending", "Suspended"):
        assert time.monotonic() - began < 60, jobs.picture()
        time.sleep(0.05)
    cluster.patch_job(name, {"spec": {"suspend": False}})
    print(f"\nsuspended for {time.monotonic() - began:.2f} s", end="", flush=True)


def apply(jobs: Jobs, name: str, steps: int = STEPS) -> None:
    jobs.arithmetic(name, schedule={"steps": steps, "checkpointEverySteps": 2, "keepLast": 3}, **SPEC)


def deleted_and_applied(jobs: Jobs, name: str) -> None:
    jobs.kubectl("delete", "djob", name, "--wait=false")
    apply(jobs, name)


def its_trainer_job_deleted(jobs: Jobs, name: str) -> None:
    [job] = jobs.names("jobs", f"{LABEL_JOB}={name}")
    jobs.kubectl("delete", job, "--wait=false")


def its_node_cut_off(jobs: Jobs, name: str) -> None:
    """The kubelet is stopped, so nobody hears of the old trainer, which trains on: it is suspended and resumed then."""
    query = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
    with frozen(daemon_pid("kubelet")):
        jobs.wait("the node is lost", lambda: jobs.kubectl("get", "node", NODE, "-o", query) == "Unknown", 240)
        suspended_and_resumed(jobs, name)
        jobs.wait("the next trainer waits", lambda: jobs.condition(name, "TrainerReady").get("reason") in WAITS, 120)
        folder = jobs.output / name
        # One that still starts looks for services that are gone by now.
        if done := len(steps_of(folder)):
            jobs.wait("the old trainer trains on", lambda: len(steps_of(folder)) >= done + 2, 480)
        assert len(jobs.names("pods", f"{LABEL_JOB}={name},job-name")) == 1, jobs.picture()
    jobs.wait("the node is back", lambda: jobs.kubectl("get", "node", NODE, "-o", query) == "True", 240)


Trouble = Callable[[Jobs, str], None]
TROUBLES: list[tuple[str, Trouble]] = [
    ("resumed", suspended_and_resumed),
    ("applied-again", deleted_and_applied),
    ("job-deleted", its_trainer_job_deleted),
    ("cut-off", its_node_cut_off),
]


@pytest.mark.parametrize(("what", "trouble"), TROUBLES, ids=[what for what, _ in TROUBLES])
def test_a_job_never_has_two_trainers(what: str, trouble: Trouble, jobs: Jobs) -> None:
    steps = STEPS_OF_A_LOST_NODE if trouble is its_node_cut_off else STEPS
    for seed in soak.chosen(range(2)):
        name = f"{what}-{seed}"
        print(f"\n{name}: seed {seed}", end="", flush=True)
        with TrainerWatch(jobs.namespace, name, jobs.output / name) as watch:
            apply(jobs, name, steps)
            moment(jobs, name, seed)
            assert trainer_processes(name), jobs.picture()
            # A kubelet that is stopped ends nobody, so there the old one needs no hold.
            hold = seed % 2 == 0 and trouble is not its_node_cut_off
            with held(jobs, name) if hold else ExitStack():
                trouble(jobs, name)
            finish(jobs, name, watch)
        found = watch.lives()
        print(f"\n{name}: {', '.join(map(str, found))}; latest {' '.join(watch.named)}", end="", flush=True)
        assert len(found) >= 2, "the trouble must have cost the first trainer, or this shows nothing"
        assert [*watch.problems(), *step_problems(steps_of(jobs.output / name), steps)] == [], jobs.picture()
        jobs.delete(name)


def moment(jobs: Jobs, name: str, seed: int) -> None:
    """Wait until the trouble is due: at a time that differs with the seed."""
    rng = random.Random(f"{name}/{seed}")
    if seed % 2:
        jobs.wait("the trainer's first process", lambda: trainer_processes(name), 480)
        delay = rng.uniform(0, IMPORT_SECONDS)
    else:
        target = rng.randint(3, 8)
        jobs.wait(f"step {target}", lambda: len(steps_of(jobs.output / name)) >= target, 600)
        delay = rng.uniform(0, STEP_SECONDS)
    print(f", {delay:.2f} s later", end="", flush=True)
    time.sleep(delay)


@contextmanager
def held(jobs: Jobs, name: str) -> Iterator[None]:
    """Hold the trainer's ranks from before a trouble until the operator says that the next one waits for them."""
    with ExitStack() as stack:
        for rank in ranks(name):
            stack.enter_context(frozen(rank.pid))
        yield
        jobs.wait("the next trainer waits", lambda: jobs.condition(name, "TrainerReady").get("reason") in WAITS, 90)


def finish(jobs: Jobs, name: str, watch: TrainerWatch) -> None:
    """Wait until the job has succeeded, and everything about its trainers is known."""
    done = jobs.finish(name, 1200)
    assert done["status"] == "True", f"{done}\n{jobs.picture()}"
    jobs.wait("the end of every trainer is known", lambda: all(life.finished for life in watch.lives()), 60)
