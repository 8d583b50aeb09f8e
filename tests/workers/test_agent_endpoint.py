"""An agent's requests, sent by the real client of OpenAI's API: what it is answered, and what is recorded of it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from test_environment_messages import TOOL, WITH_TOOLS, called
from test_episodes import PROMPT, QUESTION, TOKENIZER, ids_of

from distill_api.spec.job_spec import Prompts, Sampling
from distill_workers.engine.request import EngineRefused, Response
from distill_workers.environments.agent_endpoint import AgentEndpoint
from distill_workers.environments.chat_completions import ApiError, ChatRequest, read_request
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.environments.protocol import Message
from distill_workers.metrics import Metrics
from distill_workers.rollout.conversations.agent_session import AgentSession
from distill_workers.rollout.conversations.conversation_tree import ConversationTree, Opening, RecordedTurn
from distill_workers.rollout.conversations.episodes import Conversation, Terms
from distill_workers.rollout.scheduler import EngineAffinity

pytestmark = pytest.mark.timeout(120)

ADDS = called("add", '{"a": 12, "b": 30}')
SYSTEM = {"role": "system", "content": "Be brief."}


def by_turn(*texts: str) -> Callable[[str], str]:
    """Return what the student says: the first text that its conversation does not have yet."""
    return lambda read: next(text for text in texts if text not in read)


class Student:
    """A student that says what `says` makes of the text before, and ends it, cut off at the most that it may say."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.says, self.requests = says, list[dict[str, Any]]()
        self.together = asyncio.Barrier(1)
        self.error: Exception | None = None
        self.cancelled = 0

    async def generate(self, prompt_ids: list[int], *, max_new_tokens: int, **others: Any) -> Response:
        self.requests.append({"prompt": prompt_ids, "room": max_new_tokens, **others})
        try:
            await self.together.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        others["affinity"].engine = 1
        ids = ids_of(self.says(TOKENIZER.decode(prompt_ids)) + "<|im_end|>")
        kept = ids[:max_new_tokens]
        return Response(kept, [-0.5] * len(kept), [len(self.requests)] * len(kept), len(kept) < len(ids))


class Served:
    """One episode and the client that an agent has of it."""

    def __init__(self, endpoint: AgentEndpoint, session: AgentSession, key: str, metrics: Metrics) -> None:
        self.endpoint, self.session, self.key, self.metrics = endpoint, session, key, metrics
        direct = openai.DefaultAsyncHttpxClient(trust_env=False)  # by no proxy
        self.client = AsyncOpenAI(base_url=endpoint.url, api_key=key, max_retries=0, http_client=direct)

    async def ask(self, *messages: Any, **options: Any) -> Any:
        """Return the choice of a completion."""
        made = await self.client.chat.completions.create(model="student", messages=list(messages), **options)
        return made.choices[0]

    @property
    def conversations(self) -> list[Conversation]:
        return self.session.tree.conversations()


@asynccontextmanager
async def served(
    student: Student, *, max_tokens: int = 300, max_prompt_tokens: int = 300, max_turns: int = 8, seed: int = 5
) -> AsyncIterator[Served]:
    TOKENIZER.chat_template = WITH_TOOLS
    endpoint, metrics = AgentEndpoint(), Metrics()
    terms = Terms("sums", seed, Sampling(), max_tokens, max_turns)
    renderer = ConversationRenderer(Prompts(path="/p"), TOKENIZER, None)
    session = AgentSession(PROMPT, terms, renderer, student, metrics, max_prompt_tokens=max_prompt_tokens)
    await endpoint.start()
    with endpoint.open(session) as key:
        made = Served(endpoint, session, key, metrics)
        try:
            yield made
        finally:
            await made.client.close()
            await endpoint.close()


def written(conversation: Conversation) -> list[str]:
    """Return the texts of the turns that are trained."""
    ids, found, text = conversation.response_ids, list[str](), list[int]()
    for i, is_trained in zip([*ids, 0], [*conversation.loss_mask, False], strict=True):
        if is_trained:
            text.append(i)
        elif text:
            found.append(TOKENIZER.decode(text))
            text = []
    return found


