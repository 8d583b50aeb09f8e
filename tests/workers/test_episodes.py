"""Conversations of a played student with an environment: what becomes a sample of them."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from runs import arithmetic
from test_environment_messages import RESULT, TOOL, WITH_TOOLS, called

from distill_api.job import parse_job
from distill_api.spec.job_spec import Prompts, Reward
from distill_workers.data.cursor import Cursor
from distill_workers.data.prompts import load_data
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import EngineRefused, Response
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.fair_slots import Kind
from distill_workers.environments.pool import EnvironmentFailed, EnvironmentPool
from distill_workers.environments.protocol import AssistantMessage, Message, Row, ToolCall
from distill_workers.environments.user_environment import Answer
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import ConfigurationError, PromptError
from distill_workers.metrics import Metrics
from distill_workers.rewards.build import build_reward, build_rewards
from distill_workers.rollout.conversations.build import build_episodes
from distill_workers.rollout.conversations.environment_episodes import EnvironmentEpisodes
from distill_workers.rollout.conversations.episodes import Episodes, of_evaluation, turn_seed
from distill_workers.rollout.pipeline import RolloutPipeline, sample_seed
from distill_workers.teacher.protocol import Scores
from distill_workers.teacher.teachers import Teachers

QUESTION: Message = {"role": "user", "content": "What is 12 plus 30?"}
LIMITS = {"maxPromptTokens": 200, "maxResponseTokens": 200}
SAYS = [called("add", '{"a": 12, "b": 30}'), "The answer is 42.", "Hello"]
TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = WITH_TOOLS


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER([text], add_special_tokens=False)["input_ids"][0]
    return ids


class Engines:
    """A student that says one text a turn, and ends each by `end`; turn n under weights n, or all under `version`."""

    def __init__(self, says: list[str] = SAYS, end: str = "<|im_end|>", version: int | None = None) -> None:
        self.says, self.end, self.version, self.requests = says, end, version, list[dict[str, Any]]()
        self.refused = 0

    async def generate(self, prompt_ids: list[int], *, max_new_tokens: int, affinity: Any, **others: Any) -> Response:
        if self.refused:
            self.refused -= 1
            raise EngineRefused("too long")
        turn = sum(text in TOKENIZER.decode(prompt_ids) for text in self.says)
        self.requests.append({"prompt": prompt_ids, "room": max_new_tokens, "affinity": affinity, **others})
        ids = ids_of(self.says[turn] + self.end)
        kept = ids[:max_new_tokens]
        version = turn if self.version is None else self.version
        return Response(kept, [-0.5] * len(kept), [version] * len(kept), len(kept) < len(ids))


class Played:
    """A pool of environments in this process, which answer what `step` returns, given the number of the turn."""

    def __init__(self, step: Callable[[int], Answer], opening: list[Message] | None = None) -> None:
        self.step_of, self.opening = step, opening
        self.seen = list[AssistantMessage]()
        self.rows, self.kinds = list[Row](), list[Kind]()

    @contextlib.asynccontextmanager
    async def conversation(self, kind: Kind) -> AsyncIterator[Any]:
        self.kinds.append(kind)
        yield self

    async def reset(self, row: Row) -> list[Message]:
        self.rows.append(row)
        return self.opening or row.messages

    async def step(self, message: AssistantMessage) -> Answer:
        self.seen.append(message)
        return self.step_of(len(self.seen) - 1)


def one_tool_then_done(turn: int) -> Answer:
    return Answer([RESULT], 0.25) if turn == 0 else Answer(reward=1.0, done=True)


def for_ever(turn: int) -> Answer:
    return Answer([RESULT], 1.0)


def spec_of(folder: Path, *, objective: Any = None, **rollout: Any) -> Any:
    environment = {"function": "users_envs:Calculator", "maxTurns": 4, **rollout.pop("environment", {})}
    return parse_job(
        arithmetic(
            folder,
            "episodes",
            objective=objective or {},
            data={"sources": [{"name": "sums", "prompts": {"path": "/p"}}], "prompts": None},
            rollout={**LIMITS, "promptsPerStep": 1, "samplesPerPrompt": 1, "environment": environment, **rollout},
        )
    ).spec


def episodes(folder: Path, engines: Engines, environments: Any, *, prompts: Any = None, **rollout: Any) -> Episodes:
    spec = spec_of(folder, **rollout)
    renderer = ConversationRenderer(Prompts.model_validate({"path": "/p", **(prompts or {})}), TOKENIZER, [TOOL])
    played: Any = engines
    return EnvironmentEpisodes(spec, played, environments, {"sums": renderer, of_evaluation("held-out"): renderer})


PROMPT = Prompt(3, [1], "?", "42", {"level": 2}, "sums", messages=[QUESTION])


async def test_a_conversation_is_one_sample_whose_ids_are_what_the_template_renders(tmp_path: Path) -> None:
    engines, environment = Engines(), Played(one_tool_then_done)
    [sample] = await episodes(tmp_path, engines, environment).samples(PROMPT, 2, seed=5)
    messages = [QUESTION, {"role": "assistant", "content": SAYS[0]}, RESULT, {"role": "assistant", "content": SAYS[1]}]
    whole = ids_of(TOKENIZER.apply_chat_template(messages, tools=[TOOL], tokenize=False))
    newline = len(ids_of("\n"))  # which ends the template's turn and no turn of the student
    assert [*sample.prompt_ids, *sample.response_ids] == whole[:-newline]
    assert [TOKENIZER.decode([sample.response_ids[i] for i in turn]) for turn in sample.turns] == [
        f"{text}<|im_end|>" for text in SAYS[:2]
    ]
    assert (sample.reward, sample.truncated, sample.prompt_index, sample.index_in_group) == (1.25, False, 3, 2)
    assert environment.rows == [Row([QUESTION], "42", {"level": 2})]
    assert environment.seen[0].tool_calls == (ToolCall("call-0-0", "add", {"a": 12, "b": 30}),)
    assert environment.seen[1].content == "The answer is 42."


async def test_a_teacher_with_privileged_context_scores_the_same_turns_after_what_it_knows(tmp_path: Path) -> None:
    known = "{prompt} The answer is {answer}, at level {level}."
    made = episodes(tmp_path, Engines(), Played(one_tool_then_done), prompts={"teacherPrompt": known})
    [sample], [plain] = [
        await e.samples(PROMPT, 0, seed=5) for e in (made, episodes(tmp_path, Engines(), Played(one_tool_then_done)))
    ]
    text = TOKENIZER.decode(sample.teacher_prompt_ids)
    assert "What is 12 plus 30? The answer is 42, at level 2.<|im_end|>" in text and '"name": "add"' in text
    assert (sample.prompt_ids, sample.response_ids) == (plain.prompt_ids, plain.response_ids)
    assert plain.privileged_ids is None and sample.copied_share is not None


async def test_each_token_has_the_log_prob_and_the_weights_that_it_was_drawn_with(tmp_path: Path) -> None:
    [sample] = await episodes(tmp_path, Engines(), Played(one_tool_then_done)).samples(PROMPT, 0, seed=5)
    assert sample.loss_mask is not None and len(sample.loss_mask) == len(sample.response_ids)
    first, second = sample.turns
    assert [sample.token_versions[i] for i in (*first, *second)] == [0] * len(first) + [1] * len(second)
    assert sample.weight_version == 0
    assert set(zip(sample.loss_mask, sample.engine_logprobs, strict=True)) == {(True, -0.5), (False, 0.0)}


async def test_every_turn_continues_the_ids_before_it_on_one_engine_with_a_seed_of_its_own(tmp_path: Path) -> None:
    engines = Engines()
    [sample] = await episodes(tmp_path, engines, Played(one_tool_then_done)).samples(PROMPT, 0, seed=5)
    first, second = engines.requests
    assert first["prompt"] == sample.prompt_ids
    assert second["prompt"] == [*sample.prompt_ids, *sample.response_ids[: sample.turns[1].start]]
    assert first["affinity"] is second["affinity"] is not None
    assert [r["seed"] for r in engines.requests] == [5, turn_seed(5, 1)] and turn_seed(5, 1) != turn_seed(6, 1)
    assert (first["room"], second["room"]) == (200, 200 - sample.turns[1].start)


async def test_a_conversation_ends_after_the_last_turn_that_it_may_have(tmp_path: Path) -> None:
    engines, environment = Engines(), Played(for_ever)
    made = episodes(tmp_path, engines, environment, environment={"maxTurns": 2})
    [sample] = await made.samples(PROMPT, 0, seed=5)
    assert len(sample.turns) == len(environment.seen) == len(engines.requests) == 2
    assert sample.loss_mask is not None and sample.loss_mask[-1] and not sample.truncated and sample.reward == 2.0


@pytest.mark.parametrize(("step", "turns"), [(0, 1), (1, 1), (2, 2), (5, 3), (6, 4), (100, 4)])
async def test_under_a_curriculum_the_turns_grow_evenly_with_the_steps(step: int, turns: int, tmp_path: Path) -> None:
    curriculum = {"maxTurns": 4, "curriculum": {"fromTurns": 1, "steps": 6}}
    engines, environment = Engines([*SAYS, "And", "so on"]), Played(for_ever)
    made = episodes(tmp_path, engines, environment, environment=curriculum, maxResponseTokens=400)
    [sample] = await made.samples(PROMPT, 0, seed=5, step=step)
    assert len(sample.turns) == turns and not sample.truncated


async def test_the_batches_of_a_curriculum_have_the_turns_of_their_step(tmp_path: Path) -> None:
    curriculum = {"maxTurns": 3, "curriculum": {"fromTurns": 1, "steps": 2}}
    engines = Engines([*SAYS, "And", "so on"])
    rollouts = pipeline(
        tmp_path, engines, Played(for_ever), Teacher(), Metrics(), environment=curriculum, maxPolicyLag=2
    )
    found = []
    for step in range(3):
        batch = rollouts.take(step, 3)
        found += [len(s.turns) async for part in batch.arrivals(in_order=True) for s in part]
    assert found == [1, 2, 3]


@pytest.mark.parametrize(("truncated", "masked"), [("keep", False), ("mask", True)])
async def test_a_turn_that_is_cut_off_ends_the_conversation_and_is_no_message(
    truncated: str, masked: bool, tmp_path: Path
) -> None:
    environment = Played(for_ever)
    made = episodes(tmp_path, Engines(), environment, maxResponseTokens=10, truncated=truncated)
    [sample] = await made.samples(PROMPT, 0, seed=5)
    assert sample.truncated and sample.masked is masked and len(sample.response_ids) == 10
    assert (environment.seen, sample.reward) == ([], 0.0)


async def test_an_answer_that_leaves_no_room_for_another_turn_is_not_read(tmp_path: Path) -> None:
    long: Message = {**RESULT, "content": "42 " * 100}
    engines = Engines()
    [sample] = await episodes(tmp_path, engines, Played(lambda turn: Answer([long], 0.5))).samples(PROMPT, 0, seed=5)
    assert sample.response_ids == ids_of(SAYS[0] + "<|im_end|>") and len(engines.requests) == 1
    assert sample.truncated and sample.reward == 0.5 and sample.loss_mask == [True] * len(sample.response_ids)


async def test_a_turn_that_ends_with_another_token_is_ended_as_the_template_does(tmp_path: Path) -> None:
    made = episodes(tmp_path, Engines(end="<|endoftext|>"), Played(one_tool_then_done))
    [sample] = await made.samples(PROMPT, 0, seed=5)
    text = TOKENIZER.decode(sample.response_ids)
    assert text.startswith(f"{SAYS[0]}<|endoftext|><|im_end|>\n<|im_start|>user\n<tool_response>")
    begin = sample.turns[0].stop
    assert sample.response_ids[begin] == TOKENIZER.eos_token_id and not sample.loss_mask[begin]  # type: ignore[index]


async def test_an_opening_that_is_too_long_fails_its_sample_by_name(tmp_path: Path) -> None:
    made = episodes(tmp_path, Engines(), Played(for_ever, [{**QUESTION, "content": "12 " * 300}]))
    with pytest.raises(EnvironmentFailed, match=r"prompt 3: the environment begins with \d+ tokens, and .* is 200"):
        await made.samples(PROMPT, 0, seed=5)


async def test_messages_that_the_template_refuses_fail_their_sample_by_name(tmp_path: Path) -> None:
    made = episodes(tmp_path, Engines(), Played(lambda turn: Answer([{"role": "user", "content": "refuse me"}])))
    refusal = "{% if m.content == 'refuse me' %}{{ raise_exception('no') }}{% endif %}"
    TOKENIZER.chat_template = WITH_TOOLS.replace("{% for m in messages %}", "{% for m in messages %}" + refusal)
    try:
        with pytest.raises(EnvironmentFailed, match="prompt 3: the student's chat template refuses these messages: no"):
            await made.samples(PROMPT, 0, seed=5)
    finally:
        TOKENIZER.chat_template = WITH_TOOLS


class Teacher:
    """Scores each token with the same log-prob, and remembers what it was sent."""

    def __init__(self) -> None:
        self.requests = list[tuple[list[int], list[int]]]()

    async def prefetch(self, prompt_ids: list[int]) -> None:
        raise AssertionError("what an environment begins with is not known before")

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        self.requests.append((prompt_ids, response_ids))
        return Scores([-1.0] * len(response_ids), None, None)


def pipeline(
    folder: Path, engines: Engines, environments: Any, teacher: Teacher, metrics: Metrics, **rollout: Any
) -> Any:
    made = episodes(folder, engines, environments, **rollout)
    prompts = [dataclasses.replace(PROMPT, index=i) for i in range(4)]
    played: Any = (engines, Teachers({"": teacher}))  # type: ignore[dict-item]
    cursor = Cursor(prompts, seed=0, shuffle=False)
    return RolloutPipeline(made._spec, cursor, *played, {}, TOKENIZER, metrics, made)


async def samples_of(rollouts: Any) -> list[Sample]:
    return [sample async for part in rollouts.take(0, 1).arrivals(in_order=True) for sample in part]


async def test_the_teacher_scores_a_whole_conversation_in_one_request(tmp_path: Path) -> None:
    teacher, metrics = Teacher(), Metrics()
    rollouts = pipeline(tmp_path, Engines(), Played(one_tool_then_done), teacher, metrics)
    [sample] = await samples_of(rollouts)
    assert teacher.requests == [(sample.prompt_ids, sample.response_ids)]
    assert len(sample.teacher_logprobs) == len(sample.response_ids) and sample.reward == 1.25
    assert f'distill_tokens_total{{kind="rollout"}} {float(sample.trained_tokens)}' in metrics.text().decode()


@pytest.mark.parametrize(("source", "advantages"), [("environment", [-0.5, 0.5]), ("none", [0.0, 0.0])])
async def test_the_environments_reward_is_trained_on_where_the_objective_names_it(
    source: str, advantages: list[float], tmp_path: Path
) -> None:
    rewards = itertools.count()
    environment = Played(lambda turn: Answer(reward=next(rewards) / 2, done=True))
    objective = {"reward": {"source": source}, "advantage": "leave-one-out"}
    rollouts = pipeline(tmp_path, Engines(), environment, Teacher(), Metrics(), objective=objective, samplesPerPrompt=2)
    samples = await samples_of(rollouts)
    assert [s.reward for s in samples] == [0.0, 0.5] and [s.advantage for s in samples] == advantages


async def test_the_seed_of_a_conversation_is_that_of_its_response(tmp_path: Path) -> None:
    engines = Engines()
    await samples_of(pipeline(tmp_path, engines, Played(one_tool_then_done), Teacher(), Metrics()))
    assert engines.requests[0]["seed"] == sample_seed(0, 0, 0, 0, 0)


async def test_an_environment_that_fails_costs_its_own_sample_alone(tmp_path: Path) -> None:
    count = itertools.count()

    def step(turn: int) -> Answer:
        if next(count) == 0:
            raise EnvironmentFailed("step raised KeyError", permanent=True)
        return Answer(done=True)

    metrics = Metrics()
    rollouts = pipeline(tmp_path, Engines(), Played(step), Teacher(), metrics, samplesPerPrompt=3)
    assert len(await samples_of(rollouts)) == 2
    assert 'distill_samples_failed_total{reason="environment"} 1.0' in metrics.text().decode()


async def test_a_step_whose_conversations_all_fail_says_why(tmp_path: Path) -> None:
    def step(turn: int) -> Answer:
        raise EnvironmentFailed("step answered nothing", permanent=True)

    rollouts = pipeline(tmp_path, Engines(), Played(step), Teacher(), Metrics(), samplesPerPrompt=3)
    batch = rollouts.take(0, 1)
    assert [part async for part in batch.arrivals(in_order=True)] == [[], [], []]
    assert batch.failed.permanent
    assert batch.failed.sentence() == "3 of 3 environment; the last: step answered nothing"


def test_a_template_whose_end_of_turn_ends_no_response_is_refused(tmp_path: Path) -> None:
    [end] = ids_of("<|im_end|>")
    with pytest.raises(
        ConfigurationError, match=f"ends a turn with the token {end}, .* add it to rollout.stopTokenIds"
    ):
        episodes(tmp_path, Engines(), Played(for_ever)).check_ends([end + 1])


async def test_in_a_source_without_a_reward_no_conversation_is_weighed_by_its_own(tmp_path: Path) -> None:
    for source, coefficient in (("none", 1.0), ("environment", 0.0)):
        made = pipeline(tmp_path, Engines(), Played(lambda turn: Answer(done=True)), Teacher(), Metrics())
        objective = {"weighting": {"wrong": 0.0}, "reward": {"source": "environment"}}
        sums = {"name": "sums", "prompts": {"path": "/p"}, "reward": {"source": source}}
        changes = {
            "objective": type(made._spec.objective).model_validate(objective),
            "data": type(made._spec.data).model_validate({"sources": [sums]}),
        }
        spec = made._spec.model_copy(update=changes)
        rollouts = RolloutPipeline(
            spec, made._cursor, made._engines, made._teachers, {}, TOKENIZER, Metrics(), made._episodes
        )
        [sample] = await samples_of(rollouts)
        assert (sample.reward, sample.coefficient) == (0.0, coefficient)


async def test_a_conversation_that_an_engine_refuses_begins_anew(tmp_path: Path) -> None:
    engines, environment = Engines(), Played(lambda turn: Answer(done=True))
    engines.refused = 1
    [sample] = await samples_of(pipeline(tmp_path, engines, environment, Teacher(), Metrics()))
    assert len(environment.rows) == 2 and len(sample.turns) == 1


def evaluator(folder: Path, made: Episodes | None, **fields: Any) -> Evaluator:
    (folder / "held-out.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(3)))
    evaluation = {
        "name": "held-out",
        "prompts": {"path": str(folder / "held-out.jsonl")},
        "reward": {"source": "environment"},
        "sampling": {"temperature": 0.5},
        "maxResponseTokens": 150,
        **fields,
    }
    rollout = {**LIMITS, "environment": {"function": "users_envs:Calculator"}}
    spec = parse_job(arithmetic(folder, "held-out", evaluation=[evaluation], rollout=rollout)).spec
    return Evaluator(spec, spec.evaluation[0], TOKENIZER, Metrics(), made)


async def test_an_evaluation_scores_conversations_by_the_environments_reward(tmp_path: Path) -> None:
    rewards = itertools.count()

    def step(turn: int) -> Answer:
        return Answer([RESULT]) if turn % 2 == 0 else Answer(reward=float(next(rewards) % 3 == 0), done=True)

    class OneAfterAnother(Played):
        """The turns of conversations do not mix, so that their numbers tell which is which."""

        lock = asyncio.Lock()

        @contextlib.asynccontextmanager
        async def conversation(self, kind: Kind) -> AsyncIterator[Any]:
            self.kinds.append(kind)
            async with self.lock:
                yield self

    engines, environment, teacher = Engines(version=7), OneAfterAnother(step), Teacher()
    made = evaluator(tmp_path, episodes(tmp_path, engines, environment), samplesPerPrompt=2)
    found = await made.measure(7, engines, Teachers({"teacher": teacher}))  # type: ignore[arg-type, dict-item]
    scored = [r for r in engines.requests if r["temperature"] == 0.5]
    assert (found.score, found.failed, found.prompts) == (pytest.approx(1 / 3), 0, 3)
    assert len(scored) == 2 * 6 and len({r["seed"] for r in scored}) == 12 and all(r["urgent"] for r in scored)
    assert set(environment.kinds) == {Kind.EVALUATION}
    assert scored[0]["room"] == 150 and {row.messages[0]["content"] for row in environment.rows} == {
        f"What is {n}?" for n in range(3)
    }
    assert found.reverse_kl == pytest.approx(0.5), "over the student's own tokens alone"
    assert len(teacher.requests) == 3 and "<tool_response>" in found.examples[0]["response"]
    await made.close()


async def test_conversations_of_an_evaluation_that_fail_are_counted(tmp_path: Path) -> None:
    def step(turn: int) -> Answer:
        if turn == 1:
            raise EnvironmentFailed("step raised KeyError")
        return Answer(reward=1.0, done=True)

    engines = Engines(version=7)
    made = evaluator(tmp_path, episodes(tmp_path, engines, Played(step)), measureReverseKL=False)
    found = await made.measure(7, engines, None)  # type: ignore[arg-type]
    assert (found.score, found.failed) == (1.0, 1)
    stale = await made.measure(6, engines, None)  # type: ignore[arg-type]
    assert (stale.score, stale.failed) == (None, 3)


def test_an_evaluation_that_can_have_no_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"evaluation held-out: reward\.source environment is measured in"):
        evaluator(tmp_path, None)


CODE = """
from distill_workers.environments.protocol import Turn

