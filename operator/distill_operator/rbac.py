"""Exactly the API rights that the operator uses, as data, from which the chart's rules are generated.

Server-side apply of an object that may not exist yet needs create and patch. No Secret is read, and there is no exec.
"""

from typing import TypedDict


class Rule(TypedDict):
    """rbac.authorization.k8s.io/v1 PolicyRule."""

    apiGroups: list[str]
    resources: list[str]
    verbs: list[str]


NAMESPACED_RULES: tuple[Rule, ...] = (
    {
        "apiGroups": ["distillation-operator.io"],
        "resources": ["distillationjobs"],
        # delete: ttlSecondsAfterFinished
        "verbs": ["list", "watch", "delete"],
    },
    {"apiGroups": ["distillation-operator.io"], "resources": ["teachers"], "verbs": ["list", "watch"]},
    {
        "apiGroups": ["distillation-operator.io"],
        "resources": ["distillationjobs/status", "teachers/status"],
        "verbs": ["patch"],
    },
    # Owner references that block the deletion of their owner need it where OwnerReferencesPermissionEnforcement is on.
    {
        "apiGroups": ["distillation-operator.io"],
        "resources": ["distillationjobs/finalizers", "teachers/finalizers"],
        "verbs": ["update"],
    },
    # Deleted by the garbage collector alone.
    {"apiGroups": [""], "resources": ["configmaps", "services"], "verbs": ["list", "create", "patch"]},
    # The key of each job, made once; who may make one cannot see one.
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["list", "create", "patch"]},
    {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["list", "watch", "create", "patch", "delete"]},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list", "watch", "create", "patch", "delete"]},
    {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["list", "watch", "create", "patch", "delete"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get"]},
    # list: why a trainer Job gets no pods, which a Job says in Events alone.
    {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["list", "create", "patch"]},
)
"""For a Role in each watched namespace, or a ClusterRole when every namespace is watched."""

GANG_RULES: tuple[Rule, ...] = tuple(
    {"apiGroups": [group], "resources": ["podgroups"], "verbs": ["list", "create", "patch", "delete"]}
    for group in ("scheduling.x-k8s.io", "scheduling.volcano.sh", "scheduling.run.ai")
)
"""With NAMESPACED_RULES, each where its scheduler is used: spec.scheduling.gang."""

KUEUE_RULES: tuple[Rule, ...] = (
    {
        "apiGroups": ["kueue.x-k8s.io"],
        "resources": ["workloads"],
        "verbs": ["list", "watch", "create", "patch", "delete"],
    },
    # PodsReady, Finished, and the end of a reservation, as Kueue's own integrations write them.
    {"apiGroups": ["kueue.x-k8s.io"], "resources": ["workloads/status"], "verbs": ["patch"]},
)
"""With NAMESPACED_RULES, when DISTILL_KUEUE is true."""

KUEUE_CLUSTER_RULES: tuple[Rule, ...] = (
    # What an admission means for pods; the priority of a job in its queue.
    {"apiGroups": ["kueue.x-k8s.io"], "resources": ["resourceflavors", "workloadpriorityclasses"], "verbs": ["get"]},
    {"apiGroups": ["scheduling.k8s.io"], "resources": ["priorityclasses"], "verbs": ["get"]},
)
"""For a ClusterRole of its own, when DISTILL_KUEUE is true: these kinds are in no namespace."""

LEASE_RULES: tuple[Rule, ...] = (
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
)
"""For a Role in the operator's own namespace, when DISTILL_LEADER_ELECTION is true."""

NAMESPACE_RULES: tuple[Rule, ...] = (
    # Which namespaces have the label.
    {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["list"]},
)
"""With CLUSTER_RULES, when DISTILL_WATCH_NAMESPACE_SELECTOR is set."""

CLUSTER_RULES: tuple[Rule, ...] = (
    # WaitForFirstConsumer claims stay Pending until a pod wants them; without this right every pending claim is
    # taken for one of those, and the trainer's pods tell what is wrong instead.
    {"apiGroups": ["storage.k8s.io"], "resources": ["storageclasses"], "verbs": ["get"]},
    # kopf notices by it that KubeRay was installed later. Used only when every namespace is watched.
    {"apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"], "verbs": ["list", "watch"]},
)
"""For a ClusterRole. Optional when DISTILL_WATCH_NAMESPACES is set."""