async def test_a_conversation_with_tools_is_the_ids_that_the_template_renders() -> None:
    student = Student(by_turn(ADDS, "The answer is 42."))
    async with served(student) as agent:
        first = await agent.ask(QUESTION, tools=[TOOL])
        [call] = first.message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
        last = await agent.ask(QUESTION, first.message, result, tools=[TOOL])
        [conversation] = agent.conversations
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 12, "b": 30})
    assert (first.finish_reason, last.finish_reason) == ("tool_calls", "stop")
    assert (first.message.content, last.message.content) == (None, "The answer is 42.")
    messages = [QUESTION, {"role": "assistant", "content": ADDS}, result]
    messages.append({"role": "assistant", "content": "The answer is 42."})
    whole = ids_of(TOKENIZER.apply_chat_template(messages, tools=[TOOL], tokenize=False))
    assert [*conversation.prompt_ids, *conversation.response_ids] == whole[: -len(ids_of("\n"))]
    assert written(conversation) == [f"{ADDS}<|im_end|>", "The answer is 42.<|im_end|>"]
    assert [r["affinity"].engine for r in student.requests] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_that_no_text_is_encoded_to_go_on_as_they_were_sampled(stream: bool) -> None:
    """The student spells a word letter by letter, which a tokenizer would not."""
    student = Student(lambda read: "world")
    spelt = [i for letter in "Hello" for i in ids_of(letter)]
    assert spelt != ids_of("Hello")
    real = student.generate

    async def generate(prompt_ids: list[int], **options: Any) -> Response:
        if len(student.requests) > 0:
            return await real(prompt_ids, **options)
        student.requests.append({"prompt": prompt_ids})
        ids = [*spelt, *ids_of("<|im_end|>")]
        return Response(ids, [-0.5] * len(ids), [0] * len(ids), False)

    student.generate = generate  # type: ignore[method-assign]
    async with served(student) as agent:
        if stream:
            async with agent.client.chat.completions.stream(model="student", messages=[QUESTION]) as events:  # type: ignore[list-item]
                said = (await events.get_final_completion()).choices[0].message
        else:
            said = (await agent.ask(QUESTION)).message
        await agent.ask(QUESTION, said, {"role": "user", "content": "Go on."})
        [conversation] = agent.conversations
    assert said.content == "Hello"
    assert conversation.response_ids[: len(spelt)] == spelt
    second = student.requests[1]["prompt"]
    assert second[len(conversation.prompt_ids) :][: len(spelt)] == spelt


async def test_a_stream_says_what_a_whole_answer_says() -> None:
    async with served(Student(lambda read: f"I add.\n{ADDS}\n{ADDS}")) as agent:
        whole = await agent.ask(QUESTION, tools=[TOOL])
        strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}  # else the client parses no stream
        options: Any = {"model": "student", "messages": [QUESTION], "tools": [strict]}
        async with agent.client.chat.completions.stream(**options, stream_options={"include_usage": True}) as events:
            final = await events.get_final_completion()
        counted = [c async for c in await agent.client.chat.completions.create(**options, stream=True)]
    said = final.choices[0]
    assert (said.message.content, said.finish_reason) == (whole.message.content, whole.finish_reason)
    assert whole.message.content == "I add."
    calls = [[c.function.arguments for c in m.tool_calls] for m in (said.message, whole.message)]
    assert calls[0] == calls[1] and len(calls[0]) == 2
    assert final.usage is not None and final.usage.completion_tokens == len(ids_of(f"I add.\n{ADDS}\n{ADDS}<|im_end|>"))
    assert all(chunk.choices for chunk in counted), "no counts were wanted"


async def test_an_answer_counts_its_tokens_and_tells_thinking_apart() -> None:
    async with served(Student(lambda read: "<think>\n12 and 30\n</think>\n\n42")) as agent:
        made = await agent.client.chat.completions.create(model="student", messages=[QUESTION])  # type: ignore[list-item]
        [conversation] = agent.conversations
    message: Any = made.choices[0].message
    assert (message.content, message.reasoning_content) == ("42", "12 and 30")
    assert made.usage is not None and made.usage.prompt_tokens == len(conversation.prompt_ids)
    assert made.usage.completion_tokens == len(conversation.response_ids)


async def test_a_tool_call_that_cannot_be_read_is_a_text() -> None:
    text = f"{ADDS}<tool_call>oh</tool_call>"
    async with served(Student(lambda read: text)) as agent:
        malformed = await agent.ask(QUESTION, tools=[TOOL])
        without_tools = await agent.ask(QUESTION)
        none = await agent.ask(QUESTION, tools=[TOOL], tool_choice="none")
    for choice in (malformed, without_tools, none):
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


