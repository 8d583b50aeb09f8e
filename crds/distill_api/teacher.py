"""The teacher: what scores the tokens of the student."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Argument, Model, Path
from distill_api.template import PodTemplate


class Teacher(Model):
    """The model that scores every token of the student, served by SGLang."""

    model: Path = Field(description="Hub id, or a path on a mounted volume, of a Hugging Face checkpoint.")
    replicas: Annotated[int, Field(ge=1, le=256)] = Field(1, description="SGLang servers behind one Service.")
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Accelerators of one server.")
    max_concurrent_requests: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="Scoring requests in flight per replica."
    )
    request_timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        120, description="A scoring request that takes longer is sent again."
    )
    engine_args: Annotated[list[Argument], Field(max_length=64)] = Field(
        default_factory=list, description="More command line arguments for the SGLang server."
    )
    template: PodTemplate = Field(default_factory=PodTemplate, description="Overrides for the teacher's pods.")
