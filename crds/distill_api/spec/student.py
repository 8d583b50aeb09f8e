"""The student of a job."""

from pydantic import Field

from distill_api.base import Model, Path


class Student(Model):
    """The model that is trained."""

    model: Path = Field(description="Hugging Face checkpoint of the student: a hub id, or a path on a mounted volume.")
