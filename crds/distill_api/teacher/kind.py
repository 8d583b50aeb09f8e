"""The kind Teacher: one served model that several DistillationJobs of its namespace learn from (spec.teacher.ref)."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill_api.base import Model, Path, Tokens
from distill_api.fields import AcceleratorName, Precision
from distill_api.job import Metadata, parse_object
from distill_api.pods import agreement, refusals
from distill_api.rules import ListMap, Rule
from distill_api.status import Condition, StatusCount, StatusText, Time
from distill_api.teacher.source import Serving

KIND = "Teacher"
PLURAL = "teachers"

Replicas = Annotated[int, Field(ge=1, le=256)]


class Autoscaling(Model):
    """Autoscaling of a Teacher's servers by the scoring requests of its jobs."""

    rules = (
        Rule(
            "minReplicas must not exceed maxReplicas",
            "self.minReplicas <= self.maxReplicas",
            lambda scaling: scaling.min_replicas <= scaling.max_replicas,
        ),
    )
    min_replicas: Replicas = Field(1, description="Lower bound of the autoscaler, in servers.")
    max_replicas: Replicas = Field(description="Upper bound of the autoscaler, in servers.")
    target_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        32,
        description="Target of scoring requests per server, counted over all trainers, waiting and in flight. When it "
        "is exceeded, servers are added at once.",
    )
    scale_down_seconds: Annotated[int, Field(ge=1, le=86_400)] = Field(
        300,
        description="Scale-down delay in seconds: servers are removed once fewer would have been enough for this long.",
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
    replicas: Annotated[int, Field(ge=0, le=256)] = Field(
        1,
        description="Number of SGLang servers behind the Service, which kubectl scale, an HPA or KEDA may change. With "
        "0 it holds nothing: jobs that have not begun wait, and a running attempt ends after five minutes, as with a "
        "Teacher that is gone.",
    )
    model: Path = Field(description="Hub id, or a path on a mounted volume, of a Hugging Face checkpoint.")
    accelerator: AcceleratorName = Field(
        "nvidia.com/gpu",
        description="Resource name of the accelerator that each server requests, or none for the CPU mode.",
    )
    precision: Precision = Field(
        Precision.AUTO,
        description="Data type of weights and computation; auto is bfloat16 with accelerators, float32 without.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code from the model's repository, such as modeling files. It is a security risk: "
        "leave it off.",
    )
    max_sequence_tokens: Tokens = Field(
        32_768, description="Upper bound of a scored sequence, prompt and response together, over all jobs, in tokens."
    )
    autoscaling: Autoscaling | None = Field(
        None, description="Scale the number of servers by the load of the jobs; absent keeps replicas servers."
    )

    # A job whose numbers must repeat to the last bit needs a teacher of its own (a rule of Spec).
    deterministic: ClassVar[bool] = False
    seed: ClassVar[int] = 0

    @model_validator(mode="after")
    def _check_pods(self) -> Self:
        if problems := agreement.named_otherwise("template", refusals.TEACHER, self.template):
            raise ValueError("; ".join(problems))
        return self

    @property
    def needs_hub(self) -> bool:
        """Return whether the model is downloaded from the Hugging Face hub."""
        return not self.model.startswith("/")

    @property
    def on_cpu(self) -> bool:
        return self.accelerator == "none"

    @property
    def dtype(self) -> str:
        """Return the torch name of the precision, with auto resolved."""
        return self.precision.dtype(self.on_cpu)


class TeacherStatus(Model):
    """Status of a Teacher."""

    conditions: Annotated[list[Condition], Field(max_length=8), ListMap("type")] = Field(
        default_factory=list,
        description="Conditions: Ready is the summary; SpecValid is False where the spec cannot be rendered.",
    )
    observed_generation: StatusCount = Field(0, description="Generation of the spec that the operator acted on last.")
    address: StatusText | None = Field(
        None, description="HOST:PORT of the headless Service; each of its addresses is one server."
    )
    desired_replicas: StatusCount = Field(0, description="Servers wanted, by replicas or by the autoscaler.")
    replicas: StatusCount = Field(0, description="Servers that there are, ready or not.")
    selector: StatusText | None = Field(
        None, description="Label selector of the servers' pods, for the scale subresource."
    )
    ready_replicas: StatusCount = Field(0, description="Servers that are ready.")
    jobs: StatusCount = Field(0, description="Running jobs that use this Teacher.")
    requests: StatusCount = Field(0, description="Scoring requests of those jobs, waiting and in flight.")
    low_since: Time | None = Field(None, description="Time since which fewer servers would have been enough.")
    low_peak: StatusCount = Field(0, description="Largest number of servers that was needed since lowSince.")


class Teacher(BaseModel):
    """A Teacher as a manifest has it; a status in it is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    api_version: Literal["distillation-operator.io/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["Teacher"]
    metadata: Metadata
    spec: TeacherSpec
    status: Annotated[Any, Field(exclude=True, repr=False)] = None


def parse_teacher(manifest: Any) -> Teacher:
    """Return the Teacher of a parsed manifest. Raises InvalidManifest."""
    return parse_object(manifest, Teacher)
