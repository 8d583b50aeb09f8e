"""An attempt keeps what it began with, whichever operator looks at it: the release before this one, one with other
settings, one of a later version. What the user changes takes effect at once all the same.
"""

import asyncio
import copy
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_fakes import SETTINGS, UID, Json, Simulation, job, manifest
from test_operator_plan import NOTHING, applied, begun, deleted, plan_at, pods, says

from distill_api.job import DistillationJob, load_job, parse_job
from distill_api.protocol import Phase, ProgressReport
from distill_api.spec.job_spec import Rollout, Spec, TeacherSource
from distill_api.status import ConditionType, Progress
from distill_operator.distillationjob import progress_poller
from distill_operator.kinds import Kind
from distill_operator.model.observed import Child, Claim, Observed, Outcome
from distill_operator.model.reading import exit_report, read_child
from distill_operator.resources import pinning, ray_cluster, rendering, scalable_fields, trainer_job
from distill_operator.runtime.effects import Apply
from distill_operator.settings import Egress, Settings

ROOT = Path(__file__).resolve().parents[2]
[RELEASE] = (ROOT / "tests" / "releases").glob("*.tar.gz")
OTHER_SETTINGS = {"workers_image": "registry.test/workers:0", "workers_image_pull_policy": "Always"}
SEVERAL: dict[str, Any] = {
    "teacher": None,
    "teachers": [{"name": n, "model": f"/models/{n}"} for n in ("math", "code")],
    "data": {"prompts": {"path": "/data/train.jsonl", "teacherField": "topic"}},
}
GANG: dict[str, Any] = {"scheduling": {"gang": "volcano", "scope": "job", "queue": "q"}}
TEMPLATE: dict[str, Any] = {"template": {"env": [{"name": "A", "value": "1"}], "nodeSelector": {"pool": "gpu"}}}
FORMER: dict[str, Any] = {"trainer": TEMPLATE, "rollout": TEMPLATE, "teacher": {"model": "/models/teacher", **TEMPLATE}}
"""With templates as they were until release 0.2.0."""
WITH_PODS = (Kind.DEPLOYMENT, Kind.RAY_CLUSTER, Kind.JOB)
WRITE = """
import json, sys
from distill_api.job import parse_job
from distill_operator.children import desired
from distill_operator.settings import Settings
job, settings = parse_job(json.load(sys.stdin)), Settings(workers_image="registry.test/workers:0")
children = [*desired.lasting(job, settings), *desired.group(job, settings), *desired.serving(job, settings)]
json.dump([*children, desired.training(job, settings, 1)], sys.stdout)
"""
Write = Callable[..., list[Json]]
"""Children of attempt 1 of a job of such a spec."""


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    with tarfile.open(RELEASE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@cache
def run_release(folder: Path, program: str, text: str = "") -> str:
    """What the program prints that stands on the release's own code."""
    environment = {"PYTHONPATH": f"{folder / 'crds'}:{folder / 'operator'}"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, input=text, env=environment, capture_output=True, check=True, text=True).stdout


READ = """
import sys
from distill_api.wire import ProgressReport
print(ProgressReport.model_validate_json(sys.stdin.read()))
"""
REPORT = ProgressReport(phase=Phase.TRAINING, progress=Progress(step=3, total_steps=9))


def test_operators_read_the_reports_of_trainers_of_another_release(release: Path) -> None:
    """Workers of another release run where an image is set by hand, and while an upgrade goes back."""
    text = REPORT.model_dump_json(by_alias=True, exclude_none=True)
    assert "step=3" in run_release(release, READ, text), "nothing that older operators do not know is sent without need"
    later = json.loads(text)
    later["mood"] = later["progress"]["mood"] = "good"
    assert progress_poller._read(json.dumps(later).encode()) == REPORT
    ended = exit_report(json.dumps({"reason": "Completed", "message": "", "final": later, "mood": "good"}))
    assert ended is not None and ended.final == REPORT


def present(of: DistillationJob, by: Settings) -> list[Json]:
    children = [*rendering.lasting(of, by), *rendering.group(of, by), *rendering.serving(of, by)]
    return [*children, rendering.training(of, by, 1)]


@pytest.fixture(params=["the release before", "other settings", "a later version"])
def write(request: pytest.FixtureRequest, release: Path) -> Write:
    def by_release(**spec: Any) -> list[Json]:
        return list(json.loads(run_release(release, WRITE, json.dumps(manifest(**spec)))))

    def by_settings(**spec: Any) -> list[Json]:
        other = replace(SETTINGS, **OTHER_SETTINGS, job_egress=Egress.CLOSED, scrape_namespaces=("monitoring",))
        return present(job(**spec), other)

    def by_version(**spec: Any) -> list[Json]:
        """It has more to say of every child."""
        found = []
        for child in present(job(**spec), replace(SETTINGS, workers_image="registry.test/workers:0")):
            child["metadata"]["annotations"] = {key: f"{value}-later" for key, value in annotations(child).items()}
            for template in templates(child):
                template["spec"]["containers"][0]["env"].append({"name": "DISTILL_NEW", "value": "1"})
            if child["kind"] == "ConfigMap":
                file = json.loads(child["data"]["job.yaml"])
                file["spec"]["aFieldOfTomorrow"] = 1
                child["data"]["job.yaml"] = json.dumps(file)
            elif child["kind"] == "Service":
                child["spec"]["ports"].append({"name": "new", "port": 31000, "targetPort": 31000})
            found.append(child)
        return found

    return {"the release before": by_release, "other settings": by_settings, "a later version": by_version}[
        request.param
    ]


def annotations(child: Json) -> dict[str, str]:
    found: dict[str, str] = child["metadata"]["annotations"]
    return found


def templates(child: Json) -> list[Json]:
    spec = child.get("spec", {})
    if child["kind"] == "RayCluster":
        return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return [spec["template"]] if "template" in spec else []


def there(children: list[Json], **changes: Any) -> tuple[Child, ...]:
    """As they are read, up and running."""
    found = []
    for body in children:
        child = read_child({**body, "metadata": {**body["metadata"], "uid": body["metadata"]["name"]}}, UID)
        spec = body.get("spec", {})
        wanted = sum(group["replicas"] for group in spec.get("workerGroupSpecs", [])) or spec.get("replicas", 1)
        found.append(replace(child, ready=wanted, **changes))
    return tuple(found)


def running(children: Sequence[Child | Json]) -> Observed:
    """With as many pods as any of these jobs wants."""
    found = tuple(c if isinstance(c, Child) else there([c])[0] for c in children)
    return Observed(found, tuple(replace(p, name=f"{p.name}{i}") for i in range(3) for p in pods(job())), Claim.BOUND)


def bodies(found: Any) -> dict[str, Json]:
    return {
        f"{e.body['kind']}/{e.body['metadata']['name']}": dict(e.body) for e in found.effects if isinstance(e, Apply)
    }


@pytest.mark.parametrize(
    "spec", [{}, SEVERAL, GANG, FORMER], ids=["one teacher", "several", "gang", "former templates"]
)
def test_a_running_job_of_another_operator_is_left_as_it_is(write: Write, spec: dict[str, Any]) -> None:
    of = job(**spec)
    observed = running(write(**spec))
    found = plan_at(of, begun(of), observed)
    assert bodies(found) == {} and not deleted(found)
    assert says(found.status, ConditionType.SUCCEEDED)[1] == "Running", "its children are read as ever"
    assert says(found.status, ConditionType.READY)[0] == "True"


def test_the_numbers_that_a_user_changes_are_written_into_what_is_there_and_nothing_else(write: Write) -> None:
    before = write(**GANG)
    wanted: dict[str, Any] = {
        "rollout": {"replicas": 3},
        "teacher": {"model": "/models/teacher", "replicas": 2},
    }
    of = job(**GANG, **wanted)
    made = bodies(plan_at(of, begun(of), running(before)))
    assert set(made) == {"ConfigMap/job-job", "Deployment/job-teacher", "RayCluster/job-rollout", "PodGroup/job-gang"}
    expected = {f"{body['kind']}/{body['metadata']['name']}": copy.deepcopy(body) for body in before}
    expected["Deployment/job-teacher"]["spec"]["replicas"] = 2
    [engines] = expected["RayCluster/job-rollout"]["spec"]["workerGroupSpecs"]
    engines |= dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), 3)
    expected["PodGroup/job-gang"]["spec"]["minMember"] = 2 + 1 + 3 + 1
    for name, body in made.items():
        if name != "ConfigMap/job-job":
            assert body["spec"] == expected[name]["spec"]
    file, old = (json.loads(c["ConfigMap/job-job"]["data"]["job.yaml"]) for c in (made, expected))
    assert (file["spec"].pop("rollout"), file["spec"].pop("teacher")) == (wanted["rollout"], wanted["teacher"])
    del old["spec"]["teacher"]
    assert file == old, "an older worker knows no other field than it knew"
    after = [made.get(f"{body['kind']}/{body['metadata']['name']}", body) for body in before]
    assert not bodies(plan_at(of, begun(of), running(after))), "once"


