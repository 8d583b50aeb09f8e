"""The children of a Teacher: the same servers and the same headless Service as a job's own teacher has.

Trainers of its namespace reach its scoring; the rest of the port is SGLang's administration, which nobody may use.
"""

from distill_api import names, protocol
from distill_api.names import Role
from distill_api.pods import refusals
from distill_api.teacher.kind import Teacher
from distill_operator.model.pod_sets import placed
from distill_operator.resources import configmap, secret
from distill_operator.resources.network_policy import egress, ports_of, scraped
from distill_operator.resources.pod_template import Container, Json, metadata, pod_labels, pod_template, selector
from distill_operator.resources.rendering import NOWHERE, Placements, hashed
from distill_operator.resources.teacher_deployment import PROBES
from distill_operator.settings import Settings


def children(teacher: Teacher, settings: Settings, replicas: int, placements: Placements = NOWHERE) -> list[Json]:
    """Return all children but the Secret, each with the hash of its content."""
    found = [configmap.config_map(teacher), network_policy(teacher, settings), service(teacher)]
    return [hashed(child) for child in (*found, placed(deployment(teacher, settings, replicas), placements))]


def key(teacher: Teacher) -> Json:
    """Return the Secret, which is created once, before the first pod that reads it."""
    return hashed(secret.key_secret(teacher))


def deployment(teacher: Teacher, settings: Settings, replicas: int) -> Json:
    """Return the Deployment of a Teacher's servers."""
    spec = teacher.spec
    container = Container(
        name=refusals.TEACHER,
        command=["python3", "-m", "distill_workers.serve", "shared-teacher"],
        ports=[(protocol.METRICS_PORT_NAME, protocol.SGLANG_PORT)],
        accelerators=spec.tensor_parallel_size,
        probes=PROBES,
        needs_shared_memory=spec.tensor_parallel_size > 1,
        handles_signals=True,
    )
    own_labels = pod_labels(teacher, Role.TEACHER)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(teacher, names.shared_teacher(teacher.metadata.name), Role.TEACHER),
        "spec": {
            "replicas": replicas,
            # Jobs that run learn from it, so no server goes before its successor answers: one is made besides, and
            # where no accelerator is spare for it, the old ones serve on.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "progressDeadlineSeconds": 7200,
            "revisionHistoryLimit": 0,
            "selector": {"matchLabels": selector(teacher, Role.TEACHER)},
            "template": pod_template(
                teacher, settings, spec.template, container, own_labels, metrics_port=protocol.SGLANG_PORT
            ),
        },
    }


def service(teacher: Teacher) -> Json:
    """Return the headless Service of a Teacher's servers."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(teacher, names.shared_teacher(teacher.metadata.name), Role.TEACHER),
        "spec": {
            "clusterIP": "None",
            "selector": selector(teacher, Role.TEACHER),
            "ports": [{"name": "http", "port": protocol.SGLANG_PORT, "targetPort": protocol.SGLANG_PORT}],
        },
    }


def network_policy(teacher: Teacher, settings: Settings) -> Json:
    """Return the NetworkPolicy of a Teacher's servers, which trainers and Prometheus reach."""
    port = ports_of("TCP", protocol.SGLANG_PORT)
    trainers = {"matchLabels": {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_ROLE: Role.TRAINER.value}}
    spec: Json = {
        "podSelector": {"matchLabels": selector(teacher, Role.TEACHER)},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": trainers}], "ports": port}, *scraped(settings, protocol.SGLANG_PORT)],
    }
    reached = egress(settings)
    if reached is not None:
        spec |= {"policyTypes": ["Ingress", "Egress"], "egress": reached}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(teacher, names.shared_teacher(teacher.metadata.name)),
        "spec": spec,
    }
