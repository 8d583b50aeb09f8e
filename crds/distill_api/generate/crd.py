"""The CustomResourceDefinitions, generated from the models: `python -m distill_api.generate.crd FOLDER` writes them.

The API server wants a structural OpenAPI v3.0 schema: no references, no alternatives, a type and a bound on everything.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill_api.base import GROUP, KIND, PLURAL, VERSION, Model
from distill_api.job import NAME_RULES
from distill_api.names import Role
from distill_api.rules import LIST_TYPE, VALIDATIONS
from distill_api.spec.job_spec import Spec
from distill_api.status import ConditionType, Status
from distill_api.teacher import kind as teacher_kind
from distill_api.teacher.kind import TeacherSpec, TeacherStatus

Schema = dict[str, Any]

HEADER = "# Made from crds/distill_api by `make crds`. Do not edit.\n"
_KEPT = {
    "type", "description", "default", "enum", "format", "pattern", "required",
    "minimum", "maximum", "minLength", "maxLength", "maxItems", "maxProperties",
}  # fmt: skip
_LONG = 80
"""The characters above which a description is written once."""


@dataclass(frozen=True)
class Definition:
    """A kind of the API group, with all that its CustomResourceDefinition needs."""

    kind: str
    plural: str
    short_name: str
    description: str
    spec: type[Model]
    status: type[Model]
    columns: tuple[Schema, ...]
    subresources: tuple[tuple[str, Schema], ...] = ()


def crd(of: Definition | None = None) -> Schema:
    """Return the CustomResourceDefinition of a kind, by default DistillationJob, as a plain dict."""
    of = of or JOB
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{of.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": of.kind,
                "listKind": f"{of.kind}List",
                "plural": of.plural,
                "singular": of.kind.lower(),
                "shortNames": [of.short_name],
                "categories": ["distillation"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}, **dict(of.subresources)},
                    "additionalPrinterColumns": list(of.columns),
                    "schema": {"openAPIV3Schema": _root(of)},
                }
            ],
        },
    }


def printer_columns() -> list[Schema]:
    """Return the columns of `kubectl get djob`. A role's column is the reason of its condition: why it is not ready."""

    def reason(condition: ConditionType) -> str:
        return f'.status.conditions[?(@.type=="{condition}")].reason'

    progress = ".status.progress."
    columns = [
        ("State", "string", reason(ConditionType.SUCCEEDED), "Phase of the job, or how it ended."),
        ("Step", "integer", f"{progress}step", "Optimiser steps done."),
        ("KL", "string", f"{progress}reverseKL", "Reverse KL of student to teacher, nats per token."),
        ("Reward", "string", f"{progress}reward", "Mean task reward of the last step."),
        ("Teacher", "string", reason(ConditionType.TEACHER_READY), "Whether the teacher is ready, or why not."),
        ("Rollout", "string", reason(ConditionType.ROLLOUT_READY), "Whether the engines are ready, or why not."),
        ("Trainer", "string", reason(ConditionType.TRAINER_READY), "Whether the trainer is ready, or why not."),
        ("Restarts", "integer", ".status.restarts", "Failed attempts."),
        ("Age", "date", ".metadata.creationTimestamp", "Time since the job was created."),
    ]
    wide = [
        ("Engines", "integer", f'.status.roles[?(@.name=="{Role.ROLLOUT}")].ready', "Engine pods that are ready."),
        ("Tokens/s", "string", f"{progress}tokensPerSecond", "Response tokens trained per second."),
        (
            "Remaining",
            "integer",
            f"{progress}estimatedRemainingSeconds",
            "Estimated seconds to the end, at the speed of the last steps.",
        ),
        ("Student", "string", ".spec.student.model", "Model that is trained."),
    ]
    return _columns(columns, wide)


def teacher_columns() -> list[Schema]:
    """Return the columns of `kubectl get dteacher`."""
    ready = f'.status.conditions[?(@.type=="{ConditionType.READY}")].reason'
    columns = [
        ("State", "string", ready, "Whether the Teacher is ready, or why not."),
        ("Servers", "integer", ".status.readyReplicas", "Servers that are ready."),
        ("Wanted", "integer", ".status.desiredReplicas", "Servers wanted, by replicas or by the autoscaler."),
        ("Jobs", "integer", ".status.jobs", "Running jobs that use this Teacher."),
        ("Requests", "integer", ".status.requests", "Scoring requests of those jobs, waiting and in flight."),
        ("Age", "date", ".metadata.creationTimestamp", "Time since the Teacher was created."),
    ]
    return _columns(columns, [("Model", "string", ".spec.model", "Model that the Teacher serves.")])


