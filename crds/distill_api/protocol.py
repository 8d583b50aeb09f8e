"""The protocol between the roles and with the operator: ports, paths, environment, exit codes, reports.

GET /progress of trainer rank 0 answers with the JSON of `ProgressReport`, GET /samples with the newest lines of
samples.jsonl, 2 MiB at most; the termination message of a trainer
pod, and state.json in the run folder, are the JSON of `ExitReport`.
"""

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from distill_api.base import Model
from distill_api.names import ONLY_TEACHER
from distill_api.status import Progress, Result

JOB_FILE = "/etc/distill/job.yaml"
"""The path of the DistillationJob (YAML or JSON) in every pod, mounted from the job's ConfigMap."""

SECRETS_FOLDER = "/etc/distill-secrets"
"""The folder in trainer pods with one folder for each Secret of spec.output.publish, by its name."""

READER_MODULE = "distill_workers.local.reader"
"""The module of the workers' image that writes files of a run folder as a tar to stdout."""
READER_SUMS = "SHA256SUMS"
"""The last file of such a tar, with the hash of every file before it, as sha256sum writes them."""

SGLANG_PORT = 30000
"""The HTTP port of every SGLang server, teacher and engine, with /metrics."""
TRAINER_PORT = 8080
"""The HTTP port of trainer rank 0: /progress, /samples, /metrics, /healthz."""
MASTER_PORT = 29500
RAY_CLIENT_PORT = 10001
RAY_METRICS_PORT = 8080
ENGINE_RESOURCE = "engine"
"""The custom Ray resource, one per rollout worker pod, by which each pod holds one engine actor."""
METRICS_PORT_NAME = "metrics"
RAY_METRICS_PORT_NAME = "ray-metrics"
"""The name of Ray's metrics port in an engine's pod, where the port named metrics is SGLang's."""


class Variable(StrEnum):
    """An environment variable that the operator sets and the workers read."""

    JOB_FILE = "DISTILL_JOB_FILE"
    TEACHER = "DISTILL_TEACHER_ADDRESS"
    """The addresses of the job's teachers, except endpoints, whose URL is in the job.

    NAME=HOST:PORT[,HOST:PORT...], several with ; between them; without NAME= it is the only teacher. Each address of a
    HOST is a replica. See `teacher_addresses` and `read_teacher_addresses`.
    """
    RAY = "DISTILL_RAY_ADDRESS"
    """The address ray://HOST:PORT of the RayCluster's head."""
    ATTEMPT = "DISTILL_ATTEMPT"
    KEY = "DISTILL_KEY"
    """The job's key, from its Secret: the admin API of its SGLang servers and its Ray cluster require it."""
    POD_IP = "POD_IP"
    NODE_RANK = "JOB_COMPLETION_INDEX"
    """The index of the trainer's pod, set by the indexed Job."""
    MASTER_ADDR = "MASTER_ADDR"
    TERMINATION_LOG = "DISTILL_TERMINATION_LOG"
    """The path that the exit report is written to; /dev/termination-log in a pod."""
    WANDB_KEY = "WANDB_API_KEY"
    """The API key of Weights & Biases, by the name that its client reads, from spec.tracking.wandb.keySecret."""


TEACHER_KEY = "DISTILL_TEACHER_KEY_"
"""The prefix of the variables with the keys of teachers' endpoints (`teacher_key`)."""


def teacher_key(name: str) -> str:
    """Return the variable with the key of the endpoint of the teacher `name`, which the kubelet sets from a Secret."""
    return TEACHER_KEY + name.upper().replace("-", "_")


def teacher_addresses(addresses: Mapping[str, str]) -> str:
    """Return the text of Variable.TEACHER, from HOST:PORT[,HOST:PORT...] by the name of a teacher."""
    if list(addresses) == [ONLY_TEACHER]:
        return addresses[ONLY_TEACHER]
    return ";".join(f"{name}={address}" for name, address in addresses.items())


def read_teacher_addresses(text: str) -> dict[str, str]:
    """Return HOST:PORT[,HOST:PORT...] by the name of a teacher, from the text of Variable.TEACHER."""
    found: dict[str, str] = {}
    for entry in filter(None, text.split(";")):
        name, given, address = entry.rpartition("=")
        found[name.strip() if given else ONLY_TEACHER] = address.strip()
    return found


class ExitCode(IntEnum):
    DONE = 0
    TEMPORARY = 75
    """EX_TEMPFAIL: try again, from the last complete checkpoint."""
    CONFIGURATION = 78
    """EX_CONFIG: the job as written cannot run; never retried."""


class ExitReason(StrEnum):
    COMPLETED = "Completed"
    STOPPED = "Stopped"
    """The trainer was stopped by SIGTERM."""
    CONFIGURATION_ERROR = "ConfigurationError"
    PREFLIGHT_FAILED = "PreflightFailed"
    TEACHER_UNREACHABLE = "TeacherUnreachable"
    ENGINES_LOST = "EnginesLost"
    VOLUME_FULL = "VolumeFull"
    INTERNAL_ERROR = "InternalError"


class Phase(StrEnum):
    STARTING = "Starting"
    PREFLIGHT = "Preflight"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    EXPORTING = "Exporting"
    DONE = "Done"


class Publication(Model):
    """What became of one place of spec.output.publish."""

    to: str = Field(description="Place, as spec.output.publish names it.")
    step: int = Field(description="Step of the model.")
    done: bool = Field(description="Whether the whole model is there.")
    message: Annotated[str, Field(max_length=253)] = Field(description="What is there, or why the model is not.")


class ProgressReport(Model):
    """The answer of GET /progress."""

    phase: Phase = Field(description="Phase of the trainer.")
    preflight_passed: bool = Field(False, description="Whether every preflight check has passed.")
    notes: list[str] = Field(
        default_factory=list,
        description="Notes of the preflight: what is surely unusual and may be meant. They stand in the condition "
        "Preflight.",
    )
    publications: list[Publication] = Field(
        default_factory=list, description="What became of each place of spec.output.publish, once all were tried."
    )
    progress: Progress = Field(description="Progress, which is copied into status.progress.")
    result: Result | None = Field(None, description="Result, which is copied into status.result when phase is Done.")

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Operators of release 0.1.0 read no report with a field that they do not know."""
        found: dict[str, Any] = handler(self)
        if self.progress.objective_phase is None:
            absent = ("objective_phase", "objectivePhase")
            found["progress"] = {name: value for name, value in found["progress"].items() if name not in absent}
        return {name: value for name, value in found.items() if value or name not in ("notes", "publications")}


class ExitReport(Model):
    """The reason why a trainer ended."""

    reason: ExitReason = Field(description="Reason for programs: one CamelCase word.")
    message: Annotated[str, Field(max_length=3500)] = Field(
        description="Message for people: what is wrong, where, and what to do."
    )
    step: int = Field(0, description="Optimiser steps done.")
    final: ProgressReport | None = Field(
        None, description="Last progress report of rank 0, which a poll may have missed."
    )
