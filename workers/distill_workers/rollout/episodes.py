"""Multi-turn rollouts: conversations of the student with an environment, each of which becomes one sample.

A turn is one response of the student. All turns are sent to one engine, which has what stands before in its cache. A
conversation ends when the environment says so, after maxTurns, or at maxResponseTokens: the student's turn is cut off
there, or what the environment answered leaves no room for another turn, and is not read any more. In these two cases
the sample counts as truncated. The environment is given whole turns alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_api.spec.job_spec import RewardSource, Sampling, Spec, Truncated
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import Response
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.fair_slots import Kind
from distill_workers.environments.pool import EnvironmentFailed, EnvironmentPool, OpenEnvironment
from distill_workers.environments.protocol import Row
from distill_workers.environments.tool_calls import parse_message
from distill_workers.environments.tools import read_tools
from distill_workers.failures import ConfigurationError, PromptError
from distill_workers.rollout.conversation_clock import ConversationClock
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.scheduler import EngineAffinity


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of one turn of a conversation, which itself has the seed of its first."""
    return seed if not turn else int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:4], "big") >> 1


@dataclass
class Conversation:
    """A conversation as token ids, which are appended and never changed. Lists but the prompts are [response]."""

    prompt_ids: list[int]
    privileged_ids: list[int] | None = None
    """What the teacher is given in place of the prompt; None where it is given the same."""
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    reward: float = 0.0
    truncated: bool = False

    def add_turn(self, read_ids: Sequence[int], response: Response) -> None:
        """Append the tokens that the environment wrote before the student's turn, and the turn."""
        # They are no one's sample; the version of the turn that read them keeps that of each token defined.
        version = response.versions[0]
        self.response_ids += [*read_ids, *response.ids]
        self.logprobs += [0.0] * len(read_ids) + response.logprobs
        self.versions += [version] * len(read_ids) + response.versions
        self.loss_mask += [False] * len(read_ids) + [True] * len(response.ids)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a conversation is rendered and sampled."""

    renderer: str
    """The name of the renderer."""
    seed: int
    sampling: Sampling
    max_tokens: int
    """Of everything after the prompt."""
    urgent: bool = False
    """Of an evaluation: its first turn goes before those of training."""


class Episodes:
    """The conversations of a job."""

    def __init__(
        self,
        spec: Spec,
        engines: EnginePool,
        environments: EnvironmentPool,
        renderers: Mapping[str, ConversationRenderer],
    ) -> None:
        """`renderers` are by the names of the data's sources, and of evaluations (`of_evaluation`)."""
        assert spec.rollout.environment is not None
        self._spec, self._engines, self._environments, self._renderers = spec, engines, environments, renderers
        self._turns = spec.rollout.environment.max_turns

    def notes(self) -> list[str]:
        """Return what should be known of how conversations are rendered, as sentences."""
        return sorted({f"Conversations: {note}" for made in self._renderers.values() for note in made.notes()})

    def check_ends(self, ends: Sequence[int]) -> None:
        """Raise ConfigurationError where the engines, which stop at `ends`, would go on after the end of a turn."""
        missing = sorted(set().union(*(made.turn_ends for made in self._renderers.values())) - set(ends))
        if missing:
            raise ConfigurationError(
                f"the student's chat template ends a turn with the token {missing[0]}, at which no response ends: the "
                "student would write the environment's messages itself; add it to rollout.stopTokenIds"
            )

    async def close(self) -> None:
        """End the environments' processes."""
        await self._environments.close()

    async def sample(
        self, prompt: Prompt, index_in_group: int, seed: int, clock: ConversationClock | None = None
    ) -> Sample:
        """Return a conversation as a sample, not yet scored. Raises EnvironmentFailed, EngineRefused.

        `clock` is told the time of the student's turns.
        """
        rollout = self._spec.rollout
        terms = Terms(prompt.source, seed, rollout.sampling, rollout.max_response_tokens)
        return await self.play(prompt, index_in_group, terms, clock)

    async def play(
        self, prompt: Prompt, index_in_group: int, terms: Terms, clock: ConversationClock | None = None
    ) -> Sample:
        """Return a conversation that is sampled by other terms, as `sample` does."""
        try:
            kind = Kind.EVALUATION if terms.urgent else Kind.TRAINING
            async with self._environments.conversation(kind) as environment:
                found = await self._play(environment, prompt, terms, clock or ConversationClock())
        except PromptError as error:
            raise EnvironmentFailed(str(error), permanent=True) from None
        return Sample(
            prompt_index=prompt.index,
            index_in_group=index_in_group,
            prompt_ids=found.prompt_ids,
            response_ids=found.response_ids,
            engine_logprobs=found.logprobs,
            token_versions=found.versions,
            truncated=found.truncated,
            masked=found.truncated and self._spec.rollout.truncated is Truncated.MASK,
            source=prompt.source,
            reward=found.reward,
            loss_mask=found.loss_mask,
            privileged_ids=found.privileged_ids,
        )

    async def _play(
        self, environment: OpenEnvironment, prompt: Prompt, terms: Terms, clock: ConversationClock
    ) -> Conversation:
        renderer, where = self._renderers[terms.renderer], f"prompt {prompt.index}"
        assert prompt.messages is not None, "load_data gives prompts their messages in a job with an environment"
        messages = await environment.reset(Row(prompt.messages, prompt.answer, prompt.metadata))
        conversation = Conversation(
            renderer.opening(messages, where), renderer.privileged_opening(messages, prompt, where)
        )
        self._check_opening(conversation, where)
        affinity, read_ids = EngineAffinity(), list[int]()
        for turn in range(self._turns):
            room = terms.max_tokens - len(conversation.response_ids) - len(read_ids)
            if room <= 0:
                conversation.truncated = True
                break
            turn_of_student = self._engines.generate(
                [*conversation.prompt_ids, *conversation.response_ids, *read_ids],
                max_new_tokens=room,
                temperature=terms.sampling.temperature,
                top_p=terms.sampling.top_p,
                seed=turn_seed(terms.seed, turn),
                urgent=terms.urgent,
                affinity=affinity,
            )
            response = await clock.generating(turn_of_student)
            if not response.ids:
                break
            conversation.add_turn(read_ids, response)
            if response.truncated:
                conversation.truncated = True
                break
            answer = await environment.step(parse_message(renderer.text(response.ids), turn))
            conversation.reward += answer.reward
            if answer.done or turn + 1 == self._turns:
                break
            read_ids = renderer.continuation(answer.messages, where)
            if read_ids[0] == response.ids[-1]:
                read_ids = read_ids[1:]  # the student has ended its turn as the template does
        return conversation

    def _check_opening(self, conversation: Conversation, where: str) -> None:
        """Raise EnvironmentFailed for a conversation that begins with more than rollout.maxPromptTokens."""
        tokens = max(len(conversation.prompt_ids), len(conversation.privileged_ids or ()))
        if tokens > self._spec.rollout.max_prompt_tokens:
            raise EnvironmentFailed(
                f"{where}: the environment begins with {tokens} tokens, and rollout.maxPromptTokens is "
                f"{self._spec.rollout.max_prompt_tokens}",
                permanent=True,
            )


def of_evaluation(name: str) -> str:
    """Return the name of an evaluation's renderer, which no source of data has."""
    return f"evaluation/{name}"


def build_episodes(spec: Spec, tokenizer: Any, engines: EnginePool) -> Episodes | None:
    """Return the conversations of a job; None for one whose responses are single turns.

    Raises ConfigurationError for an environment that cannot be called, tools that are none, or a chat template that
    cannot render conversations.
    """
    environment = spec.rollout.environment
    if environment is None:
        return None
    tools = None if environment.tools is None else read_tools(environment.tools)
    renderers = {s.name: ConversationRenderer(s.prompts, tokenizer, tools) for s in spec.data.all_sources}
    for evaluation in spec.evaluation:
        if evaluation.reward.source is RewardSource.ENVIRONMENT:
            name = of_evaluation(evaluation.name)
            renderers[name] = ConversationRenderer(evaluation.prompts, tokenizer, tools)
    pool = EnvironmentPool(environment)
    pool.check()
    return Episodes(spec, engines, pool, renderers)
