"""--set changes one value of a manifest, and says what is allowed where a path names nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_api.job import InvalidManifest, parse_job
from distill_cli.overrides import BadOverride, with_overrides

MANIFEST = Path(__file__).resolve().parents[1] / "manifests" / "good" / "every-field.yaml"


@pytest.fixture
def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    return found


def at(manifest: dict[str, Any], *keys: str | int) -> Any:
    node: Any = manifest
    for key in keys:
        node = node[key]
    return node


@pytest.mark.parametrize(
    ("setting", "keys", "value"),
    [
        ("spec.schedule.steps=10", ("spec", "schedule", "steps"), 10),
        ("spec.trainer.optimizer.learningRate=1e-6", ("spec", "trainer", "optimizer", "learningRate"), 1e-6),
        ("spec.evaluation.math500.maxPrompts=8", ("spec", "evaluation", 0, "maxPrompts"), 8),
        ("spec.evaluation[1].maxPrompts=8", ("spec", "evaluation", 1, "maxPrompts"), 8),
        ("spec.evaluation[0].reward.source=none", ("spec", "evaluation", 0, "reward", "source"), "none"),
        ("spec.evaluation=[]", ("spec", "evaluation"), []),
        ("spec.rollout={maxPolicyLag: 0}", ("spec", "rollout"), {"maxPolicyLag": 0}),
        ("spec.teacher.template.labels.team=x", ("spec", "teacher", "template", "labels", "team"), "x"),
        ("spec.teacher.engineArgs[1]=0.9", ("spec", "teacher", "engineArgs", 1), 0.9),
        ("spec.student.model=/a=b", ("spec", "student", "model"), "/a=b"),
        ("spec.ttlSecondsAfterFinished=", ("spec", "ttlSecondsAfterFinished"), None),
        ("metadata.name=other", ("metadata", "name"), "other"),
    ],
)
def test_a_value_is_set_where_its_path_says(
    manifest: dict[str, Any], setting: str, keys: tuple[str | int, ...], value: object
) -> None:
    changed = with_overrides(manifest, [setting])
    assert at(changed, *keys) == value
    assert manifest == yaml.safe_load(MANIFEST.read_text()), "the manifest itself stays as it is"


def test_what_the_manifest_leaves_out_is_made_on_the_way(manifest: dict[str, Any]) -> None:
    del manifest["spec"]["trainer"]
    changed = with_overrides(manifest, ["spec.trainer.optimizer.clipGrad=2", "spec.trainer.optimizer.clipGrad=3"])
    assert changed["spec"]["trainer"] == {"optimizer": {"clipGrad": 3}}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("spec.schedule.step=10", "spec.schedule has no field step; did you mean steps"),
        ("spec.max_policy_lag=1", "spec has no field max_policy_lag; allowed are accelerator, "),
        ("sepc.seed=1", "the manifest has no field sepc; did you mean spec?"),
        ("spec.evaluation.math50.maxPrompts=8", "spec.evaluation has no item math50; did you mean math500?"),
        ("spec.evaluation[7].maxPrompts=8", r"spec.evaluation has no item 7; allowed are math500, divergence-only"),
        ("spec.teacher.engineArgs[9]=x", r"spec.teacher.engineArgs has no item 9; allowed are 0 to 1"),
        ("spec.seed.value=1", "spec.seed is a single value and has no field value"),
        ("spec.schedule.steps", "has no value; write PATH=VALUE"),
        ("spec..[x].steps=1", "is no path"),
        ("spec.seed=[1", "the value is not YAML"),
    ],
)
def test_a_path_that_names_nothing_is_one_sentence_with_what_is_allowed(
    manifest: dict[str, Any], setting: str, sentence: str
) -> None:
    with pytest.raises(BadOverride) as caught:
        with_overrides(manifest, [setting])
    assert str(caught.value).startswith(f"--set {setting.split('=')[0]}")
    assert re.search(sentence, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_value_is_validated_as_the_manifest_is(manifest: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest, match=r"spec\.schedule\.steps: must be an integer"):
        parse_job(with_overrides(manifest, ["spec.schedule.steps=ten"]))
