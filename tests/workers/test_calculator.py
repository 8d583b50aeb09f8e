"""The examples with a calculator: whole runs whose responses are conversations with an environment, or of an agent."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import CALCULATOR, Outcome, Run, arithmetic

import soak
from distill_api.job import parse_job
from distill_api.protocol import ExitCode
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer

pytestmark = pytest.mark.timeout(600)
EXAMPLES = ["calculator-cpu", "calculator-agent-cpu"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of the calculator's teacher."""
    scratch = tmp_path_factory.mktemp("teacher")
    spec = parse_job(arithmetic(scratch, "teacher", example="calculator-cpu")).spec
    server = SGLangServer(spec.teacher.model, spec, "teacher", port=reserve_port(), log=scratch / "teacher.log")
    server.start()
    try:
        server.wait_ready(300)
        yield f"127.0.0.1:{server.port}"
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the headers of the examples set; the module is found in the folder that a run begins in."""
    monkeypatch.chdir(CALCULATOR)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def run(example: str, teacher: str, folder: Path, **changes: Any) -> Outcome:
    outcome = Run(arithmetic(folder, "calculator", example=example, **changes), teacher, folder).wait()
    assert outcome.code == ExitCode.DONE, outcome.log
    return outcome


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_with_a_tool_trains_on_conversations_of_two_turns(
    example: str, teacher: str, tmp_path: Path
) -> None:
    evaluation = arithmetic(tmp_path, "calculator", example=example)["spec"]["evaluation"]
    outcome = run(
        example,
        teacher,
        tmp_path,
        rollout={"promptsPerStep": 4, "samplesPerPrompt": 6},
        schedule={"steps": 1, "checkpointEverySteps": 1, "evaluateEverySteps": 1},
        evaluation=[{**evaluation[0], "maxPrompts": 2}],
    )
    [step] = outcome.lines("step")
    first, last = outcome.lines("evaluation")
    assert step["samples"] == step["turns"]["1"]["samples"] == 24
    # The student calls the tool in a fifth of its conversations: in none of 24 with a probability of half a percent.
    assert 1 <= step["turns"]["2"]["samples"] < 24
    assert step["turns"]["1"]["reverse_kl"] > 0.1
    assert (first["prompts"], first["failed"], last["failed"]) == (2, 0, 0)
    assert 0.0 <= first["score"] <= 1.0
    lines = [json.loads(text) for text in (outcome.folder / "samples.jsonl").read_text().splitlines()]
    assert any("tool" in json.dumps(line) for line in lines if line["kind"] == "rollout")


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("example", EXAMPLES)
def test_three_seeds_of_an_example_with_a_tool_lift_the_accuracy(example: str, teacher: str, tmp_path: Path) -> None:
    for seed in soak.seeds(0.0, at_least=3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        outcome = run(example, teacher, folder, seed=seed)
        first, *_, last = outcome.lines("evaluation")
        *_, step = outcome.lines("step")
        calls = step["turns"]["2"]["samples"] / step["turns"]["1"]["samples"]
        print(
            f"\n{example}, seed {seed}: accuracy {first['score']:.3f} -> {last['score']:.3f}, "
            f"reverse KL {first['reverse_kl']:.3f} -> {last['reverse_kl']:.3f}, tool called in {calls:.0%}",
            flush=True,
        )
        assert last["score"] >= first["score"] + 0.3
        assert last["reverse_kl"] < first["reverse_kl"] / 2
        assert calls >= 0.8
