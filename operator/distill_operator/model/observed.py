"""What is: raw objects of the API server, read once into frozen values that plan() can decide on."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from pydantic import ValidationError

from distill_api import names
from distill_api.names import Role
from distill_api.protocol import ExitReport, ProgressReport
from distill_api.teacher import TeacherStatus
from distill_operator.runtime.kinds import Kind, kind_of
from distill_operator.runtime.times import parse_time

Raw = Mapping[str, Any]


CRASH_LOOP = "CrashLoopBackOff"
TRAINER_CONTAINER = "trainer"


class Claim(Enum):
    """State of the output volume's claim."""

    ABSENT = "absent"
    PENDING = "pending"
    WAITS_FOR_CONSUMER = "waits for its first consumer"
    BOUND = "bound"


class Outcome(Enum):
    """Of a trainer Job."""

    ACTIVE = "active"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True)
class Child:
    """An object under a name that belongs to the job."""

    kind: Kind
    name: str
    uid: str
    ours: bool
    """Its controller is this very job, by uid: not an earlier job of the same name, not a stranger's object."""
    deleting: bool = False
    spec_hash: str = ""
    fixed_hash: str = ""
    """Empty of one that a release before 0.2.0 made."""
    image: str = ""
    """Of the main container of its pods; of a RayCluster's head."""
    version: str = ""
    """Changes when spec or data do: the generation, where the kind counts one."""
    content: Raw = field(default_factory=dict, compare=False, repr=False)
    """The live object, to be compared with what it should be."""
    attempt: int = 0
    desired: int = 0
    ready: int = 0
    outcome: Outcome = Outcome.ACTIVE
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Pod:
    """One pod of a role, as far as readiness and failure are decided by it."""

    name: str
    uid: str
    role: Role
    head: bool = False
    """The Ray head, which holds no engine."""
    attempt: int = 0
    index: int = 0
    scheduled: bool = False
    ready: bool = False
    deleting: bool = False
    unschedulable: str = ""
    """The scheduler's own words."""
    waiting_reason: str = ""
    waiting_message: str = ""
    restarts: int = 0
    exit_code: int | None = None
    exit_reason: str = ""
    """The runtime's word, such as OOMKilled."""
    exit_message: str = ""
    evicted: bool = False
    """By anybody, for any reason, also for what it did itself."""
    disrupted_at: datetime | None = None
    """When the cluster took it away through no fault of its own: preempted, drained, under pressure."""
    eviction_message: str = ""
    finished_at: datetime | None = None
    ip: str = ""
    running: bool = False


@dataclass(frozen=True)
class Disruption:
    """A pod that the cluster took away through no fault of its own."""

    time: datetime
    message: str


@dataclass(frozen=True)
class ObservedTeacher:
    """A Teacher that the job names."""

    name: str
    deleting: bool = False
    status: TeacherStatus = field(default_factory=TeacherStatus)
    pods: tuple[Pod, ...] = ()


@dataclass(frozen=True)
class Observed:
    """Everything that a plan depends on, besides the job itself."""

    children: tuple[Child, ...] = ()
    pods: tuple[Pod, ...] = ()
    claim: Claim = Claim.ABSENT
    kuberay_installed: bool = True
    gang_problem: str = ""
    """Why no group of pods can be made, where the spec wants one."""
    report: ProgressReport | None = None
    """The newest answer of trainer rank 0, if any."""
    shared: tuple[ObservedTeacher, ...] = ()
    """Those of the Teachers it names that exist."""
    unwatched: bool = False
    """Some of the children's kinds tell of no change by themselves."""
    settled: bool = False
    """An earlier plan found these very children as they should be (Plan.settled): they are not compared again."""

    def child(self, kind: Kind, name: str) -> Child | None:
        return next((c for c in self.children if c.kind is kind and c.name == name), None)

    def observed_teacher(self, name: str) -> ObservedTeacher | None:
        return next((s for s in self.shared if s.name == name), None)

    def trainer_jobs(self) -> list[Child]:
        return [c for c in self.children if c.kind is Kind.JOB and c.ours]

    def pods_of(self, role: Role, attempt: int | None = None) -> list[Pod]:
        """Pods that are to stay, in order of their names."""
        return [p for p in self.pods if p.role is role and not p.deleting and (attempt is None or p.attempt == attempt)]


def read_child(raw: Raw, job_uid: str) -> Child:
    meta = raw["metadata"]
    kind = kind_of(raw)
    desired, ready, outcome, reason, message = _counts(kind, raw)
    owner: Raw = next((o for o in meta.get("ownerReferences", []) if o.get("controller")), {})
    return Child(
        kind=kind,
        name=meta["name"],
        uid=meta.get("uid", ""),
        ours=owner.get("uid") == job_uid,
        deleting="deletionTimestamp" in meta,
        spec_hash=meta.get("annotations", {}).get(names.ANNOTATION_SPEC_HASH, ""),
        fixed_hash=meta.get("annotations", {}).get(names.ANNOTATION_FIXED_HASH, ""),
        image=_image(raw.get("spec", {})),
        version=str(meta.get("generation") or meta.get("resourceVersion", "")),
        content=raw,
        attempt=_number(meta.get("labels", {}).get(names.LABEL_ATTEMPT)),
        desired=desired,
        ready=ready,
        outcome=outcome,
        reason=reason,
        message=message,
    )


