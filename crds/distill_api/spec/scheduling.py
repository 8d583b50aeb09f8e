"""Scheduling of the pods: gang scheduling, queue, priority and topology."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model, ShortText
from distill_api.rules import Rule, matching

_KEY = r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$"


class Gang(StrEnum):
    """A gang scheduler: it places a group of pods whole or not at all."""

    NONE = "none"
    SCHEDULER_PLUGINS = "scheduler-plugins"
    VOLCANO = "volcano"
    KAI = "kai"


class GangScope(StrEnum):
    TRAINER = "trainer"
    JOB = "job"


class Scheduling(Model):
    """Scheduling of the pods of all roles. Kueue's queue is not set here, but as a label of the job."""

    rules = (
        Rule(
            "queue goes with gang volcano or kai only: Kueue's queue is the job's label kueue.x-k8s.io/queue-name",
            "!has(self.queue) || self.gang == 'volcano' || self.gang == 'kai'",
            lambda s: s.queue is None or s.gang in (Gang.VOLCANO, Gang.KAI),
        ),
        Rule(
            "gang kai needs a queue: a group without one is never placed",
            "self.gang != 'kai' || has(self.queue)",
            lambda s: s.gang is not Gang.KAI or s.queue is not None,
        ),
        Rule(
            "scope job goes with a gang: name one of scheduler-plugins, volcano, kai",
            "self.scope != 'job' || self.gang != 'none'",
            lambda s: s.scope is not GangScope.JOB or s.gang is not Gang.NONE,
        ),
    )
    gang: Gang = Field(
        Gang.NONE,
        description="Gang scheduler, which places a group of pods whole or not at all, by a PodGroup. It must be "
        "installed. The schedulerName of a role's template takes precedence.",
    )
    scope: GangScope = Field(
        GangScope.TRAINER,
        description="Pods of the gang. trainer: the trainer's pods, created once all others have a node; job: the "
        "pods of all roles, created together.",
    )
    queue: ShortText | None = Field(None, description="Queue of volcano or kai that the PodGroup is submitted to.")
    priority_class_name: ShortText | None = Field(
        None, description="PriorityClass of the PodGroup, and of the pods of each role whose template names none."
    )
    topology_key: (
        Annotated[
            str, Field(max_length=317), matching(_KEY, "must be a label key, such as topology.kubernetes.io/zone")
        ]
        | None
    ) = Field(
        None,
        description="Node label by whose value the trainer's pods prefer to be together: a preferred pod affinity, as "
        "their collectives cross the network at every step.",
    )

    @property
    def all_at_once(self) -> bool:
        """Return whether the trainer's pods are created with all others: the gang is placed whole or not at all."""
        return self.gang is not Gang.NONE and self.scope is GangScope.JOB
