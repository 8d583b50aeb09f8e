"""Environments of the package verifiers, in a Python of their own: a played student has real conversations with one."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import REPO, arithmetic
from test_agent_endpoint import ADDS, Student, by_turn
from test_environment_messages import WITH_TOOLS
from test_episodes import LIMITS, TOKENIZER
from test_ray_connection import alive

from distill_api.job import parse_job
from distill_api.spec.environment import Verifiers
from distill_workers.data.prompts import load_data
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.environments.verifiers import PROGRAM, check_verifiers
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics
from distill_workers.rollout.conversations.build import build_episodes

pytestmark = pytest.mark.timeout(600)

SUMS = '''
import verifiers as vf
from datasets import Dataset


def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


async def right(completion, answer, info) -> float:
    return float(answer in str(completion[-1].content) and info["unit"] == "apples")


def load_environment(first: int = 12) -> vf.Environment:
    rows = [
        {"question": f"What is {first + n} plus 30?", "answer": str(first + n + 30), "info": {"unit": "apples"}}
        for n in range(4)
    ]
    return vf.ToolEnv(tools=[add], dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[right]), max_turns=4)
'''


@pytest.fixture(scope="module")
def python() -> str:
    """A Python with verifiers, made from its lock: before the layer, or here where this file runs by itself."""
    done = subprocess.run([REPO / "dev" / "verifiers.sh"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "sums_of_verifiers.py").write_text(SUMS)
    (tmp_path / "broken.py").write_text("def load_environment():\n    raise KeyError('SECRET_KEY')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    TOKENIZER.chat_template = WITH_TOOLS
    yield


def program(python: str, *arguments: str) -> str:
    command = [python, "-P", str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows(python: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("module")
    (folder / "sums_of_verifiers.py").write_text(SUMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        return program(python, "rows", "sums-of-verifiers", "-n", "2")


def episodes(folder: Path, rows: str, student: Any, python: str, verifiers: dict[str, Any] | None = None) -> Any:
    (folder / "rows.jsonl").write_text(rows)
    chosen = {"name": "sums-of-verifiers", "python": python, **(verifiers or {})}
    spec = parse_job(
        arithmetic(
            folder,
            "verifiers",
            data={"prompts": {"path": str(folder / "rows.jsonl"), "answerField": "answer", "applyChatTemplate": True}},
            rollout={**LIMITS, "maxPromptTokens": 400, "environment": {"verifiers": chosen}},
            objective={"reward": {"source": "environment"}},
            evaluation=[],
        )
    ).spec
    return build_episodes(spec, TOKENIZER, student, Metrics())


async def conversation(folder: Path, rows: str, student: Any, python: str) -> Any:
    made = episodes(folder, rows, student, python)
    first, *_ = load_data(made._spec, TOKENIZER, Metrics())
    try:
        async with asyncio.timeout(300):
            [sample] = await made.samples(first, 0, seed=5)
            return sample
    finally:
        await made.close()


def test_the_rows_of_an_environment_are_rows_of_prompts(rows: str) -> None:
    first, second = [json.loads(line) for line in rows.splitlines()]
    assert first["prompt"] == [{"role": "user", "content": "What is 12 plus 30?"}] and first["answer"] == "42"
    assert (second["answer"], second["example_id"]) == ("43", 1)


async def test_a_student_has_its_conversation_with_the_tool_and_the_reward_is_the_rubrics(
    rows: str, python: str, tmp_path: Path
) -> None:
    sample = await conversation(tmp_path, rows, Student(by_turn(ADDS, "The answer is 42.")), python)
    assert len(sample.turns) == 2 and sample.reward == 1.0 and not sample.truncated
    read, said = TOKENIZER.decode(sample.prompt_ids), TOKENIZER.decode(sample.response_ids)
    assert "What is 12 plus 30?" in read and '"name": "add"' in read
    assert "<tool_response>\n42\n</tool_response>" in said


async def test_a_student_that_says_nothing_gets_no_reward_and_does_not_fail(
    rows: str, python: str, tmp_path: Path
) -> None:
    sample = await conversation(tmp_path, rows, Student(lambda read: ""), python)
    assert (len(sample.turns), sample.reward) == (1, 0.0)


async def test_a_conversation_that_fails_is_told_by_the_name_of_the_field(
    rows: str, python: str, tmp_path: Path
) -> None:
    made = episodes(tmp_path, rows, Student(lambda read: "said"), python)
    made._command = [*made._command[:-1], '{"second": 1}']
    first, *_ = load_data(made._spec, TOKENIZER, Metrics())
    with pytest.raises(
        EnvironmentFailed, match=r"^rollout\.environment\.verifiers: the agent ended with exit code 1: .*second"
    ):
        await made.samples(first, 0, seed=5)
    await made.close()


def test_what_an_environment_starts_while_it_is_loaded_ends_with_the_check(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox, say, which has its output from the process that loads the environment."""
    started = tmp_path / "started"
    (tmp_path / "starts.py").write_text(
        "import subprocess\n"
        "def load_environment():\n"
        f"    open({str(started)!r}, 'w').write(str(subprocess.Popen(['sleep', '3600']).pid))\n"
        "    raise ValueError('too few')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"^rollout\.environment\.verifiers starts: .*too few"):
        check_verifiers(Verifiers(name="starts", python=python))
    while alive(int(started.read_text())):
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("verifiers", "sentence"),
    [
        ({"name": "no-such-environment"}, r"verifiers no-such-environment: .*no_such_environment"),
        ({"name": "broken"}, r"verifiers broken: .*SECRET_KEY"),
        ({"arguments": {"second": 1}}, r"verifiers sums-of-verifiers: .*second"),
        ({"python": sys.executable}, r"verifiers sums-of-verifiers: No module named 'verifiers'; python must be one"),
        ({"python": "no-such-python"}, r"verifiers\.python: there is no program no-such-python"),
    ],
    ids=["unknown", "raises", "arguments", "without the package", "no program"],
)
def test_an_environment_that_cannot_be_loaded_ends_the_job_before_its_first_step(
    verifiers: dict[str, Any], sentence: str, rows: str, python: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=rf"rollout\.environment\.{sentence}"):
        episodes(tmp_path, rows, Student(lambda read: ""), python, verifiers)
