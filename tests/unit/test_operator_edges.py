"""The operator's edges: metrics, health, events, progress, settings, the status on the wire, what counts as drift."""

import asyncio
import contextlib
import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from operator_fakes import EPOCH, KEY, SETTINGS, UID, FakeCluster, job, manifest, merge
from prometheus_client.exposition import generate_latest

from distill_api.metrics import OPERATOR_METRICS, scraped_name
from distill_api.protocol import ProgressReport
from distill_api.status import Status
from distill_api.teacher.kind import TeacherStatus
from distill_operator.distillationjob import progress_poller as progress_module
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind
from distill_operator.metrics import OperatorMetrics
from distill_operator.model.observed import Claim
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.model.reading import read_child, read_claim, read_pod, usable
from distill_operator.model.status import read_status, status_patch
from distill_operator.resources import rendering
from distill_operator.resources.drift import contains, has_drifted
from distill_operator.runtime.effects import Event
from distill_operator.runtime.events import PER_HOUR, EventRecorder
from distill_operator.runtime.health_server import Hearts, serve
from distill_operator.runtime.kopf_thread import kopf_settings
from distill_operator.runtime.ownership import Key
from distill_operator.settings import InvalidSettings, Settings
from distill_operator.teacher.teacher_registry import TeacherRegistry, TeacherSnapshot
from distill_operator.teacher.view import view
from distill_workers.serving.ports import reserve_port

# Metrics and health

POET = Key(Kind.TEACHER, "lab", "poet")


def metrics_of(jobs: JobRegistry, teachers: TeacherRegistry | None = None) -> OperatorMetrics:
    api = {("list", "200"): 5}
    return OperatorMetrics(
        jobs, teachers or TeacherRegistry(), queue_depth=lambda: 3, queue_retries=lambda: 2, api_requests=api
    )


def served() -> TeacherSnapshot:
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": "Ready",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    fields = {"conditions": [condition], "desiredReplicas": 3, "readyReplicas": 2, "jobs": 4, "requests": 70}
    return TeacherSnapshot("u", TeacherStatus.model_validate(fields), view("poet", None))


