"""A job and its Teacher side by side, with both reconcilers: who wakes whom, who is told, and when all is quiet."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from operator_fakes import EPOCH, KEY, RESYNC, SETTINGS, Crash, FakeCluster, Json, Simulation, manifest

from distill_api.status import Status
from distill_api.teacher.kind import Autoscaling
from distill_operator.__main__ import fill_registry
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.kinds import Kind
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.errors import ApiError, QuotaExceeded
from distill_operator.runtime.events import EventRecorder
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import Retry
from distill_operator.teacher.autoscaler import Scale, rescaled
from distill_operator.teacher.controller import TeacherController
from distill_operator.teacher.teacher_registry import TeacherRegistry

POET = Key(Kind.TEACHER, "default", "poet")
LEARNER = {"teacher": {"ref": {"name": "poet"}}}
MINUTE = 60.0
KUEUE = replace(SETTINGS, kueue=True)


class Lab(Simulation):
    """As __main__ joins them, on a clock of its own; a key is looked at when it is woken, or when its time has come."""

    def start(self) -> None:
        super().start()
        self.teachers = TeacherRegistry()
        events = EventRecorder(self.cluster, "test/operator", "test", lambda: self.now)
        jobs = self.reconciler.jobs
        self.shared = TeacherController(
            self.cache, self.settings, events, jobs, self.teachers, self.wake, lambda: self.now
        )
        self.due_at: dict[Key, datetime] = {}
        self.down: set[str] = set()
        """Deployments whose pods do not come up."""
        self.looks = 0
        self.collects = True
        """The garbage collector keeps up."""

    def wake(self, key: Key, seconds: float = 0.0) -> None:
        self.due_at[key] = min(
            self.now + timedelta(seconds=seconds), self.due_at.get(key, datetime.max.replace(tzinfo=self.now.tzinfo))
        )

    async def calm(self, seconds: float = 0.0) -> None:
        """Until nothing is to be done before so much time has passed, without a resync."""
        end = self.now + timedelta(seconds=seconds)
        for _ in range(400):
            for kind, raw, gone in self._heard():
                if self.cache.observe(kind, raw, gone=gone):
                    self.wake(OWNERSHIP.owner_of(kind, raw["metadata"]))
            if now := [key for key, at in self.due_at.items() if at <= self.now]:
                for key in now:
                    del self.due_at[key]
                    await self._look(key)
            elif not self.play() and not self.cluster.stream:
                if min(self.due_at.values(), default=end) >= end:
                    self.now = end
                    return
                self.now = min(self.due_at.values())
        raise AssertionError(f"no end: {self.cluster.writes[-20:]}")

    async def begin(self) -> None:
        for key in await self.cache.sync():
            self.wake(key)
        # No reconcile that time alone brings is due at its end.
        await self.calm(13)

    def _heard(self) -> list[tuple[Kind, Json, bool]]:
        heard, self.cluster.stream = self.cluster.stream, []
        return heard

    async def _look(self, key: Key) -> None:
        self.looks += 1
        try:
            again = await (self.reconciler if key.kind is Kind.DISTILLATION_JOB else self.shared).reconcile(key)
        except (Retry, ApiError):
            again = 0.0
        except Crash:
            self.crashes += 1
            self.start()
            for known in await self.cache.sync() | {key}:
                self.wake(known)
            return
        if again is not None:
            self.wake(key, again)
        for teacher in self.reconciler.jobs.teachers_of(key):
            self.wake(teacher, 2.0)

    def play(self, *, collect: bool = True) -> bool:
        hidden = {}
        for name in self.down & set(self.cluster.of(Kind.DEPLOYMENT)):
            self.cluster.status(Kind.DEPLOYMENT, name, {"readyReplicas": 0})
            hidden[Kind.DEPLOYMENT, name] = self.cluster.objects.pop((Kind.DEPLOYMENT, name))
        changed = super().play(collect=collect and self.collects)
        self.cluster.objects |= hidden
        return changed

    def teacher(self, **metadata: Any) -> None:
        spec = {"model": "/models/poet", "accelerator": "none"}
        self.cluster.put(Kind.TEACHER, "poet", {"metadata": {"generation": 1, **metadata}, "spec": spec})

    def said(self, about: str) -> list[tuple[str, str]]:
        """Reasons and messages of the Events on a kind."""
        return [(e["reason"], e["note"]) for e in self.cluster.events.values() if e["regarding"]["kind"] == about]


async def test_a_teachers_status_does_not_wait_for_kueue() -> None:
    sim = Lab(cluster=FakeCluster(workloads=ApiError(500, "failed calling webhook")), settings=KUEUE)
    sim.teacher(uid="first", labels={"kueue.x-k8s.io/queue-name": "research"})
    await sim.cache.sync()
    with pytest.raises(ApiError, match="webhook"):
        await sim.shared.reconcile(POET)
    found = sim.cluster.objects[Kind.TEACHER, "poet"]["status"]["conditions"]
    assert ("Ready", "WaitingForQuota") in [(c["type"], c["reason"]) for c in found]


async def lab(*, teacher: bool = True, cluster: FakeCluster | None = None) -> Lab:
    found = Lab(dict(LEARNER), cluster or FakeCluster())
    if teacher:
        found.teacher(uid="first")
    await found.begin()
    return found


async def test_a_job_that_waits_for_its_teacher_begins_at_the_moment_it_is_made() -> None:
    here = await lab(teacher=False)
    assert here.condition("TeacherReady")[1] == "TeacherNotFound"
    assert not here.cluster.of(Kind.RAY_CLUSTER)
    here.teacher()
    await here.calm()
    assert here.cluster.of(Kind.RAY_CLUSTER), "woken by the Teacher, not by time"
    await here.calm(10)
    assert here.condition("TeacherReady") == ("True", "Ready", "Teacher poet answers")
    assert here.condition("Succeeded")[1] == "Running"


async def test_a_teacher_whose_last_server_goes_is_told_at_its_running_job() -> None:
    here = await lab()
    assert here.condition("Succeeded")[1] == "Running"
    here.down.add("poet-scoring")
    await here.calm(5)
    assert here.condition("TeacherReady") == ("False", "NotReady", "Teacher poet: 0 of 1 servers answer")
    assert ("NotReady", "0 of 1 servers answer") in here.said("Teacher")
    here.down.clear()
    await here.calm(5)
    assert here.condition("TeacherReady")[0] == "True"


async def test_a_teacher_that_is_deleted_under_its_jobs_is_told_on_each_of_them_and_nothing_of_it_is_left() -> None:
    here = await lab()
    here.cluster.remove(Kind.TEACHER, "poet")
    await here.calm(5)
    told = "the Teacher poet does not exist in this namespace; create it, and the job goes on by itself"
    assert here.condition("TeacherReady") == ("False", "TeacherNotFound", told)
    assert ("TeacherNotFound", told) in here.said("DistillationJob")
    assert here.condition("Succeeded")[1] == "Running", "the trainer waits as it does for a teacher of its own"
    assert here.teachers.snapshots() == {} and here.teachers.scalings(POET) == {}
    assert not [name for name in here.cluster.of(Kind.DEPLOYMENT) if "scoring" in name]
    here.teacher()
    await here.calm(5)
    assert here.condition("TeacherReady")[0] == "True"


async def test_a_teacher_made_again_waits_for_what_the_earlier_one_left_and_takes_it_for_no_stranger() -> None:
    here = await lab()
    here.collects = False
    here.cluster.remove(Kind.TEACHER, "poet")
    here.teacher()
    await here.calm(5)
    text = "the ConfigMap poet-scoring of an earlier Teacher of this name is being removed"
    assert here.condition("TeacherReady") == ("False", "NotReady", f"Teacher poet: {text}")
    here.collects = True
    await here.calm(5)
    assert here.condition("TeacherReady")[0] == "True"
    assert "NameTaken" not in [reason for reason, _ in here.said("Teacher")]


async def test_a_crash_after_any_write_ends_in_the_same_teacher_and_job_told_by_the_same_events() -> None:
    async def story(crash_after: int) -> Lab:
        here = await lab(cluster=FakeCluster(crash_after=crash_after))
        here.cluster.remove(Kind.TEACHER, "poet")
        await here.calm(5)
        here.teacher(uid="second")
        await here.calm(15)
        return here

    def told(here: Lab) -> list[tuple[str, str]]:
        return sorted((e["regarding"]["kind"], e["reason"]) for e in here.cluster.events.values())

    usual = await story(-1)
    assert usual.condition("Succeeded")[1] == "Running"
    assert len(usual.cluster.writes) > 25
    for write in range(len(usual.cluster.writes)):
        here = await story(write)
        assert here.crashes == 1
        assert (here.cluster.shape(), told(here)) == (usual.cluster.shape(), told(usual)), usual.cluster.writes[write]
        assert [here.condition(c) for c in ("TeacherReady", "Succeeded")] == [
            usual.condition(c) for c in ("TeacherReady", "Succeeded")
        ]


async def test_events_of_a_teacher_are_about_the_teacher() -> None:
    here = await lab()
    [event] = [e for e in here.cluster.events.values() if e["regarding"]["kind"] == "Teacher"]
    uid = here.cluster.objects[Kind.TEACHER, "poet"]["metadata"]["uid"]
    assert (event["regarding"]["name"], event["regarding"]["uid"]) == ("poet", uid)
    assert (event["reason"], event["note"], event["type"]) == ("Ready", "1 of 1 servers answer", "Normal")


async def test_a_job_and_its_teacher_at_rest_write_nothing_and_do_not_keep_each_other_awake() -> None:
    here = await lab()
    before, here.looks = list(here.cluster.writes), 0
    await here.calm(10 * MINUTE)
    assert here.cluster.writes == before
    # The Teacher is looked at every ten seconds, as its jobs' requests change with no event; the job is not.
    assert here.looks <= 10 * MINUTE / 10 + 2
    for _ in range(3):
        here.pass_time(RESYNC.total_seconds())
        for key in await here.cache.sync() | here.cache.store.owners():
            here.wake(key)
        await here.calm(10)
    assert here.cluster.writes == before


async def test_a_quota_that_forbids_its_deployment_is_named_and_tried_again() -> None:
    class Full(FakeCluster):
        full = True

        async def apply(self, body: Any, *, uid: str = "", dry_run: bool = False) -> Json:
            if self.full and body["metadata"]["name"] == "poet-scoring" and body["kind"] == "Deployment":
                raise QuotaExceeded(403, "deployments.apps is forbidden: exceeded quota: objects")
            return await super().apply(body, uid=uid, dry_run=dry_run)

    cluster = Full()
    here = await lab(cluster=cluster)
    status = cluster.objects[Kind.TEACHER, "poet"]["status"]
    found = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
    assert found == {"Ready": ("False", "QuotaExceeded"), "SpecValid": ("True", "Valid")}
    assert here.condition("TeacherReady")[1] == "QuotaExceeded"
    assert [reason for reason, _ in here.said("Teacher")] == ["QuotaExceeded"]
    cluster.full = False
    await here.calm(MINUTE + 10)
    assert here.condition("Succeeded")[1] == "Running"


async def test_a_spec_that_nobody_can_read_leaves_the_operator_and_what_serves_alone() -> None:
    here = await lab()
    found = here.cluster.objects[Kind.TEACHER, "poet"]
    changed = {**found, "spec": {**found["spec"], "fromTheFuture": 1}}
    here.cluster.put(Kind.TEACHER, "poet", changed)
    await here.calm(10)
    assert here.condition("TeacherReady")[0] == "True"
    assert "InvalidSpec" in [reason for reason, _ in here.said("Teacher")]


# What trainers have for it to do


def told(requests: int, *, phase: str = "Running", trainer: str = "True") -> Status:
    conditions = [("Succeeded", "Unknown", phase), ("TrainerReady", trainer, "Ready")]
    return Status.model_validate(
        {
            "conditions": [
                {"type": t, "status": s, "reason": r, "lastTransitionTime": "2026-01-01T00:00:00Z"}
                for t, s, r in conditions
            ],
            "progress": {"teachers": [{"name": "teacher", "requests": requests}, {"name": "other", "requests": 9}]},
        }
    )


def learners(*statuses: Status) -> JobRegistry:
    jobs = JobRegistry()
    for number, status in enumerate(statuses):
        raw = {**manifest(**LEARNER), "metadata": {"uid": f"u{number}"}}
        jobs.put(Key(Kind.DISTILLATION_JOB, "default", f"job-{number}"), raw, status, EPOCH)
    return jobs


def test_requests_count_of_each_job_of_the_teacher_whose_trainer_is_there() -> None:
    assert learners(told(25), told(3)).requests_of(POET) == [25, 3]
    assert learners(told(25)).requests_of(Key(Kind.TEACHER, "other", "poet")) == []
    assert JobRegistry().requests_of(POET) == []


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (told(10_000, trainer="False"), [0]),
        (told(10_000, phase="Starting", trainer="False"), [0]),
        (told(10_000, phase="Restarting"), []),
        (told(10_000, phase="Completed"), []),
        (told(10_000, phase="Suspended"), []),
    ],
    ids=["its pod is gone", "the next attempt has not come up", "between attempts", "finished", "suspended"],
)
def test_a_trainer_that_dies_with_a_high_backlog_does_not_hold_its_teacher_up(
    status: Status, expected: list[int]
) -> None:
    requests = learners(status).requests_of(POET)
    assert requests == expected
    rule = Autoscaling(min_replicas=1, max_replicas=8, target_requests=10, scale_down_seconds=300)
    scale = rescaled(rule, Scale(8), sum(requests), EPOCH)
    assert rescaled(rule, scale, sum(requests), EPOCH + timedelta(seconds=300)).replicas == 1


async def test_a_new_operator_knows_what_all_jobs_ask_for_before_it_looks_at_a_teacher() -> None:
    cluster = FakeCluster()
    for name, spec in {"mine": LEARNER, "theirs": {**LEARNER, "managedBy": "kueue.x-k8s.io/multikueue"}}.items():
        status = told(25).model_dump(mode="json", by_alias=True, exclude_none=True)
        cluster.put(Kind.DISTILLATION_JOB, name, {"spec": manifest(**spec)["spec"], "status": status})
    cache, jobs = Cache(cluster, OWNERSHIP), JobRegistry()
    await cache.sync()
    fill_registry(cache, jobs, "")
    assert (jobs.requests_of(POET), jobs.of_teacher(POET)) == ([25], [Key(Kind.DISTILLATION_JOB, "default", "mine")])


def test_a_job_that_is_gone_takes_its_requests_along() -> None:
    jobs = learners(told(25), told(3))
    jobs.remove(Key(Kind.DISTILLATION_JOB, "default", "job-0"))
    assert (jobs.requests_of(POET), jobs.of_teacher(POET)) == ([3], [Key(Kind.DISTILLATION_JOB, "default", "job-1")])
    assert KEY not in jobs.of_teacher(POET)
