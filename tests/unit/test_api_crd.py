"""The generated CustomResourceDefinition: up to date, small, and bounded as Kubernetes' own linter for APIs asks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_api.generate.crd import JOB, TEACHER, Definition, crd, to_yaml, write_atomically
from distill_api.generate.docs import reference
from distill_api.pods import former_template
from distill_api.spec.job_spec import Rollout, Spec

ROOT = Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize("of", [JOB, TEACHER], ids=lambda of: of.kind)


def schema(of: Definition) -> dict[str, Any]:
    found: dict[str, Any] = crd(of)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below one, with its path."""
    yield path or ".", node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for kind in ("items", "additionalProperties"):
        if kind in node:
            yield from nodes(node[kind], f"{path}[]")


NODES = {f"{of.kind}{path}": node for of in (JOB, TEACHER) for path, node in nodes(schema(of))}
"""Of both kinds."""
OURS = {path: node for path, node in NODES.items() if path.partition(".")[2].startswith(("spec", "status"))}


@BOTH
def test_the_committed_crd_is_what_the_models_make(of: Definition) -> None:
    assert (ROOT / "crds" / f"{of.plural}.yaml").read_text() == to_yaml(crd(of)), "run `make crds`"


def test_the_committed_reference_is_what_the_models_make() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == reference(), "run `make crds`"


@BOTH
def test_the_crd_is_small_enough_for_a_client_side_apply(of: Definition) -> None:
    """`kubectl apply` keeps the object as compact JSON in an annotation, and annotations may hold 262,144 bytes."""
    annotation = json.dumps(crd(of), separators=(",", ":"))
    assert len(annotation.encode()) < 200_000


@BOTH
def test_the_yaml_holds_no_anchor_and_reads_back(of: Definition) -> None:
    text = to_yaml(crd(of))
    assert yaml.safe_load(text) == crd(of)
    assert "&id" not in text


def test_every_field_is_described() -> None:
    named = {p: n for p, n in OURS.items() if not p.endswith("[]")}
    assert {path for path, node in named.items() if not node.get("description")} == set()


def test_every_description_is_a_sentence() -> None:
    assert {p: n["description"] for p, n in OURS.items() if n.get("description", ".")[-1] not in ".;"} == {}


@BOTH
def test_a_long_description_stands_once_and_where_it_recurs_the_field_that_has_it_is_named(of: Definition) -> None:
    spec = {p.replace("[]", ""): n for p, n in NODES.items() if p.startswith(f"{of.kind}.spec") and p[-1] != "]"}
    texts = [n["description"] for n in spec.values() if len(n.get("description", "")) > 80]
    assert len(texts) == len(set(texts))
    named = {n["description"][3:-1] for n in spec.values() if n.get("description", "").startswith("As spec.")}
    assert all(len(spec[f"{of.kind}.{path}"]["description"]) > 80 for path in named)


def test_every_list_has_a_type_and_a_bound() -> None:
    lists = {p: n for p, n in NODES.items() if n.get("type") == "array"}
    assert lists
    assert {p for p, n in lists.items() if "x-kubernetes-list-type" not in n or "maxItems" not in n} == set()


def test_every_string_has_a_bound() -> None:
    text = {p: n for p, n in NODES.items() if n.get("type") == "string" or "x-kubernetes-int-or-string" in n}
    assert {p for p, n in text.items() if "maxLength" not in n} == set()


def test_every_number_has_two_bounds() -> None:
    numbers = {p: n for p, n in NODES.items() if n.get("type") in ("integer", "number")}
    assert {p for p, n in numbers.items() if "minimum" not in n or "maximum" not in n} == set()


def test_every_map_has_a_bound() -> None:
    maps = {p: n for p, n in NODES.items() if "additionalProperties" in n}
    assert {p for p, n in maps.items() if "maxProperties" not in n} == set()


def test_only_pieces_of_a_pod_options_of_a_task_and_arguments_of_a_template_are_open() -> None:
    names = {
        p.removesuffix("[]").split(".")[-1] for p, n in NODES.items() if "x-kubernetes-preserve-unknown-fields" in n
    }
    former = {"env", "volumes", "volumeMounts", "tolerations", "affinity"}
    assert names == {"spec", *former, "options", "chatTemplateArguments", "arguments"}


def test_the_schema_has_no_word_that_a_structural_one_forbids() -> None:
    forbidden = {"$ref", "anyOf", "allOf", "oneOf", "const", "title", "nullable", "propertyNames", "$defs"}
    assert {p for p, n in NODES.items() if forbidden & set(n)} == set()