async def test_parallel_calls_are_under_way_together_and_each_is_a_sample() -> None:
    student = Student(lambda read: read.split("user\n")[1][0])
    student.together = asyncio.Barrier(3)
    async with served(student) as agent:
        asked = [agent.ask(SYSTEM, {"role": "user", "content": text}) for text in ("a?", "b?", "c?")]
        choices = await asyncio.wait_for(asyncio.gather(*asked), 20)
        conversations = agent.conversations
    assert [c.message.content for c in choices] == ["a", "b", "c"]
    assert sorted(text for c in conversations for text in written(c)) == [f"{x}<|im_end|>" for x in "abc"]


async def test_branches_share_their_beginning_and_each_turn_is_trained_once() -> None:
    student = Student(lambda read: "first" if "first" not in read else read.rsplit("user\n", 1)[1][:4])
    async with served(student) as agent:
        first = (await agent.ask(QUESTION)).message
        for text in ("left", "over"):
            await agent.ask(QUESTION, first, {"role": "user", "content": text})
        left, over = agent.conversations
    assert left.prompt_ids == over.prompt_ids and left.response_ids[:5] == over.response_ids[:5]
    assert sorted([*written(left), *written(over)]) == ["first<|im_end|>", "left<|im_end|>", "over<|im_end|>"]
    assert written(left)[0] == "first<|im_end|>" and len(written(over)) == 1


async def test_a_turn_that_a_truncated_branch_has_too_is_trained_in_the_other() -> None:
    student = Student(lambda read: "first" if "first" not in read else read.rsplit("user\n", 1)[1][0] * 99)
    async with served(student, max_tokens=60) as agent:
        first = (await agent.ask(QUESTION)).message
        await agent.ask(QUESTION, first, {"role": "user", "content": "a"})
        await agent.ask(QUESTION, first, {"role": "user", "content": "b"}, max_tokens=5)
        whole, truncated = agent.conversations
    assert (whole.truncated, truncated.truncated) == (False, True)
    assert written(whole) == ["first<|im_end|>", "bbbbb"] and len(written(truncated)) == 1


async def test_the_same_request_again_is_another_sample_with_another_seed() -> None:
    student = Student(lambda read: f"try {len(student.requests)}")
    async with served(student) as agent:
        for _ in range(2):
            await agent.ask(QUESTION)
        conversations = agent.conversations
    assert sorted(text for c in conversations for text in written(c)) == ["try 1<|im_end|>", "try 2<|im_end|>"]
    assert len({r["seed"] for r in student.requests}) == 2


async def test_what_is_sampled_and_its_order_depend_on_no_order_of_parallel_calls() -> None:
    found = []
    for texts in (("a", "b"), ("b", "a")):
        student = Student(lambda read: "said")
        async with served(student) as agent:
            for text in texts:
                await agent.ask({"role": "user", "content": text})
            order = [c.prompt_ids for c in agent.conversations]
        found.append((order, sorted((r["prompt"], r["seed"]) for r in student.requests)))
    assert found[0] == found[1]


def rewrites(agent: Served) -> str:
    return next(
        line for line in agent.metrics.text().decode().splitlines() if line.startswith("distill_agent_rewritten_hist")
    )


@pytest.mark.parametrize(
    "again",
    [
        {"content": "first", "name": "solver"},
        {"content": "<think>\n12 and 30\n</think>\n\nfirst"},
        {"content": "\nfirst \n"},
        {"content": "first", "reasoning_content": "12 and 30"},
    ],
)
async def test_what_agents_write_otherwise_without_another_meaning_goes_on(again: dict[str, Any]) -> None:
    student = Student(by_turn("<think>\n12 and 30\n</think>\n\nfirst", "second"))
    async with served(student) as agent:
        await agent.ask(QUESTION)
        await agent.ask(QUESTION, {"role": "assistant", **again}, {"role": "user", "content": "And?"})
        [conversation] = agent.conversations
        assert rewrites(agent).endswith(" 0.0")
    assert len(written(conversation)) == 2 and "12 and 30" in written(conversation)[0]


