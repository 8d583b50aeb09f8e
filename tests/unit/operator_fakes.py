"""An API server in memory, and small builders of what the operator may observe."""

import copy
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from distill_api.job import DistillationJob, parse_job
from distill_api.names import FIELD_MANAGER
from distill_operator.distillationjob.controller import JobController
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind, kind_of
from distill_operator.model.ownership import OWNERSHIP, WITH_KUEUE
from distill_operator.model.times import format_time
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.errors import AlreadyExists, ApiError, Conflict, NotServed, Refused
from distill_operator.runtime.events import EventRecorder
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import Retry
from distill_operator.settings import Settings

Json = dict[str, Any]
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = Settings(workers_image="registry.test/workers:1")
KEY = Key(Kind.DISTILLATION_JOB, "default", "job")
FAR = datetime.max.replace(tzinfo=UTC)
RESYNC = timedelta(seconds=60)
FATES = ("once", "twice", "late", "never")
FATE_WEIGHTS = (5, 1, 2, 1)
UID = "5f0c0a54-0000-4000-8000-000000000001"


def manifest(**spec: Any) -> Json:
    body = {
        "accelerator": "none",
        "student": {"model": "/models/student"},
        "teacher": {"model": "/models/teacher"},
        "data": {"prompts": {"path": "/data/train.jsonl"}},
        "schedule": {"steps": 10},
        "output": {"volume": {"claimName": "out"}},
    }
    return {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": "job", "namespace": "default", "uid": UID, "generation": 1},
        "spec": {**body, **spec},
    }


def job(**spec: Any) -> DistillationJob:
    return parse_job(manifest(**spec))


class Crash(BaseException):
    """The process is gone."""


