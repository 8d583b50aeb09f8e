"""What is wrong with pods of a role, or with the controller that should make them: what a person may have to mend."""

from collections.abc import Sequence

from distill_api.status import Reason
from distill_operator.model.conditions import FALSE, Verdict
from distill_operator.model.observed import CRASH_LOOP, Child, Pod
from distill_operator.runtime.errors import QUOTA

IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


def pods_problem(pods: Sequence[Pod]) -> Verdict | None:
    """The first thing that is wrong with a pod of a role and that a person may have to mend."""
    for pod in pods:
        if pod.unschedulable:
            return Verdict(FALSE, Reason.UNSCHEDULABLE, f"{pod.name}: {pod.unschedulable}")
    for pod in pods:
        if pod.waiting_reason in IMAGE_REASONS:
            return Verdict(
                FALSE, Reason.IMAGE_PULL_FAILED, f"{pod.name}: {pod.waiting_reason}: {pod.waiting_message}".rstrip(": ")
            )
    for pod in pods:
        if pod.waiting_reason in CONFIG_REASONS:
            text = f"{pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
            return Verdict(FALSE, Reason.NOT_READY, text.rstrip(": "))
    for pod in pods:
        if pod.exit_reason == "OOMKilled" and not pod.ready:
            return Verdict(FALSE, Reason.OUT_OF_MEMORY, f"{pod.name} ran out of memory; raise template.resources")
        if pod.waiting_reason == CRASH_LOOP:
            return Verdict(FALSE, Reason.CRASH_LOOPING, _crash_message(pod))
    return None


def no_pods(children: Sequence[Child]) -> Verdict | None:
    """When the API server refuses the pods that a controller asks for."""
    child = next((c for c in children if c.message), None)
    if child is None:
        return None
    reason = Reason.QUOTA_EXCEEDED if QUOTA in child.message else Reason.NOT_READY
    return Verdict(FALSE, reason, f"{child.kind.value.kind} {child.name}: {child.message}")


def _crash_message(pod: Pod) -> str:
    said = f": {pod.exit_message.strip()}" if pod.exit_message.strip() else ""
    code = f" with exit code {pod.exit_code}" if pod.exit_code is not None else ""
    return f"{pod.name} ended {pod.restarts} times, the last time{code}{said}"
