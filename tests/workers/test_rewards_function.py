"""A function of the user runs in a process of its own: what it does there fails its sample, and the trainer lives."""

import asyncio
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill_api.spec.job_spec import Reward
from distill_workers import user_code
from distill_workers.data.sample import Prompt
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics
from distill_workers.rewards.base import RewardError
from distill_workers.rewards.build import build_reward

CODE = """
import asyncio, os, re, subprocess, sys

def starts(response, answer, metadata):
    # as a reward that runs the program in a response does, without a limit of its own
    child = subprocess.Popen(["sleep", "600"])
    with open(response, "w") as file:
        file.write(str(child.pid))
    if answer == "abort":
        os.abort()
    return float(child.wait())

def right(response, answer, metadata):
    return len(response) + len(answer) + metadata["x"]

def act(response, answer, metadata):
    if response == "exit":
        sys.exit(0)
    if response == "abort":
        os.abort()
    if response == "cancel":
        raise asyncio.CancelledError()
    if response == "raise":
        raise KeyError("where")
    if response == "backtrack":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "none":
        return None
    return 1.0

def score_in_a_dict(response, answer, metadata): return {"score": 1.0}
def nothing(response, answer, metadata): return None
def not_finite(response, answer, metadata): return float("nan")
def words(response, answer, metadata): return "many"
def hidden_coroutine(response, answer, metadata):
    async def later(): return 1.0
    return later()
async def awaited(response, answer, metadata): return 1.0
def one_argument(response): return 1.0
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_rewards.py").write_text(CODE)
    (tmp_path / "exits.py").write_text("import sys; sys.exit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))


def reward_of(function: str, seconds: int = 20) -> Any:
    return build_reward(
        Reward.model_validate({"source": "python", "function": function, "timeoutSeconds": seconds}), Metrics()
    )


PROMPT = Prompt(index=3, ids=[1], text="?", answer="ab", metadata={"x": 10})


async def test_it_gets_response_answer_and_metadata() -> None:
    reward = reward_of("users_rewards:right")
    assert await reward.score(PROMPT, "abc") == 15.0
    await reward.close()


async def test_whatever_it_does_fails_its_sample_and_the_next_one_is_scored() -> None:
    reward = reward_of("users_rewards:act", seconds=3)
    started = time.monotonic()
    for response, sentence in (
        ("exit", "SystemExit: 0"),
        ("cancel", "CancelledError"),
        ("raise", "KeyError: 'where'"),
        ("abort", "process died"),
        ("backtrack", "longer than 3 s"),
    ):
        with pytest.raises(RewardError, match=sentence):
            await reward.score(PROMPT, response)
        assert await reward.score(PROMPT, "fine") == 1.0
    assert time.monotonic() - started < 120
    with pytest.raises(RewardError, match="returned None; it must return a number"):
        await reward.score(PROMPT, "none")  # it returned numbers before: the job goes on
    await reward.close()


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("score_in_a_dict", r"returned a dict with 'score' \(return its 'score'\); it must return a number"),
        ("nothing", "returned None; it must return a number"),
        ("not_finite", "returned nan; it must return a number"),
        ("words", "returned str 'many'; it must return a number"),
        ("hidden_coroutine", "returned a coroutine; it must return a number"),
    ],
)
async def test_a_result_that_is_no_number_is_a_fault_of_the_job_at_the_first_call(function: str, what: str) -> None:
    reward = reward_of(f"users_rewards:{function}")
    with pytest.raises(ConfigurationError, match=f"reward.function users_rewards:{function}: {what}"):
        await reward.score(PROMPT, "x")
    await reward.close()


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("no_such_module:f", "No module named 'no_such_module'; put the module on PYTHONPATH"),
        ("math:no_such", "no_such"),
        ("math:pi", "is not a function"),
        ("users_rewards:awaited", "is an async function; it must return a number"),
        ("users_rewards:one_argument", r"cannot be called as function\(response, answer, metadata\)"),
        ("exits:f", "raised SystemExit: 3 while it was imported"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_the_job_begins(function: str, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        reward_of(function)


async def test_a_module_that_hangs_while_it_is_imported_costs_its_samples_its_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_code, "CHECK_SECONDS", 0.5)
    monkeypatch.setattr(user_code, "IMPORT_SECONDS", 1.0)
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    reward = reward_of("endless:f", seconds=1)
    begin = time.monotonic()
    with pytest.raises(RewardError, match="the reward's module endless took longer than 1 s to load") as raised:
        await reward.score(PROMPT, "x")
    assert raised.value.permanent and time.monotonic() - begin < 30
    await reward.close()


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("answer", ["wait", "abort"])
async def test_what_a_function_has_started_ends_with_its_call(answer: str, tmp_path: Path) -> None:
    reward = reward_of("users_rewards:starts", seconds=6)
    with pytest.raises(RewardError, match="longer than 6 s" if answer == "wait" else "process died"):
        await reward.score(dataclasses.replace(PROMPT, answer=answer), str(tmp_path / "pid"))
    end = time.monotonic() + 10
    while is_running((tmp_path / "pid").read_text()):
        assert time.monotonic() < end
        await asyncio.sleep(0.1)
    await reward.close()


OWNER = """
import asyncio, sys
from test_rewards_function import PROMPT, reward_of

async def main():
    reward = reward_of("users_rewards:act", seconds=600)
    await reward.score(PROMPT, "fine")
    print("ready", flush=True)
    await reward.score(PROMPT, "backtrack")

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_function_that_lets_no_other_thread_run_ends_with_the_trainer(tmp_path: Path) -> None:
    """An endless regular expression holds the interpreter, so that no thread there can see that its parent is gone."""
    path = f"{tmp_path}:{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
    time.sleep(1)  # until it is in the expression
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
    assert children
    owner.kill()
    owner.wait()
    end = time.monotonic() + 10
    while left := [pid for pid in children if is_running(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)
