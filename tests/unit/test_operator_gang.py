"""Gangs: who belongs to the group, how each scheduler is told, and that all of it is off by default."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from operator_fakes import SETTINGS, job
from test_operator_children import pod_templates
from test_operator_plan import NOTHING, applied, begun, child, deleted, failed_once, plan_at, pods, says, serving

from distill_api.job import DistillationJob
from distill_api.status import ConditionType, Status
from distill_operator.model.observed import Claim, Observed
from distill_operator.resources import rendering
from go_modules import downloaded

ROOT = Path(__file__).resolve().parents[2]
LARGE = {
    "teacher": {"model": "/models/teacher", "replicas": 2},
    "rollout": {"replicas": 4},
    "trainer": {"nodes": 3, "gpusPerNode": 8},
}


def scheduled(**scheduling: Any) -> DistillationJob:
    return job(**LARGE, scheduling=scheduling)


def group(of: DistillationJob) -> Any:
    (found,) = rendering.group(of, SETTINGS)
    return found


def pod(of: DistillationJob, role: str) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Labels, annotations, spec."""
    template = pod_templates(of)[role]
    return template["metadata"]["labels"], template["metadata"]["annotations"], template["spec"]


def test_without_a_gang_there_is_no_group_and_the_pods_are_as_ever() -> None:
    assert rendering.group(job(), SETTINGS) == []
    for _, _, spec in (pod(job(), role) for role in ("teacher", "head", "engine", "trainer")):
        assert not {"schedulerName", "priorityClassName", "affinity"} & set(spec)


@pytest.mark.parametrize(
    ("gang", "queue", "version", "scheduler", "label", "annotations"),
    [
        (
            "scheduler-plugins",
            None,
            "scheduling.x-k8s.io/v1alpha1",
            "scheduler-plugins-scheduler",
            {"scheduling.x-k8s.io/pod-group": "job-gang"},
            {},
        ),
        (
            "volcano",
            "research",
            "scheduling.volcano.sh/v1beta1",
            "volcano",
            {},
            {"scheduling.k8s.io/group-name": "job-gang"},
        ),
        (
            "kai",
            "research",
            "scheduling.run.ai/v2alpha2",
            "kai-scheduler",
            {"kai.scheduler/queue": "research"},
            {"pod-group-name": "job-gang", "kai.scheduler/skip-podgrouper": "true"},
        ),
    ],
)
def test_each_scheduler_is_told_in_its_own_words(
    gang: str, queue: str | None, version: str, scheduler: str, label: dict[str, str], annotations: dict[str, str]
) -> None:
    of = scheduled(gang=gang, **({"queue": queue} if queue else {}))
    made = group(of)
    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == (version, "PodGroup", "job-gang")
    assert made["spec"] == {"minMember": 3, **({"queue": queue} if queue else {})}
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == (of.metadata.uid, True)
    labels, notes, spec = pod(of, "trainer")
    assert spec["schedulerName"] == scheduler
    assert label.items() <= labels.items() and annotations.items() <= notes.items()
    for role in ("teacher", "head", "engine"):
        labels, notes, spec = pod(of, role)
        assert "schedulerName" not in spec
        assert not set(label) & set(labels) and not set(annotations) & set(notes)


def test_a_gang_of_the_whole_job_has_every_pod_in_it() -> None:
    of = scheduled(gang="volcano", scope="job")
    assert group(of)["spec"]["minMember"] == 2 + 1 + 4 + 3
    for role in ("teacher", "head", "engine", "trainer"):
        _, notes, spec = pod(of, role)
        assert (notes["scheduling.k8s.io/group-name"], spec["schedulerName"]) == ("job-gang", "volcano")


def test_a_gang_of_the_whole_job_is_made_all_at_once_and_its_group_first() -> None:
    """Nobody in it gets a node before the trainer is there, so the trainer cannot wait for their nodes."""
    of = scheduled(gang="volcano", scope="job")
    made = applied(plan_at(of, begun(of), NOTHING))
    assert made.index("PodGroup/job-gang") < made.index("Deployment/job-teacher")
    assert made[-1] == "Job/job-trainer-1"
    trainer_alone = scheduled(gang="volcano")
    assert "Job/job-trainer-1" not in applied(plan_at(trainer_alone, begun(trainer_alone), NOTHING))


