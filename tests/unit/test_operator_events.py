"""Whatever the watches tell, and in whichever order: one fixed point, and the right one.

Each case is a job with a spec, a fate of each attempt, and things that people and clusters do to it at any moment,
drawn from one number. Meanwhile watch events come late, twice, in another order or never, requests fail before or
after they took effect, and the operator is killed. Then calm returns, and what is left is judged by what the job says.
"""

import asyncio
import copy
import functools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from operator_fakes import FATES, SETTINGS, UID, FakeCluster, Simulation, manifest

import soak
from distill_api.job import DistillationJob, parse_job
from distill_api.spec.schedule import StallPolicy
from distill_operator.distillationjob import controller, plan
from distill_operator.kinds import Kind, kind_of
from distill_operator.model.reading import read_child
from distill_operator.resources import rendering
from distill_operator.resources.drift import has_drifted

CASES, BLOCKS = 500, 2
"""Lives of a job here, and in how many tests; `make soak` lives 2,000 at least."""
TEMPORARY = (75, '{"reason": "EnginesLost", "message": "no engine answers", "step": 3}')
DONE = (0, '{"reason": "Completed", "message": "done", "step": 10}')
WRONG = (78, '{"reason": "PreflightFailed", "message": "other tokenizer", "step": 0}')
KILLED = (137, "")
OUTCOMES = (None, DONE, DONE, TEMPORARY, TEMPORARY, KILLED, WRONG)
ACTIONS = (
    "suspend", "resume", "replicas", "teacher removed", "engines removed", "teacher changed", "service removed",
    "trainer pods gone", "trainer removed", "operator killed", "job deleted", "job replaced", "kuberay removed",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def memoised() -> Iterator[None]:
    """parse_job() and the builders are pure, and most of a case's time."""
    jobs: dict[str, DistillationJob] = {}

    def parse(raw: Any) -> DistillationJob:
        meta = {key: value for key, value in raw["metadata"].items() if key != "resourceVersion"}
        text = json.dumps([meta, raw["spec"]])
        if text not in jobs:
            jobs[text] = parse_job(raw)
        return jobs[text]

    def remembered(build: Any) -> Any:
        known: dict[Any, Any] = {}

        @functools.wraps(build)
        def wrapped(job: Any, settings: Any, *rest: Any) -> Any:
            if (id(job), repr(rest)) not in known:
                # With the job itself, or another would get its id.
                known[id(job), repr(rest)] = job, build(job, settings, *rest)
            return copy.copy(known[id(job), repr(rest)][1])

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller, "parse_job", parse)
        for name in ("lasting", "serving", "training"):
            patch.setattr(plan.rendering, name, remembered(getattr(rendering, name)))
        yield


def simulation(rng: random.Random) -> Simulation:
    spec: dict[str, Any] = {"backoffLimit": rng.choice([0, 1, 3]), "rollout": {"replicas": rng.choice([1, 2])}}
    if rng.random() < 0.15:
        spec["activeDeadlineSeconds"] = rng.choice([20, 200, 2000])
    if rng.random() < 0.1:
        spec["ttlSecondsAfterFinished"] = rng.choice([0, 100])
    if rng.random() < 0.1:
        spec["trainer"] = {"nodes": 2}
    spec["stallPolicy"] = rng.choice(["Report", "Report", "Restart"])
    cluster = FakeCluster(fail=random.Random(rng.random()) if rng.random() < 0.5 else None)
    if rng.random() < 0.4:
        cluster.crash_after = rng.randrange(25)
    sim = Simulation(spec=spec, cluster=cluster, claim=rng.random() < 0.9, chaos=random.Random(rng.random()))
    for attempt in range(1, 40):
        if outcome := rng.choice(OUTCOMES):
            sim.trainers[attempt] = outcome
    return sim


def act(sim: Simulation, action: str, rng: random.Random) -> None:
    cluster = sim.cluster
    exists = (Kind.DISTILLATION_JOB, "job") in cluster.objects
    if action == "operator killed":
        sim.start()
    elif action == "kuberay removed":
        cluster.kuberay = not cluster.kuberay
        for name in cluster.of(Kind.RAY_CLUSTER):
            cluster.remove(Kind.RAY_CLUSTER, name)
    elif action == "teacher removed":
        cluster.remove(Kind.DEPLOYMENT, "job-teacher")
    elif action == "engines removed":
        cluster.remove(Kind.RAY_CLUSTER, "job-rollout")
    elif action == "service removed":
        cluster.remove(Kind.SERVICE, "job-teacher")
    elif action == "teacher changed":
        if found := cluster.objects.get((Kind.DEPLOYMENT, "job-teacher")):
            cluster.put(Kind.DEPLOYMENT, "job-teacher", {**found, "spec": {**found["spec"], "replicas": 7}})
    elif action == "trainer removed":
        for name, found in cluster.of(Kind.JOB).items():
            sim.trainers_removed.add(int(found["metadata"]["labels"]["distillation-operator.io/attempt"]))
            cluster.remove(Kind.JOB, name)
    elif action == "trainer pods gone":
        for name, pod in cluster.of(Kind.POD).items():
            if pod["metadata"]["labels"]["distillation-operator.io/role"] == "trainer":
                cluster.remove(Kind.POD, name)
    elif exists and action in ("suspend", "resume"):
        sim.edit(suspend=action == "suspend")
    elif exists and action == "replicas":
        sim.edit(rollout={"replicas": rng.choice([1, 2, 3])})
    elif exists and action == "job deleted" and rng.random() < 0.3:
        cluster.remove(Kind.DISTILLATION_JOB, "job")
    elif exists and action == "job replaced":
        cluster.remove(Kind.DISTILLATION_JOB, "job")
        fresh = manifest(**sim.spec)
        fresh["metadata"]["uid"] = f"{UID[:-4]}{rng.randrange(1000, 9999)}"
        cluster.put(Kind.DISTILLATION_JOB, "job", fresh)


