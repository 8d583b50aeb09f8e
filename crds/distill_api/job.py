"""The kind DistillationJob: a whole manifest, parsed and validated once, at the edge."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill_api.manifest import read_manifests
from distill_api.names import MAX_JOB_NAME
from distill_api.rules import Rule
from distill_api.spec.job_spec import Spec
from distill_api.validation import sentences


class InvalidManifest(ValueError):
    """Raised for a manifest that is not valid; `problems` has a sentence for each error."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


NAME_RULES = (
    Rule(
        f"must be at most {MAX_JOB_NAME} characters long, as the names of its pods are made from it",
        f"self.size() <= {MAX_JOB_NAME}",
        lambda name: len(name) <= MAX_JOB_NAME,
    ),
    Rule(
        "must begin with a letter, end with a letter or digit, and have only lower-case letters, digits "
        "and dashes, as Services are named after it",
        "self.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        lambda name: re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) is not None,
    ),
)


class Metadata(BaseModel):
    """The fields of ObjectMeta that are read."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    name: Annotated[str, *NAME_RULES]
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    creation_timestamp: str | None = Field(None, alias="creationTimestamp")
    deletion_timestamp: str | None = Field(None, alias="deletionTimestamp")


class DistillationJob(BaseModel):
    """A DistillationJob as a manifest has it; a status in it is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    api_version: Literal["distillation-operator.io/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["DistillationJob"]
    metadata: Metadata
    spec: Spec
    status: Annotated[Any, Field(exclude=True, repr=False)] = None


ObjectT = TypeVar("ObjectT", bound=BaseModel)


def parse_job(manifest: Any) -> DistillationJob:
    """Return the job of a parsed manifest. Raises InvalidManifest."""
    return parse_object(manifest, DistillationJob)


def parse_object(manifest: Any, model: type[ObjectT]) -> ObjectT:
    """Return a parsed manifest as an object of one of the kinds of the group. Raises InvalidManifest."""
    if not isinstance(manifest, dict):
        raise InvalidManifest(["the manifest is not a mapping; it must have apiVersion, kind, metadata and spec"])
    try:
        # Not by name: the API server knows no snake_case.
        return model.model_validate(manifest, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidManifest(sentences(error, model)) from None


def load_job(path: Path, number: int | None = None) -> DistillationJob:
    """Return the job of a YAML or JSON file. Raises InvalidManifest, also for a file that cannot be read.

    number: of the object, from 1; without it the file must have one.
    """
    objects = load_objects(path)
    if number is None and len(objects) > 1:
        raise InvalidManifest([f"{path}: has {len(objects)} objects, and one job is needed here"])
    return parse_job(objects[(number or 1) - 1])


def load_objects(path: Path) -> list[Any]:
    """Return the objects of a file as kubectl reads it, yet to be parsed. Raises InvalidManifest if there is none."""
    try:
        found = read_manifests(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidManifest([f"{path}: cannot be read: {error.strerror}"]) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidManifest([f"{path}: is not YAML: {' '.join(str(error).split())}"]) from None
    if not found:
        raise InvalidManifest([f"{path}: has no object"])
    return found
