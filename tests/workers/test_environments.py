"""An environment of the user runs in a process of its own: what it does there fails its sample, and no more."""

import asyncio
import os
import re
import resource
import signal
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from distill_api.spec.environment import Environment
from distill_workers.environments import pool as pool_module
from distill_workers.environments import protocol
from distill_workers.environments.pool import EnvironmentFailed, EnvironmentPool
from distill_workers.environments.protocol import AssistantMessage, Row, ToolCall
from distill_workers.failures import ConfigurationError

REPO = Path(__file__).resolve().parents[2]
CODE = """
import asyncio, os, sys
from distill_workers.environments.protocol import Turn

SAY = [{"role": "user", "content": "go on"}]
CLOSED = []

class Counter:
    async def reset(self, row):
        self.count = 0
        self.answer = row.answer
        return [*row.messages, {"role": "user", "content": row.metadata["hint"]}]

    async def step(self, message):
        self.count += 1
        await asyncio.sleep(0)
        if message.tool_calls:
            return Turn([call.result(str(self.count)) for call in message.tool_calls], reward=0.5)
        return Turn(reward=float(message.content == self.answer), done=True)

    async def close(self):
        CLOSED.append(self.count)

class Wordless(Exception):
    def __str__(self):
        raise RuntimeError("no words")

class Acts:
    async def reset(self, row):
        return SAY

    async def step(self, message):
        match message.content:
            case "exit": sys.exit(0)
            case "abort": os.abort()
            case "cancel": raise asyncio.CancelledError()
            case "raise": raise KeyError("where")
            case "block":
                while True: pass
            case "sleep": await asyncio.sleep(600)
            case "none": return None
            case "silent": return Turn()
            case "string": return "an answer"
            case "nan": return Turn(SAY, reward=float("nan"))
            case "large": return Turn([{"role": "user", "content": "x" * 10_000_000}])
            case "assistant": return Turn([{"role": "assistant", "content": "mine"}])
            case "no text": return Turn([{"role": "user", "content": None}])
            case "object": return Turn([{"role": "user", "content": "x", "more": object()}])
            case "surrogate": return Turn([{"role": "user", "content": chr(0xD800)}])
            case "surrogate name": return Turn([{"role": "tool", "content": "", "name": chr(0xD800)}])
            case "wordless": raise Wordless()
        return Turn(SAY)

class Synchronous:
    def reset(self, row): return SAY
    async def step(self, message): return Turn(SAY)

class WithoutStep:
    async def reset(self, row): return SAY

class NeedsArguments:
    def __init__(self, size): pass

def function(): pass
"""
ROW = Row([{"role": "user", "content": "What is 1 plus 2?"}], "3", {"hint": "use the tool"})


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_envs.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))


def pool_of(name: str, seconds: int = 20) -> EnvironmentPool:
    return EnvironmentPool(Environment(function=f"users_envs:{name}", timeout_seconds=seconds))


@pytest_asyncio.fixture
async def counters() -> AsyncIterator[EnvironmentPool]:
    pool = pool_of("Counter")
    yield pool
    await pool.close()


async def test_a_conversation_is_one_object_that_reads_the_row_and_each_message(counters: EnvironmentPool) -> None:
    async with counters.conversation() as environment:
        opening = await environment.reset(ROW)
        called = await environment.step(AssistantMessage("", (ToolCall("call-0-0", "add", {"a": 1}),)))
        again = await environment.step(AssistantMessage("", (ToolCall("call-1-0", "add", {"a": 1}),)))
        ended = await environment.step(AssistantMessage("3"))
    assert [m["content"] for m in opening] == ["What is 1 plus 2?", "use the tool"]
    assert called.messages == [{"role": "tool", "tool_call_id": "call-0-0", "name": "add", "content": "1"}]
    assert (called.reward, called.done, again.messages[0]["content"]) == (0.5, False, "2")
    assert (ended.reward, ended.done, ended.messages) == (1.0, True, [])


async def test_conversations_at_the_same_time_share_nothing(counters: EnvironmentPool) -> None:
    call = AssistantMessage("", (ToolCall("call", "add", {}),))
    async with counters.conversation() as one, counters.conversation() as other:
        for environment in (one, other):
            await environment.reset(ROW)
        assert [(await one.step(call)).messages[0]["content"] for _ in range(2)] == ["1", "2"]
        assert (await other.step(call)).messages[0]["content"] == "1"