class Calculator:
    async def reset(self, row):
        self.answer = row.answer
        return row.messages

    async def step(self, message):
        if not message.tool_calls:
            return Turn(reward=float(message.content == "The answer is 42."), done=True)
        return Turn([c.result(str(c.arguments["a"] + c.arguments["b"])) for c in message.tool_calls])
"""


def job_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **prompts: Any) -> Any:
    (folder / "users_envs.py").write_text(CODE)
    (folder / "tools.json").write_text(json.dumps([TOOL]))
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "What is 12 plus 30?", "answer": "42"}))
    monkeypatch.syspath_prepend(str(folder))
    data = {"prompts": {"path": str(folder / "rows.jsonl"), "answerField": "answer", **prompts}}
    environment = {"function": "users_envs:Calculator", "tools": str(folder / "tools.json")}
    return parse_job(arithmetic(folder, "calculator", data=data, rollout={**LIMITS, "environment": environment})).spec


async def test_a_job_with_an_environment_plays_it_from_its_data_to_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, engines = job_of(tmp_path, monkeypatch), Engines()
    [prompt] = load_data(spec, TOKENIZER, Metrics())
    made = build_episodes(spec, TOKENIZER, engines, Metrics())  # type: ignore[arg-type]
    assert made is not None and made.notes() == []
    made.check_ends([TOKENIZER.eos_token_id, *ids_of("<|im_end|>")])
    [sample] = await made.samples(prompt, 0, seed=1)
    text = TOKENIZER.decode(sample.response_ids)
    assert "<tool_response>\n42\n</tool_response>" in text and len(sample.turns) == 2 and sample.reward == 1.0
    assert '"name": "add"' in TOKENIZER.decode(sample.prompt_ids)
    await made.close()


def test_prompts_have_their_messages_in_a_job_with_an_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job_of(tmp_path, monkeypatch)
    single = spec.model_copy(update={"rollout": spec.rollout.model_copy(update={"environment": None})})
    assert [p.messages for p in load_data(spec, TOKENIZER, Metrics())] == [[QUESTION]]
    assert [p.messages for p in load_data(single, TOKENIZER, Metrics())] == [None]
    assert build_episodes(single, TOKENIZER, None, Metrics()) is None  # type: ignore[arg-type]


def test_prompts_that_begin_no_conversation_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match=r"rollout\.environment needs prompts\.applyChatTemplate: true"):
        build_episodes(job_of(tmp_path, monkeypatch, applyChatTemplate=False), TOKENIZER, None, Metrics())  # type: ignore[arg-type]


def test_a_job_with_an_environment_grades_no_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_rewards(job_of(tmp_path, monkeypatch), Metrics()) == {}


def test_the_reward_of_conversations_grades_no_response_by_itself() -> None:
    with pytest.raises(ConfigurationError, match=r"reward\.source environment is that of conversations"):
        build_reward(Reward.model_validate({"source": "environment"}), Metrics())


def test_an_environment_that_cannot_be_imported_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job_of(tmp_path, monkeypatch)
    missing = spec.rollout.environment.model_copy(update={"function": "no_such_module:Calculator"})
    with pytest.raises(ConfigurationError, match=r"rollout\.environment\.function no_such_module:\w+: No module"):
        EnvironmentPool(missing).check()