def test_every_optional_field_of_the_spec_but_an_absent_one_has_a_default() -> None:
    def bare(node: dict[str, Any]) -> set[str]:
        return {name for name, p in node["properties"].items() if "default" not in p} - set(node.get("required", []))

    found = {name for p, n in OURS.items() if ".spec" in p and "properties" in n for name in bare(n)}
    assert found == {
        # absent means something that no value says
        *("forwardKlAboveEntropy", "entryClip", "reference", "teacherPrompt", "teacherSystemPrompt"),
        *("path", "reasoningGym", "answerField", "systemPrompt", "function", "maxResponseTokens", "volume"),
        *("queue", "topologyKey", "autoscaling", "lora", "steps", "sequenceHigh", "keepEvery"),
        *("above", "below", "aboveRatio", "belowRatio", "evaluation", "drop"),
        *("prompts", "dataset", "config", "revision", "responseField", "chatTemplateArguments", "reward", "url"),
        *("activeDeadlineSeconds", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished"),
        *("wandb", "mlflow", "entity", "keySecret", "secret"),
        *("environment", "agent", "tools", "verifiers", "arguments", "curriculum", "turns", "last"),
        *("teacher", "model", "ref", "endpoint", "keySecret", "vocabularySize", "teacherField", "defaultTeacher"),
        *("accelerator", "tokenizer", "student"),
        # of a phase, whose absent fields are those of spec.objective
        *(
            "divergence",
            "support",
            "topK",
            "jsdBeta",
            "datasetShare",
            "datasetResponses",
            "coefficient",
            "coefficientSchedule",
        ),
        *("discount", "discountedReturn", "baseline", "weighting", "rewardCoefficient", "rewardCoefficientSchedule"),
        *("untilStep", "untilFlat"),
        *("metadata", "spec", "requests", "limits", "priorityClassName"),
        *former_template.FIELDS,
    }


def test_the_status_has_no_default() -> None:
    assert {p for p, n in NODES.items() if ".status" in p and "default" in n} == set()


def test_a_transition_rule_stands_only_where_the_field_is_always_present_or_may_not_come_or_go() -> None:
    """CEL does not run a rule with oldSelf for a field that comes or goes: such a field would be mutable."""
    for path, node in NODES.items():
        for name, child in node.get("properties", {}).items():
            if any("oldSelf" in rule["rule"] for rule in child.get("x-kubernetes-validations", [])):
                always = "default" in child or name in node.get("required", [])
                guarded = f"has(self.{name}) == has(oldSelf.{name})" in str(node.get("x-kubernetes-validations"))
                assert always or guarded, f"{path}.{name}"


def test_what_may_change_in_a_running_job_is_little() -> None:
    def frozen(node: dict[str, Any]) -> set[str]:
        return {n for n, c in node["properties"].items() if "self == oldSelf" in str(c.get("x-kubernetes-validations"))}

    spec = schema(JOB)["properties"]["spec"]
    rollout = spec["properties"]["rollout"]
    assert set(rollout["properties"]) - frozen(rollout) == {"replicas"}
    teacher, one_of_several = spec["properties"]["teacher"], spec["properties"]["teachers"]["items"]
    assert set(teacher["properties"]) - frozen(teacher) == {"replicas"}
    assert set(one_of_several["properties"]) - frozen(one_of_several) == {"replicas"}
    assert set(spec["properties"]) - frozen(spec) == {
        *("teacher", "teachers"),  # for their replicas
        *("suspend", "rollout", "backoffLimit", "stallTimeoutSeconds", "ttlSecondsAfterFinished"),
        *("activeDeadlineSeconds", "preRunningDeadlineSeconds", "stallPolicy"),
    }
    assert Rollout.mutable is not None and Rollout.mutable <= set(Rollout.model_fields)
    assert Spec.mutable is not None and Spec.mutable <= set(Spec.model_fields)


@pytest.mark.parametrize(
    "path",
    [
        ".status.conditions",
        ".status.roles",
        ".status.progress.evaluations",
        ".spec.evaluation",
        ".spec.teachers",
        ".spec.phases",
    ],
)
def test_lists_of_named_things_merge_by_their_name(path: str) -> None:
    assert NODES[f"DistillationJob{path}"]["x-kubernetes-list-type"] == "map"
    assert NODES[f"DistillationJob{path}"]["x-kubernetes-list-map-keys"] == [
        "type" if path.endswith("conditions") else "name"
    ]


@BOTH
def test_the_printer_columns_point_at_fields_that_exist(of: Definition) -> None:
    for column in of.columns:
        path = column["jsonPath"].split("[")[0]
        assert f"{of.kind}{path}" in NODES or path.startswith(".metadata"), path


def test_the_columns_of_a_job_are_few() -> None:
    assert [c["name"] for c in JOB.columns if "priority" not in c] == [
        *("State", "Step", "KL", "Reward", "Teacher", "Rollout", "Trainer", "Restarts", "Age"),
    ]


def test_of_a_teacher_only_the_number_of_its_servers_may_change() -> None:
    fields = schema(TEACHER)["properties"]["spec"]["properties"]
    assert {n for n, c in fields.items() if "oldSelf" not in str(c.get("x-kubernetes-validations"))} == {
        *("replicas", "autoscaling"),
    }


def test_half_a_file_is_never_left(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
