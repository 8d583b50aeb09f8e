"""One episode of an agent: its requests for the student's messages, answered by engines and recorded as token ids."""

import asyncio
import hashlib
import json
from collections import defaultdict
from typing import Protocol

from distill_workers.data.sample import Prompt
from distill_workers.engine.request import Response
from distill_workers.environments.agent_process import SETTING
from distill_workers.environments.chat_completions import ApiError, ChatRequest, Completion, answered, spoken
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.environments.protocol import AssistantMessage, Message
from distill_workers.failures import PromptError
from distill_workers.metrics import Metrics
from distill_workers.rollout.conversations.conversation_tree import (
    ConversationTree,
    Opening,
    RecordedTurn,
    as_compared,
)
from distill_workers.rollout.conversations.episodes import Terms
from distill_workers.rollout.scheduler import EngineAffinity


class Generator(Protocol):
    """What generates a turn, as EnginePool.generate does."""

    async def generate(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        urgent: bool = False,
        affinity: EngineAffinity | None = None,
    ) -> Response: ...


def request_seed(seed: int, ids: list[int], number: int) -> int:
    """Return the seed of a turn after `ids`; `number` tells apart those of one episode that have the same before them.

    It does not depend on the order in which parallel calls arrive.
    """
    text = f"{seed}/{number}/{','.join(map(str, ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class AgentSession:
    """The episode of one agent."""

    def __init__(
        self,
        prompt: Prompt,
        terms: Terms,
        renderer: ConversationRenderer,
        engines: Generator,
        metrics: Metrics,
        *,
        max_prompt_tokens: int,
        setting: str = SETTING,
    ) -> None:
        """`setting` is the field of the job that names the agent."""
        self._setting = setting
        self._prompt, self._terms, self._renderer = prompt, terms, renderer
        self._engines, self._metrics = engines, metrics
        self._max_prompt_tokens = max_prompt_tokens
        self._where = f"prompt {prompt.index}"
        self._numbers = defaultdict[tuple[int, ...], set[int]](set)
        """Of the turns that were generated, or are, by the ids before them."""
        self._calls = set[asyncio.Task[Response]]()
        """Calls of the engines that have not ended, also of requests that were given up."""
        self._open = 0
        """Requests that wait for their answer."""
        self._open_since = self._idle_since = asyncio.get_running_loop().time()
        self._failed = asyncio.Event()
        self._has_ended = False
        self.tree = ConversationTree()
        self.failure: Exception | None = None
        """What no request of the agent's was the cause of, such as an engine that refuses: it fails the episode."""
        self.refusal = ""
        """What the last refused request was told."""
        self.met_a_limit = False
        """Whether a request was refused since the conversation, or the episode, is as long as it may be."""

    async def complete(self, request: ChatRequest) -> Completion:
        """Return the student's next message, and record it. Raises ApiError."""
        loop = asyncio.get_running_loop()
        if not self._open:
            self._open_since = loop.time()
        self._open += 1
        try:
            self._check_is_open()
            completion = await self._complete(request)
            self._idle_since = self._open_since = loop.time()
            return completion
        except ApiError:
            raise
        except PromptError as error:
            raise ApiError(str(error), param="messages") from None
        except Exception as error:
            self.failure = error
            self._failed.set()
            raise ApiError(f"the student cannot answer: {error}", status=500) from error
        finally:
            self._open -= 1
            if not self._open:
                self._idle_since += loop.time() - self._open_since  # the student's time, also where it was given up

    def end(self) -> None:
        """Record no more turns: the agent has ended. Those that are being generated may finish."""
        self._has_ended = True

    @property
    def told(self) -> str:
        """What the last refused request was told, as the end of a sentence; empty without one."""
        return f" (its last refused request was told: {self.refusal})" if self.refusal else ""

    async def watch(self, seconds: float) -> None:
        """Wait until the episode fails. Raises what failed it, and EnvironmentFailed for an agent that for so long has
        neither been answered nor had a request open: one that is refused again and again ends too."""
        while self.failure is None:
            idle = 0.0 if self._open else asyncio.get_running_loop().time() - self._idle_since
            if idle >= seconds:
                raise EnvironmentFailed(
                    f"{self._setting}: the agent made no request that was answered for {seconds:g} s, and did not end"
                    f"{self.told}"
                )
            try:
                await asyncio.wait_for(self._failed.wait(), seconds - idle)
            except TimeoutError:
                continue
        raise self.failure

    async def _complete(self, request: ChatRequest) -> Completion:
        renderer = self._renderer if request.tools is None else self._renderer.with_tools(request.tools)
        tools, asked = json.dumps(request.tools), as_compared(request.messages)
        if sum(map(len, self._numbers.values())) >= self._terms.max_turns:
            most = self._terms.max_turns
            raise self._limit(
                f"the student has had {most} turns, and rollout.environment allows as many (maxTurns, or "
                "its curriculum)",
                "max_turns",
            )
        parent = self.tree.repeated(asked, tools)
        opening, said, read_ids = self._placed(request.messages, parent, renderer)
        room = self._terms.max_tokens - len(said) - len(read_ids)
        if room <= 0:
            assert parent is not None, "an opening leaves all room"
            parent.truncated = True
            raise self._limit(
                f"the conversation has {len(said) + len(read_ids)} tokens after its first messages, and "
                f"maxResponseTokens is {self._terms.max_tokens}"
            )
        if self.tree.is_rewritten(asked):
            self._metrics.add("distill_agent_rewritten_histories")
        before = [*opening.prompt_ids, *said, *read_ids]
        numbers = self._numbers[tuple(before)]
        number = next(n for n in range(len(numbers) + 1) if n not in numbers)
        seed = request_seed(self._terms.seed, before, number)
        affinity = EngineAffinity(parent.affinity.engine if parent is not None else None)
        numbers.add(number)
        try:
            response = await self._generated(before, min(room, request.max_tokens or room), seed, affinity)
        except BaseException:
            numbers.discard(number)  # it is none of maxTurns, and a request that is tried again has its seed
            raise
        self._check_is_open()
        if not response.ids:  # no turn that could be learned from, or gone on from
            return Completion(AssistantMessage(""), len(before), 0, cut_off=False)
        text = renderer.text(response.ids, cut_off=response.truncated)
        message = answered(text, seed, with_tools=request.tools is not None)
        truncated = response.truncated and len(response.ids) >= room
        messages = [*asked, *as_compared([spoken(message)])]
        self.tree.add(RecordedTurn(messages, tools, opening, parent, read_ids, response, affinity, truncated))
        return Completion(message, len(before), len(response.ids), cut_off=response.truncated)

    async def _generated(self, before: list[int], most: int, seed: int, affinity: EngineAffinity) -> Response:
        """Return a turn of at most so many tokens.

        An engine goes on generating for a request that is given up, so its slot is held until the call has ended.
        """
        call = asyncio.create_task(
            self._engines.generate(
                before,
                max_new_tokens=most,
                temperature=self._terms.sampling.temperature,
                top_p=self._terms.sampling.top_p,
                seed=seed,
                urgent=self._terms.urgent,
                affinity=affinity,
            )
        )
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return await self._terms.clock.generating(asyncio.shield(call))

    def _forget(self, call: asyncio.Task[Response]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # or asyncio would print that nobody has read it

    def _check_is_open(self) -> None:
        """Raise ApiError for an episode that has failed or ended."""
        if self.failure is not None or self._has_ended:
            how = "ended" if self.failure is None else "failed"
            raise ApiError(f"the episode has {how}", status=410, code="episode_ended")

    def _placed(
        self, messages: list[Message], parent: RecordedTurn | None, renderer: ConversationRenderer
    ) -> tuple[Opening, list[int], list[int]]:
        """Return what the conversation begins with, what followed that so far, and what the student reads next, as ids.

        Raises ApiError, PromptError.
        """
        if parent is None:
            opening = Opening(
                renderer.opening(messages, self._where),
                renderer.privileged_opening(messages, self._prompt, self._where),
            )
            tokens = max(len(opening.prompt_ids), len(opening.privileged_ids or ()))
            if tokens > self._max_prompt_tokens:
                raise self._limit(
                    f"the conversation begins with {tokens} tokens, and rollout.maxPromptTokens is "
                    f"{self._max_prompt_tokens}"
                )
            return opening, [], []
        read_ids = renderer.continuation(messages[len(parent.messages) :], self._where)
        if read_ids[0] == parent.response.ids[-1]:
            read_ids = read_ids[1:]  # the student has ended its turn as the template does
        return parent.opening, parent.ids, read_ids

    def _limit(self, message: str, code: str = "context_length_exceeded") -> ApiError:
        self.met_a_limit = True
        return ApiError(message, code=code)
