"""A job whose responses are conversations, with an environment that a ConfigMap brings: all of it real."""

import pytest
from conftest import REPO, Jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800, func_only=True)]


@pytest.mark.soak
def test_a_student_learns_to_call_the_tool_of_its_environment(jobs: Jobs) -> None:
    name = "calls"
    jobs.kubectl("create", "configmap", "calculator", f"--from-file={REPO / 'examples' / 'calculator'}")
    jobs.arithmetic(name, "examples/calculator-cpu")
    done = jobs.finish(name, 1500)
    assert done["status"] == "True", jobs.picture()
    status = jobs.status(name)
    assert (status["attempts"], status["restarts"]) == (1, 0)
    [heldout] = status["progress"]["evaluations"]
    print(f"\nscore {heldout['firstScore']} -> {heldout['score']}")
    assert float(heldout["score"]) >= float(heldout["firstScore"]) + 0.3
    jobs.delete(name)
    jobs.kubectl("delete", "configmap", "calculator")
