"""The sources of a job's teachers: a model that the job serves, a shared Teacher, an endpoint, or the student."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Argument, Model, Path
from distill_api.fields import ObjectName
from distill_api.names import MAX_TEACHER_NAME, ONLY_TEACHER
from distill_api.pods.template import RoleTemplate, is_untouched, is_untouched_cel
from distill_api.role_accelerators import ACCELERATOR_IS_IMMUTABLE, DESCRIPTION, RoleAccelerator
from distill_api.rules import Rule, matching
from distill_api.teacher.endpoint import Endpoint
from distill_api.teacher.student import StudentAsTeacher, StudentWeights

TeacherName = Annotated[
    str,
    Field(max_length=MAX_TEACHER_NAME),
    matching(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "must be lower-case letters, digits and dashes, with no dash at an end"
    ),
]


class TeacherRef(Model):
    """A reference to a Teacher of the job's namespace, which several jobs may share."""

    name: ObjectName = Field(description="Name of the Teacher.")


class Serving(Model):
    """How a model is served: SGLang servers behind one Service."""

    replicas: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="Number of SGLang servers behind the Service. It may change while the job runs."
    )
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Tensor parallel size: accelerators of one server, all in one pod."
    )
    accelerator: RoleAccelerator | None = Field(None, description=DESCRIPTION)
    max_concurrent_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="Upper bound of scoring requests in flight per server; further ones wait in the trainer."
    )
    engine_args: Annotated[list[Argument], Field(max_length=64)] = Field(
        default_factory=list, description="Additional command-line arguments of the SGLang servers."
    )
    template: RoleTemplate = Field(default_factory=RoleTemplate, description="Pods of the servers.")


class TeacherSource(Serving):
    """What scores every token of the student: a model that the job serves, a shared Teacher, an endpoint, or itself."""

    mutable = frozenset({"replicas"})
    transitions = (
        (
            "which of model, ref, endpoint and student is set is immutable: make a new job",
            "has(self.model) == has(oldSelf.model) && has(self.ref) == has(oldSelf.ref) && "
            "has(self.endpoint) == has(oldSelf.endpoint) && has(self.student) == has(oldSelf.student)",
        ),
        ("tokenizer is immutable: make a new job", "has(self.tokenizer) == has(oldSelf.tokenizer)"),
        ACCELERATOR_IS_IMMUTABLE,
    )
    rules = (
        Rule(
            "set exactly one of model, ref, endpoint and student",
            "[has(self.model), has(self.ref), has(self.endpoint), has(self.student)].filter(given, given).size() == 1",
            lambda t: [t.model, t.ref, t.endpoint, t.student].count(None) == 3,
        ),
        Rule(
            "replicas, tensorParallelSize, accelerator, engineArgs and template go with model, and with a student's "
            "weights that are not live: they are how the job serves it",
            "has(self.model) || (has(self.student) && self.student.weights != 'live') || "
            "(self.replicas == 1 && self.tensorParallelSize == 1 && !has(self.accelerator) && "
            f"self.engineArgs.size() == 0 && {is_untouched_cel('self.template')})",
            lambda t: (
                t.model is not None
                or (t.student is not None and t.student.weights is not StudentWeights.LIVE)
                or (
                    (t.replicas, t.tensor_parallel_size, t.accelerator, t.engine_args) == (1, 1, None, [])
                    and is_untouched(t.template)
                )
            ),
        ),
        Rule(
            "student goes without tokenizer: it has the student's",
            "!has(self.student) || !has(self.tokenizer)",
            lambda t: t.student is None or t.tokenizer is None,
        ),
        Rule(
            "student with weights live goes without maxConcurrentRequests and requestTimeoutSeconds: the engines score",
            "!has(self.student) || self.student.weights != 'live' || "
            "(self.maxConcurrentRequests == 32 && self.requestTimeoutSeconds == 120)",
            lambda t: (
                t.student is None
                or t.student.weights is not StudentWeights.LIVE
                or (t.max_concurrent_requests, t.request_timeout_seconds) == (32, 120)
            ),
        ),
    )
    model: Path | None = Field(
        None,
        description="Hugging Face checkpoint that the job itself serves: a hub id, or a path on a mounted volume.",
    )
    ref: TeacherRef | None = Field(None, description="Teacher of this namespace to use instead of model.")
    endpoint: Endpoint | None = Field(
        None, description="Servers outside the operator's control to use instead of model."
    )
    student: StudentAsTeacher | None = Field(
        None, description="The student itself to use instead of model, asked by prompts.teacherPrompt."
    )
    tokenizer: Path | None = Field(
        None,
        description="Tokenizer of the teacher, if it is not the student's: a hub id, or a folder that the trainer's "
        "pods mount, with config.json and the chat template. The student's responses are then scored as text.",
    )
    request_timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        120, description="Timeout of a scoring request in seconds; after it the request is retried."
    )
    max_disagreement: Annotated[float, Field(gt=0, le=100)] = Field(
        0.05,
        description="Upper bound, in nats per token, of the mean difference between the scores that two replicas give "
        "to the same tokens. Above it preflight fails, and a replica that joins later is not used. bfloat16 kernels "
        "differ by about 0.01.",
    )

    @property
    def title(self) -> str:
        """Return the name of the source in messages: its model, its Teacher, its URL, or the student."""
        if self.student is not None:
            return "the student itself"
        if self.model is not None:
            return self.model
        if self.ref is not None:
            return f"Teacher {self.ref.name}"
        assert self.endpoint is not None
        return self.endpoint.model or self.endpoint.url


class NamedTeacherSource(TeacherSource):
    """One of several teachers of a job."""

    name: TeacherName = Field(
        description="Name by which prompts and data sources select this teacher, and its label in metrics."
    )
    coefficient: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Factor on objective.coefficient for the samples that this teacher scores."
    )

    @property
    def path(self) -> str:
        """Return the path of its field in a job, for messages."""
        return "spec.teacher" if self.name == ONLY_TEACHER else f"spec.teachers[{self.name}]"


OWN_WHERE_DETERMINISTIC = Rule(
    "deterministic goes with teachers that the job itself serves, or the student: the scores of others change with "
    "their load",
    "!self.deterministic || ((!has(self.teacher) || has(self.teacher.model) || has(self.teacher.student)) && "
    "self.teachers.all(t, has(t.model)))",
    lambda spec: not spec.deterministic or all(t.model or t.student for t in spec.all_teachers),
)
"""A rule of a spec."""
