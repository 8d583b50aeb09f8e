"""The kind Teacher: one served model that several DistillationJobs of its namespace learn from (spec.teacher.ref)."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from distill_api.base import Model, Path, Tokens
from distill_api.fields import AcceleratorName, Precision
from distill_api.job import Metadata, parse_object
from distill_api.rules import ListMap, Rule
from distill_api.status import Condition, StatusCount, StatusText, Time
from distill_api.teacher_source import Serving

KIND = "Teacher"
PLURAL = "teachers"

Replicas = Annotated[int, Field(ge=1, le=256)]


class Autoscaling(Model):
    """How many servers there are, by what the trainers have for them to do."""

    rules = (
        Rule(
            "minReplicas must not exceed maxReplicas",
            "self.minReplicas <= self.maxReplicas",
            lambda scaling: scaling.min_replicas <= scaling.max_replicas,
        ),
    )
    min_replicas: Replicas = Field(1, description="Least servers.")
    max_replicas: Replicas = Field(description="Most servers.")
    target_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        32,
        description="Scoring requests, waiting and under way at all trainers, that one server is to have. More of them "
        "add servers at once.",
    )
    scale_down_seconds: Annotated[int, Field(ge=1, le=86_400)] = Field(
        300, description="Servers go when fewer would have been enough for so long."
    )


class TeacherSpec(Serving):
    """A model served by SGLang for all jobs of a namespace that name it."""

    mutable = frozenset({"replicas", "autoscaling"})
    rules = (
        Rule(
            "replicas is what autoscaling decides: leave it 1",
            "!has(self.autoscaling) || self.replicas == 1",
            lambda spec: spec.autoscaling is None or spec.replicas == 1,
        ),
    )
    model: Path = Field(description="Hub id, or a path on a mounted volume, of a Hugging Face checkpoint.")
    accelerator: AcceleratorName = Field(
        "nvidia.com/gpu", description="Resource name of the accelerator, or none for the CPU mode."
    )
    precision: Precision = Field(
        Precision.AUTO, description="Of weights and computation; auto is bfloat16, and float32 without accelerators."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's repository brings. Leave it off.")
    max_sequence_tokens: Tokens = Field(
        32_768, description="Prompt and response of the longest sequence that it scores, of any job."
    )
    autoscaling: Autoscaling | None = Field(None, description="Instead of replicas: as many as the jobs keep busy.")

    # A job whose numbers must repeat to the last bit needs a teacher of its own (a rule of Spec).
    deterministic: ClassVar[bool] = False
    seed: ClassVar[int] = 0

    @property
    def needs_hub(self) -> bool:
        """Whether the model is downloaded from the Hugging Face hub."""
        return not self.model.startswith("/")

    @property
    def on_cpu(self) -> bool:
        return self.accelerator == "none"

    @property
    def dtype(self) -> str:
        """The torch name of the precision that auto stands for."""
        return self.precision.dtype(self.on_cpu)


class TeacherStatus(Model):
    """Status of a Teacher."""

    conditions: Annotated[list[Condition], Field(max_length=8), ListMap("type")] = Field(
        default_factory=list, description="Ready is the summary; SpecValid says whether it can be made."
    )
    observed_generation: StatusCount = Field(0, description="Generation of the spec last acted on.")
    address: StatusText | None = Field(None, description="HOST:PORT of its headless Service: each address is a server.")
    desired_replicas: StatusCount = Field(0, description="Servers wanted.")
    ready_replicas: StatusCount = Field(0, description="Servers that answer.")
    jobs: StatusCount = Field(0, description="Running jobs that learn from it.")
    requests: StatusCount = Field(0, description="Scoring requests, waiting and under way, of those jobs.")
    low_since: Time | None = Field(None, description="Since when fewer servers would have been enough.")
    low_peak: StatusCount = Field(0, description="Most servers that were needed since then.")


class Teacher(BaseModel):
    """apiVersion, kind, metadata and spec; a status is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    api_version: Literal["distillation-operator.io/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["Teacher"]
    metadata: Metadata
    spec: TeacherSpec
    status: Annotated[Any, Field(exclude=True, repr=False)] = None


def parse_teacher(manifest: Any) -> Teacher:
    """The Teacher of a parsed manifest. Raises InvalidManifest."""
    return parse_object(manifest, Teacher)
