"""What the roles say to each other and to the operator: ports, paths, environment, exit codes, messages.

GET /progress of trainer rank 0 answers with the JSON of `ProgressReport`, GET /samples with the newest lines of
samples.jsonl, 2 MiB at most; the termination message of a trainer
pod, and state.json in the run folder, are the JSON of `ExitReport`.
"""

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.names import ONLY_TEACHER
from distill_api.status import Progress, Result

JOB_FILE = "/etc/distill/job.yaml"
"""Where every pod finds the DistillationJob (YAML or JSON), from the job's ConfigMap."""

SGLANG_PORT = 30000
"""HTTP of every SGLang server, teacher and engine; /metrics too."""
TRAINER_PORT = 8080
"""HTTP of trainer rank 0: /progress, /samples, /metrics, /healthz."""
MASTER_PORT = 29500
RAY_CLIENT_PORT = 10001
RAY_METRICS_PORT = 8080
ENGINE_RESOURCE = "engine"
"""Custom Ray resource: one per rollout worker pod, so that each holds one engine actor."""
METRICS_PORT_NAME = "metrics"
RAY_METRICS_PORT_NAME = "ray-metrics"
"""Of an engine's pod, whose port metrics is SGLang's."""


class Variable(StrEnum):
    """Environment that the operator sets and the workers read."""

    JOB_FILE = "DISTILL_JOB_FILE"
    TEACHER = "DISTILL_TEACHER_ADDRESS"
    """Where the job's teachers serve, but for endpoints, which the job itself names: NAME=HOST:PORT[,HOST:PORT...],
    several with ; between them. Without NAME= it is the only one. Each address that a HOST has is a replica. See
    `teacher_addresses` and `read_teacher_addresses`."""
    RAY = "DISTILL_RAY_ADDRESS"
    """ray://HOST:PORT of the RayCluster's head."""
    ATTEMPT = "DISTILL_ATTEMPT"
    KEY = "DISTILL_KEY"
    """The job's key: the administration of its SGLang servers and its Ray ask for it. From the Secret of the job."""
    POD_IP = "POD_IP"
    NODE_RANK = "JOB_COMPLETION_INDEX"
    """Set by the indexed Job: the trainer pod's number."""
    MASTER_ADDR = "MASTER_ADDR"
    TERMINATION_LOG = "DISTILL_TERMINATION_LOG"
    """Where the exit report goes; /dev/termination-log in a pod."""
    WANDB_KEY = "WANDB_API_KEY"
    """As Weights & Biases names it: from spec.tracking.wandb.keySecret."""


TEACHER_KEY = "DISTILL_TEACHER_KEY_"
"""Begins the name of the variable with the key of a teacher's endpoint (`teacher_key`)."""


def teacher_key(name: str) -> str:
    """The variable that holds the key of the endpoint of the teacher `name`; set from a Secret by the kubelet."""
    return TEACHER_KEY + name.upper().replace("-", "_")


def teacher_addresses(addresses: Mapping[str, str]) -> str:
    """The text of Variable.TEACHER, from HOST:PORT[,HOST:PORT...] by the name of a teacher."""
    if list(addresses) == [ONLY_TEACHER]:
        return addresses[ONLY_TEACHER]
    return ";".join(f"{name}={address}" for name, address in addresses.items())


def read_teacher_addresses(text: str) -> dict[str, str]:
    """HOST:PORT[,HOST:PORT...] by the name of a teacher."""
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
    """By SIGTERM."""
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


class ProgressReport(Model):
    """Answer of GET /progress."""

    phase: Phase = Field(description="What the trainer is doing.")
    preflight_passed: bool = Field(False, description="Whether every preflight check has passed.")
    progress: Progress = Field(description="Copied into status.progress.")
    result: Result | None = Field(None, description="Copied into status.result when phase is Done.")


class ExitReport(Model):
    """Why a trainer ended."""

    reason: ExitReason = Field(description="One word for programs.")
    message: Annotated[str, Field(max_length=3500)] = Field(description="For people: what, where, what to do.")
    step: int = Field(0, description="Optimiser steps done.")
    final: ProgressReport | None = Field(None, description="Of rank 0: the last words, which a poll may have missed.")
