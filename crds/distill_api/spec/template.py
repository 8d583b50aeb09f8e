"""Overrides for the pods of a role: a narrow struct instead of a PodTemplateSpec, so that the CRD stays small."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distill_api.base import SHORT_KEYS, WITHOUT_NULLS, KubernetesObject, Model, ShortText, StringMap
from distill_api.rules import INT_OR_STRING, Rule


def _as_text(value: Any) -> Any:
    """Return `2` as `"2"`, as Kubernetes reads quantities; only integers of 64 bits are converted."""
    whole = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return str(value) if whole else value


def _int_or_string(schema: dict[str, Any]) -> None:
    del schema["type"]
    schema[INT_OR_STRING] = True


_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?$"
Quantity = Annotated[
    str,
    Field(max_length=32),
    Rule(
        "must be a quantity: a number and a unit, such as 500m, 2, 16Gi or 1.5G",
        f"type(self) == int ? self >= 0 : self.matches(r'{_QUANTITY}')",
        lambda text: re.fullmatch(_QUANTITY, text) is not None,
    ),
    BeforeValidator(_as_text),
    Field(json_schema_extra=_int_or_string),
]
ResourceList = Annotated[dict[str, Quantity], Field(max_length=16), SHORT_KEYS, WITHOUT_NULLS]
_RESERVED = (
    r"^((distillation-operator\.io|ray\.io|batch\.kubernetes\.io|kueue\.x-k8s\.io)/.*"
    r"|app\.kubernetes\.io/(managed-by|part-of)|job-name|controller-uid)$"
)
PodLabels = Annotated[
    StringMap,
    Rule(
        "may not have keys under distillation-operator.io/, ray.io/, batch.kubernetes.io/ or kueue.x-k8s.io/, nor "
        "app.kubernetes.io/managed-by, app.kubernetes.io/part-of, job-name or controller-uid: controllers know their "
        "pods by these; use a prefix of your own",
        f"self.all(key, !key.matches(r'{_RESERVED}'))",
        lambda labels: not any(re.fullmatch(_RESERVED, key) for key in labels),
    ),
]
"""Labels that a user adds to pods: none by which somebody would take them for another owner's."""
ObjectList = Annotated[list[KubernetesObject], Field(max_length=32)]


class Resources(Model):
    """Compute resources of the role's main container, as in a Kubernetes container."""

    requests: ResourceList = Field(default_factory=dict, description="Resource requests, by resource name.")
    limits: ResourceList = Field(
        default_factory=dict, description="Resource limits, by resource name. The operator adds the accelerator."
    )


class PodTemplate(Model):
    """Overrides for the pods of one role."""

    image: ShortText | None = Field(
        None, description="Image of the main container; by default the workers image of the chart."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="Pull policy of the image: Always, IfNotPresent or Never."
    )
    image_pull_secrets: Annotated[list[ShortText], Field(max_length=8)] = Field(
        default_factory=list, description="Names of Secrets of this namespace with the credentials of the registry."
    )
    resources: Resources = Field(default_factory=Resources, description="Compute resources of the main container.")
    env: ObjectList = Field(
        default_factory=list, description="Environment variables of the main container, as in a Kubernetes container."
    )
    volumes: ObjectList = Field(default_factory=list, description="Volumes of the pods, as in a Kubernetes pod.")
    volume_mounts: ObjectList = Field(
        default_factory=list, description="Volume mounts of the main container, as in a Kubernetes container."
    )
    node_selector: StringMap = Field(
        default_factory=dict, description="Labels that a node must have for the pods, as in a Kubernetes pod."
    )
    tolerations: ObjectList = Field(
        default_factory=list, description="Tolerations of the pods, as in a Kubernetes pod."
    )
    affinity: KubernetesObject | None = Field(None, description="Affinity of the pods, as in a Kubernetes pod.")
    labels: PodLabels = Field(default_factory=dict, description="Additional labels of the pods.")
    annotations: StringMap = Field(default_factory=dict, description="Additional annotations of the pods.")
    service_account_name: ShortText | None = Field(
        None, description="ServiceAccount of the pods; its token is not mounted. By default that of the namespace."
    )
    priority_class_name: ShortText | None = Field(
        None, description="PriorityClass of the pods; by default scheduling.priorityClassName."
    )
    scheduler_name: ShortText | None = Field(
        None, description="Scheduler of the pods; by default the one of scheduling.gang, or of the cluster."
    )
    runtime_class_name: ShortText | None = Field(
        None, description="RuntimeClass of the pods; by default the runtime of the node."
    )


def is_untouched_cel(template: str) -> str:
    """Return the CEL that says of the template at a path what `== PodTemplate()` says of a model."""
    fields = PodTemplate.model_fields
    absent = [f"!has({template}.{f.alias})" for f in fields.values() if f.default is None]
    empty = [f"{template}.{f.alias}.size() == 0" for f in fields.values() if f.default_factory in (list, dict)]
    others = [
        f"{template}.imagePullPolicy == '{fields['image_pull_policy'].default}'",
        f"{template}.resources.requests.size() == 0",
        f"{template}.resources.limits.size() == 0",
    ]
    assert len(absent) + len(empty) + 2 == len(fields), "a field of another kind: say here when it is untouched"
    return " && ".join([*absent, *empty, *others])
