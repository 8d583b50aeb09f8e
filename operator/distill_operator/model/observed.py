"""What a plan decides on: frozen values of everything that was observed of an owner and its children."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from distill_api.names import Role
from distill_api.protocol import ProgressReport
from distill_api.teacher.kind import TeacherStatus
from distill_operator.kinds import Kind
from distill_operator.model.queueing import Queueing

Raw = Mapping[str, Any]


class Claim(Enum):
    """The state of the output volume's claim."""

    ABSENT = "absent"
    DELETING = "is being deleted"
    PENDING = "pending"
    WAITS_FOR_CONSUMER = "waits for its first consumer"
    BOUND = "bound"


class Outcome(Enum):
    """The outcome of a trainer Job."""

    ACTIVE = "active"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True)
class Child:
    """An object under a name that belongs to the owner."""

    kind: Kind
    name: str
    uid: str
    ours: bool
    """Its controller is this very owner, by uid: not an earlier one of the same name, and it is no foreign object."""
    deleting: bool = False
    spec_hash: str = ""
    fixed_hash: str = ""
    """Hash of all but the scalable fields. Empty of an object that a release before 0.2.0 made."""
    image: str = ""
    """Image of the main container of its pods; of a RayCluster, of its head's."""
    version: str = ""
    """Changes when spec or data do: the generation, where the kind counts one."""
    content: Raw = field(default_factory=dict, compare=False, repr=False)
    """The live object, to be compared with what it should be."""
    attempt: int = 0
    made_at: datetime | None = None
    desired: int = 0
    ready: int = 0
    outcome: Outcome = Outcome.ACTIVE
    reason: str = ""
    message: str = ""

    def belongs_to_earlier(self, owner: Raw) -> bool:
        """Return whether the controller of a foreign object is an earlier object of the owner's kind and name.

        `owner` is an owner reference. The garbage collector takes what has gone with its owner.
        """
        found = self.content.get("metadata", {}).get("ownerReferences", [])
        same = (owner["kind"], owner["name"])
        return any(o.get("controller") and (o.get("kind"), o.get("name")) == same for o in found)


@dataclass(frozen=True)
class Pod:
    """One pod of a role, as far as readiness and failure are decided by it."""

    name: str
    uid: str
    role: Role
    head: bool = False
    """It is the Ray head, which holds no engine."""
    attempt: int = 0
    index: int = 0
    scheduled: bool = False
    ready: bool = False
    deleting: bool = False
    due: datetime | None = None
    """By when a pod that is being deleted should have ended, its grace period included."""
    ended: bool = False
    """It has succeeded or failed: nothing of it runs, and nothing of it will."""
    node: str = ""
    unschedulable: str = ""
    """Why the scheduler finds no node for it; empty where it does not say so."""
    waiting_reason: str = ""
    waiting_message: str = ""
    restarts: int = 0
    exit_code: int | None = None
    exit_reason: str = ""
    """Why the container ended as the runtime calls it, such as OOMKilled."""
    exit_message: str = ""
    evicted: bool = False
    """It was evicted by anybody, for any reason, also for what it did itself."""
    disrupted_at: datetime | None = None
    """When the cluster took it away through no fault of its own: preempted, drained, in the way of others."""
    eviction_message: str = ""
    outgrew: str = ""
    """What it used more of than it may, such as memory, where it was evicted for that."""
    finished_at: datetime | None = None
    ip: str = ""
    running: bool = False


@dataclass(frozen=True)
class Disruption:
    """The cluster took a pod away through no fault of its own."""

    time: datetime
    message: str


@dataclass(frozen=True)
class ObservedTeacher:
    """A Teacher that a job names."""

    name: str
    deleting: bool = False
    status: TeacherStatus = field(default_factory=TeacherStatus)
    pods: tuple[Pod, ...] = ()


@dataclass(frozen=True)
class Observed:
    """Everything that a plan depends on, besides the owner itself."""

    children: tuple[Child, ...] = ()
    pods: tuple[Pod, ...] = ()
    """Those of this very owner (pod_owners.py)."""
    claim: Claim = Claim.ABSENT
    kuberay_installed: bool = True
    gang_problem: str = ""
    """Why no group of pods can be made, where the spec wants one."""
    report: ProgressReport | None = None
    """The newest answer of trainer rank 0, if any."""
    trainer_silent: bool = False
    """Trainer rank 0 has not answered this process for a minute: no report does not mean that none was asked for."""
    teachers: tuple[ObservedTeacher, ...] = ()
    """Those of the Teachers it names that exist."""
    unwatched: bool = False
    """Some of the children's kinds tell of no change by themselves."""
    settled: bool = False
    """An earlier plan found these very children as they should be (Plan.settled): they are not compared again."""
    queueing: Queueing = field(default_factory=Queueing)
    earlier_trainers: tuple[Pod, ...] = ()
    """Trainer pods that are not the owner's own, and may still write into its run folder."""

    def child(self, kind: Kind, name: str) -> Child | None:
        """Return the child of a kind and name, if there is one."""
        return next((c for c in self.children if c.kind is kind and c.name == name), None)

    def teacher(self, name: str) -> ObservedTeacher | None:
        """Return the Teacher of a name, if it exists."""
        return next((t for t in self.teachers if t.name == name), None)

    def trainer_jobs(self) -> list[Child]:
        """Return the trainer Jobs of all attempts."""
        return [c for c in self.children if c.kind is Kind.JOB and c.ours]

    @property
    def active(self) -> int:
        """Number of the owner's pods that exist and have not ended."""
        return sum(not p.ended for p in self.pods)

    def lacks_pods(self, trainer_job: Child) -> bool:
        """Return whether a trainer Job that is under way has fewer pods than it wants."""
        if not trainer_job.ours or trainer_job.deleting or trainer_job.outcome is not Outcome.ACTIVE:
            return False
        pods = [p for p in self.pods if p.role is Role.TRAINER and p.attempt == trainer_job.attempt and not p.ended]
        return len(pods) < trainer_job.desired

    def pods_of(self, role: Role, attempt: int | None = None) -> list[Pod]:
        """Return the pods of a role that are not being deleted, in order of their names."""
        return [p for p in self.pods if p.role is role and not p.deleting and (attempt is None or p.attempt == attempt)]


def newest_disruption(pods: Iterable[Pod]) -> Disruption | None:
    """Return the newest disruption that the pods tell of, those that are being deleted among them."""
    found = [
        Disruption(p.disrupted_at, f"{p.name} was taken away: {p.eviction_message or 'evicted or preempted'}")
        for p in pods
        if p.disrupted_at is not None
    ]
    return max(found, key=lambda d: d.time, default=None)
