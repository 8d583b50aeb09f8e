"""An agent of the user is a program: it runs once for each response, and what goes wrong there fails that alone."""

import asyncio
import itertools
import json
import re
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from runs import arithmetic
from test_agent_endpoint import ADDS, Student, by_turn
from test_environment_messages import WITH_TOOLS
from test_episodes import LIMITS, TOKENIZER, Teacher, ids_of, samples_of

from distill_api.job import parse_job
from distill_workers.data.cursor import Cursor
from distill_workers.data.prompts import load_data
from distill_workers.engine.request import EngineRefused
from distill_workers.environments.agent_process import KEPT_BYTES, Ended, started
from distill_workers.environments.fair_slots import Kind
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.environments.protocol import Row
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics
from distill_workers.rollout.conversations import agent_episodes
from distill_workers.rollout.conversations.agent_episodes import AgentEpisodes
from distill_workers.rollout.conversations.build import build_episodes
from distill_workers.rollout.conversations.conversation_clock import ConversationClock
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.teacher.protocol import Scores
from distill_workers.teacher.teachers import Teachers

pytestmark = pytest.mark.timeout(120)

CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)
REPO = Path(__file__).resolve().parents[2]
AGENT = """
import json, os, sys, time, urllib.request

row = json.load(sys.stdin)

def ask(*messages):
    body = json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": messages}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
        return json.load(answer)["choices"][0]["message"]

"""


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    TOKENIZER.chat_template = WITH_TOOLS
    yield


def spec_of(folder: Path, *, source: str = "environment", objective: Any = None, **fields: Any) -> Any:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "What is 12 plus 30?", "answer": "42", "level": 2}))
    environment = {"agent": {"command": [sys.executable, str(folder / "agent.py")]}, **fields.pop("environment", {})}
    prompts = {"path": str(folder / "rows.jsonl"), "answerField": "answer", **fields.pop("prompts", {})}
    rollout = {**LIMITS, "promptsPerStep": 1, "samplesPerPrompt": 2, "environment": environment, **fields}
    evaluation = [
        {
            "name": "held-out",
            "prompts": {"path": str(folder / "rows.jsonl")},
            "reward": {"source": "environment"},
            "samplesPerPrompt": 2,
        }
    ]
    objective = {"reward": {"source": source}, **(objective or {})}
    data = {"prompts": prompts}
    return parse_job(
        arithmetic(folder, "agents", data=data, rollout=rollout, objective=objective, evaluation=evaluation)
    ).spec


def agents(folder: Path, code: str, student: Student, **fields: Any) -> AgentEpisodes:
    (folder / "agent.py").write_text(AGENT + textwrap.dedent(code))
    made = build_episodes(spec_of(folder, **fields), TOKENIZER, student, Metrics())  # type: ignore[arg-type]
    assert isinstance(made, AgentEpisodes)
    return made


async def samples(made: AgentEpisodes, **changes: Any) -> Any:
    [prompt] = load_data(made._spec, TOKENIZER, Metrics())
    try:
        return await made.samples(prompt, 1, seed=5)
    finally:
        await made.close()


async def failure(folder: Path, code: str, student: Student | None = None, **fields: Any) -> EnvironmentFailed:
    with pytest.raises(EnvironmentFailed) as failed:
        await samples(agents(folder, code, student or Student(lambda read: "said"), **fields))
    return failed.value


async def test_an_agent_reads_its_row_and_its_conversations_share_the_reward_that_it_prints(tmp_path: Path) -> None:
    code = """
        first = ask(*row["messages"])
        ask(*row["messages"], first, {"role": "user", "content": f"And with level {row['metadata']['level']}?"})
        ask({"role": "user", "content": "another conversation"})
        print("working")
        print(json.dumps({"reward": 0.5 if row["answer"] == "42" else 0.0}))
    """
    found = await samples(agents(tmp_path, code, Student(by_turn("first", "second", "third"))))
    assert [s.reward for s in found] == [0.5, 0.5] and {s.index_in_group for s in found} == {1}
    assert sorted(len(s.turns) for s in found) == [1, 2]
    [long] = [s for s in found if len(s.turns) == 2]
    assert "And with level 2?" in TOKENIZER.decode(long.response_ids)
    assert long.loss_mask is not None and set(long.loss_mask) == {True, False} and not long.truncated
    assert set(long.trained(long.engine_logprobs)) == {-0.5}