async def closed_in(process: Any) -> Any:
    return await process.call(eval, "__import__('users_envs').CLOSED")


async def test_an_environment_is_closed_after_its_conversation(counters: EnvironmentPool) -> None:
    async with counters.conversation() as environment:
        await environment.reset(ROW)
        await environment.step(AssistantMessage("", (ToolCall("call", "add", {}),)))
        assert await closed_in(environment._process) == []
    assert await closed_in(environment._process) == [1]


async def test_an_environment_whose_conversation_was_cancelled_is_closed_before_the_next(
    counters: EnvironmentPool,
) -> None:
    with pytest.raises(asyncio.CancelledError):
        async with counters.conversation() as environment:
            await environment.reset(ROW)
            raise asyncio.CancelledError
    assert await closed_in(environment._process) == []
    async with counters.conversation() as environment:
        await environment.reset(ROW)
        assert await closed_in(environment._process) == [0]


def test_a_low_limit_of_open_files_is_raised_for_the_processes_of_conversations() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        pool_of("Counter")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(before[1], pool_module.OPEN_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_conversation_begins_once_one_of_those_that_go_on_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CONVERSATIONS", 1)
    pool = pool_of("Counter")
    async with pool.conversation() as first:
        await first.reset(ROW)

        async def second() -> list[Any]:
            async with pool.conversation() as environment:
                return await environment.reset(ROW)

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0.2)
        assert not waiting.done()
    assert len(await waiting) == 2
    await pool.close()


