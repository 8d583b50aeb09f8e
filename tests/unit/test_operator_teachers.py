"""A job whose teacher is somebody else's, and one that has several."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from operator_fakes import KEY, SETTINGS, job
from test_operator_plan import applied, begun, child, deleted, plan_at, pods, running, says, trainer

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import ConditionType, Status
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.kinds import Kind
from distill_operator.model.observed import Claim, Observed, Pod
from distill_operator.resources import rendering
from distill_operator.runtime.effects import Apply

ROUTED = {"prompts": {"path": "/data/train.jsonl", "teacherField": "topic"}}


def external() -> DistillationJob:
    return job(teacher={"endpoint": {"url": "http://sglang.example:30000"}})


def several(math_replicas: int = 2) -> DistillationJob:
    teachers = [
        {"name": "math", "model": "/models/math", "replicas": math_replicas},
        {"name": "code", "model": "/models/code"},
        {"name": "far", "endpoint": {"url": "http://sglang.example:30000"}},
    ]
    return job(teacher=None, teachers=teachers, data=ROUTED)


def up(of: DistillationJob, **ready: int) -> Observed:
    """Everything but the trainer, with so many ready pods of each teacher."""
    bodies = [*rendering.lasting(of, SETTINGS), *rendering.serving(of, SETTINGS)]
    counts = {"job-rollout": of.spec.rollout.replicas} | {f"job-teacher-{n}": count for n, count in ready.items()}
    children = tuple(child(body, ready=counts.get(body["metadata"]["name"], 0)) for body in bodies)
    count = sum(t.replicas for t in of.spec.served_teachers)
    teachers = [Pod(f"t{i}", f"t{i}", Role.TEACHER, scheduled=True) for i in range(count)]
    engines = [Pod("e", "e", Role.ROLLOUT, scheduled=True), Pod("h", "h", Role.ROLLOUT, head=True, scheduled=True)]
    return Observed(children=children, pods=(*teachers, *engines), claim=Claim.BOUND)


def roles(of: DistillationJob, observed: Observed) -> dict[str, Any]:
    status = plan_at(of, begun(of), observed).status
    return {r.name: (r.ready, r.desired) for r in status.roles or []}


def test_a_teacher_that_is_not_the_jobs_own_is_ready_as_external_and_the_preflight_judges_it() -> None:
    of = external()
    found = plan_at(of, begun(of), up(of))
    state, reason, message = says(found.status, ConditionType.TEACHER_READY)
    assert (state, reason) == ("True", "External")
    assert message == "http://sglang.example:30000: not the job's own, so the trainer's preflight judges"
    assert applied(found) == ["Job/job-trainer-1"], "the trainer waits for no teacher's pod"


def test_the_replicas_of_all_teachers_that_the_job_serves_count_and_none_stands_in_for_another() -> None:
    of = several()
    assert roles(of, up(of, math=2, code=1))["teacher"] == (3, 3)
    waiting = up(of, math=3, code=0)
    assert roles(of, waiting)["teacher"] == (2, 3)
    assert says(plan_at(of, begun(of), waiting).status, ConditionType.TEACHER_READY)[:2] == ("False", "NotReady")


def test_the_trainer_waits_until_every_teachers_pod_has_a_node() -> None:
    of = several()
    seen = up(of, math=2, code=1)
    assert not applied(plan_at(of, begun(of), replace(seen, pods=seen.pods[1:])))
    assert applied(plan_at(of, begun(of), seen)) == ["Job/job-trainer-1"]


def test_all_teachers_are_released_when_the_job_is_suspended() -> None:
    of = several()
    stopped = job(teacher=None, teachers=_teachers(of), data=ROUTED, suspend=True)
    seen = replace(up(of, math=2, code=1), children=(*up(of, math=2, code=1).children, trainer(of)))
    suspended = plan_at(stopped, begun(of), seen).status
    assert {"Deployment/job-teacher-math", "Deployment/job-teacher-code"} < set(
        deleted(plan_at(stopped, suspended, seen))
    )


def test_more_replicas_of_a_running_teacher_change_its_deployment_and_leave_the_trainer_alone() -> None:
    before, after = job(), job(teacher={"model": "/models/teacher", "replicas": 3})
    found = plan_at(after, begun(before), replace(running(before), pods=pods(before)))
    bodies = {e.body["kind"]: e.body for e in found.effects if isinstance(e, Apply)}
    assert bodies.keys() == {"ConfigMap", "Deployment"}, "and the trainer's Job is not made anew"
    assert bodies["Deployment"]["spec"]["replicas"] == 3
    assert not any(c.kind is Kind.JOB and c.deleting for c in running(before).children)


@pytest.mark.parametrize(
    "teacher",
    [
        {"model": "/models/t"},
        {"ref": {"name": "poet"}},
        {"endpoint": {"url": "http://t.example", "keySecret": {"name": "key", "key": "token"}}},
    ],
    ids=["served", "shared", "external"],
)
def test_a_job_whose_scores_are_precomputed_waits_for_no_teacher_and_has_none(teacher: dict[str, Any]) -> None:
    objective = {"support": "top-k", "datasetShare": 1, "teacherLogprobs": "precomputed"}
    data = {"prompts": {"path": "/data/train.jsonl", "responseField": "response"}}
    of = job(teacher=teacher, objective=objective, data=data, evaluation=[])
    found = plan_at(of, begun(of), up(of))
    state, reason, message = says(found.status, ConditionType.TEACHER_READY)
    assert (state, reason) == ("True", "External")
    assert message == "all scores are precomputed (objective.teacherLogprobs): no teacher is needed"
    assert applied(found) == ["Job/job-trainer-1"]
    made = [*rendering.lasting(of, SETTINGS), *rendering.serving(of, SETTINGS), rendering.training(of, SETTINGS, 1)]
    assert not [child for child in made if "job-teacher" in child["metadata"]["name"]]
    variables = str(next(child for child in made if child["kind"] == "Job"))
    assert "DISTILL_TEACHER_KEY" not in variables and "poet" not in variables


def test_a_student_that_teaches_itself_has_no_teachers_pods_and_the_trainer_waits_for_none() -> None:
    data = {"prompts": {"path": "/data/train.jsonl", "answerField": "answer", "teacherPrompt": "{prompt} {answer}"}}
    of = job(teacher={"student": {"weights": "live"}}, data=data, evaluation=[])
    found = plan_at(of, begun(of), up(of))
    state, reason, message = says(found.status, ConditionType.TEACHER_READY)
    assert (state, reason) == ("True", "External")
    assert message == "the teacher is the student itself (teacher.student): the rollout engines score"
    assert applied(found) == ["Job/job-trainer-1"]
    made = [*rendering.lasting(of, SETTINGS), *rendering.serving(of, SETTINGS), rendering.training(of, SETTINGS, 1)]
    assert [child["kind"] for child in made] == ["ConfigMap", "NetworkPolicy", "Service", "RayCluster", "Job"]
    assert "job-teacher" not in str(made[-1])


def test_a_lagged_student_is_served_as_a_model_is_and_sees_the_volume_that_its_weights_come_over() -> None:
    data = {"prompts": {"path": "/data/train.jsonl", "answerField": "answer", "teacherPrompt": "{prompt} {answer}"}}
    common: dict[str, Any] = {"data": data, "evaluation": [], "output": {"volume": {"claimName": "out"}}}
    served = {}
    for name, teacher in {"model": {"model": "/t"}, "student": {"student": {"weights": "lagged"}}}.items():
        of = job(teacher=teacher, **common)
        [served[name]] = [c for c in rendering.serving(of, SETTINGS) if c["kind"] == "Deployment"]
        assert says(plan_at(of, begun(of), up(of)).status, ConditionType.TEACHER_READY)[:2] == ("False", "NotReady")
    pods = {name: child["spec"]["template"]["spec"] for name, child in served.items()}
    volumes = {name: {v["name"] for v in pod["volumes"]} for name, pod in pods.items()}
    assert volumes["student"] - volumes["model"] == {"output"}
    mounts, keys = ([c[what] for c in pods["student"]["containers"]] for what in ("volumeMounts", "env"))
    assert any(m["name"] == "output" and m["mountPath"] == of.spec.output.path for m in mounts[0])
    assert any(variable["name"] == "DISTILL_KEY" for variable in keys[0]), "with which the trainer may give it weights"


def _teachers(of: DistillationJob) -> list[dict[str, Any]]:
    return [t.model_dump(mode="json", by_alias=True, exclude_none=True) for t in of.spec.teachers]


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ({"teacher": {"model": "/models/t"}}, "/models/t"),
        ({"teacher": {"ref": {"name": "poet"}}}, "Teacher poet"),
        ({"teacher": {"endpoint": {"url": "http://t.example"}}}, "http://t.example"),
        ({"teacher": {"student": {}}}, "the student itself"),
        ({"teachers": [{"name": "a", "model": "/a"}, {"name": "b", "endpoint": {"model": "big"}}]}, "/a,big"),
        ({"teacher": "nonsense"}, ""),
        ("nonsense", ""),
    ],
)
def test_the_metrics_name_the_teacher_whatever_kind_it_is_and_whether_or_not_the_spec_is_valid(
    spec: Any, shown: str
) -> None:
    jobs = JobRegistry()
    jobs.put(KEY, {"metadata": {"uid": "u"}, "spec": spec}, Status(), datetime.now(UTC))
    assert jobs.snapshots()[KEY].teacher == shown
