"""The teachers: what scores the tokens of the student, and where it serves."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Argument, Model, Path
from distill_api.endpoint import Endpoint
from distill_api.fields import ObjectName
from distill_api.names import MAX_TEACHER_NAME, ONLY_TEACHER
from distill_api.rules import Rule, matching
from distill_api.template import PodTemplate

TeacherName = Annotated[
    str,
    Field(max_length=MAX_TEACHER_NAME),
    matching(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "must be lower-case letters, digits and dashes, with no dash at an end"
    ),
]


class TeacherRef(Model):
    """A Teacher of the job's namespace, which several jobs may share."""

    name: ObjectName = Field(description="Its name.")


class Serving(Model):
    """How a model is served: SGLang servers behind one Service."""

    replicas: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="SGLang servers behind one Service. May change while the job runs."
    )
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Accelerators of one server.")
    max_concurrent_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="Scoring requests in flight per replica."
    )
    engine_args: Annotated[list[Argument], Field(max_length=64)] = Field(
        default_factory=list, description="More command line arguments for the SGLang server."
    )
    template: PodTemplate = Field(
        default_factory=PodTemplate, description="Overrides for the teacher's pods, where the job makes them."
    )


class TeacherSource(Serving):
    """What scores every token of the student: a model that the job serves, a Teacher that is shared, or an endpoint."""

    mutable = frozenset({"replicas"})
    transitions = (
        (
            "which of model, ref and endpoint is set is immutable: make a new job",
            "has(self.model) == has(oldSelf.model) && has(self.ref) == has(oldSelf.ref) && "
            "has(self.endpoint) == has(oldSelf.endpoint)",
        ),
    )
    rules = (
        Rule(
            "set exactly one of model, ref and endpoint",
            "[has(self.model), has(self.ref), has(self.endpoint)].filter(given, given).size() == 1",
            lambda t: [t.model, t.ref, t.endpoint].count(None) == 2,
        ),
        Rule(
            "replicas, tensorParallelSize and engineArgs go with model only: they are how the job serves it",
            "has(self.model) || (self.replicas == 1 && self.tensorParallelSize == 1 && self.engineArgs.size() == 0)",
            lambda t: t.model is not None or (t.replicas == 1 and t.tensor_parallel_size == 1 and not t.engine_args),
        ),
    )
    model: Path | None = Field(
        None,
        description="Hub id, or a path on a mounted volume, of a Hugging Face checkpoint that the job itself serves.",
    )
    ref: TeacherRef | None = Field(None, description="A Teacher of this namespace instead of a model of the job's own.")
    endpoint: Endpoint | None = Field(None, description="Servers that somebody else runs, instead of a model.")
    request_timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        120, description="A scoring request that takes longer is sent again."
    )
    max_disagreement: Annotated[float, Field(gt=0, le=100)] = Field(
        0.05,
        description="Nats per token by which the scores of two replicas, of the same tokens, may differ on average "
        "before the preflight refuses the teacher, and a replica that joins later is left alone. Kernels of bfloat16 "
        "differ by about 0.01.",
    )

    @property
    def title(self) -> str:
        """What it is called where people read."""
        if self.model is not None:
            return self.model
        if self.ref is not None:
            return f"Teacher {self.ref.name}"
        assert self.endpoint is not None
        return self.endpoint.model or self.endpoint.url


class NamedTeacherSource(TeacherSource):
    """One of several teachers."""

    name: TeacherName = Field(description="What a prompt chooses it by, and its name in metrics.")
    coefficient: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Multiplies objective.coefficient for the samples that it scores."
    )

    @property
    def path(self) -> str:
        """Where it stands in a job, for a sentence about it."""
        return "spec.teacher" if self.name == ONLY_TEACHER else f"spec.teachers[{self.name}]"
