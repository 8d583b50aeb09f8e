"""What is made for a Teacher: the same servers and the same headless Service as of a job's own teacher.

Trainers of its namespace reach its scoring; the rest of the port is SGLang's administration, which nobody may use.
"""

from distill_api import names, wire
from distill_api.names import Role
from distill_api.shared_teacher import SharedTeacher
from distill_operator.children import configmap, secret
from distill_operator.children.desired import hashed
from distill_operator.children.network import ports_of, scraped
from distill_operator.children.pod import Container, Json, labels, metadata, pod_template, selector
from distill_operator.children.teacher import PROBES
from distill_operator.settings import Settings


def children(teacher: SharedTeacher, settings: Settings, replicas: int) -> list[Json]:
    """All of them, each with the hash of its own content."""
    found = [configmap.config_map(teacher), network_policy(teacher, settings), service(teacher)]
    return [hashed(child) for child in (*found, deployment(teacher, settings, replicas))]


def key(teacher: SharedTeacher) -> Json:
    """Made once, before the first pod that reads it."""
    return hashed(secret.key_secret(teacher))


def deployment(teacher: SharedTeacher, settings: Settings, replicas: int) -> Json:
    spec = teacher.spec
    container = Container(
        name="teacher",
        command=["python", "-m", "distill_workers.serve", "shared-teacher"],
        ports=[(wire.METRICS_PORT_NAME, wire.SGLANG_PORT)],
        accelerators=spec.tensor_parallel_size,
        probes=PROBES,
        needs_shared_memory=spec.tensor_parallel_size > 1,
    )
    pod_labels = labels(teacher, Role.TEACHER)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(teacher, names.shared_teacher(teacher.metadata.name), Role.TEACHER),
        "spec": {
            "replicas": replicas,
            # Another operator's words take effect at once, under jobs that run: no server goes before another answers.
            # Without accelerators to spare the old ones serve on.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "progressDeadlineSeconds": 7200,
            "revisionHistoryLimit": 0,
            "selector": {"matchLabels": selector(teacher, Role.TEACHER)},
            "template": pod_template(
                teacher, settings, spec.template, container, pod_labels, metrics_port=wire.SGLANG_PORT
            ),
        },
    }


def service(teacher: SharedTeacher) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(teacher, names.shared_teacher(teacher.metadata.name), Role.TEACHER),
        "spec": {
            "clusterIP": "None",
            "selector": selector(teacher, Role.TEACHER),
            "ports": [{"name": "http", "port": wire.SGLANG_PORT, "targetPort": wire.SGLANG_PORT}],
        },
    }


def network_policy(teacher: SharedTeacher, settings: Settings) -> Json:
    port = ports_of("TCP", wire.SGLANG_PORT)
    trainers = {"matchLabels": {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_ROLE: Role.TRAINER.value}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(teacher, names.shared_teacher(teacher.metadata.name)),
        "spec": {
            "podSelector": {"matchLabels": selector(teacher, Role.TEACHER)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": trainers}], "ports": port}, *scraped(settings, wire.SGLANG_PORT)],
        },
    }