def test_a_group_follows_the_number_of_engines() -> None:
    scheduling = {"gang": "volcano", "scope": "job"}
    before = job(**LARGE, scheduling=scheduling)
    after = job(**{**LARGE, "rollout": {"replicas": 6}}, scheduling=scheduling)
    observed = Observed(children=(*serving(before), child(group(before))), pods=pods(before), claim=Claim.BOUND)
    assert "PodGroup/job-gang" in applied(plan_at(after, begun(before), observed))
    assert group(after)["spec"]["minMember"] == 12


def test_a_group_goes_with_its_attempt() -> None:
    of = scheduled(gang="volcano")
    status, observed = failed_once(of)
    found = plan_at(of, status, replace(observed, children=(*observed.children, child(group(of)))))
    assert deleted(found)[-1] == "PodGroup/job-gang"


def test_what_a_template_names_goes_before_what_is_said_for_all() -> None:
    template = {"schedulerName": "mine", "priorityClassName": "urgent"}
    of = job(scheduling={"gang": "volcano", "priorityClassName": "high"}, trainer={"template": template})
    assert group(of)["spec"]["priorityClassName"] == "high"
    classes = {role: pod(of, role)[2]["priorityClassName"] for role in ("teacher", "head", "engine", "trainer")}
    assert classes == {"teacher": "high", "head": "high", "engine": "high", "trainer": "urgent"}
    assert pod(of, "trainer")[2]["schedulerName"] == "mine"


def test_trainers_are_rather_near_each_other_and_what_the_user_said_of_affinity_stays() -> None:
    wanted = {"podAntiAffinity": {"x": 1}, "podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [1]}}
    trainer = {"nodes": 2, "template": {"affinity": wanted}}
    of = job(scheduling={"topologyKey": "topology.kubernetes.io/zone"}, trainer=trainer)
    affinity = pod(of, "trainer")[2]["affinity"]
    assert affinity["podAntiAffinity"] == {"x": 1}
    assert affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == [1]
    (near,) = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert near["podAffinityTerm"]["topologyKey"] == "topology.kubernetes.io/zone"
    assert near["podAffinityTerm"]["labelSelector"]["matchLabels"] == {
        "distillation-operator.io/job": "job",
        "distillation-operator.io/role": "trainer",
    }
    assert "affinity" not in pod(of, "engine")[2]
    assert of.spec.trainer.template.affinity == wanted, "what the user wrote is not changed"


def test_a_gang_that_cannot_be_made_starts_nothing_and_says_why() -> None:
    observed = replace(NOTHING, gang_problem="install volcano")
    found = plan_at(scheduled(gang="volcano"), Status(), observed)
    assert says(found.status, ConditionType.TRAINER_READY) == ("False", "GangSchedulerNotInstalled", "install volcano")
    assert not applied(found) and found.status.attempts == 0


def test_volcano_knows_each_field_of_its_group() -> None:
    """By the tags of its own Go type, at the version that KubeRay is built with; its CRD is made from them."""
    folder = Path(downloaded("volcano.sh/apis", ROOT / "dev/tools/kuberay")["Dir"]) / "pkg/apis/scheduling/v1beta1"
    spec = (folder / "types.go").read_text().partition("type PodGroupSpec struct {")[2].partition("\n}")[0]
    made = group(scheduled(gang="volcano", queue="research", priorityClassName="high"))["spec"]
    assert set(made) == {"minMember", "queue", "priorityClassName"}
    assert set(made) <= set(re.findall(r'json:"(\w+)', spec))
    words = "".join(path.read_text() for path in folder.glob("*.go"))
    assert 'KubeGroupNameAnnotationKey = "scheduling.k8s.io/group-name"' in words
