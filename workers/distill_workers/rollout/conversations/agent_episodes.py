"""Conversations of the student with agents: programs of the user that speak OpenAI's API.

An agent may have several conversations, of which each becomes a sample; all have the reward that it prints at its end.
"""

import asyncio
from collections.abc import Mapping, Sequence

from distill_api.spec.job_spec import Spec
from distill_workers.data.sample import Prompt
from distill_workers.environments.agent_endpoint import AgentEndpoint
from distill_workers.environments.agent_process import SETTING, AgentProcess, Ended, NoReward, check_command, started
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.fair_slots import FairSlots
from distill_workers.environments.pool import CONVERSATIONS, EnvironmentFailed, allow_open_files
from distill_workers.environments.protocol import Row
from distill_workers.metrics import Metrics
from distill_workers.rollout.conversations.agent_session import AgentSession, Generator
from distill_workers.rollout.conversations.episodes import Conversation, Episodes, Terms
from distill_workers.rollout.engine_pool import EnginePool


class AgentEpisodes(Episodes):
    """The conversations of a job with an agent, one process of it for each response."""

    def __init__(
        self,
        spec: Spec,
        engines: EnginePool,
        renderers: Mapping[str, ConversationRenderer],
        metrics: Metrics,
        command: Sequence[str],
        *,
        setting: str = SETTING,
    ) -> None:
        """`setting` is the field of the job that names the command. Raises ConfigurationError for a program that is not
        there."""
        super().__init__(spec, engines, renderers)
        environment = spec.rollout.environment
        assert environment is not None
        self._environment, self._command, self._setting = environment, command, setting
        check_command(command, setting)
        allow_open_files()
        self._metrics = metrics
        self._endpoint = AgentEndpoint()
        self._places = FairSlots(CONVERSATIONS)

    async def close(self) -> None:
        await self._endpoint.close()

    async def _conversations(self, prompt: Prompt, terms: Terms) -> list[Conversation]:
        assert prompt.messages is not None, "load_data gives prompts their messages in a job with an environment"
        row = Row(prompt.messages, prompt.answer, prompt.metadata)
        async with self._places.one(terms.kind):
            terms.clock.begin()
            await self._start_endpoint()
            engines: Generator = self._engines
            session = AgentSession(
                prompt,
                terms,
                self._renderers[terms.renderer],
                engines,
                self._metrics,
                max_prompt_tokens=self._spec.rollout.max_prompt_tokens,
                setting=self._setting,
            )
            with self._endpoint.open(session) as key:
                async with started(self._command, row, self._endpoint.url, key, setting=self._setting) as agent:
                    try:
                        ended = await self._ended(agent, session)
                    finally:
                        session.end()
        return _rewarded(session, ended, terms, self._setting)

    async def _start_endpoint(self) -> None:
        """Raise EnvironmentFailed where this machine gives it no port to listen on."""
        try:
            await self._endpoint.start()
        except OSError as error:
            raise EnvironmentFailed(f"{self._setting}: the agents' endpoint cannot listen: {error}") from None

    async def _ended(self, agent: AgentProcess, session: AgentSession) -> Ended:
        """Return how the agent ended. Raises what the session's `watch` does."""
        ending = asyncio.create_task(agent.ended())
        watching = asyncio.create_task(session.watch(float(self._environment.timeout_seconds)))
        try:
            await asyncio.wait((ending, watching), return_when=asyncio.FIRST_COMPLETED)
            if session.failure is not None:
                raise session.failure
            if watching.done():
                await watching
            return await ending
        finally:
            for task in (ending, watching):
                task.cancel()
            await asyncio.gather(ending, watching, return_exceptions=True)


def _rewarded(session: AgentSession, ended: Ended, terms: Terms, setting: str) -> list[Conversation]:
    """Return the conversations of an agent that has ended, with its reward. Raises EnvironmentFailed."""
    conversations = session.tree.conversations()
    if ended.failure and not (session.met_a_limit and conversations):
        raise EnvironmentFailed(f"{setting}: the agent {ended.failure}{session.told}")
    if not conversations:
        raise EnvironmentFailed(
            f"{setting}: the agent ended without a message of the student: it must ask at OPENAI_BASE_URL"
            f"{session.told}",
            permanent=True,
        )
    try:
        # As of a conversation with an environment: one that is too long keeps the reward that it had by then.
        reward = 0.0 if ended.failure else ended.reward
    except NoReward as error:
        raise EnvironmentFailed(f"{setting}: the agent {error}", permanent=True) from None
    if reward is None and terms.needs_reward:
        raise EnvironmentFailed(
            f'{setting}: the agent ended without a reward; its last line must be such as {{"reward": 0.5}}',
            permanent=True,
        )
    for conversation in conversations:
        conversation.reward = reward
    return conversations
