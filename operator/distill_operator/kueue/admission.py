"""Admission: what an owner's Workload means for its pods, and what is to be done about it. Pure.

An owner that names a queue has no pod without an admission. Evicted, or no longer what was admitted, it lets all its
pods go; only then its reservation ends, so that no two owners use one quota.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from distill_api.status import ConditionType, Reason
from distill_operator.kinds import Kind, kind_of
from distill_operator.kueue import demand, workload
from distill_operator.model.conditions import FALSE, TRUE, ConditionValue
from distill_operator.model.observed import Child, Raw
from distill_operator.model.queueing import Queueing
from distill_operator.resources.pod_template import Json
from distill_operator.runtime.effects import Apply, Delete, Effect, PatchStatus
from distill_operator.runtime.errors import ApiError, QuotaExceeded, Refused

NOT_YET = "Kueue has not considered it yet"


@dataclass(frozen=True)
class Hold:
    """Why an owner may have no pod."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Request:
    """An owner's Workload as it is, and what decides about it."""

    queueing: Queueing
    live: Child | None
    """The object under the Workload's name."""
    wanted: Callable[[], Json]
    """Renders the Workload as it should be."""
    generation: int
    running: bool = False
    """Pods were made by an admission that is not withdrawn: what cannot be read now does not end them."""
    capped: bool = False
    """It makes do with the number of pods that was admitted, where it wants more."""
    unqueued: bool = False
    """Its pods were made before it had a queue: it keeps them, and is queued for the next."""


def is_queued(request: Request) -> bool:
    """Return whether Kueue decides: also of an owner whose label was removed, for as long as it holds quota."""
    live = request.live
    if live is not None and live.ours and _is_reserved(live.content):
        return True
    return bool(request.queueing.queue) and not request.unqueued


def hold(request: Request) -> Hold | None:
    """Return why the owner may have no pod; None where it may."""
    queueing, live = request.queueing, request.live
    if not is_queued(request):
        return None
    if queueing.obstacle is not None:
        if not request.running:
            return Hold(queueing.obstacle.reason, queueing.obstacle.message)
        if live is None:
            return None
    queue = queueing.queue or str(live.content["spec"].get("queueName", "")) if live else queueing.queue
    if live is None:
        return Hold(Reason.WAITING_FOR_QUOTA, f"waits for quota in queue {queue}: {NOT_YET}")
    if not live.ours:
        what = f"the Workload {live.name} exists and belongs to something else"
        return Hold(Reason.NAME_TAKEN, f"{what}; delete it if it does not go by itself")
    if live.deleting or workload.is_true(live.content, "Finished"):
        return Hold(Reason.WAITING_FOR_QUOTA, f"waits for quota in queue {queue}: its last Workload has ended")
    if _is_outgrown(request):
        text = f"its pods are no longer those that queue {queue} admitted, so they wait for quota again"
        return Hold(Reason.WAITING_FOR_QUOTA, text)
    if _is_evicted(live.content) and _is_reserved(live.content):
        message = workload.condition(live.content, "Evicted").get("message", "")
        return Hold(Reason.EVICTED, f"evicted from queue {queue}: {message}")
    if not _is_admitted(live.content):
        return Hold(Reason.WAITING_FOR_QUOTA, f"waits for quota in queue {queue}: {_why(live.content)}")
    return None


def effects(
    request: Request, now: datetime, *, released: bool, ready: bool, ended: ConditionValue | None
) -> list[Effect]:
    """Return what is to be done about the Workload.

    `released` says that no pod of the owner is left, `ready` that all of them are; `ended` is the summary of an owner
    that has finished.
    """
    live = request.live
    if live is not None and (not live.ours or live.deleting):
        return []
    if not is_queued(request):
        return [] if live is None else _deletion(live)
    if ended is not None:
        if live is None or not released or workload.is_true(live.content, "Finished"):
            return []
        return [_patch(live, now, workload.finished(ended.message, success=ended.status is TRUE))]
    if live is None:
        # Until the pods of a Workload that somebody deleted are gone, they use quota that nobody counts.
        return [Apply(request.wanted())] if released and request.queueing.obstacle is None else []
    if workload.is_true(live.content, "Finished") or _is_outgrown(request):
        return _deletion(live) if released else []
    if not _is_reserved(live.content):
        return _update(request, live)
    if _is_evicted(live.content):
        if not released:
            return []
        return [PatchStatus(live.kind, live.name, workload.released(live.content, now))]
    if not _is_admitted(live.content):
        return []
    condition = workload.pods_ready(live.content, ready=ready)
    before = workload.condition(live.content, "PodsReady")
    if (before.get("status"), before.get("reason")) == (condition["status"], condition["reason"]):
        return []
    # That it is ready again stays said as it was first said.
    if ready and before.get("status") == "True":
        return []
    return [_patch(live, now, condition)]