async def test_the_system_prompt_and_what_the_teacher_knows_go_with_a_conversation(tmp_path: Path) -> None:
    prompts = {"systemPrompt": "Be brief.", "teacherPrompt": "{prompt} The answer is {answer}."}
    code = 'ask(*row["messages"])\nprint(\'{"reward": 1}\')'
    [sample] = await samples(agents(tmp_path, code, Student(lambda read: "said"), prompts=prompts))
    read, known = TOKENIZER.decode(sample.prompt_ids), TOKENIZER.decode(sample.teacher_prompt_ids)
    assert "Be brief." in read and "The answer is 42." not in read
    assert "Be brief." in known and "What is 12 plus 30? The answer is 42." in known


EXAMPLE = re.compile(r"# the module my_agent\n(.*?)```", re.S)


async def test_the_example_of_the_guide_is_an_agent(tmp_path: Path) -> None:
    match = EXAMPLE.search((REPO / "docs" / "guides" / "environments.md").read_text())
    assert match is not None and len(match[1].strip().splitlines()) <= 20
    (tmp_path / "agent.py").write_text(match[1])
    student = Student(by_turn(ADDS, "The answer is 42."))
    made = build_episodes(spec_of(tmp_path), TOKENIZER, student, Metrics())  # type: ignore[arg-type]
    assert isinstance(made, AgentEpisodes)
    [sample] = await samples(made)
    assert len(sample.turns) == 2 and sample.reward == 1.0
    assert "<tool_response>\n42\n</tool_response>" in TOKENIZER.decode(sample.response_ids)


async def test_an_agent_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    code = """
        import subprocess
        ask(*row["messages"])
        child = subprocess.Popen(["sleep", "600"])
        open(sys.argv[0] + ".pid", "w").write(str(child.pid))
        print('{"reward": 1}')
    """
    [sample] = await samples(agents(tmp_path, code, Student(lambda read: "said")))
    await until_it_has_ended(int((tmp_path / "agent.py.pid").read_text()))
    assert sample.reward == 1.0


def written(path: Path) -> bool:
    return path.exists() and path.read_text() != ""


async def until_it_has_ended(process: int) -> None:
    for _ in range(500):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"process {process} is alive")


KILLED = """
import asyncio, sys
from distill_workers.environments.agent_process import started
from distill_workers.environments.protocol import Row

async def trainer():
    async with started(["sleep", "600"], Row([], None, {}), "", "") as agent:
        print(agent._process.pid, flush=True)
        await agent.ended()

asyncio.run(trainer())
"""


async def test_a_trainer_that_is_killed_takes_the_agent_with_it() -> None:
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, stdout=asyncio.subprocess.PIPE)
    assert trainer.stdout is not None
    number = int(await trainer.stdout.readline())
    while Path(f"/proc/{number}/comm").read_text().strip() != "sleep":
        await asyncio.sleep(0.01)
    trainer.kill()
    await until_it_has_ended(number)
    await trainer.wait()


@pytest.mark.parametrize("is_asking", [False, True])
async def test_an_agent_that_is_cancelled_is_killed(tmp_path: Path, is_asking: bool) -> None:
    code = f"""
        open(sys.argv[0] + ".pid", "w").write(str(os.getpid()))
        {"ask(*row['messages'])" if is_asking else ""}
        time.sleep(600)
    """
    student = Student(lambda read: "said")
    student.together = asyncio.Barrier(2)
    playing = asyncio.create_task(samples(agents(tmp_path, code, student)))
    while not (student.requests if is_asking else written(tmp_path / "agent.py.pid")):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    await until_it_has_ended(int((tmp_path / "agent.py.pid").read_text()))