def _columns(always: list[tuple[str, str, str, str]], wide: list[tuple[str, str, str, str]]) -> list[Schema]:
    return [
        {"name": name, "type": kind, "jsonPath": path, "description": text, **({"priority": 1} if late else {})}
        for late, group in ((False, always), (True, wide))
        for name, kind, path, text in group
    ]


def _root(of: Definition) -> Schema:
    return {
        "description": of.description,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "maxLength": 253, "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "maxLength": 63, "description": of.kind},
            "metadata": {"type": "object"},  # the server allows nothing more here
            "spec": _described_once(structural(of.spec), "spec", {}),
            "status": _without_defaults(structural(of.status)),
        },
        VALIDATIONS: [
            {"rule": r.cel.replace("self", "self.metadata.name", 1), "message": f"metadata.name {r.message}"}
            for r in NAME_RULES
        ],
    }


def structural(model: type[Model]) -> Schema:
    """Return the structural schema of a model."""
    schema = model.model_json_schema(by_alias=True)
    return structural_node(schema, schema.get("$defs", {}))


def structural_node(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return the structural schema of a node of a JSON schema whose references are among the definitions."""
    node = _plain(node, definitions)
    out = {key: value for key, value in node.items() if key in _KEPT or key.startswith("x-kubernetes-")}
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in node:  # OpenAPI 3.0 has a flag where JSON schema has a number
            out |= {bound: node[exclusive], exclusive: True}
    if "properties" in node:
        out["properties"] = {name: structural_node(p, definitions) for name, p in node["properties"].items()}
    if isinstance(node.get("additionalProperties"), dict) and node["additionalProperties"]:
        out["additionalProperties"] = structural_node(node["additionalProperties"], definitions)
    if "items" in node:
        out["items"] = structural_node(node["items"], definitions)
        out.setdefault(LIST_TYPE, "atomic")
    if "enum" in node:
        out["maxLength"] = max(len(value) for value in node["enum"])
    return out


def _plain(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return the node without references, and without null, which absence stands for.

    The keywords of a field take precedence over those of its type.
    """
    if "$ref" in node:
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
    elif "anyOf" in node:
        (target,) = (option for option in node["anyOf"] if option != {"type": "null"})
    else:
        return node
    own = {key: value for key, value in node.items() if key not in ("$ref", "anyOf") and value is not None}
    target = _plain(target, definitions)
    rules = target.get(VALIDATIONS, []) + own.get(VALIDATIONS, [])
    return {**target, **own, **({VALIDATIONS: rules} if rules else {})}


def _described_once(node: Schema, path: str, seen: dict[str, str]) -> Schema:
    """Return a schema in which a long description that stands at several fields stands once; the others refer to it.

    seen: each long description so far, with the path of its field; what is found is added.
    """
    out = dict(node)
    text = out.get("description", "")
    if len(text) > _LONG and seen.setdefault(text, path) != path:
        out["description"] = f"As {seen[text]}."
    if "properties" in out:
        out["properties"] = {n: _described_once(p, f"{path}.{n}", seen) for n, p in out["properties"].items()}
    if "items" in out:
        out["items"] = _described_once(out["items"], path, seen)
    return out


def _without_defaults(node: Schema) -> Schema:
    """Return a schema without defaults: a status has only what the operator observed, nothing that the server added."""
    out = {key: value for key, value in node.items() if key != "default"}
    if "properties" in out:
        out["properties"] = {name: _without_defaults(p) for name, p in out["properties"].items()}
    if "items" in out:
        out["items"] = _without_defaults(out["items"])
    return out


class _Dumper(yaml.SafeDumper):
    """A dumper that repeats equal values instead of using anchors, which readers of a CRD do not expect."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(manifest: Schema) -> str:
    """Return a manifest as YAML, each text on a line of its own, with the comment that it is generated."""
    return HEADER + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=sys.maxsize, allow_unicode=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all: into a temporary file beside it, which then replaces it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


JOB = Definition(
    KIND,
    PLURAL,
    "djob",
    "An on-policy distillation: a student learns from a teacher on its own samples.",
    Spec,
    Status,
    tuple(printer_columns()),
)
TEACHER = Definition(
    teacher_kind.KIND,
    teacher_kind.PLURAL,
    "dteacher",
    "A served model that several DistillationJobs of its namespace learn from, by spec.teacher.ref.",
    TeacherSpec,
    TeacherStatus,
    tuple(teacher_columns()),
    (("scale", {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.readyReplicas"}),),
)


if __name__ == "__main__":
    for definition in (JOB, TEACHER):
        write_atomically(Path(sys.argv[1]) / f"{definition.plural}.yaml", to_yaml(crd(definition)))