@dataclass
class FakeCluster:
    """resourceVersions, uids, preconditions, server-side apply without field ownership, watches, failures on demand.

    A stored object is replaced, never changed, so nothing is copied on its way out.
    """

    objects: dict[tuple[Kind, str], Json] = field(default_factory=dict)
    events: dict[str, Json] = field(default_factory=dict)
    kuberay: bool = True
    refuse: str = ""
    """Part of a name whose apply is refused."""
    workloads: ApiError | None = None
    """What every write of a Workload, or of its status, is answered with."""
    writes: list[str] = field(default_factory=list)
    crash_after: int = -1
    """Die after so many writes. Reads never fail by it."""
    fail: random.Random | None = None
    """Every request may fail, before or after it took effect."""
    stream: list[tuple[Kind, Json, bool]] = field(default_factory=list)
    """What the watches have to tell: kind, object, whether it is gone."""
    _versions: Any = field(default_factory=lambda: itertools.count(1))

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        self._maybe_fail()
        return self.objects.get((kind, name))

    async def pages(self, kind: Kind, namespace: str, *, labels: str = "") -> AsyncIterator[tuple[list[Json], int]]:
        found = await self.list(kind, namespace, labels=labels)
        yield found, int(self._version())

    async def list(
        self, kind: Kind, namespace: str, *, labels: str = "", name: str = "", fields: str = ""
    ) -> list[Json]:
        self._maybe_fail()
        if kind is Kind.RAY_CLUSTER and not self.kuberay:
            raise NotServed(404, "no RayCluster")
        if kind is Kind.EVENT:
            # Of those that the test put there; the operator's own are in `events`.
            asked = dict(part.split("=", 1) for part in fields.split(","))
            found = [o for (k, _), o in self.objects.items() if k is kind]
            return [e for e in found if {"regarding.uid": e["regarding"]["uid"], "reason": e["reason"]} == asked]
        wanted = dict(part.split("=", 1) for part in labels.split(",") if part)
        return [
            o
            for (k, n), o in self.objects.items()
            if k is kind
            and name in ("", n)
            and all(o["metadata"].get("labels", {}).get(key) == v for key, v in wanted.items())
        ]

    async def apply(self, body: Mapping[str, Any], *, uid: str = "", dry_run: bool = False) -> Json:
        self._maybe_fail()
        name = body["metadata"]["name"]
        if self.refuse and self.refuse in name:
            raise Refused(422, f"{name} is wrong")
        if self.workloads and kind_of(body) is Kind.WORKLOAD:
            raise self.workloads
        key = (kind_of(body), name)
        if key[0] is Kind.RAY_CLUSTER and not self.kuberay:
            raise ApiError(404, "no RayCluster")
        old = self.objects.get(key)
        if uid != (old["metadata"]["uid"] if old else ""):
            raise Conflict(409, f"{name} is not the one that was meant")
        if dry_run:
            return dict(body)
        if old is not None:
            if (
                old["metadata"].get("ownerReferences", body["metadata"]["ownerReferences"])
                != body["metadata"]["ownerReferences"]
            ):
                raise AssertionError(f"{key} of somebody else was taken over")
            assert key[0] is not Kind.JOB or old["spec"] == body["spec"], "the pods of a Job cannot be changed"
        elif key[0] is Kind.JOB:
            for pod in self.of(Kind.POD).values():
                trainer = pod["metadata"]["labels"].get("distillation-operator.io/role") == "trainer"
                ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
                assert ended or not trainer, "two trainers at once would write the same checkpoints"
        fresh = dict(body)
        meta = old["metadata"] if old else {"uid": f"uid-{next(self._versions)}"}
        fresh["metadata"] = {**meta, **fresh["metadata"]}
        fresh["status"] = (old or {}).get("status", {})
        return self._store(key, fresh, f"apply {body['kind']}/{name}")

    async def create(self, body: Mapping[str, Any]) -> None:
        self._maybe_fail()
        name = body["metadata"]["name"]
        key = (kind_of(body), name)
        if key in self.objects:
            raise AlreadyExists(409, name)
        fresh = copy.deepcopy(dict(body))
        fresh["metadata"] |= {"uid": f"uid-{next(self._versions)}"}
        self._store(key, fresh, f"create {body['kind']}/{name}")

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        self._maybe_fail()
        found = self.objects.get((kind, name))
        if found is not None and found["metadata"]["uid"] == uid:
            self.remove(kind, name)
            self._wrote(f"delete {kind.value.kind}/{name}")

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Json:
        self._maybe_fail()
        if self.workloads and kind is Kind.WORKLOAD:
            raise self.workloads
        found = self.objects.get((kind, name))
        if found is None:
            raise ApiError(404, "gone")
        if patch["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
            raise Conflict(409, "changed")
        fresh = {**found, "metadata": dict(found["metadata"]), "status": copy.deepcopy(found.get("status", {}))}
        merge(fresh["status"], patch["status"])
        return self._store((kind, name), fresh, "status")

    async def create_event(self, body: Mapping[str, Any]) -> None:
        self._maybe_fail()
        name = body["metadata"]["name"]
        if name in self.events:
            raise AlreadyExists(409, name)
        self.events[name] = dict(body)
        self._wrote(f"event {body['reason']}")

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        if name not in self.events:
            raise ApiError(404, name)
        self.events[name] |= patch

    def put(self, kind: Kind, name: str, body: Json) -> None:
        """By somebody else than the operator."""
        meta = {"uid": f"uid-{next(self._versions)}", "name": name, "namespace": "default", **body.get("metadata", {})}
        types = {"kind": kind.value.kind, "apiVersion": kind.value.api_version}
        self.objects[kind, name] = {**body, **types, "metadata": {**meta, "resourceVersion": self._version()}}
        self._tell(kind, self.objects[kind, name], gone=False)

    def status(self, kind: Kind, name: str, status: Json) -> None:
        found = self.objects[kind, name]
        if found.get("status") != status:
            self.put(kind, name, {**found, "status": status})

    def remove(self, kind: Kind, name: str) -> None:
        if found := self.objects.pop((kind, name), None):
            self._version()
            self._tell(kind, found, gone=True)

    def of(self, kind: Kind) -> dict[str, Json]:
        return {name: o for (k, name), o in list(self.objects.items()) if k is kind}

    def shape(self) -> dict[str, str]:
        """What is there, without what differs from run to run."""
        return {
            f"{kind.value.kind}/{name}": o["metadata"]["annotations"]["distillation-operator.io/spec-hash"]
            for (kind, name), o in self.objects.items()
            if o["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == FIELD_MANAGER
            and kind is not Kind.POD
        }

    def _store(self, key: tuple[Kind, str], body: Json, what: str) -> Json:
        body["metadata"]["resourceVersion"] = self._version()
        self.objects[key] = body
        self._tell(key[0], body, gone=False)
        self._wrote(what)
        return body

    def _tell(self, kind: Kind, body: Json, *, gone: bool) -> None:
        label = body["metadata"].get("labels", {}).get(OWNERSHIP.managed_label)
        child = kind in WITH_KUEUE.watched and label == OWNERSHIP.field_manager
        if OWNERSHIP.is_owner(kind) or child:
            self.stream.append((kind, body, gone))

    def _wrote(self, what: str) -> None:
        self.writes.append(what)
        if self.crash_after >= 0 and len(self.writes) > self.crash_after:
            self.crash_after = -1
            raise Crash
        if self.fail and self.fail.random() < 0.1:
            raise ApiError(0, "connection lost after the write")

    def _maybe_fail(self) -> None:
        if self.fail and self.fail.random() < 0.02:
            raise ApiError(500, "etcd is leaderless")

    def _version(self) -> str:
        return str(next(self._versions))


def merge(target: Json, patch: Mapping[str, Any]) -> None:
    """RFC 7386."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)


@dataclass
class Simulation:
    """One job, the operator, and a cluster that does its part, all in memory and on a clock of its own."""

    spec: Json = field(default_factory=dict)
    cluster: FakeCluster = field(default_factory=FakeCluster)
    now: datetime = EPOCH
    trainers: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Exit code and termination message by attempt; an attempt that is not named runs on."""
    trainer_uids: set[str] = field(default_factory=set)
    trainer_jobs: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    """Their uids, by the uid of the DistillationJob and the attempt."""
    trainers_removed: set[int] = field(default_factory=set)
    """Attempts whose trainer Job somebody deleted."""
    key: Key = KEY
    claim: bool = True
    settings: Settings = SETTINGS
    crashes: int = 0
    chaos: random.Random | None = None
    """Watch events come late, twice, in another order, or never."""
    told: Counter[str] = field(default_factory=Counter)
    """Events by what became of them."""

    def __post_init__(self) -> None:
        self.cluster.put(Kind.DISTILLATION_JOB, "job", manifest(**self.spec))
        if self.claim:
            self.cluster.put(Kind.CLAIM, "out", {"status": {"phase": "Bound"}})
        self.start()

    def start(self) -> None:
        """A new process, which remembers nothing."""
        poller = ProgressPoller(1.0, lambda _: None)
        poller.is_silent = lambda key, pod_uid: True  # type: ignore[method-assign]  # its trainers answer nobody
        recorder = EventRecorder(self.cluster, "test/operator", "test", lambda: self.now)
        ownership = WITH_KUEUE if self.settings.kueue else OWNERSHIP
        self.cache = Cache(self.cluster, ownership, clock=lambda: self.now.timestamp())
        self.reconciler = JobController(self.cache, self.settings, recorder, poller, JobRegistry(), lambda: self.now)
        self.next_resync = self.due = self.now
        self.listed = False

    def upgrade(self, **settings: Any) -> None:
        """Another operator takes over, with these settings."""
        self.settings = replace(self.settings, **settings)
        self.start()

    def deliver(self) -> None:
        """What the watches tell until now. News wake the job, and nothing else does."""
        heard, self.cluster.stream = self.cluster.stream, []
        if self.chaos and self.chaos.random() < 0.3:
            self.chaos.shuffle(heard)
        for event in heard:
            fate = self.chaos.choices(FATES, FATE_WEIGHTS)[0] if self.chaos else "once"
            self.told[fate] += 1
            if fate in ("twice", "late"):
                self.cluster.stream.append(event)
            if fate in ("once", "twice"):
                kind, raw, gone = event
                if self.cache.observe(kind, raw, gone=gone):
                    self.due = self.now

    async def reconcile(self) -> float | None:
        """Once; a crash is followed by a new process, an error by another try."""
        try:
            if not self.listed or self.now >= self.next_resync:
                await self.cache.sync()
                self.listed, self.next_resync = True, self.now + RESYNC
            self.deliver()
            return await self.reconciler.reconcile(self.key)
        except Crash:
            self.crashes += 1
            self.start()
            return 0.0
        except (Retry, ApiError):
            return 0.0

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    async def reconcile_if_due(self) -> None:
        """When something told of news, the time has come, or a resync is due."""
        if min(self.due, self.next_resync) <= self.now:
            self.due = FAR
            again = await self.reconcile()
            if again is not None:
                self.due = min(self.due, self.now + timedelta(seconds=again))

    async def run_until_quiet(self, *, limit: int = 60, seconds: float = 400.0) -> None:
        """Until nothing changes any more, time passing where only time is waited for.

        The job is looked at when an event is news, when its time has come, and at each resync.
        """
        quiet = 0
        end = self.now + timedelta(seconds=seconds)
        for _ in range(limit):
            before = (len(self.cluster.writes), self.crashes)
            self.deliver()
            await self.reconcile_if_due()
            changed = self.play()
            if changed or (len(self.cluster.writes), self.crashes) != before or self.due <= self.now:
                quiet = 0
                continue
            quiet += 1
            if quiet > 3 and (self.due == FAR or self.now >= end):
                return
            self.now = min(self.due, self.next_resync)
        if self.now < end and quiet < 3:
            raise AssertionError(f"no fixed point: {self.cluster.writes[-20:]}")

    def play(self, *, collect: bool = True) -> bool:
        """One turn of everybody else: garbage collector (which may be slow), Deployment, KubeRay, Job, kubelet."""
        before = {key: o["metadata"]["resourceVersion"] for key, o in self.cluster.objects.items()}
        c = self.cluster
        if collect:
            self._collect()
        for name, o in c.of(Kind.DEPLOYMENT).items():
            count = o["spec"]["replicas"]
            self._pods(o, name, count, o["spec"]["template"])
            c.status(Kind.DEPLOYMENT, name, {"readyReplicas": count})
        for name, o in c.of(Kind.RAY_CLUSTER).items():
            group = o["spec"]["workerGroupSpecs"][0]
            self._pods(o, f"{name}-head", 1, o["spec"]["headGroupSpec"]["template"], {"ray.io/node-type": "head"})
            self._pods(o, f"{name}-engine", group["replicas"], group["template"], {"ray.io/node-type": "worker"})
            head = {"type": "HeadPodReady", "status": "True"}
            c.status(Kind.RAY_CLUSTER, name, {"readyWorkerReplicas": group["replicas"], "conditions": [head]})
        for name, o in c.of(Kind.JOB).items():
            self._job(name, o)
        return before != {key: o["metadata"]["resourceVersion"] for key, o in c.objects.items()}

    def _collect(self) -> None:
        """What has lost its owner, and then what has lost that."""
        c = self.cluster
        owners = {o["metadata"]["uid"] for o in c.objects.values()}
        for (kind, name), o in list(c.objects.items()):
            if any(r["uid"] not in owners for r in o["metadata"].get("ownerReferences", [])):
                c.remove(kind, name)
        owners = {o["metadata"]["uid"] for o in c.objects.values()}
        for name, pod in c.of(Kind.POD).items():
            if pod["metadata"]["annotations"]["owner"] in owners:
                continue
            if self.chaos and self.chaos.random() < 0.6:
                # It runs on, for its grace period.
                due = format_time(self.now + timedelta(seconds=120))
                meta = {"deletionTimestamp": due, **pod["metadata"]}
                c.put(Kind.POD, name, {**pod, "metadata": meta})
            else:
                c.remove(Kind.POD, name)

    def _job(self, name: str, o: Json) -> None:
        self.trainer_uids.add(o["metadata"]["uid"])
        attempt = int(o["metadata"]["labels"]["distillation-operator.io/attempt"])
        owner = o["metadata"]["ownerReferences"][0]["uid"]
        self.trainer_jobs.setdefault((owner, attempt), set()).add(o["metadata"]["uid"])
        count = o["spec"]["completions"]
        code, message = self.trainers.get(attempt, (None, ""))
        self._pods(o, name, count, o["spec"]["template"])
        if code is None or not o.get("status"):
            self.cluster.status(Kind.JOB, name, {"ready": count, "active": count})
            return
        for index in range(count):
            ended = {"exitCode": code, "message": message, "finishedAt": "2026-01-01T00:00:00Z"}
            state = {"name": "trainer", "state": {"terminated": ended}}
            self.cluster.status(
                Kind.POD, f"{name}-{index}", {"phase": "Failed" if code else "Succeeded", "containerStatuses": [state]}
            )
        kind = "Failed" if code else "Complete"
        words = f"Container trainer for pod default/{name}-0 failed with exit code {code} matching FailJob rule"
        self.cluster.status(Kind.JOB, name, {"conditions": [{"type": kind, "status": "True", "message": words}]})

    def _pods(self, owner: Json, prefix: str, count: int, template: Json, labels: Json | None = None) -> None:
        for index in range(count):
            name = f"{prefix}-{index}"
            if (Kind.POD, name) in self.cluster.objects:
                continue
            annotations = {"owner": owner["metadata"]["uid"], "batch.kubernetes.io/job-completion-index": str(index)}
            meta = {"labels": {**template["metadata"]["labels"], **(labels or {})}, "annotations": annotations}
            ready = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]
            status = {"phase": "Running", "conditions": ready}
            self.cluster.put(Kind.POD, name, {"metadata": meta, "spec": {}, "status": status})

    def edit(self, **spec: Any) -> None:
        """By the user."""
        found = copy.deepcopy(self.cluster.objects[Kind.DISTILLATION_JOB, "job"])
        found["spec"] |= spec
        found["metadata"]["generation"] += 1
        self.cluster.put(Kind.DISTILLATION_JOB, "job", found)

    @property
    def job_status(self) -> Json:
        found: Json = self.cluster.objects[Kind.DISTILLATION_JOB, self.key.name].get("status", {})
        return found

    def condition(self, kind: str) -> tuple[str, str, str]:
        """Status, reason, message."""
        found = next((c for c in self.job_status.get("conditions", []) if c["type"] == kind), None)
        return (found["status"], found["reason"], found["message"]) if found else ("", "", "")
