"""Nothing stands in the contract for show: every field is read, every metric is set, every reason is given."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from distill_api import metrics
from distill_api.pods.template import RoleTemplate
from distill_api.protocol import ExitReason, ProgressReport, Variable
from distill_api.spec.job_spec import Spec
from distill_api.status import ConditionType, Reason, Status
from distill_api.teacher.kind import TeacherSpec, TeacherStatus

REPO = Path(__file__).resolve().parents[2]
SOURCES = [
    *(REPO / "operator" / "distill_operator").rglob("*.py"),
    REPO / "crds" / "distill_api" / "pods" / "former_template.py",
    *(REPO / "workers" / "distill_workers").rglob("*.py"),
]


def models(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all that its fields hold."""
    todo, seen = [root], set[type[BaseModel]]()
    while todo:
        model = todo.pop()
        if model in seen:
            continue
        seen.add(model)
        yield model
        for field in model.model_fields.values():
            todo += [t for t in flat(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]


def flat(annotation: object) -> Iterator[object]:
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from flat(inner)


@pytest.fixture(scope="module")
def used() -> set[str]:
    """Every attribute name, keyword and string constant in the code of both sides."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                found.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


@pytest.mark.parametrize("model", [*models(Spec), *models(TeacherSpec)], ids=lambda m: m.__name__)
def test_every_field_of_the_spec_is_read(model: type[BaseModel], used: set[str]) -> None:
    read_by_the_model_itself = {
        "precision",
        "sources",
        "when",
    }  # by Spec.dtype, Data.all_sources, Output.at_checkpoints
    # Of release 0.2.0, read by their names in manifests.
    former = {name for name, field in model.model_fields.items() if model is RoleTemplate and field.alias in used}
    unread = set(model.model_fields) - used - read_by_the_model_itself - former
    assert {"dtype", "all_sources", "at_checkpoints"} <= used
    assert not unread, f"{model.__name__}: nothing reads {unread}"


@pytest.mark.parametrize("root", [Status, TeacherStatus, ProgressReport], ids=lambda m: m.__name__)
def test_every_field_of_the_status_is_set(root: type[BaseModel], used: set[str]) -> None:
    for model in models(root):
        unset = set(model.model_fields) - used
        assert not unset, f"{model.__name__}: nothing sets {unset}"


def test_every_metric_is_set(used: set[str]) -> None:
    names = {m.name for m in (*metrics.WORKER_METRICS, *metrics.OPERATOR_METRICS)}
    set_by_its_kind = {"distill_operator_reconcile_duration_seconds"}  # the operator's only histogram
    unset = names - used - set_by_its_kind
    assert not unset, f"nothing sets {unset}"


@pytest.mark.parametrize("enum", [ConditionType, Reason, ExitReason, Variable], ids=lambda e: e.__name__)
def test_every_word_of_the_contract_is_said(enum: type[Reason], used: set[str]) -> None:
    unsaid = {member.name for member in enum} - used
    assert not unsaid, f"{enum.__name__}: nobody says {unsaid}"
