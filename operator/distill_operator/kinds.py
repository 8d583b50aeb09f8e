"""The kinds that the operator reads and writes, and where the API server keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from distill_api.base import API_VERSION, KIND, PLURAL
from distill_api.teacher import kind as teacher_kind


@dataclass(frozen=True)
class Resource:
    """A kind's name, its group and version, and its plural in URLs."""

    kind: str
    api_version: str
    plural: str

    @property
    def path(self) -> str:
        """The root of the kind's version in the API server's URLs."""
        return f"/{'apis' if '/' in self.api_version else 'api'}/{self.api_version}"


class Kind(Enum):
    """Every kind in use; rbac.py lists what may be done with each."""

    JOB = Resource("Job", "batch/v1", "jobs")
    DEPLOYMENT = Resource("Deployment", "apps/v1", "deployments")
    RAY_CLUSTER = Resource("RayCluster", "ray.io/v1", "rayclusters")
    CONFIG_MAP = Resource("ConfigMap", "v1", "configmaps")
    SECRET = Resource("Secret", "v1", "secrets")
    SERVICE = Resource("Service", "v1", "services")
    NETWORK_POLICY = Resource("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies")
    POD = Resource("Pod", "v1", "pods")
    CLAIM = Resource("PersistentVolumeClaim", "v1", "persistentvolumeclaims")
    STORAGE_CLASS = Resource("StorageClass", "storage.k8s.io/v1", "storageclasses")
    COSCHEDULING_GROUP = Resource("PodGroup", "scheduling.x-k8s.io/v1alpha1", "podgroups")
    VOLCANO_GROUP = Resource("PodGroup", "scheduling.volcano.sh/v1beta1", "podgroups")
    KAI_GROUP = Resource("PodGroup", "scheduling.run.ai/v2alpha2", "podgroups")
    WORKLOAD = Resource("Workload", "kueue.x-k8s.io/v1beta2", "workloads")
    RESOURCE_FLAVOR = Resource("ResourceFlavor", "kueue.x-k8s.io/v1beta2", "resourceflavors")
    WORKLOAD_PRIORITY_CLASS = Resource("WorkloadPriorityClass", "kueue.x-k8s.io/v1beta2", "workloadpriorityclasses")
    PRIORITY_CLASS = Resource("PriorityClass", "scheduling.k8s.io/v1", "priorityclasses")
    EVENT = Resource("Event", "events.k8s.io/v1", "events")
    NAMESPACE = Resource("Namespace", "v1", "namespaces")
    LEASE = Resource("Lease", "coordination.k8s.io/v1", "leases")
    DISTILLATION_JOB = Resource(KIND, API_VERSION, PLURAL)
    TEACHER = Resource(teacher_kind.KIND, API_VERSION, teacher_kind.PLURAL)


# Keyed by version and kind, as three schedulers have a PodGroup.
_BY_TYPE = {(k.value.api_version, k.value.kind): k for k in Kind}


def kind_of(body: Mapping[str, Any]) -> Kind:
    """Return the kind of an object that carries its apiVersion and kind."""
    return _BY_TYPE[body["apiVersion"], body["kind"]]
