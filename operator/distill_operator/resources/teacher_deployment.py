"""A teacher that the job serves: unmodified SGLang servers in a Deployment, and a headless Service.

The Service is headless as the client balances by itself. For a Teacher of the namespace, or an endpoint, nothing is
made here.
"""

from distill_api import names, protocol
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.pods import refusals
from distill_api.teacher.source import NamedTeacherSource
from distill_operator.resources.pod_template import Container, Json, metadata, pod_labels, pod_template, selector
from distill_operator.settings import Settings

MODEL_INFO = {"path": "/model_info", "port": protocol.SGLANG_PORT}
"""A request that is cheap, and answered while generation is paused; /health generates a token and takes a second."""

PROBES: Json = {
    # An hour: hundreds of gigabytes over a network file system.
    "startupProbe": {"httpGet": MODEL_INFO, "periodSeconds": 2, "failureThreshold": 1800, "timeoutSeconds": 5},
    "readinessProbe": {
        "exec": {"command": ["python3", "-m", "distill_workers.probe", "score", f"127.0.0.1:{protocol.SGLANG_PORT}"]},
        "periodSeconds": 10,
        "failureThreshold": 3,
        "timeoutSeconds": 30,
    },
    "livenessProbe": {"httpGet": MODEL_INFO, "periodSeconds": 20, "failureThreshold": 6, "timeoutSeconds": 10},
}


def deployment(job: DistillationJob, settings: Settings, teacher: NamedTeacherSource) -> Json:
    """Return the Deployment of one of a job's own teachers."""
    container = Container(
        name=refusals.TEACHER,
        command=["python3", "-m", "distill_workers.serve", "teacher", *([] if _is_only(teacher) else [teacher.name])],
        ports=[(protocol.METRICS_PORT_NAME, protocol.SGLANG_PORT)],
        accelerators=teacher.tensor_parallel_size,
        accelerator=teacher.accelerator,
        probes=PROBES,
        needs_shared_memory=teacher.tensor_parallel_size > 1,
        handles_signals=True,
        needs_output=teacher.student is not None,  # through which it gets the student's weights
    )
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(job, names.teacher(job.metadata.name, teacher.name), Role.TEACHER),
        "spec": {
            "replicas": teacher.replicas,
            # A rolling update would need accelerators that nobody keeps spare.
            "strategy": {"type": "Recreate"},
            # The job's own deadlines decide; a large model may load for longer than the default ten minutes.
            "progressDeadlineSeconds": 7200,
            "revisionHistoryLimit": 0,
            "selector": {"matchLabels": {**selector(job, Role.TEACHER), **_name_label(teacher)}},
            "template": pod_template(
                job,
                settings,
                teacher.template,
                container,
                {**pod_labels(job, Role.TEACHER), **_name_label(teacher)},
                metrics_port=protocol.SGLANG_PORT,
            ),
        },
    }


def service(job: DistillationJob, teacher: NamedTeacherSource) -> Json:
    """Return the headless Service of one of a job's own teachers."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(job, names.teacher(job.metadata.name, teacher.name), Role.TEACHER),
        "spec": {
            "clusterIP": "None",
            "selector": {**selector(job, Role.TEACHER), **_name_label(teacher)},
            "ports": [{"name": "http", "port": protocol.SGLANG_PORT, "targetPort": protocol.SGLANG_PORT}],
        },
    }


def addresses(job: DistillationJob) -> dict[str, str]:
    """Return HOST:PORT of the headless Service of each teacher, by its name; endpoints are read in the job itself."""
    own = {t.name: names.teacher(job.metadata.name, t.name) for t in job.spec.served_teachers}
    named = {t.name: names.shared_teacher(t.ref.name) for t in job.spec.live_teachers if t.ref is not None}
    return {name: f"{service}:{protocol.SGLANG_PORT}" for name, service in (own | named).items()}


def keys(job: DistillationJob) -> list[Json]:
    """Return the environment with the key of each endpoint, which the kubelet takes from its Secret."""
    return [
        {
            "name": protocol.teacher_key(t.name),
            "valueFrom": {"secretKeyRef": {"name": t.endpoint.key_secret.name, "key": t.endpoint.key_secret.key}},
        }
        for t in job.spec.live_teachers
        if t.endpoint is not None and t.endpoint.key_secret is not None
    ]


def _is_only(teacher: NamedTeacherSource) -> bool:
    return teacher.name == names.ONLY_TEACHER


def _name_label(teacher: NamedTeacherSource) -> dict[str, str]:
    return {} if _is_only(teacher) else {names.LABEL_TEACHER: teacher.name}
