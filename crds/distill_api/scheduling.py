"""Where and when the pods are placed: all at once or one by one, before whom, and how near to each other."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model, ShortText
from distill_api.rules import Rule, matching

_KEY = r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$"


class Gang(StrEnum):
    """A scheduler that places a group of pods whole or not at all."""

    NONE = "none"
    SCHEDULER_PLUGINS = "scheduler-plugins"
    VOLCANO = "volcano"
    KAI = "kai"


class GangScope(StrEnum):
    TRAINER = "trainer"
    JOB = "job"


class Scheduling(Model):
    """How the pods of all roles are placed. Kueue is not named here: its queue is a label of the job itself."""

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
        description="The scheduler that places a group of pods whole or not at all, with its PodGroup. It must be "
        "installed. A schedulerName of a role's template goes before its own.",
    )
    scope: GangScope = Field(
        GangScope.TRAINER,
        description="What the group is: the trainer's pods, made once all others have a node; or the pods of all "
        "roles, made together.",
    )
    queue: ShortText | None = Field(None, description="Queue of volcano or kai that the group stands in.")
    priority_class_name: ShortText | None = Field(
        None, description="PriorityClass of the pods of all roles whose template names none, and of the group."
    )
    topology_key: (
        Annotated[
            str, Field(max_length=317), matching(_KEY, "must be a label key, such as topology.kubernetes.io/zone")
        ]
        | None
    ) = Field(
        None,
        description="Label of nodes: the trainer's pods are rather placed on nodes that share its value, as their "
        "collectives cross the network at every step.",
    )

    @property
    def all_at_once(self) -> bool:
        """Whether the trainer's pods are made with the others, as none is placed without them."""
        return self.gang is not Gang.NONE and self.scope is GangScope.JOB