@pytest.mark.parametrize(
    ("does", "sentence", "permanent"),
    [
        ("exit", "step raised SystemExit: 0", False),
        ("cancel", "step raised CancelledError", False),
        ("raise", "step raised KeyError: 'where'", False),
        ("none", r"step answered nothing, which must be a Turn", True),
        ("string", "step answered a value of the type str, which must be a Turn", True),
        ("silent", "step answered no message in place of messages, and is not done", True),
        ("nan", "step answered the reward nan, which must be a finite number", True),
        ("large", r"step answered 10,000,000 characters; at most 1,000,000 are read", True),
        ("assistant", "step answered message 1 of the role 'assistant'; allowed are system, tool, user", True),
        ("no text", "step answered message 1, which is no", True),
        ("object", "step answered messages that are no JSON", True),
        ("surrogate", "step answered message 1 with half a surrogate pair", True),
        ("surrogate name", "step answered message 1 with half a surrogate pair", True),
        ("wordless", "step raised Wordless: it has no text", False),
    ],
)
async def test_what_it_raises_or_answers_wrongly_fails_its_conversation_by_name(
    does: str, sentence: str, permanent: bool, acting: EnvironmentPool
) -> None:
    with pytest.raises(EnvironmentFailed, match=f"rollout.environment.function users_envs:Acts: {sentence}") as raised:
        await said(acting, does)
    assert raised.value.permanent is permanent
    assert (await said(acting, "fine")).messages[0]["content"] == "go on"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def acting(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvironmentPool]:
    """One process for what leaves it alive, so that the many cases start no other."""
    folder = tmp_path_factory.mktemp("acting")
    (folder / "users_envs.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        pool = pool_of("Acts", seconds=5)
        yield pool
        await pool.close()


async def said(pool: EnvironmentPool, content: str) -> Any:
    async with pool.conversation() as environment:
        await environment.reset(ROW)
        return await environment.step(AssistantMessage(content))


async def test_one_that_hangs_or_dies_is_killed_and_the_next_conversation_goes_on() -> None:
    pool = pool_of("Acts", seconds=4)
    begin = time.monotonic()
    for does, sentence in (("block", "took longer than 4 s"), ("sleep", "longer than 4 s"), ("abort", "process died")):
        with pytest.raises(EnvironmentFailed, match=f"the environment.*{sentence}") as raised:
            await said(pool, does)
        assert not raised.value.permanent
    assert (await said(pool, "fine")).messages[0]["content"] == "go on"
    assert time.monotonic() - begin < 60
    await pool.close()


async def test_a_process_that_cannot_be_started_fails_its_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process() -> Any:
        raise OSError(24, "Too many open files")

    pool = pool_of("Acts")
    monkeypatch.setattr("distill_workers.user_code.new_process", no_process)
    with pytest.raises(
        EnvironmentFailed, match=r"no process could be started for the environment: .*Too many"
    ) as raised:
        await said(pool, "fine")
    assert not raised.value.permanent
    await pool.close()


async def test_a_process_that_dies_as_it_loads_the_class_fails_its_conversation(tmp_path: Path) -> None:
    (tmp_path / "users_envs.py").write_text("import os\nos.abort()\n")
    pool = pool_of("Acts")
    with pytest.raises(EnvironmentFailed, match="process died while it loaded the module users_envs") as raised:
        await said(pool, "fine")
    assert not raised.value.permanent
    await pool.close()


async def test_a_class_that_was_loaded_before_and_is_not_this_time_fails_its_conversation_alone(tmp_path: Path) -> None:
    pool = pool_of("Acts", seconds=1)
    pool.check()
    with pytest.raises(EnvironmentFailed, match="longer than 1 s"):
        await said(pool, "block")
    (tmp_path / "users_envs.py").write_text("raise OSError('the volume is away')\n")
    with pytest.raises(EnvironmentFailed, match="users_envs raised OSError: the volume is away") as raised:
        await said(pool, "fine")
    assert not raised.value.permanent
    await pool.close()


def example_of(text: str) -> str:
    """The calculator in a text, without the text's indentation."""
    block = re.search(r"^ *from distill_workers\.environments\.protocol .*?(?=```|\n *`rollout)", text, re.S | re.M)
    assert block is not None
    return textwrap.dedent(block[0]).strip()


async def test_the_example_of_the_guide_and_of_the_protocol_is_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = example_of((REPO / "docs" / "guides" / "environments.md").read_text())
    assert example_of(str(protocol.__doc__)).split() == guide.split()
    (tmp_path / "my_envs.py").write_text(guide)
    pool = EnvironmentPool(Environment(function="my_envs:Calculator"))
    pool.check()
    async with pool.conversation() as environment:
        assert await environment.reset(ROW) == ROW.messages
        called = await environment.step(AssistantMessage("", (ToolCall("c", "add", {"a": 1, "b": 2}),)))
        wrong = await environment.step(AssistantMessage("", (ToolCall("c", "add", {"a": "1"}),)))
        ended = await environment.step(AssistantMessage("3"))
    assert [called.messages[0]["content"], wrong.messages[0]["content"][:6]] == ["3", "error:"]
    assert (ended.reward, ended.done) == (1.0, True)
    await pool.close()


def has_ended(child: int) -> bool:
    """Whether it can be waited for: its first thread is gone sooner than its last."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


async def test_a_process_that_is_killed_fails_its_own_conversation_and_none_while_it_is_idle(
    counters: EnvironmentPool,
) -> None:
    call = AssistantMessage("", (ToolCall("call", "add", {}),))
    for while_idle in (True, False):
        async with counters.conversation() as environment:
            await environment.reset(ROW)
            process = await environment._process.call(os.getpid)
        if while_idle:
            os.kill(process, signal.SIGKILL)
            async with asyncio.timeout(60):
                while not has_ended(process):
                    await asyncio.sleep(0.01)
            continue
        with pytest.raises(EnvironmentFailed, match="the environment's process died"):
            async with counters.conversation() as environment:
                await environment.reset(ROW)
                os.kill(process, signal.SIGKILL)
                await environment.step(call)
    async with counters.conversation() as environment:
        assert len(await environment.reset(ROW)) == 2


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("NoSuch", "has no attribute 'NoSuch'; put the module on PYTHONPATH"),
        ("function", "is not a class"),
        ("Synchronous", r"has no method async def reset\(self, row\)"),
        ("WithoutStep", r"has no method async def step\(self, message\)"),
        ("NeedsArguments", "cannot be made without arguments: missing a required argument: 'size'"),
    ],
)
def test_a_class_that_is_no_environment_is_refused_before_the_job_begins(name: str, what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"rollout.environment.function users_envs:{name}: .*{what}"):
        pool_of(name).check()
