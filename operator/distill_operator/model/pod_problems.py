"""Problems of the pods of a role, or of the controller that should make them, that a person may have to mend."""

from collections.abc import Sequence

from distill_api.status import Reason
from distill_operator.model.conditions import FALSE, ConditionValue
from distill_operator.model.observed import Child, Pod
from distill_operator.model.reading import CRASH_LOOP
from distill_operator.runtime.errors import QUOTA

IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


def pods_problem(pods: Sequence[Pod]) -> ConditionValue | None:
    """Return the problem that explains most, as the condition of the role; None where the pods have none."""
    for pod in pods:
        if pod.unschedulable:
            return ConditionValue(FALSE, Reason.UNSCHEDULABLE, f"{pod.name}: {pod.unschedulable}")
    for pod in pods:
        if pod.waiting_reason in IMAGE_REASONS:
            return ConditionValue(
                FALSE, Reason.IMAGE_PULL_FAILED, f"{pod.name}: {pod.waiting_reason}: {pod.waiting_message}".rstrip(": ")
            )
    for pod in pods:
        if pod.waiting_reason in CONFIG_REASONS:
            text = f"{pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
            return ConditionValue(FALSE, Reason.CONTAINER_REFUSED, text.rstrip(": "))
    for pod in pods:
        if pod.exit_reason == "OOMKilled" and not pod.ready:
            return ConditionValue(
                FALSE, Reason.OUT_OF_MEMORY, f"{pod.name} ran out of memory; raise resources in the template"
            )
        if pod.waiting_reason == CRASH_LOOP:
            return ConditionValue(FALSE, Reason.CRASH_LOOPING, _crash_message(pod))
    return None


def no_pods(children: Sequence[Child]) -> ConditionValue | None:
    """Return why the API server refuses the pods that a controller asks for; None where it does not."""
    child = next((c for c in children if c.message), None)
    if child is None:
        return None
    reason = Reason.QUOTA_EXCEEDED if QUOTA in child.message else Reason.PODS_REFUSED
    return ConditionValue(FALSE, reason, f"{child.kind.value.kind} {child.name}: {child.message}")


def _crash_message(pod: Pod) -> str:
    said = f": {pod.exit_message.strip()}" if pod.exit_message.strip() else ""
    code = f" with exit code {pod.exit_code}" if pod.exit_code is not None else ""
    return f"{pod.name} ended {pod.restarts} times, the last time{code}{said}"
