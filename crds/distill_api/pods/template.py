"""The pods of a role as Kubernetes writes them, to be merged over what the operator writes.

The schema leaves `spec` open, so that the CRD stays small: refusals.py names what may not be overridden, and a dry
run of the API server judges the rest before the first pod. The other fields of a role's template are those of release
0.2.0, which former_template.py turns into pods.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from distill_api.base import SHORT_KEYS, WITHOUT_NULLS, KubernetesObject, Model, ShortText, StringMap
from distill_api.pods import former_template, refusals
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
    r"^((distillation-operator|ray|batch\.kubernetes|kueue\.x-k8s)\.io/.*"
    r"|app\.kubernetes\.io/(managed-by|part-of)|job-name|controller-uid)$"
)
PodLabels = Annotated[
    StringMap,
    Rule(
        "may not have keys under distillation-operator.io/, ray.io/, batch.kubernetes.io/ or kueue.x-k8s.io/, nor "
        "app.kubernetes.io/managed-by or part-of, job-name or controller-uid: controllers use these",
        f"self.all(key, !key.matches(r'{_RESERVED}'))",
        lambda labels: not any(re.fullmatch(_RESERVED, key) for key in labels),
    ),
]
"""Labels that a user adds to pods: none by which somebody would take them for another owner's."""
ObjectList = Annotated[list[KubernetesObject], Field(max_length=32)]


class PodMetadata(Model):
    """Labels and annotations of pods."""

    labels: PodLabels = Field(default_factory=dict, description="Additional labels of the pods.")
    annotations: StringMap = Field(default_factory=dict, description="Additional annotations of the pods.")


class PodTemplate(Model):
    """A PodTemplateSpec, merged over what the operator writes, as kubectl merges a strategic patch.

    Lists of named things are merged by the name, other values are replaced, and null leaves out what the operator
    writes. The container `main` is the role's own.
    """

    metadata: PodMetadata | None = Field(None, description="Labels and annotations of the pods.")
    spec: Annotated[KubernetesObject, AfterValidator(refusals.check)] | None = Field(
        None,
        description="Spec of the pods, as in Kubernetes: containers (main is the role's own), initContainers, volumes, "
        "tolerations and so on. What only the operator may set is refused by name.",
    )

    def patches(self) -> list[dict[str, Any]]:
        """Return what is to be merged over the operator's pods, in this order, each as a PodTemplateSpec."""
        metadata = self.metadata.model_dump(by_alias=True, exclude_defaults=True) if self.metadata else {}
        given = {"metadata": metadata, "spec": self.spec}
        return [{key: value for key, value in given.items() if value}]


class Resources(Model):
    """Compute resources of the role's main container, as release 0.2.0 had them."""

    requests: ResourceList | None = Field(None, description="Resource requests.")
    limits: ResourceList | None = Field(None, description="Resource limits.")


def _former(place: str) -> str:
    return f"Deprecated: now {place}."


class RoleTemplate(PodTemplate):
    """A PodTemplate of one role, merged over the job's podTemplate.

    The deprecated fields are those of release 0.2.0; `distill migrate` rewrites them.
    """

    image: ShortText | None = Field(None, description=_former("image of the container main"))
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description=_former("imagePullPolicy of the container main")
    )
    image_pull_secrets: Annotated[list[ShortText], Field(max_length=8)] | None = Field(
        None, description=_former("spec.imagePullSecrets")
    )
    resources: Resources | None = Field(None, description=_former("resources of the container main"))
    env: ObjectList | None = Field(None, description=_former("env of the container main"))
    volumes: ObjectList | None = Field(None, description=_former("spec.volumes"))
    volume_mounts: ObjectList | None = Field(None, description=_former("volumeMounts of the container main"))
    node_selector: StringMap | None = Field(None, description=_former("spec.nodeSelector"))
    tolerations: ObjectList | None = Field(None, description=_former("spec.tolerations"))
    affinity: KubernetesObject | None = Field(None, description=_former("spec.affinity"))
    labels: PodLabels | None = Field(None, description=_former("metadata.labels"))
    annotations: StringMap | None = Field(None, description=_former("metadata.annotations"))
    service_account_name: ShortText | None = Field(None, description=_former("spec.serviceAccountName"))
    priority_class_name: ShortText | None = Field(None, description=_former("spec.priorityClassName"))
    scheduler_name: ShortText | None = Field(None, description=_former("spec.schedulerName"))
    runtime_class_name: ShortText | None = Field(None, description=_former("spec.runtimeClassName"))

    def patches(self) -> list[dict[str, Any]]:
        """Return what is to be merged over the operator's pods: what the fields of release 0.2.0 say goes first."""
        written = self.model_dump(by_alias=True, exclude_none=True, exclude={"metadata", "spec"})
        return [former_template.as_pod(written), *super().patches()]


def main_containers(patches: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return what each patch says of the main container of a role, by `main` or by its own name."""
    return [
        container
        for patch in patches
        for container in patch.get("spec", {}).get("containers", [])
        if container.get("name") in (refusals.MAIN, name)
    ]


def is_untouched_cel(template: str) -> str:
    """Return the CEL that says of the template at a path what `is_untouched` says of a model."""
    fields = {name: field.alias or name for name, field in RoleTemplate.model_fields.items()}
    sized = [*former_template.LISTS, *former_template.MAPS]
    default = f"(!has(t.imagePullPolicy) || t.imagePullPolicy == '{former_template.PULL_POLICY}')"
    resources = " && ".join(
        f"(!has(t.resources.{part}) || t.resources.{part}.size() == 0)" for part in ("requests", "limits")
    )
    others = {"imagePullPolicy": default, "resources": f"(!has(t.resources) || ({resources}))"}
    others |= {field: f"(!has(t.{field}) || t.{field}.size() == 0)" for field in sized}
    said = " && ".join(others.get(field, f"!has(t.{field})") for field in fields.values())
    return f"[{template}].all(t, {said})"


def is_untouched(template: RoleTemplate) -> bool:
    """Return whether a template says nothing: release 0.2.0 stored its defaults in every job."""
    absent = (template.metadata, template.spec, template.affinity)
    return absent == (None, None, None) and not any(template.patches())