def test_all_that_may_change_within_a_part_of_a_spec_is_a_number_that_is_carried_over() -> None:
    """A field that becomes mutable must be written into the children of an attempt under way, too."""
    assert Rollout.mutable is not None and TeacherSource.mutable is not None
    assert Rollout.mutable | TeacherSource.mutable <= scalable_fields.COUNTS
    parts = {name for name in Spec.mutable or () if name in ("rollout", "teacher", "teachers")}
    assert parts == {*scalable_fields.PARTS, "teachers"}
    numbers = {name for name in (Spec.mutable or set()) - parts if name.endswith(("seconds", "limit", "finished"))}
    assert (Spec.mutable or set()) - parts - numbers == {"suspend", "stall_policy"}, "no child is written by these"


def test_of_several_teachers_the_one_that_is_resized_changes_alone(write: Write) -> None:
    before = write(**SEVERAL)
    math, code = SEVERAL["teachers"]
    of = job(**{**SEVERAL, "teachers": [math, {**code, "replicas": 3}]})
    made = bodies(plan_at(of, begun(of), running(before)))
    assert set(made) == {"ConfigMap/job-job", "Deployment/job-teacher-code"}
    assert made["Deployment/job-teacher-code"]["spec"]["replicas"] == 3
    file = json.loads(made["ConfigMap/job-job"]["data"]["job.yaml"])["spec"]
    assert file["teachers"] == [math, {**code, "replicas": 3}]


