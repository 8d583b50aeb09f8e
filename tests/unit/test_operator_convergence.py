"""Whatever happens on the way, the end is the same: crashes after every write, lost requests, stale lists, any order.

The reconciler is the real one; the API server and the rest of the cluster are in memory, on a clock of their own.
"""

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_fakes import FakeCluster, Simulation

from distill_operator.kinds import Kind
from distill_operator.runtime.ownership import Key

TEMPORARY = (75, '{"reason": "EnginesLost", "message": "no engine answers", "step": 3}')
DONE = (0, '{"reason": "Completed", "message": "done", "step": 10}')
WRONG = (78, '{"reason": "PreflightFailed", "message": "other tokenizer", "step": 0}')


async def happy(sim: Simulation) -> None:
    await sim.run_until_quiet(seconds=60)
    sim.trainers[1] = DONE
    await sim.run_until_quiet()


async def failing_once(sim: Simulation) -> None:
    sim.trainers |= {1: TEMPORARY, 2: DONE}
    await sim.run_until_quiet()


async def failing_for_good(sim: Simulation) -> None:
    sim.trainers |= {1: TEMPORARY, 2: TEMPORARY, 3: TEMPORARY}
    await sim.run_until_quiet(limit=120)


async def misconfigured(sim: Simulation) -> None:
    sim.trainers[1] = WRONG
    await sim.run_until_quiet()


async def suspended_and_resumed(sim: Simulation) -> None:
    await sim.run_until_quiet(seconds=60)
    sim.edit(suspend=True)
    await sim.run_until_quiet(seconds=60)
    assert not sim.cluster.of(Kind.POD), "a suspended job holds no pod"
    sim.edit(suspend=False)
    sim.trainers[2] = DONE
    await sim.run_until_quiet()


async def scaled(sim: Simulation) -> None:
    await sim.run_until_quiet(seconds=60)
    sim.edit(rollout={"replicas": 3})
    await sim.run_until_quiet(seconds=60)


async def timed_out(sim: Simulation) -> None:
    sim.edit(activeDeadlineSeconds=30)
    await sim.run_until_quiet(seconds=200)


STORIES: dict[str, tuple[Callable[[Simulation], Any], dict[str, Any]]] = {
    "happy": (happy, {}),
    "failing once": (failing_once, {}),
    "failing for good": (failing_for_good, {"backoffLimit": 2}),
    "misconfigured": (misconfigured, {}),
    "suspended and resumed": (suspended_and_resumed, {}),
    "scaled": (scaled, {}),
    "timed out": (timed_out, {}),
}
END = {
    "happy": ("True", "Completed", 1, 0),
    "failing once": ("True", "Completed", 2, 1),
    "failing for good": ("False", "BackoffLimitExceeded", 3, 3),
    "misconfigured": ("False", "PreflightFailed", 1, 0),
    "suspended and resumed": ("True", "Completed", 2, 0),
    "scaled": ("Unknown", "Running", 1, 0),
    "timed out": ("False", "DeadlineExceeded", 1, 0),
}


def play(story: str, **cluster: Any) -> Simulation:
    act, spec = STORIES[story]
    sim = Simulation(spec=spec, cluster=FakeCluster(**cluster))
    asyncio.run(act(sim))
    return sim


def end(sim: Simulation) -> tuple[str, str, int, int]:
    status = sim.job_status
    state, reason, _ = sim.condition("Succeeded")
    return state, reason, status["attempts"], status.get("restarts", 0)


def events(sim: Simulation) -> list[tuple[str, str]]:
    return sorted((e["reason"], e["type"]) for e in sim.cluster.events.values())


@pytest.mark.parametrize("story", STORIES)
def test_each_story_ends_as_it_should(story: str) -> None:
    sim = play(story)
    assert end(sim) == END[story]
    assert len(sim.trainer_uids) == sim.job_status["attempts"], "one trainer Job per attempt"
    if END[story][0] != "Unknown":
        kinds = {kind for kind, _ in sim.cluster.objects}
        assert not kinds & {Kind.DEPLOYMENT, Kind.RAY_CLUSTER}, "accelerators are released"


def kstatus(status: dict[str, Any], generation: int) -> str:
    """What kstatus (Flux, Argo, helm --wait) makes of an object of a kind that it does not know."""
    found = {c["type"]: c["status"] for c in status["conditions"]}
    if status["observedGeneration"] != generation or found.get("Reconciling") == "True":
        return "InProgress"
    if found.get("Stalled") == "True":
        return "Failed"
    return "Current" if found.get("Ready", "True") == "True" else "InProgress"


