"""What belongs to a DistillationJob or a Teacher: the runtime's Ownership of this operator."""

from dataclasses import replace

from distill_api import names
from distill_api.base import GROUP
from distill_operator.kinds import Kind
from distill_operator.runtime.ownership import Ownership


def _private_names(name: str, uid: str) -> tuple[str, ...]:
    # The longest first, as the Secret's name holds the other two.
    return names.key_secret(name, uid), uid, name


OWNERSHIP = Ownership(
    group=GROUP,
    field_manager=names.FIELD_MANAGER,
    managed_label=names.LABEL_MANAGED_BY,
    owner_labels={Kind.TEACHER: names.LABEL_SHARED_TEACHER, Kind.DISTILLATION_JOB: names.LABEL_JOB},
    watched=(Kind.DEPLOYMENT, Kind.JOB, Kind.RAY_CLUSTER, Kind.POD),
    # PodGroups of gang schedulers are in neither list: their kinds are seldom installed, and memory knows only what
    # was written to them.
    listed=(Kind.CONFIG_MAP, Kind.SERVICE, Kind.NETWORK_POLICY),
    optional=frozenset({Kind.RAY_CLUSTER, Kind.TEACHER}),
    private_names=_private_names,
)

WITH_KUEUE = replace(
    OWNERSHIP, watched=(*OWNERSHIP.watched, Kind.WORKLOAD), optional=OWNERSHIP.optional | {Kind.WORKLOAD}
)
"""With the Workloads of what waits in a queue of Kueue."""
