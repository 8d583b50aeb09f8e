"""Types of single fields that several models share: counts, seconds, names with their rules, the precision."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.rules import matching

Count = Annotated[int, Field(ge=1, le=4096)]
Seconds = Annotated[int, Field(ge=1, le=31_536_000)]
AcceleratorName = Annotated[
    str,
    Field(max_length=253),
    matching(
        r"^(none|[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?)$",
        "must be none, or a resource name such as nvidia.com/gpu",
    ),
]
ControllerName = Annotated[
    str,
    Field(max_length=253),
    matching(
        r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._/A-Za-z0-9]*[A-Za-z0-9])?$",
        "must be a domain and a path, such as kueue.x-k8s.io/multikueue",
    ),
]
Name = Annotated[
    str,
    Field(max_length=40),
    matching(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "must be lower-case letters, digits and dashes, with no dash at an end"
    ),
]
ObjectName = Annotated[
    str,
    Field(max_length=253),
    matching(
        r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$",
        "must be the name of an object: lower-case letters, digits, dashes and dots, no dash or dot at an end",
    ),
]
"""The name of a Kubernetes object. Its rule keeps out what would be another path of the API server."""
AbsolutePath = Annotated[
    str, Field(max_length=1024), matching(r"^/[^\x00]*$", "must be an absolute path: it must begin with /")
]


class Precision(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    def dtype(self, on_cpu: bool) -> str:
        """Return the torch name of the precision, with auto resolved."""
        if self is Precision.AUTO:
            return "float32" if on_cpu else "bfloat16"
        return self.value