async def test_an_agent_that_neither_asks_nor_ends_is_killed_at_its_time_limit(tmp_path: Path) -> None:
    begin = time.monotonic()
    error = await failure(tmp_path, 'ask(*row["messages"])\ntime.sleep(600)', environment={"timeoutSeconds": 1})
    told = "rollout.environment.agent.command: the agent made no request that was answered for 1 s, and did not end"
    assert str(error) == told and not error.permanent
    assert time.monotonic() - begin < 30


async def test_the_time_that_the_student_takes_is_none_of_the_agents(tmp_path: Path) -> None:
    student = Student(lambda read: "said")
    student.together = asyncio.Barrier(2)
    code = 'ask(*row["messages"])\nprint(\'{"reward": 1}\')'
    made = agents(tmp_path, code, student, environment={"timeoutSeconds": 5})
    playing = asyncio.create_task(samples(made))
    while not student.requests:
        await asyncio.sleep(0.01)
    await asyncio.sleep(6)
    await student.together.wait()
    [sample] = await playing
    assert sample.reward == 1.0


@pytest.mark.parametrize(
    ("code", "sentence", "permanent"),
    [
        ("", "the agent ended without a message of the student: it must ask at OPENAI_BASE_URL", True),
        ('ask(*row["messages"])', r'ended without a reward; its last line must be such as {"reward": 0.5}', True),
        ('ask(*row["messages"])\nprint("done")', "ended without a reward", True),
        ('ask(*row["messages"])\nprint(\'{"score": 1}\')', 'printed {"score": 1} at last, which has no "reward"', True),
        ('ask(*row["messages"])\nprint(\'{"reward": NaN}\')', "has no .* finite number", True),
        ('ask(*row["messages"])\nprint(\'{"reward": \' + "1" * 400 + "}")', "has no .* finite number", True),
        ('ask(*row["messages"])\nraise KeyError("where")', "ended with exit code 1: KeyError: 'where'", False),
        ('ask(*row["messages"])\nsys.exit(3)', "the agent ended with exit code 3$", False),
        ("os.abort()", "the agent was ended by signal 6", False),
        ('ask({"role": "wizard"})', r"exit code 1: .*400.* was told: messages\[0\] has the role 'wizard'", False),
        ('ask({"role": "user", "content": "12 " * 900})', r"told: the conversation begins with \d+ tokens", False),
    ],
)
async def test_what_an_agent_does_wrong_fails_its_response_by_name(
    code: str, sentence: str, permanent: bool, tmp_path: Path
) -> None:
    error = await failure(tmp_path, code)
    assert re.search(sentence, str(error)) and str(error).startswith("rollout.environment.agent.command: the agent ")
    assert error.permanent is permanent


async def test_a_job_without_a_reward_needs_none_of_its_agents(tmp_path: Path) -> None:
    [sample] = await samples(agents(tmp_path, 'ask(*row["messages"])', Student(lambda read: "said"), source="none"))
    assert sample.reward is None


@pytest.mark.parametrize("limit", [{"maxResponseTokens": 10}, {"environment": {"maxTurns": 1}}])
async def test_an_agent_that_fails_at_a_limit_of_the_job_keeps_its_conversation(
    limit: dict[str, Any], tmp_path: Path
) -> None:
    code = """
        said = ask(*row["messages"])
        ask(*row["messages"], said, {"role": "user", "content": "Go on."})
    """
    [sample] = await samples(agents(tmp_path, code, Student(lambda read: "Hello world"), **limit))
    assert (sample.reward, sample.truncated) == (0.0, "maxResponseTokens" in limit)