def read_pod(raw: Raw) -> Pod | None:
    """None for a pod of no role, which only carries our labels."""
    meta, status = raw["metadata"], raw.get("status", {})
    labels = meta.get("labels", {})
    role = next((r for r in Role if r.value == labels.get(names.LABEL_ROLE)), None)
    if role is None:
        return None
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    # What keeps crashing explains the pod, be it ours, KubeRay's or an injected one.
    loops = next((c for c in containers if c.get("state", {}).get("waiting", {}).get("reason") == CRASH_LOOP), None)
    named = next((c for c in containers if c.get("name") == TRAINER_CONTAINER), None)
    main = loops or named or (containers[-1] if containers else {})
    disrupted = conditions.get("DisruptionTarget", {})
    if disrupted.get("status") != "True":
        disrupted = {}
    ended = main.get("state", {}).get("terminated") or main.get("lastState", {}).get("terminated") or {}
    waiting: Raw = next((w for c in containers if (w := c.get("state", {}).get("waiting"))), {})
    return Pod(
        name=meta["name"],
        uid=meta.get("uid", ""),
        role=role,
        head=labels.get("ray.io/node-type") == "head",
        attempt=_number(labels.get(names.LABEL_ATTEMPT)),
        index=_number(meta.get("annotations", {}).get("batch.kubernetes.io/job-completion-index")),
        scheduled=scheduled.get("status") == "True" or bool(raw.get("spec", {}).get("nodeName")),
        ready=conditions.get("Ready", {}).get("status") == "True",
        deleting="deletionTimestamp" in meta,
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        restarts=max((int(c.get("restartCount", 0)) for c in containers), default=0),
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason", ""),
        exit_message=ended.get("message", ""),
        evicted=status.get("reason") == "Evicted" or bool(disrupted),
        disrupted_at=parse_time(disrupted.get("lastTransitionTime")),
        eviction_message=disrupted.get("message") or status.get("message", ""),
        finished_at=parse_time(ended.get("finishedAt")),
        ip=status.get("podIP", ""),
        running=status.get("phase") == "Running",
    )


def read_claim(claim: Raw | None, storage_class: Raw | None) -> Claim:
    """`storage_class` is None where we may not read it: then the claim gets the benefit of the doubt."""
    if claim is None:
        return Claim.ABSENT
    if claim.get("status", {}).get("phase") == "Bound":
        return Claim.BOUND
    if claim.get("status", {}).get("phase") == "Lost":
        return Claim.PENDING
    if storage_class is None or storage_class.get("volumeBindingMode") == "WaitForFirstConsumer":
        return Claim.WAITS_FOR_CONSUMER
    return Claim.PENDING


def read_pods(raws: Iterable[Raw]) -> tuple[Pod, ...]:
    found = (read_pod(raw) for raw in raws)
    return tuple(sorted((p for p in found if p is not None), key=lambda p: p.name))


def newest_disruption(pods: Iterable[Pod]) -> Disruption | None:
    """Pods that are going away tell of it too."""
    found = [
        Disruption(p.disrupted_at, f"{p.name} was taken away: {p.eviction_message or 'evicted or preempted'}")
        for p in pods
        if p.disrupted_at is not None
    ]
    return max(found, key=lambda d: d.time, default=None)


def exit_report(text: str) -> ExitReport | None:
    """The report in a termination message; None where the process ended without writing one."""
    try:
        return ExitReport.model_validate(json.loads(text))
    except (ValueError, ValidationError):
        return None


EXIT_CODE_IN_JOB_MESSAGE = re.compile(r"failed with exit code (\d+)")


def exit_code_of(job: Child) -> int | None:
    """From the Job's own words, for when its pods are gone."""
    match = EXIT_CODE_IN_JOB_MESSAGE.search(job.message)
    return int(match.group(1)) if match else None


def _image(spec: Raw) -> str:
    template = spec.get("headGroupSpec", spec).get("template", {})
    containers = template.get("spec", {}).get("containers", [])
    return str(containers[0].get("image", "")) if containers else ""


def _counts(kind: Kind, raw: Raw) -> tuple[int, int, Outcome, str, str]:
    spec, status = raw.get("spec", {}), raw.get("status", {})
    if kind is Kind.DEPLOYMENT:
        return spec.get("replicas", 0), status.get("readyReplicas", 0), Outcome.ACTIVE, *_replica_failure(status)
    if kind is Kind.RAY_CLUSTER:
        # RayClusterProvisioned never goes back to False, so the head's own condition counts too.
        head = any(c["type"] == "HeadPodReady" and c["status"] == "True" for c in status.get("conditions", []))
        wanted = sum(group.get("replicas", 0) for group in spec.get("workerGroupSpecs", []))
        ready = status.get("readyWorkerReplicas", 0) if head else 0
        return wanted, ready, Outcome.ACTIVE, *_replica_failure(status)
    if kind is Kind.JOB:
        outcome, reason, message = _job_outcome(status)
        return spec.get("completions", 0), status.get("ready", 0), outcome, reason, message
    return 0, 0, Outcome.ACTIVE, "", ""


def _replica_failure(status: Raw) -> tuple[str, str]:
    """Why no pod could be made, such as a quota: Deployment and RayCluster call the condition the same."""
    conditions = status.get("conditions", [])
    found: Raw = next((c for c in conditions if c["type"] == "ReplicaFailure" and c["status"] == "True"), {})
    return found.get("reason", ""), found.get("message", "")


def _job_outcome(status: Raw) -> tuple[Outcome, str, str]:
    conditions = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    for condition_type, outcome in (
        ("Complete", Outcome.COMPLETE),
        # FailureTarget comes seconds earlier, while the pods that tell why are still there.
        ("Failed", Outcome.FAILED),
        ("FailureTarget", Outcome.FAILED),
    ):
        if found := conditions.get(condition_type):
            return outcome, found.get("reason", ""), found.get("message", "")
    return Outcome.ACTIVE, "", ""


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
