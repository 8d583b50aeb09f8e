"""What every model of the API shares: camelCase on the wire, unknown fields refused, bounded strings."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "distillation-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "DistillationJob"
PLURAL = "distillationjobs"


class Model(BaseModel):
    """A frozen model that reads and writes camelCase and refuses a field it does not know."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, protected_namespaces=()
    )


def preserve_unknown(extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The schema of a piece of a pod that we pass on as it is."""
    return {"type": "object", "x-kubernetes-preserve-unknown-fields": True, **(extra or {})}


ShortText = Annotated[str, Field(min_length=1, max_length=253)]
Path = Annotated[str, Field(min_length=1, max_length=1024)]
Text = Annotated[str, Field(max_length=8192)]
Argument = Annotated[str, Field(max_length=1024)]
KubernetesObject = Annotated[dict[str, Any], Field(json_schema_extra=preserve_unknown())]
StringMap = Annotated[dict[ShortText, Annotated[str, Field(max_length=1024)]], Field(max_length=64)]
