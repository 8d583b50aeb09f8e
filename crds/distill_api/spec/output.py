"""The output of a run: the volume of its run folder, and the places to which its model is published."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.fields import AbsolutePath, ObjectName
from distill_api.rules import ListMap, Rule, matching


class OutputVolume(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    claim_name: ObjectName = Field(
        description="Name of the PersistentVolumeClaim; ReadWriteMany where several pods mount it."
    )


class PublishedStep(StrEnum):
    LAST = "last"
    """The exported model, which is that of the last step or of the one that a guard went back to."""
    BEST = "best"


class PublishedWhen(StrEnum):
    END = "end"
    CHECKPOINT = "checkpoint"
    """Once the run is done, and after each checkpoint of the schedule."""


class Publish(Model):
    """A place to which the model is copied."""

    rules = (
        Rule(
            "when checkpoint needs step last: which step is the best is known at the end",
            "!has(self.when) || self.when != 'checkpoint' || !has(self.step) || self.step != 'best'",
            lambda p: p.when is not PublishedWhen.CHECKPOINT or p.step is not PublishedStep.BEST,
        ),
    )
    to: Annotated[
        str,
        Field(max_length=253),
        matching(
            r"^(hf://[-.\w]+/[-.\w]+|(s3|gs|az)://[^\s@]+|file:///[^\s@]+)$",
            "must be hf://OWNER/NAME, s3://, gs:// or az://BUCKET/FOLDER, or file:///FOLDER, without credentials",
        ),
    ] = Field(description="Repository of the Hugging Face hub, or folder of an object store or a mounted volume.")
    step: PublishedStep = Field(
        PublishedStep.LAST,
        description="Step of the model: last is the exported one, best that of the best evaluation.",
    )
    when: PublishedWhen = Field(
        PublishedWhen.END,
        description="Once the run is done; with checkpoint, after each checkpoint of the schedule too.",
    )
    private: bool = Field(True, description="Whether a repository of the hub is private; a public one is then refused.")
    secret: ObjectName | None = Field(
        None,
        description="Name of a Secret whose keys are variables of the client, such as HF_TOKEN; by default the pod's "
        "own identity is used.",
    )

    @property
    def on_volume(self) -> bool:
        """Return whether it is a folder of the pod, which needs no network."""
        return self.to.startswith("file:")


class Output(Model):
    """The output of a run: checkpoints, the exported model and metrics.jsonl, in the folder path/NAME of a volume."""

    volume: OutputVolume | None = Field(
        None, description="Volume mounted at path. Required on a cluster; `distill run` uses the local folder."
    )
    path: AbsolutePath = Field("/output", description="Mount path of the output volume.")
    publish: Annotated[list[Publish], Field(max_length=4), ListMap("to")] = Field(
        default_factory=list, description="Places to which the model is published."
    )

    @property
    def publishes_best(self) -> bool:
        """Return whether the model of the best step is published."""
        return any(place.step is PublishedStep.BEST for place in self.publish)

    @property
    def at_checkpoints(self) -> list[Publish]:
        """Return the places that get the model of each checkpoint of the schedule."""
        return [place for place in self.publish if place.when is PublishedWhen.CHECKPOINT]
