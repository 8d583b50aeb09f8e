"""Whatever is sent: the API server refuses it, or the operator makes it run, or says in SpecValid what is wrong."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import ApiServer
from generated_manifests import Json, manifests
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from kubernetes.aio import client, config
from operator_world import World
from test_crd import Client

import soak
from distill_api.job import InvalidManifest, parse_job
from distill_api.names import Role
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob import plan as planning
from distill_operator.distillationjob.controller import OURS, JobController, managed_by
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.model import conditions
from distill_operator.model.observed import Claim, Observed, Pod
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.model.status import read_status
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.client import KubernetesCluster
from distill_operator.runtime.effects import Apply, Check
from distill_operator.runtime.events import EventRecorder, now_utc
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import WorkQueue
from distill_operator.settings import Settings

pytest_plugins = ["operator_fixtures"]

GENERATED = 800
"""Here; `make soak` generates 5,000 at least, others in each round."""
RECONCILED = 80
"""Of those that the API server accepts: stored there, and reconciled by the real reconciler and queue."""
SETTINGS = Settings(workers_image="registry.test/workers:1")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Verdicts:
    """How often which of both refused."""

    counts: Counter[str] = field(default_factory=Counter)
    accepted: list[Json] = field(default_factory=list)
    unlike: list[tuple[Json, str]] = field(default_factory=list)


def judged(manifest: Json) -> list[str]:
    """Problems that the models find. Whatever else is raised is a crash of the operator.

    One more is a cluster's alone: `distill run` needs no volume.
    """
    try:
        job = parse_job(manifest)
    except InvalidManifest as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
        return error.problems
    return [] if job.spec.output.volume is not None else ["spec.output.volume is missing"]


def planned(raw: Json) -> None:
    """From nothing to running, as far as plan() and the builders go; what they write must be JSON."""
    job = parse_job(raw)
    observed = Observed(claim=Claim.BOUND)
    begun = planning.plan(job, Status(), observed, SETTINGS, NOW)
    pods = tuple(Pod(name="p", uid="p", role=role, head=head, scheduled=True) for role, head in PODS)
    enough = max(sum(t.replicas for t in job.spec.served_teachers), job.spec.rollout.replicas)
    after = planning.plan(job, begun.status, Observed(pods=pods * enough), SETTINGS, NOW)
    for effect in (*begun.effects, *after.effects):
        if isinstance(effect, Check | Apply):
            json.dumps(effect.body, allow_nan=False)


PODS = ((Role.TEACHER, False), (Role.ROLLOUT, True), (Role.ROLLOUT, False))


def judge_all(server: Client, count: int, chosen: random.Random | None = None) -> Verdicts:
    """`count` manifests: always the same, or those of a random generator."""
    found = Verdicts()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=chosen is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(manifest=manifests())
    def judge(manifest: Json) -> None:
        code, answer = server.create("default", manifest)
        problems = judged(manifest)
        assert code < 500, answer
        found.counts["accepted" if code == 201 else "refused", "valid" if not problems else "invalid"] += 1
        if code == 201:
            found.accepted.append(manifest)
            # As the operator will read it: with the server's defaults.
            stored = {**answer, "metadata": {**answer["metadata"], "uid": "u"}}
            if sentences := judged(stored):
                status = planning.invalid("u", Status(), sentences, 1, NOW).status
                said = conditions.find(status, ConditionType.SPEC_VALID)
                assert said is not None and said.message
            else:
                planned(stored)
        if (code == 201) == bool(problems):
            found.unlike.append((manifest, answer.get("message", "") or str(problems)))

    (judge if chosen is None else hypothesis_seed(chosen.getrandbits(64))(judge))()
    return found


@pytest.fixture(scope="module")
def verdicts(crds_installed: ApiServer) -> Verdicts:
    return judge_all(Client(crds_installed), GENERATED)


@pytest.mark.soak
def test_manifests_of_many_seeds_are_refused_or_planned_and_nobody_disagrees(crds_installed: ApiServer) -> None:
    server, total = Client(crds_installed), 0
    for seed in soak.seeds(0.2, at_least=5):
        found = judge_all(server, 1000, random.Random(seed))
        total += sum(found.counts.values())
        print(f"seed {seed}: {dict(found.counts)}", flush=True)
        assert [text for _, text in found.unlike] == []
    assert total >= 5000


def test_generated_manifests_are_refused_or_planned_or_answered_with_a_sentence(verdicts: Verdicts) -> None:
    print(dict(verdicts.counts), [text[:300] for _, text in verdicts.unlike[:40]])
    assert sum(verdicts.counts.values()) >= GENERATED
    assert len(verdicts.accepted) >= GENERATED / 10, "most were refused for something crude"


def test_the_models_and_the_api_server_agree_on_them(verdicts: Verdicts) -> None:
    assert [text for _, text in verdicts.unlike] == []


@pytest.mark.usefixtures("kuberay")
def test_some_of_them_are_reconciled_and_the_queue_never_stalls(
    verdicts: Verdicts,
    world: World,
    crds_installed: ApiServer,
    operator_kubeconfig: Path,
) -> None:
    world.claim()
    server = Client(crds_installed)
    # A job of another controller is left alone, without a status: other tests show that.
    ours = [m for m in verdicts.accepted if managed_by(m) == OURS]
    sample = random.Random(5).sample(ours, RECONCILED)
    for index, manifest in enumerate(sample):
        named = {**manifest, "metadata": {"name": f"job-{index}"}}
        code, answer = server.create(world.namespace, named, dry_run=False)
        assert code == 201, answer
    statuses, retries = asyncio.run(reconciled(operator_kubeconfig, world.namespace, RECONCILED))
    assert retries == 0
    ends: Counter[str] = Counter()
    for name, status in statuses.items():
        verdict = conditions.find(status, ConditionType.SPEC_VALID)
        assert verdict is not None, name
        ends[conditions.reason_of(status, ConditionType.SUCCEEDED)] += 1
        if verdict.status is not conditions.TRUE:
            assert verdict.reason == Reason.INVALID_SPEC and len(verdict.message) > 10, name
    print(dict(ends))
    assert ends[Reason.STARTING] >= RECONCILED / 2


async def reconciled(kubeconfig: Path, namespace: str, jobs: int) -> tuple[dict[str, Status], int]:
    """The statuses once every job was looked at and nothing is due at once, and how often a look failed."""
    configuration = client.Configuration()
    await config.load_kube_config(config_file=str(kubeconfig), client_configuration=configuration)
    cluster = KubernetesCluster(client.ApiClient(configuration), OWNERSHIP.field_manager)
    cache = Cache(cluster, OWNERSHIP, [namespace])
    events = EventRecorder(cluster, "test/operator", "test", now_utc)
    reconciler = JobController(cache, SETTINGS, events, ProgressPoller(1.0, lambda _: None), JobRegistry(), now_utc)
    queue = WorkQueue(reconciler.reconcile, concurrency=8)
    await cache.sync()
    keys: set[Key] = cache.store.owners()
    assert len(keys) == jobs
    workers = asyncio.create_task(queue.run())
    for key in keys:
        queue.add(key)

    def status(key: Key) -> Status:
        return read_status(cache.owner(key) or {"metadata": {}}, Status)

    async with asyncio.timeout(120):
        quiet = 0
        while quiet < 10:
            await asyncio.sleep(0.1)
            settled = queue.depth == 0 and all(status(key).conditions for key in keys)
            quiet = quiet + 1 if settled else 0
    found = {key.name: status(key) for key in keys}
    queue.stop()
    await workers
    await cluster.close()
    return found, queue.retries