@pytest.mark.parametrize("changed", [0, 1])
async def test_an_earlier_message_that_is_changed_begins_a_conversation_and_is_counted(changed: int) -> None:
    async with served(Student(by_turn("first", "second"))) as agent:
        said = (await agent.ask(QUESTION)).message
        messages = [QUESTION, {"role": "assistant", "content": said.content}, {"role": "user", "content": "And?"}]
        assert rewrites(agent).endswith(" 0.0")
        messages[changed] = {**messages[changed], "content": "first, or rather"}
        await agent.ask(*messages)
        assert rewrites(agent).endswith(" 1.0")
        conversations = agent.conversations
    assert sorted(text for c in conversations for text in written(c)) == ["first<|im_end|>", "second<|im_end|>"]
    assert len(conversations) == 2 and all(all(c.loss_mask) for c in conversations)


async def test_other_tools_begin_another_conversation_which_is_not_rewritten() -> None:
    async with served(Student(by_turn("first", "second"))) as agent:
        said = (await agent.ask(QUESTION, tools=[TOOL])).message
        await agent.ask(QUESTION, said, {"role": "user", "content": "And?"})
        assert len(agent.conversations) == 2 and rewrites(agent).endswith(" 0.0")


async def test_examples_of_other_conversations_are_not_what_the_student_said_before() -> None:
    examples = [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}]
    async with served(Student(by_turn("first", "second"))) as agent:
        await agent.ask(QUESTION)
        await agent.ask(*examples, QUESTION)
        assert len(agent.conversations) == 2 and rewrites(agent).endswith(" 0.0")


async def test_a_request_that_is_refused_has_rewritten_nothing() -> None:
    async with served(Student(by_turn("first", "second")), max_turns=1) as agent:
        await agent.ask(QUESTION)
        with pytest.raises(openai.BadRequestError, match="maxTurns"):
            await agent.ask(QUESTION, {"role": "assistant", "content": "other"}, {"role": "user", "content": "And?"})
        assert rewrites(agent).endswith(" 0.0")


async def test_a_message_in_parts_and_with_fields_of_other_apis_is_the_same_message() -> None:
    async with served(Student(by_turn("first", "second"))) as agent:
        await agent.ask(QUESTION)
        parts = [{"type": "text", "text": "What is 12 "}, {"type": "text", "text": "plus 30?"}]
        again = {"role": "assistant", "content": "first", "refusal": None, "annotations": [], "function_call": None}
        await agent.ask({"role": "user", "content": parts}, again, {"role": "user", "content": "And?"})
        [conversation] = agent.conversations
    assert len(written(conversation)) == 2


async def test_the_sampling_is_the_jobs_whatever_the_agent_asks_for(caplog: pytest.LogCaptureFixture) -> None:
    student = Student(lambda read: "said")
    with caplog.at_level(logging.INFO):
        async with served(student) as agent:
            for _ in range(2):
                await agent.ask(QUESTION, temperature=0.2, top_p=1, seed=3)
    assert all((r["temperature"], r["top_p"]) == (1.0, 1.0) for r in student.requests)
    told = [r.message for r in caplog.records if "passed over" in r.message]
    assert [text.split(",")[0] for text in told] == ["an agent asks for temperature 0.2", "an agent asks for seed 3"]


async def test_an_answer_may_have_a_limit_of_its_own_and_the_conversation_goes_on() -> None:
    async with served(Student(by_turn("Hello world", "second"))) as agent:
        first = await agent.ask(QUESTION, max_completion_tokens=1)
        await agent.ask(QUESTION, first.message, {"role": "user", "content": "And?"})
        [conversation] = agent.conversations
    assert first.finish_reason == "length" and not conversation.truncated
    assert len(conversation.loss_mask) > 1 and conversation.loss_mask[:2] == [True, False]
    assert TOKENIZER.decode(conversation.response_ids[1:3]).startswith("<|im_end|>")


async def test_a_turn_without_room_is_cut_off_and_the_conversation_counts_as_truncated() -> None:
    async with served(Student(lambda read: "Hello world " * 20), max_tokens=10) as agent:
        cut = await agent.ask(QUESTION)
        with pytest.raises(openai.BadRequestError, match=r"maxResponseTokens is 10") as refused:
            await agent.ask(QUESTION, cut.message, {"role": "user", "content": "And?"})
        [conversation] = agent.conversations
    assert cut.finish_reason == "length" and refused.value.code == "context_length_exceeded"
    assert conversation.truncated and len(conversation.response_ids) == 10 and agent.session.met_a_limit


