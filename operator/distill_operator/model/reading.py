"""Reading of raw objects of the API server into the frozen values of observed.py."""

import json
import re
from collections.abc import Iterable

from pydantic import ValidationError

from distill_api import names
from distill_api.names import Role
from distill_api.protocol import ExitReport, ProgressReport
from distill_operator.kinds import Kind, kind_of
from distill_operator.model.observed import Child, Claim, Outcome, Pod, Raw
from distill_operator.model.times import format_time, parse_time

CRASH_LOOP = "CrashLoopBackOff"
TRAINER_CONTAINER = "trainer"
# The kubelet's words (pkg/kubelet/eviction): it gives no reason for programs.
_LARGER_CONSUMPTION = re.compile(r"has larger consumption of ([\w-]+)")
_OVER_A_LIMIT = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit")


def read_child(raw: Raw, owner_uid: str) -> Child:
    """Return an object under a name that belongs to the owner of this uid."""
    meta = raw["metadata"]
    kind = kind_of(raw)
    desired, ready, outcome, reason, message = _counts(kind, raw)
    controller: Raw = next((o for o in meta.get("ownerReferences", []) if o.get("controller")), {})
    return Child(
        kind=kind,
        name=meta["name"],
        uid=meta.get("uid", ""),
        ours=controller.get("uid") == owner_uid,
        deleting="deletionTimestamp" in meta,
        spec_hash=meta.get("annotations", {}).get(names.ANNOTATION_SPEC_HASH, ""),
        fixed_hash=meta.get("annotations", {}).get(names.ANNOTATION_FIXED_HASH, ""),
        image=_image(raw.get("spec", {})),
        version=version_of(meta),
        content=raw,
        attempt=_number(meta.get("labels", {}).get(names.LABEL_ATTEMPT)),
        made_at=parse_time(meta.get("creationTimestamp")),
        desired=desired,
        ready=ready,
        outcome=outcome,
        reason=reason,
        message=message,
    )


def version_of(metadata: Raw) -> str:
    """Return what changes when spec or data of an object do: the generation, where its kind counts one; and its uid."""
    return f"{metadata.get('uid', '')}/{metadata.get('generation') or metadata.get('resourceVersion', '')}"


def read_pods(raws: Iterable[Raw]) -> tuple[Pod, ...]:
    """Return the pods of roles, in order of their names."""
    found = (read_pod(raw) for raw in raws)
    return tuple(sorted((p for p in found if p is not None), key=lambda p: p.name))


def read_pod(raw: Raw) -> Pod | None:
    """Return a pod; None for one of no role, which only carries our labels."""
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
    eviction_message = disrupted.get("message") or status.get("message", "")
    outgrew = _outgrown(eviction_message)
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
        due=parse_time(meta.get("deletionTimestamp")),
        ended=status.get("phase") in ("Succeeded", "Failed"),
        node=raw.get("spec", {}).get("nodeName", ""),
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        restarts=max((int(c.get("restartCount", 0)) for c in containers), default=0),
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason", ""),
        exit_message=ended.get("message", ""),
        evicted=status.get("reason") == "Evicted" or bool(disrupted),
        disrupted_at=None if outgrew else parse_time(disrupted.get("lastTransitionTime")),
        eviction_message=eviction_message,
        outgrew=outgrew,
        finished_at=parse_time(ended.get("finishedAt")),
        ip=status.get("podIP", ""),
        running=status.get("phase") == "Running",
    )


def read_claim(claim: Raw | None, storage_class: Raw | None) -> Claim:
    """Return the state of a claim.

    `storage_class` is None where it may not be read: then the claim is taken for one that waits for its consumer.
    """
    if claim is None:
        return Claim.ABSENT
    if "deletionTimestamp" in claim.get("metadata", {}):
        # It stays Bound for as long as a pod uses it, and no new pod may.
        return Claim.DELETING
    if claim.get("status", {}).get("phase") == "Bound":
        return Claim.BOUND
    if claim.get("status", {}).get("phase") == "Lost":
        return Claim.PENDING
    if storage_class is None or storage_class.get("volumeBindingMode") == "WaitForFirstConsumer":
        return Claim.WAITS_FOR_CONSUMER
    return Claim.PENDING


def usable(report: ProgressReport) -> ProgressReport:
    """Return the report with its times as the API server takes them, and without one that it would refuse.

    A trainer's image may be anybody's, and a status with one bad value is refused as a whole.
    """
    progress = report.progress
    changes: dict[str, object] = {}
    if (time := _usable_time(progress.last_step_time)) != progress.last_step_time:
        changes["last_step_time"] = time
    events = [e.model_copy(update={"time": time}) for e in progress.guard_events if (time := _usable_time(e.time))]
    if events != progress.guard_events:
        changes["guard_events"] = events
    return report.model_copy(update={"progress": progress.model_copy(update=changes)}) if changes else report


def _usable_time(text: str | None) -> str | None:
    found = parse_time(text)
    # Years of fewer digits are no dates for the API server, and no trainer's.
    return format_time(found) if found is not None and found.year >= 1970 else None


def exit_report(text: str) -> ExitReport | None:
    """Return the report in a termination message; None where the process ended without writing one."""
    try:
        return ExitReport.model_validate(json.loads(text), extra="ignore")
    except (ValueError, ValidationError):
        return None


def _image(spec: Raw) -> str:
    template = spec.get("headGroupSpec", spec).get("template", {})
    containers = template.get("spec", {}).get("containers", [])
    return str(containers[0].get("image", "")) if containers else ""


def _counts(kind: Kind, raw: Raw) -> tuple[int, int, Outcome, str, str]:
    """Return how many pods are desired and ready, the outcome, and the reason and message of a failure."""
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
    """Return why no pod could be made, such as a quota: Deployment and RayCluster call the condition the same."""
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


def _outgrown(message: str) -> str:
    """Return what the kubelet says that an evicted pod used too much of; empty where it was not for its own use.

    A pod within its requests is evicted from a full node as well, which the kubelet's message tells by its silence.
    """
    if larger := _LARGER_CONSUMPTION.search(message):
        return larger.group(1)
    return "disk" if _OVER_A_LIMIT.search(message) else ""


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
