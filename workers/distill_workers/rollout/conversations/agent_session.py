"""One episode of an agent: its requests for the student's messages, answered by engines and recorded as token ids."""

import asyncio
import hashlib
import json
from collections import Counter
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
from distill_workers.rollout.conversations.conversation_tree import ConversationTree, Opening, RecordedTurn
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
    """Return the seed of the turn after `ids`, of which the episode has had `number` before.

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
        max_turns: int,
    ) -> None:
        self._prompt, self._terms, self._renderer = prompt, terms, renderer
        self._engines, self._metrics = engines, metrics
        self._max_prompt_tokens, self._max_turns = max_prompt_tokens, max_turns
        self._where = f"prompt {prompt.index}"
        self._generated = Counter[tuple[int, ...]]()
        """Turns that were generated, or are, by the ids before them."""
        self._open = 0
        """Requests that wait for their answer."""
        self._idle_since = asyncio.get_running_loop().time()
        self._failed = asyncio.Event()
        self.tree = ConversationTree()
        self.failure: Exception | None = None
        """What no request of the agent's was the cause of, such as an engine that refuses: it fails the episode."""
        self.refusal = ""
        """What the last refused request was told."""
        self.met_a_limit = False
        """Whether a request was refused since the conversation, or the episode, is as long as it may be."""

    async def complete(self, request: ChatRequest) -> Completion:
        """Return the student's next message, and record it. Raises ApiError."""
        self._open += 1
        try:
            if self.failure is not None:
                raise ApiError("the episode has failed", status=410, code="episode_ended")
            return await self._complete(request)
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
            self._idle_since = asyncio.get_running_loop().time()

    async def watch(self, seconds: float) -> None:
        """Wait until the episode fails. Raises what failed it, and EnvironmentFailed for an agent that has had no
        request open for so long."""
        while self.failure is None:
            idle = 0.0 if self._open else asyncio.get_running_loop().time() - self._idle_since
            if idle >= seconds:
                raise EnvironmentFailed(f"{SETTING}: the agent made no request for {seconds:g} s, and did not end")
            try:
                await asyncio.wait_for(self._failed.wait(), seconds - idle)
            except TimeoutError:
                continue
        raise self.failure

    async def _complete(self, request: ChatRequest) -> Completion:
        renderer = self._renderer if request.tools is None else self._renderer.with_tools(request.tools)
        tools = json.dumps(request.tools)
        parent = self.tree.repeated(request.messages, tools)
        if self.tree.is_rewritten(request.messages, parent):
            self._metrics.add("distill_agent_rewritten_histories")
        opening, said, read_ids = self._placed(request.messages, parent, renderer)
        room = self._terms.max_tokens - len(said) - len(read_ids)
        if room <= 0:
            assert parent is not None, "an opening leaves all room"
            parent.truncated = True
            raise self._limit(
                f"the conversation has {len(said) + len(read_ids)} tokens after its first messages, and "
                f"maxResponseTokens is {self._terms.max_tokens}"
            )
        if self._generated.total() >= self._max_turns:
            raise self._limit(
                f"the student has had {self._max_turns} turns, and rollout.environment.maxTurns is as many", "max_turns"
            )
        before = [*opening.prompt_ids, *said, *read_ids]
        seed = request_seed(self._terms.seed, before, self._generated[tuple(before)])
        self._generated[tuple(before)] += 1
        affinity = EngineAffinity(parent.affinity.engine if parent is not None else None)
        turn_of_student = self._engines.generate(
            before,
            max_new_tokens=min(room, request.max_tokens or room),
            temperature=self._terms.sampling.temperature,
            top_p=self._terms.sampling.top_p,
            seed=seed,
            urgent=self._terms.urgent,
            affinity=affinity,
        )
        response = await self._terms.clock.generating(turn_of_student)
        if not response.ids:  # no turn that could be learned from, or gone on from
            return Completion(AssistantMessage(""), len(before), 0, cut_off=False)
        text = renderer.text(response.ids, cut_off=response.truncated)
        message = answered(text, seed, with_tools=request.tools is not None)
        truncated = response.truncated and len(response.ids) >= room
        messages = [*request.messages, spoken(message)]
        self.tree.add(RecordedTurn(messages, tools, opening, parent, read_ids, response, affinity, truncated))
        return Completion(message, len(before), len(response.ids), cut_off=response.truncated)

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
