"""The base of every model of the API: camelCase in manifests, unknown fields refused, values read as the server does.

Also the names of the API group, and the text types that most models use.
"""

import functools
import re
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from distill_api.rules import PRESERVE_UNKNOWN, WITHOUT_CREDENTIALS, Rule, add_validation

GROUP = "distillation-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "DistillationJob"
PLURAL = "distillationjobs"


SCALARS: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false"}
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""1e-6, without a dot: a string to PyYAML, which reads YAML 1.1; the API server's reader takes it for a number."""


def _scalar(annotation: Any) -> Any:
    """Return int, float or bool for an annotation of one of them, with or without bounds and None; else None."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    return annotation if annotation in SCALARS else None


@functools.cache
def _scalar_of(model: type[BaseModel], field: str) -> Any:
    """Return the scalar type of a field, or None; cached, since each manifest needs it for every field."""
    return _scalar(model.model_fields[field].annotation)


def _default(value: Any) -> Any:
    """Return the default of a schema for a value made by a factory: the fields that the factory set.

    The server fills in the others from the defaults of the type, but only after it has run the rules: a type that has
    rules gets all fields.
    """
    if not isinstance(value, Model):
        return value
    return value.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=not value.rules)


class Model(BaseModel):
    """A frozen model that reads and writes camelCase and refuses a field it does not know.

    Its JSON schema carries what pydantic leaves out and the API server needs: defaults made by a factory, the rules,
    and the fields that may not change.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, protected_namespaces=()
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    mutable: ClassVar[frozenset[str] | None] = None
    """The names of the fields that may change once the object exists; None leaves it to the models around this."""
    transitions: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Messages and CEL of rules about a change, which the server alone can check: it has the old object."""

    cluster_rules: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Messages and CEL of rules that hold on a cluster alone, not for `distill run`, which has the same models."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_the_server_reads(cls, value: Any, info: ValidationInfo) -> Any:
        """Return the value as the API server reads it.

        pydantic would take "3" for 3 and yes for true, and would refuse null for an optional field.
        """
        assert info.field_name is not None
        if value is None:
            field = cls.model_fields[info.field_name]
            if not field.is_required():
                return field.get_default(call_default_factory=True, validated_data={})
        scalar = _scalar_of(cls, info.field_name)
        if scalar is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
            return float(value)
        refused = not isinstance(value, bool) if scalar is bool else isinstance(value, bool | str)
        if scalar is not None and refused:
            raise ValueError(f"must be {SCALARS[scalar]}")
        return value

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = [rule.message for rule in self.rules if not rule.holds(self)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = handler(schema)
        json_schema = handler.resolve_ref_schema(reference)
        for rule in cls.rules:
            add_validation(json_schema, rule.cel, rule.message)
        for message, cel in (*cls.transitions, *cls.cluster_rules):
            add_validation(json_schema, cel, message)
        for name, field in cls.model_fields.items():
            alias = field.alias or name
            node = json_schema["properties"][alias]
            if field.default_factory is not None:
                value = field.get_default(call_default_factory=True, validated_data={})
                node["default"] = _default(value)
            if cls.mutable is not None and name not in cls.mutable:
                add_validation(node, "self == oldSelf", f"{alias} is immutable: make a new job")
        return reference


def preserve_unknown(extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the schema of a part of a pod that is passed on unchanged."""
    return {"type": "object", PRESERVE_UNKNOWN: True, **(extra or {})}


ShortText = Annotated[str, Field(min_length=1, max_length=253)]
Path = Annotated[str, Field(min_length=1, max_length=1024), WITHOUT_CREDENTIALS]
Text = Annotated[str, Field(max_length=8192)]
Tokens = Annotated[int, Field(ge=1, le=1_048_576)]
Argument = Annotated[str, Field(max_length=1024), WITHOUT_CREDENTIALS]
KubernetesObject = Annotated[dict[str, Any], Field(json_schema_extra=preserve_unknown())]


def _without_nulls(mapping: Any) -> Any:
    return {k: v for k, v in mapping.items() if v is not None} if isinstance(mapping, dict) else mapping


WITHOUT_NULLS = BeforeValidator(_without_nulls)
"""The validator that drops entries that are null from a map to strings, as the API server does."""
SHORT_KEYS = Rule(
    "each key must have 1 to 253 characters",
    "self.all(key, key.size() >= 1 && key.size() <= 253)",
    lambda mapping: all(1 <= len(key) <= 253 for key in mapping),
)
StringMap = Annotated[
    dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=64), SHORT_KEYS, WITHOUT_NULLS
]