def may_fail(effect: Effect, error: ApiError) -> bool:
    """Return whether an effect that failed concerns the Workload alone, and is nothing that the owner's author mends.

    While Kueue's manager is down, its webhooks refuse everything; the owner's status does not wait for its return.
    """
    match effect:
        case PatchStatus():
            return True
        case Delete(kind):
            return kind is Kind.WORKLOAD
        case Apply(body):
            return kind_of(body) is Kind.WORKLOAD and not isinstance(error, Refused | QuotaExceeded)
        case _:
            return False


def admitted_count(request: Request, name: str) -> int | None:
    """Return for how many pods of a set quota is reserved; None where none is, or need not be."""
    live = request.live
    if live is None or not live.ours or not _is_reserved(live.content):
        return None
    return demand.counts(live.content).get(name)


def withdrawal(live: Child | None) -> list[Effect]:
    """Return what takes an owner out of its queue, as it is suspended by its user and has no pod."""
    return [] if live is None or not live.ours or live.deleting else _deletion(live)


def conditions(request: Request) -> Mapping[ConditionType, ConditionValue]:
    """Return QuotaReserved and Admitted as the owner shows them; nothing for one without a queue."""
    if not is_queued(request):
        return {}
    stopped = hold(request)
    live = request.live.content if request.live is not None and request.live.ours else {}
    reserved = bool(live) and _is_reserved(live)
    why = stopped or Hold(Reason.WAITING_FOR_QUOTA, NOT_YET)
    waits = ConditionValue(FALSE, why.reason, why.message)
    found = {ConditionType.QUOTA_RESERVED: waits, ConditionType.ADMITTED: waits}
    if reserved:
        text = workload.condition(live, "QuotaReserved").get("message", "")
        found[ConditionType.QUOTA_RESERVED] = ConditionValue(TRUE, Reason.QUOTA_RESERVED, text)
    if stopped is None:
        admitted_by = (live.get("status", {}).get("admission") or {}).get("clusterQueue", "")
        text = f"admitted by ClusterQueue {admitted_by}"
        if not live and request.queueing.obstacle is not None:
            text = f"what was admitted runs on: {request.queueing.obstacle.message}"
        found[ConditionType.ADMITTED] = ConditionValue(TRUE, Reason.ADMITTED, text)
    return found


def _is_reserved(live: Raw) -> bool:
    ended = workload.is_true(live, "Finished")
    return workload.is_true(live, "QuotaReserved") and bool(live["status"].get("admission")) and not ended


def _is_admitted(live: Raw) -> bool:
    return _is_reserved(live) and workload.is_true(live, "Admitted") and not _is_evicted(live)


def _is_evicted(live: Raw) -> bool:
    return workload.is_true(live, "Evicted")


def _is_outgrown(request: Request) -> bool:
    """Return whether an edit of the spec wants pods that the reservation does not cover; fewer of the same it does.

    Another operator may count the same spec differently: that alone ends no reservation. Nor do pods that it renders
    differently, and no larger.
    """
    live = request.live
    if live is None or not _is_reserved(live.content) or not request.queueing.queue:
        return False
    annotations = live.content["metadata"].get("annotations", {})
    if annotations.get(workload.GENERATION) == str(request.generation):
        return False
    return demand.exceeds(request.wanted(), live.content, capped=request.capped)


def _update(request: Request, live: Child) -> list[Effect]:
    """Return the apply of a Workload that waits, and is not what it should be."""
    if request.queueing.obstacle is not None:
        return []
    wanted = request.wanted()
    spec, before = wanted["spec"], live.content["spec"]
    keys = ("queueName", "priority", "priorityClassRef", "maximumExecutionTimeSeconds")
    same = all(spec.get(key) == before.get(key) for key in keys) and demand.counts(wanted) == demand.counts(
        live.content
    )
    same = same and wanted["metadata"]["annotations"] == {
        key: live.content["metadata"].get("annotations", {}).get(key) for key in wanted["metadata"]["annotations"]
    }
    return [] if same else [Apply(wanted)]


def _why(live: Raw) -> str:
    """Return why Kueue does not admit a Workload, in its own words."""
    if _is_reserved(live):
        checks = live["status"].get("admissionChecks", [])
        waits = [
            f"{c['name']} is {c['state']}: {c.get('message', '')}".rstrip(": ") for c in checks if c["state"] != "Ready"
        ]
        return "; ".join(waits) or workload.condition(live, "Admitted").get("message") or "it is not admitted yet"
    if live["spec"].get("active") is False:
        return "its Workload is deactivated (spec.active)"
    return str(workload.condition(live, "QuotaReserved").get("message") or NOT_YET)


def _deletion(live: Child) -> list[Effect]:
    return [Delete(Kind.WORKLOAD, live.name, live.uid)]


def _patch(live: Child, now: datetime, condition: Json) -> PatchStatus:
    return PatchStatus(live.kind, live.name, workload.with_conditions(live.content, now, condition))