def test_between_attempts_everything_gets_the_words_of_the_operator_that_begins_the_next_one(write: Write) -> None:
    of = job()
    children = there(write())
    failed = tuple(replace(c, outcome=Outcome.FAILED) if c.kind is Kind.JOB else c for c in children)
    status = plan_at(of, begun(of), running(failed)).status
    lasting = tuple(c for c in children if c.kind not in WITH_PODS)
    left = Observed(lasting, claim=Claim.BOUND)
    second = plan_at(of, status, left, seconds=60).status
    assert second.attempts == 2
    made = bodies(plan_at(of, second, left, seconds=60))
    ours = {f"{body['kind']}/{body['metadata']['name']}": body for body in present(of, SETTINGS)[:-1]}
    own = {name for name, body in ours.items() if annotations(body) in [annotations(c.content) for c in lasting]}
    assert made == {name: body for name, body in ours.items() if name not in own}


@pytest.mark.parametrize("lost", ["Deployment", "RayCluster", "Job", "ConfigMap", "Service", "NetworkPolicy"])
def test_a_child_that_is_gone_is_made_again_with_the_image_of_the_others(write: Write, lost: str) -> None:
    of = job()
    left = [body for body in write() if body["kind"] != lost]
    made = bodies(plan_at(of, begun(of), running(left)))
    assert {body["kind"] for body in made.values()} == {lost}
    images = {t["spec"]["containers"][0]["image"] for body in made.values() for t in templates(body)}
    assert images <= {"registry.test/workers:0"}
    after = [*left, *made.values()]
    assert not bodies(plan_at(of, begun(of), running(after))), "once"


def test_an_image_that_the_user_chose_is_not_taken_for_the_operators() -> None:
    mine = {"template": {"image": "mine:1"}}
    spec = {
        "trainer": mine,
        "teacher": {"model": "/models/teacher", **mine},
        "rollout": {"headTemplate": {"image": "my-head:1"}},
    }
    of = job(**spec)
    observed = running(present(of, replace(SETTINGS, **OTHER_SETTINGS)))
    assert pinning.pinned_settings(of, observed, 1, SETTINGS) == SETTINGS


