"""`distill validate`: which manifests are taken, and what the others are told. tests/api asks the server the same."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from distill_api.generate.crd import crd
from distill_api.job import InvalidManifest, load_job, parse_job
from distill_api.manifest import read_manifest
from distill_api.rules import Rule
from distill_api.spec.job_spec import Prompts, Protocol, Spec
from distill_api.teacher.kind import parse_teacher
from distill_api.training_phases import cluster_rule

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "tests" / "manifests"
BAD = sorted((MANIFESTS / "bad").glob("*.yaml"))
SINGLE_BAD = [p for p in BAD if "# offline: none" not in p.read_text()]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
PROMPTS = {"path": "/data/p.jsonl", "responseField": "response"}
HELD_OUT = {"name": "held-out", "prompts": PROMPTS}
GOOD = [*sorted((MANIFESTS / "good").glob("*.yaml")), *sorted((ROOT / "examples").glob("*.yaml")), *RECIPES]
TEACHERS = [path for path in GOOD if "kind: Teacher" in path.read_text()]
GOOD = [path for path in GOOD if "kind: DistillationJob" in path.read_text()]


def problems_of(path: Path) -> list[str]:
    with pytest.raises(InvalidManifest) as caught:
        load_job(path)
    return caught.value.problems


def minimal(**spec: Any) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((MANIFESTS / "good" / "minimal.yaml").read_text())
    manifest["spec"].update(spec)
    return manifest


@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.stem)
def test_a_good_manifest_is_taken(path: Path) -> None:
    load_job(path)


@pytest.mark.parametrize("path", TEACHERS, ids=lambda p: p.stem)
def test_a_teacher_of_the_examples_is_taken_and_is_one_that_an_example_names(path: Path) -> None:
    found = parse_teacher(read_manifest(path.read_text()))
    named = [name for example in GOOD if example.parent != MANIFESTS / "good" for name in _shared(example)]
    assert found.metadata.name in named


def test_the_examples_have_each_way_to_come_by_a_teacher() -> None:
    teachers = [t for path in GOOD if path.parent.name == "examples" for t in load_job(path).spec.all_teachers]
    protocols = {t.endpoint.protocol for t in teachers if t.endpoint is not None}
    assert protocols == set(Protocol)
    assert any(t.ref for t in teachers) and any(t.model for t in teachers)
    assert any(len(load_job(path).spec.teachers) > 1 for path in GOOD if path.parent.name == "examples")


def _shared(path: Path) -> list[str]:
    return load_job(path).spec.shared_teachers


@pytest.mark.parametrize("path", SINGLE_BAD, ids=lambda p: p.stem)
def test_a_bad_manifest_is_refused_with_one_sentence_that_names_the_field_and_what_is_allowed(path: Path) -> None:
    found = re.search("^# expect: (.*)$", path.read_text(), re.MULTILINE)
    assert found, f"{path} lacks its expectation"
    problems = problems_of(path)
    assert len(problems) == 1, problems
    assert re.search(found[1], problems[0], re.IGNORECASE), problems[0]


def test_what_only_a_cluster_needs_is_not_needed_by_distill_run() -> None:
    load_job(MANIFESTS / "bad" / "output-without-volume.yaml")


@pytest.mark.parametrize("path", [p for p in BAD if p.stem.startswith("immutable-")], ids=lambda p: p.stem)
def test_each_half_of_a_forbidden_change_is_valid_by_itself(path: Path) -> None:
    before, after = yaml.safe_load_all(path.read_text())
    assert parse_job(before) != parse_job(after)


def test_every_rule_of_the_crd_is_broken_by_a_bad_manifest() -> None:
    def messages(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {rule["message"] for rule in node.get("x-kubernetes-validations", [])}
            return own.union(*(messages(child) for child in node.values()))
        return set().union(*(messages(child) for child in node)) if isinstance(node, list) else set()

    said = "\n".join(problem for path in SINGLE_BAD for problem in problems_of(path))
    for_the_server_alone = {message for message, _ in Spec.cluster_rules}
    rules = {m.removeprefix("metadata.name ") for m in messages(crd()) if "immutable" not in m} - for_the_server_alone
    assert len(rules) >= 15
    assert {rule for rule in rules if rule not in said} == set()


def test_the_server_is_asked_of_a_phase_only_what_a_phase_may_change() -> None:
    kept = Rule("", "self.objective.topK < 300 || has(self.objective.reference)", lambda spec: True)
    left_out = Rule("", "!has(self.objective.reference)", lambda spec: True)
    _, cel = cluster_rule([kept, left_out])
    changed = "(has(p.objective.topK) ? p.objective.topK : self.objective.topK)"
    assert cel.endswith(f" && ({changed} < 300 || has(self.objective.reference)))")


@pytest.mark.parametrize("path", SINGLE_BAD, ids=lambda p: p.stem)
def test_no_sentence_speaks_of_pydantic_or_python(path: Path) -> None:
    for jargon in ("Input should", "valid dictionary", "instance of", "NoneType", "Value error", "str_", "pattern"):
        assert jargon not in " ".join(problems_of(path))


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(InvalidManifest) as caught:
        parse_job(minimal(seed=-1, suspend="no", rollout={"replicas": 0}))
    assert len(caught.value.problems) == 3


def test_a_misspelt_field_is_told_the_one_that_was_meant() -> None:
    with pytest.raises(
        InvalidManifest, match=r'unknown field "spec.teacher.tensorParallel": did you mean tensorParallelSize'
    ):
        parse_job(minimal(teacher={"model": "m", "tensorParallel": 2}))


def test_an_unknown_field_is_told_those_that_exist() -> None:
    with pytest.raises(InvalidManifest, match=r'unknown field "spec.output.bucket": allowed are volume, path'):
        parse_job(minimal(output={"bucket": "s3"}))


def test_a_number_that_yaml_1_1_takes_for_a_string_is_a_number() -> None:
    rates = ("1e-6", "1E-6", "1.e-6", "+1e-06", "1.0e-6")
    for rate in rates:
        parsed = yaml.safe_load(f"optimizer: {{learningRate: {rate}}}")
        assert parse_job(minimal(trainer=parsed)).spec.trainer.optimizer.learning_rate == 1e-6


def test_a_date_is_left_as_it_is_written() -> None:
    text = (MANIFESTS / "good" / "minimal.yaml").read_text() + "  trainer: {template: {labels: {since: 2026-01-02}}}\n"
    assert parse_job(read_manifest(text)).spec.trainer.template.labels == {"since": "2026-01-02"}


def test_code_may_pass_none_for_a_field_that_is_absent_and_use_python_names() -> None:
    assert Prompts(path="/data", reasoning_gym=None, answer_field=None).path == "/data"
    with pytest.raises(ValidationError):
        Prompts(path=None)


def test_a_job_of_paths_alone_needs_no_hub_until_a_data_set_is_of_one() -> None:
    hub = {"name": "e", "prompts": {"dataset": {"name": "openai/gsm8k", "split": "test"}, "promptField": "question"}}
    assert not parse_job(minimal()).spec.needs_hub
    assert parse_job(minimal(evaluation=[hub])).spec.needs_hub
    assert parse_job(minimal(data={"sources": [{"name": "s", "prompts": hub["prompts"]}]})).spec.needs_hub
    assert parse_job(minimal(student={"model": "Qwen/Qwen3-8B"})).spec.needs_hub


def test_an_object_of_the_api_server_is_read_with_its_status_and_metadata() -> None:
    manifest = minimal()
    manifest["metadata"] |= {"uid": "u", "managedFields": [], "creationTimestamp": "2026-01-02T03:04:05Z"}
    manifest["status"] = {"anything": 1}
    assert parse_job(manifest).metadata.uid == "u"


@pytest.mark.parametrize("text", ["", "[]", "a: b: c", "--- 1\n--- 2\n", "\tx"])
def test_a_file_that_is_no_manifest_is_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert len(problems_of(path)) >= 1


def test_a_file_that_is_missing_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "none.yaml") == [f"{tmp_path}/none.yaml: cannot be read: No such file or directory"]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            {"data": {"sources": [{"name": "sums", "prompts": PROMPTS, "reward": {"source": "reasoning-gym"}}]}},
            "data.sources[sums].reward.source: reasoning-gym grades responses",
        ),
        (
            {
                "data": {"sources": [{"name": "sums", "prompts": PROMPTS, "reward": {"source": "environment"}}]},
                "rollout": {},
            },
            "data.sources[sums].reward.source: environment goes with rollout.environment only",
        ),
        (
            {"evaluation": [{**HELD_OUT, "reward": {"source": "environment"}}], "rollout": {}},
            "evaluation[held-out].reward.source: environment goes with rollout.environment only",
        ),
        (
            {"evaluation": [{**HELD_OUT, "reward": {"source": "environment"}, "scoreTeacher": True}]},
            "evaluation[held-out].scoreTeacher: the teacher has no conversations",
        ),
    ],
)
def test_what_does_not_go_with_an_environment_is_refused(spec: dict[str, Any], sentence: str) -> None:
    rollout = {"environment": {"function": "my_envs:Calculator"}}
    job = minimal(**{"data": {"prompts": PROMPTS}, "rollout": rollout, **spec})
    with pytest.raises(InvalidManifest, match=re.escape(sentence)):
        parse_job(job)


def test_an_environment_goes_with_its_own_reward_and_with_none() -> None:
    for source in ("environment", "none"):
        rollout = {"environment": {"function": "my_envs:Calculator"}}
        parse_job(minimal(rollout=rollout, objective={"reward": {"source": source}}))
