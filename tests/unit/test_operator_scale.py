"""What one job costs, so that a thousand are cheap: requests, looks that build nothing, status that can wait, polls.

bench/operator_scale.py measures the same against a real API server.
"""

import asyncio
from collections import Counter
from typing import Any

import pytest
from aiohttp import web
from operator_fakes import KEY, SETTINGS, UID, FakeCluster, Simulation, job

from distill_api.protocol import ProgressReport
from distill_operator.distillationjob import plan
from distill_operator.distillationjob import progress_poller as progress_module
from distill_operator.distillationjob.controller import HELD_PER_SECOND, HOLD, HOLD_STARTING, TELEMETRY_PER_SECOND
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.resources import rendering
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.errors import Refused
from distill_operator.runtime.ownership import Key


def test_a_job_takes_eleven_writes_until_it_runs() -> None:
    sim = Simulation()
    asyncio.run(sim.run_until_quiet(seconds=60))
    assert sim.condition("Succeeded")[1] == "Running"
    found = Counter(write.partition(" ")[0] for write in sim.cluster.writes)
    assert found == {"apply": 7, "create": 1, "event": 1, "status": 2}


def test_children_that_are_as_they_should_be_are_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, built = Simulation(), []
    serving = rendering.serving

    def counted(*arguments: Any) -> Any:
        built.append(arguments)
        return serving(*arguments)

    async def run() -> None:
        await sim.run_until_quiet(seconds=60)
        await sim.reconcile()
        monkeypatch.setattr(plan.rendering, "serving", counted)
        for _ in range(3):
            await sim.reconcile()
        assert not built
        found = sim.cluster.objects[Kind.DEPLOYMENT, "job-teacher"]
        sim.cluster.put(Kind.DEPLOYMENT, "job-teacher", {**found, "spec": {**found["spec"], "replicas": 7}})
        await sim.reconcile()
        assert built, "a child that somebody changed is compared"
        assert sim.cluster.objects[Kind.DEPLOYMENT, "job-teacher"]["spec"]["replicas"] == 1
        await sim.run_until_quiet(seconds=60)
        built.clear()
        sim.cluster.remove(Kind.RAY_CLUSTER, "job-rollout")
        await sim.reconcile()
        assert built and (Kind.RAY_CLUSTER, "job-rollout") in sim.cluster.objects, "so is one that is gone"
        await sim.run_until_quiet(seconds=60)
        built.clear()
        sim.edit(rollout={"replicas": 2})
        await sim.reconcile()
        assert built, "and all of a spec that changed"

    asyncio.run(run())


@pytest.mark.parametrize("jobs", [1, 200])
def test_a_starting_jobs_counts_wait_longer_the_more_jobs_start(jobs: int) -> None:
    sim = Simulation()

    async def run() -> float | None:
        while sim.condition("Succeeded")[1] != "Starting":
            await sim.reconcile()
        await sim.reconcile()
        sim.reconciler._held |= {Key(Kind.DISTILLATION_JOB, "default", f"job-{n}"): sim.now for n in range(jobs - 1)}
        for name in ("job-teacher", "job-rollout"):
            sim.cluster.put(Kind.POD, f"{name}-0", _pod("teacher"))
        sim.cluster.status(Kind.DEPLOYMENT, "job-teacher", {"readyReplicas": 1})
        before = len(sim.cluster.writes)
        again = await sim.reconcile()
        assert len(sim.cluster.writes) == before
        return again

    assert asyncio.run(run()) == max(HOLD_STARTING.total_seconds(), jobs / HELD_PER_SECOND)


@pytest.mark.parametrize(("jobs", "wait"), [(1, HOLD.total_seconds()), (200, 200 / TELEMETRY_PER_SECOND)])
def test_the_progress_of_all_jobs_together_has_a_budget_of_writes(jobs: int, wait: float) -> None:
    sim = Simulation()

    async def run() -> float | None:
        await sim.run_until_quiet(seconds=60)
        sim.reconciler._held |= {Key(Kind.DISTILLATION_JOB, "default", f"job-{n}"): sim.now for n in range(jobs - 1)}
        told(sim, step=3)
        before = len(sim.cluster.writes)
        again = await sim.reconcile()
        assert len(sim.cluster.writes) == before
        sim.pass_time(wait)
        await sim.reconcile()
        assert (sim.cluster.writes[before:], sim.job_status["progress"]["step"]) == (["status"], 3)
        return again

    assert asyncio.run(run()) == wait