def status(reason: str = "Running", restarts: int = 0) -> Status:
    condition = {
        "type": "Succeeded",
        "status": "Unknown",
        "reason": reason,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    return Status.model_validate({"conditions": [condition], "restarts": restarts})


def test_the_operator_exports_exactly_the_metrics_of_the_registry() -> None:
    jobs = JobRegistry()
    jobs.put(KEY, manifest(), status(), EPOCH)
    teachers = TeacherRegistry()
    teachers.put(POET, served())
    exported = metrics_of(jobs, teachers)
    families = {f.name: {k for s in f.samples for k in s.labels if k != "le"} for f in exported.collect()}
    assert families == {m.name: set(m.labels) for m in OPERATOR_METRICS}
    text = generate_latest(exported.registry()).decode()
    for metric in OPERATOR_METRICS:
        assert scraped_name(metric) in text


def test_a_deleted_job_leaves_no_series() -> None:
    jobs = JobRegistry()
    found = metrics_of(jobs)
    jobs.put(KEY, manifest(), status(restarts=2), EPOCH)
    text = generate_latest(found.registry()).decode()
    assert 'distill_job_restarts{name="job",namespace="default"} 2.0' in text
    assert 'distill_jobs{state="Running"} 1.0' in text
    assert 'distill_job_phase{name="job",namespace="default",phase="Running"} 1.0' in text
    jobs.remove(KEY)
    assert "default" not in generate_latest(found.registry()).decode()


def test_a_teacher_is_seen_with_its_servers_jobs_and_scalings_and_a_deleted_one_leaves_no_series() -> None:
    teachers = TeacherRegistry()
    for scaled in (0, 2, -1, 1):
        teachers.put(POET, served(), scaled)
    found = metrics_of(JobRegistry(), teachers)
    text = generate_latest(found.registry()).decode()
    for series, value in {
        'condition{name="poet",namespace="lab",type="Ready"}': 1,
        'servers{name="poet",namespace="lab",state="wanted"}': 3,
        'servers{name="poet",namespace="lab",state="ready"}': 2,
        'jobs{name="poet",namespace="lab"}': 4,
        'requests{name="poet",namespace="lab"}': 70,
        'scalings_total{direction="up",name="poet",namespace="lab"}': 2,
        'scalings_total{direction="down",name="poet",namespace="lab"}': 1,
    }.items():
        assert f"distill_shared_teacher_{series} {float(value)}" in text
    teachers.remove(POET)
    assert "poet" not in generate_latest(found.registry()).decode()


def test_a_job_with_precomputed_scores_asks_no_teacher() -> None:
    """A shared Teacher that does not answer is critical as long as a job needs it."""
    jobs, raw = JobRegistry(), manifest()
    raw["spec"]["teacher"] = {"ref": {"name": "poet"}}
    poet = Key(Kind.TEACHER, KEY.namespace, "poet")
    for how, asked in (("live", True), ("cached", True), ("precomputed", False), (None, True)):
        raw["spec"]["objective"] = {} if how is None else {"teacherLogprobs": how}
        jobs.put(KEY, raw, status(), EPOCH)
        assert (jobs.of_teacher(poet) == [KEY]) is asked and (jobs.teachers_of(KEY) == {poet}) is asked
    jobs.put(KEY, {**raw, "spec": {**raw["spec"], "objective": "live"}}, status(), EPOCH)
    assert jobs.of_teacher(poet) == [KEY], "an invalid spec is read as it came"


def test_durations_are_cumulative() -> None:
    found = metrics_of(JobRegistry())
    for seconds in (0.005, 0.3, 500.0):
        found.durations.observe(seconds)
    text = generate_latest(found.registry()).decode()
    assert 'distill_operator_reconcile_duration_seconds_bucket{le="0.01"} 1.0' in text
    assert 'distill_operator_reconcile_duration_seconds_bucket{le="0.5"} 2.0' in text
    assert 'distill_operator_reconcile_duration_seconds_bucket{le="+Inf"} 3.0' in text


def test_the_seconds_of_a_phase_are_known_once_it_is_over() -> None:
    jobs = JobRegistry()
    found = metrics_of(jobs)
    raw = manifest()
    raw["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    for seconds, reason in ((2, "Pending"), (4, "Pending"), (8, "Starting"), (50, "Running"), (60, "Running")):
        jobs.put(KEY, raw, status(reason), EPOCH + timedelta(seconds=seconds))
    text = generate_latest(found.registry()).decode()
    assert 'distill_job_phase_duration_seconds_sum{phase="Pending"} 8.0' in text
    assert 'distill_job_phase_duration_seconds_sum{phase="Starting"} 42.0' in text
    assert 'distill_job_phase_duration_seconds_bucket{le="30.0",phase="Starting"} 0.0' in text
    assert 'distill_job_phase_duration_seconds_count{phase="Running"} 0.0' in text, "it still runs"


def test_an_operator_that_finds_a_running_job_does_not_guess_since_when_it_runs() -> None:
    jobs = JobRegistry()
    found = metrics_of(jobs)
    for seconds, reason in ((10, "Running"), (20, "Suspended"), (50, "Running")):
        jobs.put(KEY, manifest(), status(reason), EPOCH + timedelta(seconds=seconds))
    text = generate_latest(found.registry()).decode()
    assert 'distill_job_phase_duration_seconds_count{phase="Running"} 0.0' in text
    assert 'distill_job_phase_duration_seconds_sum{phase="Suspended"} 30.0' in text


async def test_the_process_is_healthy_while_each_of_its_parts_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stuck = [0.0], [0.0]
    hearts = Hearts(lambda: now[0])
    watches, lists = hearts.heart("watches"), hearts.heart("lists")
    hearts.measure("reconciles", lambda: stuck[0])
    port = reserve_port()
    settings = replace(SETTINGS, health_port=port, metrics_port=0)
    serving = asyncio.create_task(serve(settings, hearts, metrics_of(JobRegistry()).registry()))
    async with aiohttp.ClientSession() as session:

        async def health() -> tuple[int, str]:
            async with session.get(f"http://127.0.0.1:{port}/healthz") as answer:
                return answer.status, await answer.text()

        while True:
            with contextlib.suppress(aiohttp.ClientError):
                assert await health() == (200, "".join(f"{p}: last success 0 s ago\n" for p in hearts.ages_seconds()))
                break
            await asyncio.sleep(0.01)
        now[0] = 200.0
        lists()
        code, text = await health()
        assert code == 503 and "watches: last success 200 s ago" in text
        watches()
        assert (await health())[0] == 200
        stuck[0] = 200.0
        assert (await health())[0] == 503
    serving.cancel()


# Events


async def test_an_event_that_was_posted_before_a_restart_is_not_posted_again() -> None:
    cluster = FakeCluster()
    for _ in range(3):
        recorder = EventRecorder(cluster, "test/operator", "pod", lambda: EPOCH)
        for _ in range(3):
            await recorder.record(KEY, UID, Event("key", "Running", "it runs", False))
    assert [(e["reason"], e["type"]) for e in cluster.events.values()] == [("Running", "Normal")]


async def test_an_event_that_happens_again_is_counted_once_a_minute_at_most() -> None:
    cluster, now = FakeCluster(), EPOCH
    recorder = EventRecorder(cluster, "test/operator", "pod", lambda: now)
    for seconds in (0, 1, 2, 61, 62, 130):
        now = EPOCH + timedelta(seconds=seconds)
        await recorder.record(KEY, UID, Event("key", "Unschedulable", "no node", True))
    (found,) = cluster.events.values()
    assert found["series"]["count"] == 3


async def test_an_event_that_the_api_server_has_forgotten_is_posted_again() -> None:
    cluster, now = FakeCluster(), EPOCH
    recorder = EventRecorder(cluster, "test/operator", "pod", lambda: now)
    for minutes in (0, 5, 70, 72):
        if minutes == 70:
            cluster.events.clear()
        now = EPOCH + timedelta(minutes=minutes)
        await recorder.record(KEY, UID, Event("key", "Unschedulable", "no node", True))
    (found,) = cluster.events.values()
    assert found["eventTime"].startswith("2026-01-01T01:10")
    assert found["series"]["count"] == 2


async def test_a_job_that_flaps_cannot_flood_the_namespace() -> None:
    cluster = FakeCluster()
    recorder = EventRecorder(cluster, "test/operator", "pod", lambda: EPOCH)
    for n in range(1000):
        await recorder.record(KEY, UID, Event(f"key {n}", "CrashLooping", "x" * 5000, True))
    assert len(cluster.events) == PER_HOUR
    assert all(len(e["note"]) <= 1024 for e in cluster.events.values())


# Progress


@pytest.mark.parametrize("answer", ["{}", "no json", '{"phase": "Training"}', "[" * 300_000])
async def test_a_trainer_that_answers_nonsense_is_no_news(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await ask(answer, monkeypatch) == (None, [])


async def test_an_answer_wakes_the_job_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    report, woken = await ask('{"phase": "Training", "progress": {"step": 3}}', monkeypatch)
    assert report.progress.step == 3
    assert woken == [KEY]


async def test_a_trainer_that_hangs_is_believed_for_a_minute_and_then_has_nothing_for_its_teachers_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = '{"phase": "Training", "progress": {"step": 3, "teachers": [{"name": "teacher", "requests": 900}]}}'
    answer: bytes | None = None
    asked = 0

    async def fetch(_: Any, url: str) -> bytes | None:
        nonlocal asked
        asked += 1
        return answer

    monkeypatch.setattr(progress_module, "_fetch", fetch)
    now, woken, left = 0.0, [], []
    poller = ProgressPoller(0.0, woken.append, clock=lambda: now)
    poller.follow(KEY, "pod-uid", "127.0.0.1")

    async def polled() -> int:
        """Requests that it is taken to have."""
        before, task = asked, asyncio.create_task(poller.run())
        async with asyncio.timeout(30):
            while asked < before + 2:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        report = poller.latest(KEY, "pod-uid")
        assert report and report.progress.step == 3
        return sum(t.requests for t in report.progress.teachers)

    for at, heard in ((0.0, True), (1.0, False), (60.0, False), (61.0, False), (62.0, False), (63.0, True)):
        now, answer = at, said.encode() if heard else None
        left.append(await polled())
    assert left == [900, 900, 900, 0, 0, 900]
    assert woken == [KEY] * 3, "for each change"


async def ask(answer: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Key]]:
    """What two polls of a trainer make of its answer."""

    asked = 0

    async def respond(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(text=answer)

    app = web.Application()
    app.router.add_get("/progress", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    monkeypatch.setattr(progress_module, "TRAINER_PORT", port)
    woken: list[Key] = []
    poller = ProgressPoller(0.01, woken.append)
    poller.follow(KEY, "pod-uid", "127.0.0.1")
    task = asyncio.create_task(poller.run())
    async with asyncio.timeout(30):
        while asked < 3:  # the answers before the last have been read
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await runner.cleanup()
    assert poller.latest(KEY, "another pod") is None
    return poller.latest(KEY, "pod-uid"), woken


# Settings


def test_the_image_of_the_workers_must_be_set() -> None:
    with pytest.raises(InvalidSettings, match="DISTILL_WORKERS_IMAGE"):
        Settings.from_environment({})


def test_settings_are_read_from_the_environment() -> None:
    found = Settings.from_environment(
        {
            "DISTILL_WORKERS_IMAGE": "w:1",
            "DISTILL_WATCH_NAMESPACES": "a, b",
            "DISTILL_WATCH_NAMESPACE_SELECTOR": "team in (x, y)",
            "DISTILL_SCRAPE_NAMESPACES": "monitoring",
            "DISTILL_RESYNC_SECONDS": "30",
            "DISTILL_WORKERS_IMAGE_PULL_POLICY": "Never",
        }
    )
    assert found == Settings(
        workers_image="w:1",
        watch_namespaces=("a", "b"),
        watch_namespace_selector="team in (x, y)",
        scrape_namespaces=("monitoring",),
        resync_seconds=30.0,
        workers_image_pull_policy="Never",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("DISTILL_RESYNC_SECONDS", "soon"), ("DISTILL_HEALTH_PORT", "0"), ("DISTILL_LOG_FORMAT", "xml")],
)
def test_a_wrong_setting_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=f"{name}.*{value}"):
        Settings.from_environment({"DISTILL_WORKERS_IMAGE": "w", name: value})


@pytest.mark.parametrize(
    "value",
    [
        "team",
        "!team",
        "team=",
        "team=x",
        "example.com/team==x",
        "team != x",
        "team in (x, y),!old",
        "team notin (x,y) , tier=1",
        "rank > 3,rank<9",
    ],
)
def test_a_label_selector_is_taken_as_it_is(value: str) -> None:
    found = Settings.from_environment({"DISTILL_WORKERS_IMAGE": "w", "DISTILL_WATCH_NAMESPACE_SELECTOR": value})
    assert found.watch_namespace_selector == value


@pytest.mark.parametrize(
    "value",
    [
        "team in x",
        "team in ()",
        "team=x,",
        ",team",
        "=x",
        "team=x y",
        "team: x",
        "a/b/c=x",
        "-team",
        "team=" + "x" * 64,
        '{"matchLabels": {"team": "x"}}',
    ],
)
def test_what_is_no_label_selector_is_refused_at_the_start(value: str) -> None:
    """The API server would refuse every list of namespaces: none would ever be watched."""
    with pytest.raises(InvalidSettings, match=r"DISTILL_WATCH_NAMESPACE_SELECTOR.*must be a label selector"):
        Settings.from_environment({"DISTILL_WORKERS_IMAGE": "w", "DISTILL_WATCH_NAMESPACE_SELECTOR": value})


# kopf


def test_only_labelled_children_are_watched() -> None:
    selectors = kopf_settings(SETTINGS, OWNERSHIP).watching.label_selectors
    assert len(selectors) == len(OWNERSHIP.watched)
    assert set(selectors.values()) == {"app.kubernetes.io/managed-by=distillation-operator"}


@pytest.mark.parametrize(
    ("kind", "labels", "key"),
    [
        (Kind.POD, {"distillation-operator.io/job": "job"}, KEY),
        (Kind.POD, {"distillation-operator.io/shared-teacher": "job"}, Key(Kind.TEACHER, "default", "job")),
        (
            Kind.DISTILLATION_JOB,
            {"distillation-operator.io/job": "other"},
            KEY._replace(name="thing"),
        ),
        (Kind.TEACHER, {}, Key(Kind.TEACHER, "default", "thing")),
        (Kind.POD, {}, None),
    ],
)
def test_an_object_wakes_what_it_was_made_for_by_label(kind: Kind, labels: dict[str, str], key: Key) -> None:
    assert OWNERSHIP.owner_of(kind, {"namespace": "default", "name": "thing", "labels": labels}) == key


# The status on the wire


def test_a_field_that_vanishes_is_removed_and_what_stays_is_not_sent() -> None:
    raw = manifest() | {"status": {"attempts": 1, "nextAttemptTime": "2026-01-01T00:00:00Z", "restarts": 2}}
    raw["metadata"]["resourceVersion"] = "7"
    after = read_status(raw, Status).model_copy(update={"next_attempt_time": None, "attempts": 2})
    patch = status_patch(raw, after)
    assert patch is not None
    assert patch["metadata"] == {"resourceVersion": "7", "uid": UID}
    changed = {k: v for k, v in patch["status"].items() if k in ("nextAttemptTime", "attempts", "restarts")}
    assert changed == {"nextAttemptTime": None, "attempts": 2}


def test_a_patch_makes_the_status_that_was_meant_and_then_there_is_none() -> None:
    raw: dict[str, Any] = manifest()
    raw["metadata"]["resourceVersion"] = "1"
    meant = status(restarts=1)
    patch = status_patch(raw, meant)
    assert patch is not None
    raw["status"] = {}
    merge(raw["status"], patch["status"])
    assert read_status(raw, Status) == meant
    assert status_patch(raw, meant) is None


def test_a_status_of_another_version_is_read_as_far_as_it_goes() -> None:
    raw = manifest() | {"status": {"attempts": 3, "mood": "good", "roles": "none"}}
    assert read_status(raw, Status).attempts == 3


# Drift


def test_defaults_of_the_api_server_are_no_drift() -> None:
    body = rendering.serving(job(), SETTINGS)[0]
    live = copy.deepcopy(body)
    live["metadata"] |= {"uid": "1"}
    live["spec"]["revisionHistoryLimit"] = 0
    live["spec"]["template"]["spec"]["dnsPolicy"] = "ClusterFirst"
    live["spec"]["template"]["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "0.1", "memory": "1Gi"}}
    live["spec"]["template"]["spec"]["containers"].append({"name": "injected"})
    assert not has_drifted(body, read_child(live, UID))
    live["spec"]["replicas"] = 5
    assert has_drifted(body, read_child(live, UID))


@pytest.mark.parametrize(
    ("live", "wanted", "inside"),
    [
        ({"ingress": [{"ports": [1]}, {}]}, {"ingress": [{"ports": [1]}]}, False),
        ({"ingress": [{"from": [1, 2]}]}, {"ingress": [{"from": [1]}]}, False),
        ({"ingress": [{"from": [{"a": 1, "b": 2}]}]}, {"ingress": [{"from": [{"a": 1}]}]}, True),
        ({"egress": [{"to": [1]}, {"to": [2]}]}, {"egress": [{"to": [1]}]}, False),
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({}, {"a": []}, True),
        ([{"name": "x", "v": 1}, {"name": "y"}], [{"name": "x"}], True),
        ([{"name": "y"}], [{"name": "x"}], False),
        (None, {"a": 1}, False),
    ],
)
def test_what_we_wrote_must_be_there_and_more_may(live: Any, wanted: Any, inside: bool) -> None:
    assert contains(live, wanted) is inside


# Reading


@pytest.mark.parametrize(
    ("claim", "storage_class", "state"),
    [
        (None, None, Claim.ABSENT),
        ({"status": {"phase": "Bound"}}, None, Claim.BOUND),
        ({"metadata": {"deletionTimestamp": "x"}, "status": {"phase": "Bound"}}, None, Claim.DELETING),
        ({"status": {"phase": "Pending"}}, {"volumeBindingMode": "Immediate"}, Claim.PENDING),
        ({"status": {"phase": "Pending"}}, {}, Claim.PENDING),
        ({"status": {"phase": "Lost"}}, None, Claim.PENDING),
        ({"status": {"phase": "Pending"}}, {"volumeBindingMode": "WaitForFirstConsumer"}, Claim.WAITS_FOR_CONSUMER),
        ({"status": {"phase": "Pending"}}, None, Claim.WAITS_FOR_CONSUMER),
    ],
)
def test_a_pending_claim_may_wait_for_its_first_consumer(claim: Any, storage_class: Any, state: Claim) -> None:
    assert read_claim(claim, storage_class) is state


def test_a_ray_cluster_without_a_head_has_no_ready_engine() -> None:
    body = copy.deepcopy(rendering.serving(job(), SETTINGS)[1])
    body["status"] = {"readyWorkerReplicas": 1, "conditions": [{"type": "RayClusterProvisioned", "status": "True"}]}
    assert (read_child(body, UID).desired, read_child(body, UID).ready) == (1, 0)
    body["status"]["conditions"].append({"type": "HeadPodReady", "status": "True"})
    assert read_child(body, UID).ready == 1


@pytest.mark.parametrize("text", ["{}", "metadata: {name: x}", "{metadata: {name: x}, status: {conditions: []}}"])
def test_a_pod_that_has_no_role_yet_is_not_looked_at(text: str) -> None:
    assert read_pod({"metadata": {}, **yaml.safe_load(text)}) is None


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("2026-01-01T00:01:00Z", "2026-01-01T00:01:00Z"),
        ("2026-01-01T02:01:00.5+02:00", "2026-01-01T00:01:00Z"),
        ("2026-W01", "2025-12-29T00:00:00Z"),
        ("yesterday", None),
        ("0001-01-01T00:00:00Z", None),
    ],
)
def test_a_time_that_the_api_server_would_refuse_does_not_reach_the_status(told: str, kept: str | None) -> None:
    event = {"guard": "g", "step": 1, "action": "stop", "message": "m", "time": told}
    progress = {"step": 3, "lastStepTime": told, "guardEvents": [event]}
    found = usable(ProgressReport.model_validate({"phase": "Training", "progress": progress})).progress
    assert (found.step, found.last_step_time) == (3, kept)
    assert [e.time for e in found.guard_events] == ([kept] if kept else [])


def test_every_kind_has_a_place_on_the_api_server() -> None:
    assert Kind.POD.value.path == "/api/v1"
    assert Kind.RAY_CLUSTER.value.path == "/apis/ray.io/v1"