async def test_an_agent_under_a_curriculum_ends_at_the_turns_of_its_step(tmp_path: Path) -> None:
    code = """
        messages = row["messages"]
        while True:
            messages += [ask(*messages), {"role": "user", "content": "Go on."}]
    """
    curriculum = {"maxTurns": 3, "curriculum": {"fromTurns": 1, "steps": 2}}
    for step, turns in ((0, 1), (1, 2), (2, 3)):
        made = agents(tmp_path, code, Student(lambda read: "said"), environment=curriculum)
        [prompt] = load_data(made._spec, TOKENIZER, Metrics())
        [sample] = await made.samples(prompt, 0, seed=5, step=step)
        await made.close()
        assert (len(sample.turns), sample.reward, sample.truncated) == (turns, 0.0, False)


async def test_a_program_that_is_not_there_is_refused_before_the_run(tmp_path: Path) -> None:
    missing = {"agent": {"command": ["no-such-agent"]}}
    with pytest.raises(ConfigurationError, match=r"agent\.command: there is no program no-such-agent; it must"):
        build_episodes(spec_of(tmp_path, environment=missing), TOKENIZER, None, Metrics())  # type: ignore[arg-type]


async def test_a_program_that_is_gone_by_then_fails_its_response(tmp_path: Path) -> None:
    program = tmp_path / "agent"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    made = agents(tmp_path, "", Student(lambda read: ""), environment={"agent": {"command": [str(program)]}})
    program.unlink()
    with pytest.raises(EnvironmentFailed, match=r"ended with exit code 1: .*No such file or directory"):
        await samples(made)


@pytest.mark.parametrize("metadata", [{(1, 2): 3}, {"level": CIRCULAR}], ids=["keys", "circular"])
async def test_a_row_that_json_cannot_have_fails_its_response_for_good(metadata: Any) -> None:
    with pytest.raises(EnvironmentFailed, match="the row cannot be written as JSON: ") as failed:
        async with started(["true"], Row([], None, metadata), "", ""):
            pass
    assert failed.value.permanent


async def test_an_endpoint_that_gets_no_port_fails_its_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(site: web.TCPSite) -> None:
        raise OSError("Too many open files")

    made = agents(tmp_path, "", Student(lambda read: ""))
    monkeypatch.setattr(web.TCPSite, "start", refuse)
    with pytest.raises(EnvironmentFailed, match="the agents' endpoint cannot listen: Too many open files") as failed:
        await samples(made)
    assert not failed.value.permanent


async def test_signals_that_python_ignores_are_not_ignored_in_an_agent() -> None:
    """A program such as yes, in a pipe whose reader has ended, would go on otherwise."""
    async with started(["grep", "SigIgn", "/proc/self/status"], Row([], None, {}), "", "") as agent:
        ignored = int((await agent.ended()).output.split()[1], 16)
    assert not [s.name for s in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> s - 1 & 1]


async def test_the_time_of_an_agent_begins_once_it_has_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_episodes, "CONVERSATIONS", 1)
    made = agents(tmp_path, 'ask(*row["messages"])\nprint(\'{"reward": 1}\')', Student(lambda read: "said"))
    [prompt] = load_data(made._spec, TOKENIZER, Metrics())
    clock, begin = ConversationClock(), time.monotonic()
    async with made._places.one(Kind.TRAINING):
        playing = asyncio.create_task(made.samples(prompt, 0, seed=5, clock=clock))
        await asyncio.sleep(0.5)
    await playing
    clock.stop()
    await made.close()
    assert 0.0 < clock.seconds <= time.monotonic() - begin - 0.5


async def test_what_an_engine_refuses_is_no_fault_of_the_agents(tmp_path: Path) -> None:
    student = Student(lambda read: "said")
    student.error = EngineRefused("not finite")
    with pytest.raises(EngineRefused, match="not finite"):
        await samples(agents(tmp_path, 'ask(*row["messages"])', student))


async def test_an_agent_begins_once_one_of_those_that_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_episodes, "CONVERSATIONS", 1)
    student = Student(lambda read: "said")
    made = agents(tmp_path, 'ask(*row["messages"])\nprint(\'{"reward": 1}\')', student)
    student.together = asyncio.Barrier(2)
    [prompt] = load_data(made._spec, TOKENIZER, Metrics())
    playing = [asyncio.create_task(made.samples(prompt, i, seed=i)) for i in range(2)]
    for asked in (1, 2):
        while len(student.requests) < asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert len(student.requests) == asked
        await student.together.wait()
    await asyncio.gather(*playing)
    await made.close()