def test_requests_to_teachers_alone_are_not_written() -> None:
    sim = Simulation()

    async def run() -> None:
        await sim.run_until_quiet(seconds=60)
        for requests in (0, 7, 9):
            told(sim, step=3, teachers=[{"name": "teacher", "requests": requests}])
            sim.pass_time(5)
            await sim.reconcile()
            sim.pass_time(5)
            await sim.reconcile()

    asyncio.run(run())
    progress = sim.reconciler.jobs.snapshots()[KEY].status.progress
    assert progress is not None and progress.teachers[0].requests == 9, "which the autoscaler reads"
    assert sim.job_status["progress"]["teachers"] == [{"name": "teacher", "requests": 0}]


def told(sim: Simulation, **progress: Any) -> None:
    """What the job's trainer has answered last."""
    pod = sim.cluster.objects[Kind.POD, "job-trainer-1-0"]["metadata"]["uid"]
    report = ProgressReport.model_validate({"phase": "Training", "progress": progress})
    sim.reconciler.progress.follow(KEY, pod, "192.0.2.1")
    sim.reconciler.progress._watched[KEY].report = report


def test_what_is_wrong_with_a_starting_job_does_not_wait_for_others() -> None:
    sim = Simulation()

    async def run() -> float | None:
        while sim.condition("Succeeded")[1] != "Starting":
            await sim.reconcile()
        await sim.reconcile()
        sim.reconciler._held |= {Key(Kind.DISTILLATION_JOB, "default", f"job-{n}"): sim.now for n in range(200)}
        waiting = {"name": "teacher", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
        sim.cluster.put(Kind.POD, "job-teacher-0", {**_pod("teacher"), "status": {"containerStatuses": [waiting]}})
        return await sim.reconcile()

    assert asyncio.run(run()) == HOLD.total_seconds()
    assert [e["reason"] for e in sim.cluster.events.values()] == ["ImagePullFailed"], "its Event comes at once"


def _pod(role: str) -> dict[str, Any]:
    own = {"app.kubernetes.io/managed-by": "distillation-operator", "distillation-operator.io/job": "job"}
    own["distillation-operator.io/owner-uid"] = UID
    return {"metadata": {"labels": {**own, "distillation-operator.io/role": role}, "annotations": {"owner": "x"}}}


@pytest.mark.parametrize("refuse", ["", "mine"])
async def test_the_same_dry_run_is_not_asked_for_twice_at_once(refuse: str) -> None:
    cluster, asked = FakeCluster(), []

    async def slow(body: Any, **_: Any) -> Any:
        asked.append(body["metadata"]["name"])
        await asyncio.sleep(0)
        if body["metadata"]["name"].startswith(refuse or "?"):
            raise Refused(422, "no")
        return dict(body)

    cluster.apply = slow  # type: ignore[method-assign]
    cache = Cache(cluster, OWNERSHIP)
    jobs = [
        of.model_copy(update={"metadata": of.metadata.model_copy(update={"name": name, "uid": f"uid of {name}"})})
        for of, name in ((job(), "mine"), (job(), "another"), (job(), "third"))
    ]
    bodies = [rendering.serving(of, SETTINGS)[0] for of in jobs]
    found = await asyncio.gather(*(cache.check(body) for body in bodies), return_exceptions=True)
    # A refusal is of that object alone: the next asks for itself.
    assert asked == (["mine-teacher", "another-teacher"] if refuse else ["mine-teacher"])
    assert [isinstance(error, Refused) for error in found] == [bool(refuse), False, False]


async def test_a_trainer_is_asked_at_once_and_many_are_asked_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    async def respond(_: web.Request) -> web.Response:
        asked.append(asyncio.get_running_loop().time())
        return web.Response(text='{"phase": "Training", "progress": {"step": 3}}')

    app = web.Application()
    app.router.add_get("/progress", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setattr(progress_module, "TRAINER_PORT", runner.addresses[0][1])
    woken: list[Key] = []
    poller = ProgressPoller(3600.0, woken.append)
    task = asyncio.create_task(poller.run())
    poller.follow(KEY, "pod", "127.0.0.1")
    while not woken:
        await asyncio.sleep(0.01)
    assert len(asked) == 1 and poller.latest(KEY, "pod") is not None, "not after the interval"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    poller = ProgressPoller(0.4, woken.append)
    for n in range(8):
        poller.follow(Key(Kind.DISTILLATION_JOB, "default", f"job-{n}"), "pod", "127.0.0.1")
    task = asyncio.create_task(poller.run())
    asked.clear()
    while len(asked) < 16:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await runner.cleanup()
    assert asked[15] - asked[8] > 0.2, "spread over the interval, after all were asked for the first time"