def test_drift_made_by_hand_is_put_right_after_another_image_was_configured() -> None:
    of = job()
    children = present(of, replace(SETTINGS, workers_image="registry.test/workers:0"))
    spoiled = copy.deepcopy(children)
    for body in spoiled:
        for template in templates(body) if body["kind"] == "Deployment" else ():
            template["spec"]["containers"][0]["command"] = ["sleep"]
    [made] = bodies(plan_at(of, begun(of), running(spoiled))).values()
    assert made == next(body for body in children if body["kind"] == "Deployment")


def test_a_file_that_somebody_spoiled_is_written_anew(write: Write) -> None:
    of = job()
    children = write()
    for text in ("{", '{"spec": 1}', '{"spec": {"rollout": 1}}'):
        for body in children:
            if body["kind"] == "ConfigMap":
                body["data"] = {"job.yaml": text}
        made = bodies(plan_at(job(rollout={"replicas": 2}), begun(of), running(children)))
        assert json.loads(made["ConfigMap/job-job"]["data"]["job.yaml"])["spec"]["rollout"] == {"replicas": 2}


@pytest.mark.parametrize(
    ("image", "turn"), [("registry.test/workers:0", "Restarting"), (SETTINGS.workers_image, "Starting")]
)
def test_an_attempt_whose_image_cannot_be_pulled_begins_anew_once_the_operator_has_another(
    image: str, turn: str
) -> None:
    of = job(backoffLimit=0)
    children = present(of, replace(SETTINGS, workers_image=image))
    waiting = tuple(replace(c, ready=0) for c in there(children))
    stuck = pods(of, waiting_reason="ImagePullBackOff", waiting_message="no such tag")
    found = plan_at(of, begun(of), Observed(waiting, stuck, Claim.BOUND)).status
    assert (says(found, ConditionType.SUCCEEDED)[1], found.restarts) == (turn, 0)
    if turn == "Restarting":
        assert "not counted, as it never ran" in says(found, ConditionType.SUCCEEDED)[2]
        assert f"was {image} and is {SETTINGS.workers_image}" in says(found, ConditionType.SUCCEEDED)[2]


def test_what_an_installation_no_longer_allows_ends_no_attempt_and_begins_none() -> None:
    of = job(student={"model": "org/student"})
    status = begun(of)
    closed = replace(SETTINGS, job_egress=Egress.CLOSED)
    children = there(present(of, SETTINGS))
    with patch("test_operator_plan.SETTINGS", closed):
        assert not bodies(plan_at(of, status, running(children)))
        done = tuple(replace(c, outcome=Outcome.COMPLETE) if c.kind is Kind.JOB else c for c in children)
        assert says(plan_at(of, status, running(done)).status, ConditionType.SUCCEEDED)[1] == "Completed"
        over = status.model_copy(update={"next_attempt_time": "2026-01-01T00:00:00Z"})
        refused = plan_at(of, over, NOTHING, seconds=9)
        assert not applied(refused) and refused.status.attempts == 1
        assert "jobEgress" in says(refused.status, ConditionType.SPEC_VALID)[2]


def test_what_workers_of_the_release_before_report_is_read(release: Path) -> None:
    report = """
from distill_api.status import Progress, Result
from distill_api.wire import ExitReason, ExitReport, Phase, ProgressReport
progress = Progress(step=3, total_steps=10, percent=30, reverse_kl="0.5", checkpoint_step=2)
final = ProgressReport(phase=Phase.DONE, progress=progress, result=Result(model_path="/output/job/model", step=3))
print(ExitReport(reason=ExitReason.COMPLETED, message="done", step=3, final=final).model_dump_json(by_alias=True))
"""
    found = exit_report(run_release(release, report))
    assert found is not None and found.final is not None and found.final.progress.reverse_kl == "0.5"


def test_every_job_that_the_release_before_took_is_taken(release: Path) -> None:
    manifests = [*release.glob("examples/*.yaml"), *release.glob("tests/manifests/good/*.yaml")]
    found = [path for path in manifests if "kind: DistillationJob" in path.read_text()]
    assert len(found) >= 10
    for path in found:
        load_job(path)


def test_this_version_is_newer_than_the_release_that_is_kept() -> None:
    found = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    ours, theirs = (tuple(map(int, text.split("."))) for text in (found[1], RELEASE.name.removesuffix(".tar.gz")))
    assert ours > theirs, "a release was made: move the version on (tests/releases/README.md)"


# Any order of upgrades and of everything else

OPERATORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "this": ({}, {}),
    "another image": (OTHER_SETTINGS, {}),
    "closed": ({"job_egress": Egress.CLOSED, "scrape_namespaces": ("monitoring",)}, {}),
    "next version": (OTHER_SETTINGS, {"RAY_VERSION": "3.0.0", "GRACE_SECONDS": 5}),
}
ACTIONS = (
    "reconcile",
    "cluster",
    "wait",
    "resize",
    "resize teacher",
    "budget",
    "suspend",
    "resume",
    "trainer fails",
    "kill teacher",
    "kill rollout",
)
"""Besides the upgrades."""


@settings(max_examples=25, deadline=None, derandomize=True)
@given(actions=st.lists(st.sampled_from([*ACTIONS, *OPERATORS]), max_size=30))
def test_no_order_of_upgrades_changes_a_pod_of_an_attempt_under_way(actions: list[str]) -> None:
    spec: dict[str, Any] = {"backoffLimit": 100, "rollout": {"replicas": 1}}
    sim = Simulation(spec=spec)
    began: dict[str, Any] = {}

    def check() -> None:
        """Whatever has pods keeps the words it was made with, by uid, but for the numbers."""
        for (kind, name), body in sim.cluster.objects.items():
            if kind in WITH_PODS:
                assert began.setdefault(body["metadata"]["uid"], templates(body)) == templates(body), name

    async def run(stack: ExitStack) -> None:
        await sim.run_until_quiet(seconds=60)
        for number, action in enumerate(actions):
            if action in OPERATORS:
                stack.close()
                changed, constants = OPERATORS[action]
                for name, value in constants.items():
                    stack.enter_context(
                        patch.object(ray_cluster if hasattr(ray_cluster, name) else trainer_job, name, value)
                    )
                sim.settings = SETTINGS
                sim.upgrade(**changed)
                await sim.reconcile()
            elif action == "reconcile":
                await sim.reconcile()
            elif action == "cluster":
                sim.play()
            elif action == "wait":
                sim.pass_time(15)
            elif action == "resize":
                sim.edit(rollout={"replicas": 1 + number % 3})
            elif action == "resize teacher":
                sim.edit(teacher={"model": "/models/teacher", "replicas": 1 + number % 3})
            elif action == "budget":
                sim.edit(backoffLimit=50 + number)
            elif action in ("suspend", "resume"):
                sim.edit(suspend=action == "suspend")
            elif action == "trainer fails":
                sim.trainers[sim.job_status["attempts"]] = (75, '{"reason": "EnginesLost", "message": "m", "step": 3}')
            elif action == "kill teacher":
                sim.cluster.remove(Kind.DEPLOYMENT, "job-teacher")
            else:
                sim.cluster.remove(Kind.RAY_CLUSTER, "job-rollout")
            check()
        sim.edit(suspend=False)
        await sim.run_until_quiet(limit=200)
        check()
        assert sim.condition("Succeeded")[1] == "Running"
        of = parse_job({**sim.cluster.objects[Kind.DISTILLATION_JOB, "job"], **TYPES})
        found = {kind: sim.cluster.objects[kind, name] for kind, name in NAMES}
        assert found[Kind.DEPLOYMENT]["spec"]["replicas"] == of.spec.served_teachers[0].replicas
        [engines] = found[Kind.RAY_CLUSTER]["spec"]["workerGroupSpecs"]
        file = json.loads(found[Kind.CONFIG_MAP]["data"]["job.yaml"])["spec"]
        assert {engines[n] for n in ("replicas", "minReplicas", "maxReplicas")} == {of.spec.rollout.replicas}
        assert file["rollout"]["replicas"] == of.spec.rollout.replicas
        sim.trainers[sim.job_status["attempts"]] = (0, '{"reason": "Completed", "message": "done", "step": 10}')
        await sim.run_until_quiet(limit=200)

    with ExitStack() as stack:
        asyncio.run(run(stack))
    assert sim.condition("Succeeded")[:2] == ("True", "Completed")
    assert len(sim.trainer_uids) <= sim.job_status["attempts"]


TYPES = {"apiVersion": "distillation-operator.io/v1alpha1", "kind": "DistillationJob"}
NAMES = ((Kind.DEPLOYMENT, "job-teacher"), (Kind.RAY_CLUSTER, "job-rollout"), (Kind.CONFIG_MAP, "job-job"))