@pytest.mark.parametrize("story", STORIES)
def test_a_finished_job_says_so_by_the_conditions_of_a_batch_job(story: str) -> None:
    sim = play(story)
    succeeded, reason, _ = sim.condition("Succeeded")
    ends = {c["type"]: (c["status"], c["reason"]) for c in sim.job_status["conditions"]}
    wanted = {"True": "Complete", "False": "Failed"}.get(succeeded)
    assert {name: ends.get(name) for name in ("Complete", "Failed")} == {
        name: ("True", reason) if name == wanted else None for name in ("Complete", "Failed")
    }
    generation = sim.cluster.of(Kind.DISTILLATION_JOB)["job"]["metadata"]["generation"]
    assert (kstatus(sim.job_status, generation) == "Current") == (succeeded != "False")


@pytest.mark.parametrize("story", STORIES)
def test_a_crash_after_any_write_changes_nothing_in_the_end(story: str) -> None:
    whole = play(story)
    writes = len(whole.cluster.writes)
    assert writes > 8
    for count in range(writes):
        sim = play(story, crash_after=count)
        assert sim.crashes == 1, f"no crash after write {count}"
        assert end(sim) == END[story], f"crash after {whole.cluster.writes[count]}"
        assert sim.cluster.shape() == whole.cluster.shape(), f"crash after {whole.cluster.writes[count]}"
        assert len(sim.trainer_uids) == len(whole.trainer_uids), f"crash after {whole.cluster.writes[count]}"
        assert events(sim) == events(whole), f"crash after {whole.cluster.writes[count]}"


@pytest.mark.parametrize("story", STORIES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_lost_requests_and_stale_lists_delay_but_neither_duplicate_nor_destroy(story: str, seed: int) -> None:
    cluster = FakeCluster(fail=random.Random(seed))
    act, spec = STORIES[story]
    sim = Simulation(spec=spec, cluster=cluster, chaos=random.Random(seed + 1))

    async def run() -> None:
        if story == "suspended and resumed":
            # Its steps assume that each one has settled, which a stale list may hide; the end is still the same.
            await asyncio.wait_for(_patient(sim), 60)
        else:
            await act(sim)
        cluster.fail = sim.chaos = None
        await sim.run_until_quiet(limit=200)

    asyncio.run(run())
    # Where the trainer's pods were not seen, the Job's own words still tell that the configuration was wrong.
    state, reason, *counts = end(sim)
    assert (state, reason.replace("ConfigurationError", "PreflightFailed"), *counts) == END[story]
    # A deadline may pass before the news that lets the trainer start.
    missing = sim.job_status["attempts"] - len(sim.trainer_uids)
    assert missing == 0 or (story == "timed out" and missing == 1), "one trainer Job per attempt"


async def _patient(sim: Simulation) -> None:
    await sim.run_until_quiet(seconds=60, limit=200)
    sim.edit(suspend=True)
    while sim.condition("Suspended")[0] != "True" or sim.cluster.of(Kind.POD):
        await sim.run_until_quiet(seconds=30, limit=200)
    sim.edit(suspend=False)
    sim.trainers[2] = DONE
    await sim.run_until_quiet(limit=200)


ACTIONS = ("reconcile", "cluster", "wait", "suspend", "resume", "kill teacher", "kill rollout", "restart operator")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=40), fails=st.integers(0, 3))
def test_any_order_of_events_reaches_the_end_with_one_trainer_per_attempt(actions: list[str], fails: int) -> None:
    sim = Simulation(spec={"backoffLimit": 100})
    sim.trainers |= dict.fromkeys(range(1, fails + 1), TEMPORARY)

    async def run() -> None:
        for action in actions:
            if action == "reconcile":
                await sim.reconcile()
            elif action == "cluster":
                sim.play()
            elif action == "wait":
                sim.now += timedelta(seconds=15)
            elif action in ("suspend", "resume"):
                sim.edit(suspend=action == "suspend")
            elif action == "kill teacher":
                sim.cluster.remove(Kind.DEPLOYMENT, "job-teacher")
            elif action == "kill rollout":
                sim.cluster.remove(Kind.RAY_CLUSTER, "job-rollout")
            else:
                sim.start()
            jobs = [j for j in sim.cluster.of(Kind.JOB).values() if not j.get("status", {}).get("conditions")]
            assert len(jobs) <= 1, "two trainers at once would write the same checkpoints"
        sim.edit(suspend=False)
        await sim.run_until_quiet(limit=200)
        assert sim.condition("Succeeded")[1] == "Running"
        sim.trainers[sim.job_status["attempts"]] = DONE
        await sim.run_until_quiet(limit=200)

    asyncio.run(run())
    assert sim.condition("Succeeded")[:2] == ("True", "Completed")
    assert len(sim.trainer_uids) <= sim.job_status["attempts"]
    assert sim.job_status.get("restarts", 0) <= fails