def test_only_the_end_of_a_long_output_is_kept_and_its_last_line_counts() -> None:
    assert Ended(0, 'x\n{"reward": 1}\n{"reward": 0.25}\n\n', "").reward == 0.25
    assert Ended(0, "", "").reward is None and KEPT_BYTES < 100_000


async def test_an_agent_that_prints_much_is_read_to_its_end(tmp_path: Path) -> None:
    code = """
        ask(*row["messages"])
        for pipe in (sys.stdout, sys.stderr):
            pipe.write("x" * 3_000_000 + "\\n")
        print('{"reward": 1}')
    """
    [sample] = await samples(agents(tmp_path, code, Student(lambda read: "said")))
    assert sample.reward == 1.0


async def test_the_samples_of_a_response_share_advantage_and_baseline(tmp_path: Path) -> None:
    """Of two responses one has two conversations: the other counts as much as both together."""
    code = """
        is_first = ask({"role": "user", "content": "Which?"})["content"] == "0"
        if is_first:
            ask({"role": "user", "content": "more"})
        print(json.dumps({"reward": float(is_first)}))
    """
    numbers = itertools.count()
    student = Student(lambda read: "said" if "more" in read else str(next(numbers)))
    objective = {"advantage": "leave-one-out", "baseline": "leave-one-out", "support": "sampled-token", "topK": None}
    made = agents(tmp_path, code, student, objective=objective)

    class Choosy(Teacher):
        async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
            liked = "said" not in TOKENIZER.decode(response_ids)
            return Scores([-1.0 if liked else -2.0] * len(response_ids), None, None)

    teachers: Any = Teachers({"teacher": Choosy()})  # type: ignore[dict-item]
    cursor = Cursor(load_data(made._spec, TOKENIZER, Metrics()), seed=0, shuffle=False)
    metrics = Metrics()
    rollouts = RolloutPipeline(made._spec, cursor, student, teachers, {}, TOKENIZER, metrics, made)  # type: ignore[arg-type]
    found = await samples_of(rollouts)
    await made.close()
    assert sorted((s.reward, s.advantage) for s in found) == [(0.0, -1.0), (1.0, 1.0), (1.0, 1.0)]
    short, long = len(ids_of("0<|im_end|>")), len(ids_of("said<|im_end|>"))
    of_two = (0.5 * short + 1.5 * long) / (short + long)
    assert [s.baseline for s in found] == [pytest.approx(of_two if s.reward == 0.0 else 0.5) for s in found]
    tokens = float(sum(s.trained_tokens for s in found))
    assert f'distill_tokens_total{{kind="rollout"}} {tokens}' in metrics.text().decode()


async def test_an_evaluation_scores_a_response_once_and_measures_all_its_conversations(tmp_path: Path) -> None:
    code = """
        for n in range(2):
            ask({"role": "user", "content": str(n)})
        print('{"reward": 0.25}')
    """
    student, teacher = Student(lambda read: "said"), Teacher()
    real = student.generate

    async def generate(prompt_ids: list[int], **options: Any) -> Any:
        response = await real(prompt_ids, **options)
        response.versions[:] = [7] * len(response.ids)
        return response

    student.generate = generate  # type: ignore[method-assign]
    made = agents(tmp_path, code, student)
    [evaluation] = made._spec.evaluation
    evaluator = Evaluator(made._spec, evaluation, TOKENIZER, Metrics(), made)
    found = await evaluator.measure(7, student, Teachers({"teacher": teacher}))  # type: ignore[arg-type, dict-item]
    await made.close()
    assert (found.score, found.failed, found.prompts) == (0.25, 0, 1) and len(found.examples) == 2
    assert len(teacher.requests) == 2 and found.reverse_kl == pytest.approx(0.5)
    assert all(r["urgent"] for r in student.requests)
