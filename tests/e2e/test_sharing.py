"""A Teacher that a job learns from, and engines that join and leave while it runs: all of it real."""

import json
import re

import pytest
import yaml
from conftest import REPO, Jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900, func_only=True)]


@pytest.mark.soak
def test_a_job_learns_from_a_shared_teacher_while_engines_join_and_leave(jobs: Jobs) -> None:
    teacher = yaml.safe_load((REPO / "examples" / "teacher-cpu.yaml").read_text())
    teacher["spec"]["autoscaling"]["maxReplicas"] = 1  # two cores have no room for more
    jobs.kubectl("apply", "-f", "-", stdin=json.dumps(teacher))
    name = "shares"
    schedule = {"steps": 60, "checkpointEverySteps": 60}
    jobs.arithmetic(name, "examples/shared-teacher-cpu", schedule=schedule, evaluation=[])
    log = jobs.output / name / "logs" / "rank-0.log"

    def said(text: str) -> bool:
        return log.exists() and re.search(text, log.read_text()) is not None

    jobs.wait("the first steps", lambda: jobs.step(name) >= 2)
    assert not [d for d in jobs.names("deployments") if name in d], "the job has no teacher of its own"
    served = jobs.get("teacher", "adder")["status"]
    assert (served["readyReplicas"], jobs.condition(name, "TeacherReady")["reason"]) == (1, "Ready")

    def resize(replicas: int) -> None:
        jobs.kubectl("patch", "djob", name, "--type=merge", "-p", f'{{"spec":{{"rollout":{{"replicas":{replicas}}}}}}}')

    resize(2)
    jobs.wait("the second engine serves", lambda: said(r"engine 1 is back after .* with weights"), 240)
    resize(1)
    jobs.wait("one engine goes", lambda: said(r"engine \d goes: the job wants 1"), 240)
    jobs.wait("its Teacher knows of it", lambda: jobs.get("teacher", "adder")["status"].get("jobs") == 1, 60)
    done = jobs.finish(name)
    assert done["status"] == "True", jobs.picture()
    status = jobs.status(name)
    assert (status["attempts"], status["restarts"], status["progress"]["step"]) == (1, 0, 60)
    jobs.delete(name)
    jobs.kubectl("delete", "teacher", "adder", "--wait")
    jobs.wait("nothing of the Teacher is left", lambda: not [d for d in jobs.names("deployments") if "adder" in d], 60)