def test_nothing_is_written_once_the_fixed_point_is_reached() -> None:
    sim = Simulation()

    async def run() -> list[str]:
        await sim.run_until_quiet(seconds=60)
        before = len(sim.cluster.writes)
        for _ in range(20):
            sim.now += timedelta(seconds=30)
            await sim.reconcile()
        return sim.cluster.writes[before:]

    assert asyncio.run(run()) == []


def test_a_refused_child_starts_nothing_until_the_spec_is_mended() -> None:
    sim = Simulation(cluster=FakeCluster(refuse="trainer-1"))

    async def run() -> None:
        await sim.run_until_quiet(seconds=30)
        assert sim.condition("Succeeded")[:2] == ("Unknown", "InvalidSpec")
        assert "job-trainer-1 is wrong" in sim.condition("SpecValid")[2]
        assert not sim.cluster.shape()
        sim.cluster.refuse = ""
        sim.edit(trainer={})
        await sim.run_until_quiet(seconds=60)

    asyncio.run(run())
    assert sim.condition("Succeeded")[1] == "Running"
    assert sim.condition("SpecValid")[0] == "True"


def test_a_stored_spec_that_no_longer_parses_is_reported_and_no_crash() -> None:
    sim = Simulation()
    sim.edit(schedule={"steps": "many"}, unknown=1)
    asyncio.run(sim.run_until_quiet(seconds=30))
    assert sim.condition("Succeeded")[:2] == ("Unknown", "InvalidSpec")
    assert "spec.schedule.steps" in sim.condition("SpecValid")[2]
    assert not sim.cluster.shape()


def test_a_running_job_survives_a_spec_that_no_longer_parses() -> None:
    sim = Simulation()

    async def run() -> dict[str, str]:
        await sim.run_until_quiet(seconds=60)
        before = sim.cluster.shape()
        sim.edit(unknown=1)
        await sim.run_until_quiet(seconds=60)
        return before

    assert asyncio.run(run()) == sim.cluster.shape()
    assert sim.condition("SpecValid")[0] == "False"
    assert sim.condition("Succeeded")[1] == "Running"


def test_a_name_too_long_is_reported_and_starts_nothing() -> None:
    sim = Simulation()
    found = sim.cluster.objects.pop((Kind.DISTILLATION_JOB, "job"))
    sim.key = Key(Kind.DISTILLATION_JOB, "default", "x" * 41)
    sim.cluster.put(Kind.DISTILLATION_JOB, sim.key.name, {**found, "metadata": {**found["metadata"], "name": "x" * 41}})
    asyncio.run(sim.run_until_quiet(seconds=30))
    assert sim.condition("SpecValid")[:2] == ("False", "InvalidSpec")
    assert "metadata.name" in sim.condition("SpecValid")[2] and "40" in sim.condition("SpecValid")[2]
    assert not sim.cluster.shape()


def test_an_object_of_an_earlier_job_of_the_same_name_is_waited_for() -> None:
    sim = Simulation()
    old = {"labels": {}, "ownerReferences": [{"uid": "an-earlier-job", "controller": True}]}
    sim.cluster.put(
        Kind.DEPLOYMENT,
        "job-teacher",
        {"metadata": old, "spec": {"replicas": 0, "template": {"metadata": {"labels": {}}}}},
    )

    async def run() -> None:
        # It has no label of ours, so nothing told of it: the first reconcile finds out, the second says so.
        await sim.reconcile()
        await sim.reconcile()
        assert sim.condition("TeacherReady")[1] == "NameTaken"
        assert not sim.cluster.shape()
        sim.cluster.remove(Kind.DEPLOYMENT, "job-teacher")
        await sim.run_until_quiet(seconds=60)

    asyncio.run(run())
    assert sim.condition("Succeeded")[1] == "Running"


def test_a_job_that_its_ttl_removes_is_forgotten_at_once() -> None:
    sim = Simulation(spec={"ttlSecondsAfterFinished": 5})
    sim.trainers[1] = DONE

    async def run() -> None:
        while (Kind.DISTILLATION_JOB, "job") in sim.cluster.objects:
            await sim.reconcile_if_due()
            sim.play()
            sim.pass_time(1)

    asyncio.run(run())
    assert not sim.reconciler.jobs.snapshots(), "or its series would stay until the next resync"


def test_a_deleted_job_is_left_to_the_garbage_collector() -> None:
    sim = Simulation()

    async def run() -> int:
        await sim.run_until_quiet(seconds=60)
        sim.cluster.remove(Kind.DISTILLATION_JOB, "job")
        before = len(sim.cluster.writes)
        assert await sim.reconcile() is None
        return before

    assert asyncio.run(run()) == len(sim.cluster.writes)
    assert not sim.reconciler.jobs.snapshots()