async def test_a_message_that_leaves_no_room_for_another_turn_is_refused_and_not_read() -> None:
    async with served(Student(lambda read: "said"), max_tokens=40) as agent:
        said = (await agent.ask(QUESTION)).message
        assert not agent.conversations[0].truncated
        with pytest.raises(
            openai.BadRequestError, match="tokens after its first messages, and maxResponseTokens is 40"
        ):
            await agent.ask(QUESTION, said, {"role": "user", "content": "12 " * 60})
        [conversation] = agent.conversations
    assert conversation.truncated and written(conversation) == ["said<|im_end|>"] and all(conversation.loss_mask)


async def test_a_conversation_that_begins_too_long_is_refused() -> None:
    async with served(Student(lambda read: "said"), max_prompt_tokens=20) as agent:
        with pytest.raises(openai.BadRequestError, match=r"begins with \d+ tokens, and rollout.maxPromptTokens is 20"):
            await agent.ask({"role": "user", "content": "12 " * 60})
        assert agent.conversations == []


async def test_the_turns_of_an_episode_are_bounded_over_all_its_conversations() -> None:
    student = Student(lambda read: "said")
    async with served(student, max_turns=2) as agent:
        for text in "ab":
            await agent.ask({"role": "user", "content": text})
        with pytest.raises(
            openai.BadRequestError, match=r"has had 2 turns, and rollout\.environment allows as many \(maxTurns"
        ):
            await agent.ask({"role": "user", "content": "c"})
        assert len(agent.conversations) == len(student.requests) == 2 and agent.session.met_a_limit


async def test_a_request_after_the_last_turn_makes_no_conversation_truncated() -> None:
    async with served(Student(lambda read: "said"), max_turns=1, max_tokens=20) as agent:
        said = (await agent.ask(QUESTION)).message
        with pytest.raises(openai.BadRequestError, match="maxTurns") as refused:
            await agent.ask(QUESTION, said, {"role": "user", "content": "12 " * 60})
        [conversation] = agent.conversations
    assert refused.value.code == "max_turns" and not conversation.truncated


async def test_an_agent_that_is_refused_again_and_again_is_given_up() -> None:
    async with served(Student(lambda read: "said"), max_turns=1) as agent:
        await agent.ask(QUESTION)
        watching = asyncio.create_task(agent.session.watch(0.5))
        for _ in range(100):
            if watching.done():
                break
            with pytest.raises(openai.BadRequestError):
                await agent.ask(QUESTION)
            await asyncio.sleep(0.05)
        assert watching.done()
        with pytest.raises(EnvironmentFailed, match=r"no request that was answered for 0.5 s.* was told: .*maxTurns"):
            await watching


async def test_the_time_of_a_request_that_was_given_up_is_the_students() -> None:
    student = Student(lambda read: "said")
    student.together = asyncio.Barrier(2)
    async with served(student) as agent:
        asking = asyncio.create_task(agent.session.complete(ChatRequest([QUESTION])))
        await asyncio.sleep(2.5)
        await cancelled(asking)
        watching = asyncio.create_task(agent.session.watch(2.0))
        await asyncio.sleep(0.1)
        assert not watching.done()
        await cancelled(watching)
        await student.together.wait()


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_another_model_does_not_exist() -> None:
    async with served(Student(lambda read: "said")) as agent:
        assert [m.id for m in (await agent.client.models.list()).data] == ["student"]
        assert agent.endpoint.url.startswith("http://127.0.0.1:")
        with pytest.raises(openai.NotFoundError, match=r"the model 'gpt-4o' does not exist.*'student'") as refused:
            await agent.client.chat.completions.create(model="gpt-4o", messages=[QUESTION])  # type: ignore[list-item]
    assert refused.value.code == "model_not_found"


async def test_other_parts_of_the_api_are_not_there() -> None:
    async with served(Student(lambda read: "said")) as agent:
        with pytest.raises(openai.NotFoundError, match=r"POST /v1/responses is not there.*chat/completions"):
            await agent.client.responses.create(model="student", input="?")


