"""`distill migrate`: what release 0.2.0 took becomes what this one takes, and says the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from operator_fakes import SETTINGS, Json

from distill_api.job import parse_job
from distill_api.manifest import read_manifests
from distill_api.pods import former_template
from distill_api.teacher.kind import parse_teacher
from distill_cli.commands.migrate import migrated_text
from distill_cli.main import cli, main
from distill_operator.resources import rendering, teacher_servers

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "tests" / "releases" / "examples-0.2.0").glob("*.yaml"))
FORMER = ROOT / "tests" / "manifests" / "good" / "former-template.yaml"


def pods(manifest: Json) -> list[Any]:
    """The children that have pods, but for the hashes, of each job or Teacher in an object."""
    if manifest["kind"] == "AppWrapper":
        return pods(manifest["spec"]["components"][1]["template"])
    if manifest["kind"] == "Teacher":
        return [teacher_servers.deployment(parse_teacher(manifest), SETTINGS, 1)["spec"]]
    job = parse_job(manifest)
    return [c["spec"] for c in (*rendering.serving(job, SETTINGS), rendering.training(job, SETTINGS, 1))]


@pytest.mark.parametrize("path", [*EXAMPLES, FORMER], ids=lambda p: p.stem)
def test_a_manifest_of_release_0_2_0_makes_the_same_pods_after_it_was_migrated(path: Path) -> None:
    text = path.read_text()
    after = migrated_text(text)
    assert list(former_template.templates(read_manifests(text)))
    assert not list(former_template.templates(read_manifests(after)))
    assert [pods(m) for m in read_manifests(after)] == [pods(m) for m in read_manifests(text)]
    assert migrated_text(after) == after, "once"


WRITTEN = """# One job.
apiVersion: distillation-operator.io/v1alpha1
kind: DistillationJob
spec:
  # The student.
  student: {model: /models/student}   # small
  rollout:
    template: &models
      env: [{name: A, value: "1"}]
      nodeSelector: {pool: gpu}

  # Then the trainer.
  trainer: {template: *models, nodes: 2}
  teacher: {model: m, template: {image: i}}
"""
MIGRATED = """# One job.
apiVersion: distillation-operator.io/v1alpha1
kind: DistillationJob
spec:
  # The student.
  student: {model: /models/student}   # small
  rollout:
    template: &models
      spec:
        containers:
        - name: main
          env:
          - {name: A, value: '1'}
        nodeSelector: {pool: gpu}

  # Then the trainer.
  trainer: {template: *models, nodes: 2}
  teacher: {model: m, template: {spec: {containers: [{name: main, image: i}]}}}
"""


def test_what_is_outside_of_templates_stays_as_it_is_written_comments_and_anchors_too() -> None:
    assert migrated_text(WRITTEN) == MIGRATED


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_examples_have_nothing_to_migrate(path: Path) -> None:
    assert migrated_text(path.read_text()) == path.read_text()


def test_an_anchor_of_a_template_that_is_used_outside_of_it_is_written_out() -> None:
    text = FORMER.read_text().replace("env: [", "env: &env [")
    text += "  podTemplate: {spec: {containers: [{name: main, env: *env}]}}\n"
    (after,) = read_manifests(migrated_text(text))
    (before,) = read_manifests(text)
    assert after["spec"]["podTemplate"] == before["spec"]["podTemplate"]
    assert pods(after) == pods(before)


def test_json_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    spec = {"trainer": {"template": {"image": "i"}}}
    path.write_text(json.dumps({"apiVersion": "distillation-operator.io/v1alpha1", "spec": spec}))
    assert main(["migrate", str(path), "--write"]) == 0
    assert json.loads(path.read_text())["spec"]["trainer"]["template"]["spec"]["containers"][0]["image"] == "i"


def test_a_template_that_is_pods_in_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    text = "apiVersion: distillation-operator.io/v1alpha1\nspec: {trainer: {template: {image: i, spec: {}}}}\n"
    path.write_text(text)
    assert main(["migrate", str(path)]) == 1
    assert path.read_text() == text


def test_validate_says_which_templates_are_written_as_in_release_0_2_0() -> None:
    done = CliRunner().invoke(cli, ["validate", "-f", str(FORMER)])
    assert "spec.teacher.template is written as in release 0.2.0: `distill migrate` rewrites it" in done.stderr
    assert "is valid" in done.stdout
