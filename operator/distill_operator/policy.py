"""The installation's policy: what it does not allow, whatever a job says. Pure."""

from distill_api.spec.job_spec import Spec
from distill_api.teacher.kind import TeacherSpec
from distill_operator.settings import Egress, Settings

TRUST_FLAG = "--trust-remote-code"
ADVICE = "this installation does not allow code that a model brings (allowTrustRemoteCode of the chart)"


def problems(spec: Spec | TeacherSpec, settings: Settings) -> list[str]:
    """Return what the policy forbids of a spec, one sentence each; none where all is allowed."""
    found = [] if settings.allow_trust_remote_code else _trusting(spec)
    if settings.job_egress is Egress.CLOSED and spec.needs_hub:
        found.append(
            "spec: something is to be downloaded from the hub, which this installation does not allow (jobEgress of "
            "the chart); name models and data by paths on a mounted volume"
        )
    if settings.job_egress is Egress.CLOSED and isinstance(spec, Spec):
        found += [
            f"spec.output.publish: {place.to} is not in the cluster, and pods may not leave it here (jobEgress of the "
            "chart); name a folder of a mounted volume, file:///FOLDER"
            for place in spec.output.publish
            if not place.on_volume
        ]
    return found


def _trusting(spec: Spec | TeacherSpec) -> list[str]:
    found = [f"spec.trustRemoteCode: {ADVICE}; leave it out"] if spec.trust_remote_code else []
    for where, given in _arguments(spec):
        found += [f"{where}: {a} could turn it on, but {ADVICE}; leave it out" for a in given if _may_trust(a)]
    return found


def _arguments(spec: Spec | TeacherSpec) -> list[tuple[str, list[str]]]:
    if isinstance(spec, TeacherSpec):
        return [("spec.engineArgs", spec.engine_args)]
    where = "spec.teachers[{}].engineArgs" if spec.teachers else "spec.teacher.engineArgs"
    teachers = [(where.format(t.name), t.engine_args) for t in spec.served_teachers]
    return [*teachers, ("spec.rollout.engineArgs", spec.rollout.engine_args)]


def _may_trust(argument: str) -> bool:
    """Also shortened, as argparse allows, and by a file of arguments, which nobody here can read."""
    flag = argument.partition("=")[0]
    return (len(flag) > len("--t") and TRUST_FLAG.startswith(flag)) or flag == "--config"