async def test_a_key_finds_its_own_episode_until_that_has_ended() -> None:
    async with served(Student(lambda read: "said")) as agent:
        with agent.endpoint.open(agent.session) as other:
            second = AsyncOpenAI(base_url=agent.endpoint.url, api_key=other, max_retries=0)
            assert other != agent.key and (await second.models.list()).data
        with pytest.raises(openai.APIStatusError, match="the episode of this key has ended") as gone:
            await second.models.list()
        for forged in ("sk-123", other[:-1] + ("0" if other[-1] != "0" else "1"), agent.key.replace("-1-", "-9-")):
            forger = AsyncOpenAI(base_url=agent.endpoint.url, api_key=forged, max_retries=0)
            with pytest.raises(openai.AuthenticationError, match="the key is of no episode: use OPENAI_API_KEY"):
                await forger.models.list()
            await forger.close()
        await second.close()
    assert gone.value.status_code == 410


async def test_a_template_without_a_place_for_tools_is_said() -> None:
    async with served(Student(lambda read: "said")) as agent:
        TOKENIZER.chat_template = WITH_TOOLS.replace("{% if tools %}", "{% if false %}")
        try:
            with pytest.raises(openai.BadRequestError, match="chat template has no place for tools"):
                await agent.ask(QUESTION, tools=[TOOL])
        finally:
            TOKENIZER.chat_template = WITH_TOOLS


async def test_messages_that_the_template_refuses_are_said() -> None:
    refusal = "{% if m.content == 'refuse me' %}{{ raise_exception('no such role') }}{% endif %}"
    async with served(Student(lambda read: "said")) as agent:
        TOKENIZER.chat_template = WITH_TOOLS.replace("{% for m in messages %}", "{% for m in messages %}" + refusal)
        try:
            with pytest.raises(openai.BadRequestError, match="refuses these messages: no such role"):
                await agent.ask({"role": "user", "content": "refuse me"})
        finally:
            TOKENIZER.chat_template = WITH_TOOLS
        assert agent.session.failure is None and "no such role" in agent.session.refusal


async def test_what_an_engine_refuses_fails_the_episode() -> None:
    student = Student(lambda read: "said")
    student.error = EngineRefused("not finite")
    async with served(student) as agent:
        with pytest.raises(openai.InternalServerError, match="the student cannot answer: not finite"):
            await agent.ask(QUESTION)
        with pytest.raises(EngineRefused):
            await agent.session.watch(60)
        with pytest.raises(openai.APIStatusError, match="the episode has failed"):
            await agent.ask(QUESTION)
    assert len(student.requests) == 1


async def test_a_request_whose_agent_has_gone_is_given_up_and_its_engine_generates_to_the_end() -> None:
    """An engine that is taken for idle while it generates would be given more than it can run."""
    student = Student(lambda read: "said")
    student.together = asyncio.Barrier(2)
    async with served(student) as agent:
        asking = asyncio.create_task(agent.ask(QUESTION))
        while not student.requests:
            await asyncio.sleep(0.01)
        asking.cancel()
        await agent.client.close()
        while agent.session._open:
            await asyncio.sleep(0.01)
        assert student.cancelled == 0 and len(agent.session._calls) == 1
        await student.together.wait()
        while agent.session._calls:
            await asyncio.sleep(0.01)
        assert (student.cancelled, agent.conversations) == (0, [])


async def test_a_request_that_was_given_up_is_none_of_the_turns_and_the_next_has_its_seed() -> None:
    student = Student(lambda read: "said")
    student.together = asyncio.Barrier(3)
    async with served(student, max_turns=2) as agent:
        first, second = (asyncio.create_task(agent.session.complete(ChatRequest([QUESTION]))) for _ in range(2))
        while len(student.requests) < 2:
            await asyncio.sleep(0.01)
        await cancelled(first)
        third = asyncio.create_task(agent.session.complete(ChatRequest([QUESTION])))
        await asyncio.gather(second, third)
        with pytest.raises(ApiError, match="has had 2 turns"):
            await agent.session.complete(ChatRequest([QUESTION]))
        assert len(agent.conversations) == 2
    seeds = [r["seed"] for r in student.requests]
    assert seeds[0] == seeds[2] != seeds[1]


