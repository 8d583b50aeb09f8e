"""The trainer: one indexed Job per attempt, so that an attempt is one unit and its name says which one it is."""

from distill_api import accelerator_environment, names, protocol
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_operator.model.reading import TRAINER_CONTAINER
from distill_operator.resources import teacher_deployment
from distill_operator.resources.pod_template import Container, Json, metadata, pod_labels, pod_template, selector
from distill_operator.settings import Settings

TERMINATION_LOG = "/dev/termination-log"
GRACE_SECONDS = 120
"""Grace period of a trainer pod, for the checkpoint that every rank writes on SIGTERM."""


def trainer_job(job: DistillationJob, settings: Settings, attempt: int) -> Json:
    """Return the Job of an attempt."""
    name = job.metadata.name
    trainer = job.spec.trainer
    container = Container(
        name=TRAINER_CONTAINER,
        command=["python3", "-m", "distill_workers.launch"],
        ports=[(protocol.METRICS_PORT_NAME, protocol.TRAINER_PORT)],
        environment=[
            *(
                {"name": variable.value, "value": value}
                for variable, value in (
                    (protocol.Variable.TEACHER, protocol.teacher_addresses(teacher_deployment.addresses(job))),
                    (protocol.Variable.RAY, f"ray://{names.ray_head_service(name)}:{protocol.RAY_CLIENT_PORT}"),
                    (protocol.Variable.ATTEMPT, str(attempt)),
                    (protocol.Variable.MASTER_ADDR, f"{names.trainer_job(name, attempt)}-0.{names.trainer(name)}"),
                    (protocol.Variable.TERMINATION_LOG, TERMINATION_LOG),
                )
            ),
            *(
                {"name": name, "value": value}
                for name, value in accelerator_environment.of_the_trainer(job.spec).items()
            ),
            *teacher_deployment.keys(job),
            *_tracking_key(job),
        ],
        accelerators=trainer.gpus_per_node,
        accelerator=trainer.accelerator,
        needs_output=True,
        secrets=sorted({place.secret for place in job.spec.output.publish if place.secret is not None}),
        needs_shared_memory=trainer.gpus_per_node > 1,
        grace_seconds=GRACE_SECONDS,
        handles_signals=True,
    )
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(job, names.trainer_job(name, attempt), Role.TRAINER, attempt),
        "spec": {
            "completionMode": "Indexed",
            "completions": trainer.nodes,
            "parallelism": trainer.nodes,
            # Retries are the operator's: all ranks, teacher and engines as one unit.
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    # First, as an evicted trainer ends with 75: a drained node costs a pod, not an attempt.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": TRAINER_CONTAINER,
                            "operator": "In",
                            "values": sorted(
                                [protocol.ExitCode.TEMPORARY.value, protocol.ExitCode.CONFIGURATION.value]
                            ),
                        },
                    },
                ]
            },
            "template": pod_template(
                job,
                settings,
                trainer.template,
                container,
                pod_labels(job, Role.TRAINER, attempt),
                metrics_port=protocol.TRAINER_PORT,
                restartPolicy="Never",
                subdomain=names.trainer(name),
            ),
        },
    }


def _tracking_key(job: DistillationJob) -> list[Json]:
    """Return the environment with the tracker's key.

    It is optional, as a run without it is kept offline: a missing Secret must not keep the trainer from starting.
    """
    wandb = job.spec.tracking.wandb
    if wandb is None or wandb.key_secret is None:
        return []
    name = protocol.Variable.WANDB_KEY.value
    return [{"name": name, "valueFrom": {"secretKeyRef": {"name": wandb.key_secret, "key": name, "optional": True}}}]


def service(job: DistillationJob) -> Json:
    """Return the headless Service that gives every rank a name before any is ready, as they wait for each other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(job, names.trainer(job.metadata.name), Role.TRAINER),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(job, Role.TRAINER),
            "ports": [
                {
                    "name": protocol.METRICS_PORT_NAME,
                    "port": protocol.TRAINER_PORT,
                    "targetPort": protocol.TRAINER_PORT,
                },
                {"name": "rendezvous", "port": protocol.MASTER_PORT, "targetPort": protocol.MASTER_PORT},
            ],
        },
    }
