"""Multi-turn rollouts: conversations of the student, of which each becomes one sample.

A turn is one response of the student. All turns are sent to one engine, which has what stands before in its cache. Who
answers the student is of two kinds: an environment (environment_episodes.py), with which it has one conversation, and
an agent (agent_episodes.py), which may have several.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distill_api.spec.environment import Environment
from distill_api.spec.job_spec import RewardSource, Sampling, Spec, Truncated
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import Response
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.fair_slots import Kind
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.failures import ConfigurationError, PromptError
from distill_workers.rollout.conversations.conversation_clock import ConversationClock
from distill_workers.rollout.engine_pool import EnginePool


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of one turn of a conversation, which itself has the seed of its first."""
    return seed if not turn else int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:4], "big") >> 1


def turns_at(environment: Environment, step: int) -> int:
    """Return the upper bound of the student's turns after `step` steps (TCOD, arXiv 2604.24005: short to long)."""
    curriculum = environment.curriculum
    if curriculum is None:
        return environment.max_turns
    grown = (environment.max_turns - curriculum.from_turns) * min(step, curriculum.steps) // curriculum.steps
    return curriculum.from_turns + grown


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
    reward: float | None = 0.0
    """None where an agent gave none."""
    truncated: bool = False

    def add_turn(self, read_ids: Sequence[int], response: Response, *, is_trained: bool = True) -> None:
        """Append the tokens that the environment wrote before the student's turn, and the turn.

        One that is not trained is trained in another sample.
        """
        # They are no one's sample; the version of the turn that read them keeps that of each token defined.
        version = response.versions[0]
        self.response_ids += [*read_ids, *response.ids]
        self.logprobs += [0.0] * len(read_ids) + response.logprobs
        self.versions += [version] * len(read_ids) + response.versions
        self.loss_mask += [False] * len(read_ids) + [is_trained] * len(response.ids)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a conversation is rendered and sampled."""

    renderer: str
    """The name of the renderer."""
    seed: int
    sampling: Sampling
    max_tokens: int
    """Of everything after the prompt."""
    max_turns: int
    """Of the student."""
    urgent: bool = False
    """Of an evaluation: its first turn goes before those of training."""
    needs_reward: bool = True
    """Whether an agent that gives no reward has failed."""
    clock: ConversationClock = field(default_factory=ConversationClock)
    """It is told when the conversation begins, and the time of the student's turns."""

    @property
    def kind(self) -> Kind:
        """The kind of work whose slots the conversation takes."""
        return Kind.EVALUATION if self.urgent else Kind.TRAINING


class Episodes(ABC):
    """The conversations of a job."""

    def __init__(self, spec: Spec, engines: EnginePool, renderers: Mapping[str, ConversationRenderer]) -> None:
        """`renderers` are by the names of the data's sources, and of evaluations (`of_evaluation`)."""
        self._spec, self._engines, self._renderers = spec, engines, renderers
        chosen = {s.name: (s.reward or spec.objective.reward).source for s in spec.data.all_sources}
        self._rewarded = {name for name, source in chosen.items() if source is RewardSource.ENVIRONMENT}

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

    async def samples(
        self, prompt: Prompt, index_in_group: int, seed: int, *, step: int = 0, clock: ConversationClock | None = None
    ) -> list[Sample]:
        """Return the samples of one response to a prompt, not yet scored. Raises EnvironmentFailed, EngineRefused.

        `step` is that of the response's batch, by which a curriculum bounds the turns. `clock` is told when the
        response begins, and the time of the student's turns.
        """
        rollout = self._spec.rollout
        assert rollout.environment is not None
        terms = Terms(
            prompt.source,
            seed,
            rollout.sampling,
            rollout.max_response_tokens,
            turns_at(rollout.environment, step),
            needs_reward=prompt.source in self._rewarded,
            clock=clock or ConversationClock(),
        )
        return await self.play(prompt, index_in_group, terms)

    async def play(self, prompt: Prompt, index_in_group: int, terms: Terms) -> list[Sample]:
        """Return the samples of a response that is sampled by other terms, as `samples` does."""
        try:
            conversations = await self._conversations(prompt, terms)
        except PromptError as error:
            raise EnvironmentFailed(str(error), permanent=True) from None
        return [self._sample(found, prompt, index_in_group) for found in conversations]

    @abstractmethod
    async def close(self) -> None:
        """End all processes."""

    @abstractmethod
    async def _conversations(self, prompt: Prompt, terms: Terms) -> list[Conversation]:
        """Return the conversations of one response. Raises EnvironmentFailed, EngineRefused, PromptError."""

    def _sample(self, found: Conversation, prompt: Prompt, index_in_group: int) -> Sample:
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


def of_evaluation(name: str) -> str:
    """Return the name of an evaluation's renderer, which no source of data has."""
    return f"evaluation/{name}"