async def test_a_turn_that_ends_after_the_episode_is_not_recorded() -> None:
    student = Student(lambda read: "said")
    student.together = asyncio.Barrier(2)
    async with served(student) as agent:
        asking = asyncio.create_task(agent.session.complete(ChatRequest([QUESTION])))
        while not student.requests:
            await asyncio.sleep(0.01)
        agent.session.end()
        await student.together.wait()
        with pytest.raises(ApiError, match="the episode has ended") as refused:
            await asking
        assert agent.conversations == [] and refused.value.status == 410


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"[]", 400, "the body must be a JSON object"),
        (b'"' + b"x" * 9_000_000 + b'"', 413, "the body has more than 8,000,000 bytes"),
    ],
)
async def test_a_body_that_is_none_is_said(body: bytes, status: int, sentence: str) -> None:
    async with served(Student(lambda read: "said")) as agent, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {agent.key}"}
        async with session.post(f"{agent.endpoint.url}/chat/completions", data=body, headers=headers) as response:
            told = await response.json()
    assert response.status == status and sentence in told["error"]["message"]


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "student", "messages": [QUESTION], **fields}


def calls(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n": 2}, "n: 2 cannot be given"),
        ({"stop": ["\n"]}, "stop: .* cannot be given"),
        ({"logprobs": True}, "logprobs: True cannot be given"),
        ({"response_format": {"type": "json_object"}}, "response_format: .* cannot be given"),
        ({"tool_choice": "required"}, "tool_choice: 'required' cannot be given"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: .* cannot be given"),
        ({"tools": {}}, "tools must be a list"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is not"),
        ({"max_tokens": 0}, "must be a whole number above 0"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": ["hello"]}, r"messages\[0\] has the role None"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "the role 'wizard'; allowed are assistant, developer"),
        ({"messages": [{"role": ["user"], "content": ""}]}, r"messages\[0\] has the role \['user'\]; allowed are"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "42"}]}, "the last message is the assistant's own"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a content that is no text"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_001}]}, "1,000,0.. characters; at most 1,000,000"),
        ({"messages": [{"role": "tool", "content": "", "name": 1}]}, r"messages\[0\].name is no text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}, QUESTION]}, "no call of a function with a"),
        ({"messages": [{"role": "assistant", "tool_calls": [calls("{")]}, QUESTION]}, "arguments that are no JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [calls("[]")]}, QUESTION]}, "arguments that are no object"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_in_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ApiError, match=sentence) as refused:
        read_request(asked(**fields))
    assert refused.value.status == 400


def test_fields_that_ask_for_what_is_given_anyway_are_taken() -> None:
    request = read_request(asked(n=1, stop=None, logprobs=False, tool_choice="auto", temperature=1, user="me"))
    assert request.passed_over == () and request.messages == [QUESTION]
    others = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "chat_template_kwargs": {}}
    assert read_request(asked(**others)).passed_over == ()


def test_the_sampling_of_other_servers_is_passed_over_too() -> None:
    request = read_request(asked(top_k=20, min_p=0.05, repetition_penalty=1.1))
    assert sorted(request.passed_over) == ["min_p 0.05", "repetition_penalty 1.1", "top_k 20"]


def test_the_role_developer_is_the_systems() -> None:
    request = read_request(asked(messages=[{**SYSTEM, "role": "developer"}, QUESTION]))
    assert request.messages == [SYSTEM, QUESTION]


def test_a_tool_without_parameters_is_taken_as_it_stands() -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    assert read_request(asked(tools=tools)).tools == tools


def test_of_turns_that_say_the_same_one_is_gone_on_from_whichever_was_recorded_first() -> None:
    messages: list[Message] = [QUESTION, {"role": "assistant", "content": "Hello"}]
    found = []
    for order in ([5, 6], [6, 5]):
        tree = ConversationTree()
        for i in order:
            response = Response([i], [0.0], [0], False)
            tree.add(RecordedTurn(messages, "", Opening([1], None), None, [], response, EngineAffinity(), False))
        turn = tree.repeated([*messages, QUESTION], "")
        assert turn is not None
        found.append(turn.ids)
    assert found[0] == found[1]


def test_a_conversation_of_a_thousand_turns_is_one_sample() -> None:
    """As many as maxTurns allows."""
    turn: RecordedTurn | None = None
    tree, opening = ConversationTree(), Opening([1], None)
    for n in range(1000):
        read = [2] if turn is not None else []
        turn = RecordedTurn([], "", opening, turn, read, Response([3], [0.0], [n], False), EngineAffinity(), False)
        tree.add(turn)
    [conversation] = tree.conversations()
    assert len(conversation.response_ids) == 1999 and sum(conversation.loss_mask) == 1000