async def live(seed: int) -> Simulation:
    """A stormy life, then calm until nothing changes."""
    rng = random.Random(seed)
    sim = simulation(rng)
    for _ in range(rng.randrange(5, 40)):
        sim.deliver()
        await sim.reconcile_if_due()
        if rng.random() < 0.7:
            sim.play(collect=rng.random() < 0.4)
        if rng.random() < 0.3:
            sim.pass_time(rng.choice([1, 5, 15, 70]))
        if rng.random() < 0.2:
            act(sim, rng.choice(ACTIONS), rng)
    sim.cluster.fail = sim.chaos = None
    sim.cluster.crash_after = -1
    sim.cluster.kuberay = True
    sim.cluster.put(Kind.CLAIM, "out", {"status": {"phase": "Bound"}})
    await sim.run_until_quiet(limit=400, seconds=5000)
    return sim


def judge(sim: Simulation) -> str:
    """How the job ended, once every promise about that end is checked."""
    objects = sim.cluster.objects
    assert all(len(uids) == 1 for uids in sim.trainer_jobs.values()), "one trainer Job per attempt"
    if (Kind.DISTILLATION_JOB, "job") not in objects:
        assert {kind for kind, _ in objects} <= {Kind.CLAIM}, "nothing is left of a job that is gone"
        assert not sim.cache.store.owners() and not sim.reconciler.jobs.snapshots(), "and nothing remembered"
        return "gone"
    status, (state, reason, _) = sim.job_status, sim.condition("Succeeded")
    job = parse_job(objects[Kind.DISTILLATION_JOB, "job"])
    attempts, restarts = status.get("attempts", 0), status.get("restarts", 0)
    code = (sim.trainers.get(attempts) or (None, ""))[0]
    serving = {kind for kind, _ in objects} & {Kind.DEPLOYMENT, Kind.RAY_CLUSTER}
    pods = {p["metadata"]["labels"]["distillation-operator.io/role"] for p in sim.cluster.of(Kind.POD).values()}
    assert restarts <= min(attempts, job.spec.backoff_limit + 1)
    hangs = job.spec.stall_policy is StallPolicy.RESTART
    if "completionTime" in status:
        assert not serving and pods <= {"trainer"}, "accelerators are released"
        expected = {
            "Completed": code == 0,
            "PreflightFailed": code == 78,
            "ConfigurationError": code == 78,
            "BackoffLimitExceeded": (code in (75, 137) or attempts in sim.trainers_removed or (hangs and code is None))
            and restarts == job.spec.backoff_limit + 1,
            "DeadlineExceeded": job.spec.active_deadline_seconds is not None,
        }
        assert expected[reason], (reason, code, restarts)
        assert state == ("True" if reason == "Completed" else "False")
        return reason
    if job.spec.suspend:
        assert (reason, sim.condition("Suspended")[0]) == ("Suspended", "True")
        assert not serving and not pods and not sim.cluster.of(Kind.JOB), "a suspended job holds nothing"
        return reason
    assert (state, reason, code) == ("Unknown", "Running", None)
    wanted = [
        *rendering.lasting(job, SETTINGS),
        *rendering.serving(job, SETTINGS),
        rendering.training(job, SETTINGS, attempts),
    ]
    for body in wanted:
        found = objects[kind_of(body), body["metadata"]["name"]]
        assert not has_drifted(body, read_child(found, job.metadata.uid))
    assert len(sim.cluster.of(Kind.JOB)) == 1
    return reason


async def stays(sim: Simulation) -> None:
    """Nothing is written at a fixed point."""
    before = list(sim.cluster.writes)
    for _ in range(3):
        sim.pass_time(61)
        sim.deliver()
        await sim.reconcile_if_due()
    assert sim.cluster.writes == before


def all_end_well(seeds: Iterable[int]) -> Counter[str]:
    """How the jobs of the lives of the seeds ended. Raises AssertionError with the seed that broke a promise."""
    ends: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for seed in seeds:
        try:
            sim = asyncio.run(live(seed))
            ends[judge(sim)] += 1
            if ends.total() % 8 == 0:
                asyncio.run(stays(sim))
        except Exception as error:
            raise AssertionError(f"case {seed}: {error!r}") from error
        told += sim.told
    print(f"{ends.total()} lives: {dict(ends)}, {dict(told)}")
    assert set(ends) >= {"gone", "Completed", "PreflightFailed", "BackoffLimitExceeded", "Suspended", "Running"}
    assert all(told[fate] > 200 for fate in FATES)
    return ends


@pytest.mark.parametrize("block", range(BLOCKS))
def test_any_life_ends_in_the_right_fixed_point(block: int) -> None:
    all_end_well(range(block * CASES // BLOCKS, (block + 1) * CASES // BLOCKS))


@pytest.mark.soak
def test_thousands_of_lives_end_in_the_right_fixed_point() -> None:
    assert all_end_well(soak.seeds(0.2, at_least=2000)).total() >= 2000
