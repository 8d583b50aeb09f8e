"""Conversations of the student with an environment.

A conversation ends when the environment says so, after maxTurns, or at maxResponseTokens: the student's turn is cut off
there, or what the environment answered leaves no room for another turn, and is not read any more. In these two cases
the sample counts as truncated. The environment is given whole turns alone.
"""

from collections.abc import Mapping

from distill_api.spec.job_spec import Spec
from distill_workers.data.sample import Prompt
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.pool import EnvironmentFailed, EnvironmentPool, OpenEnvironment
from distill_workers.environments.protocol import Row
from distill_workers.environments.tool_calls import parse_message
from distill_workers.rollout.conversations.episodes import Conversation, Episodes, Terms, turn_seed
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.scheduler import EngineAffinity


class EnvironmentEpisodes(Episodes):
    """The conversations of a job with an environment: one for each response."""

    def __init__(
        self,
        spec: Spec,
        engines: EnginePool,
        environments: EnvironmentPool,
        renderers: Mapping[str, ConversationRenderer],
    ) -> None:
        super().__init__(spec, engines, renderers)
        self._environments = environments

    async def close(self) -> None:
        await self._environments.close()

    async def _conversations(self, prompt: Prompt, terms: Terms) -> list[Conversation]:
        async with self._environments.conversation(terms.kind) as environment:
            terms.clock.begin()
            return [await self._play(environment, prompt, terms)]

    async def _play(self, environment: OpenEnvironment, prompt: Prompt, terms: Terms) -> Conversation:
        renderer, where = self._renderers[terms.renderer], f"prompt {prompt.index}"
        assert prompt.messages is not None, "load_data gives prompts their messages in a job with an environment"
        messages = await environment.reset(Row(prompt.messages, prompt.answer, prompt.metadata))
        conversation = Conversation(
            renderer.opening(messages, where), renderer.privileged_opening(messages, prompt, where)
        )
        self._check_opening(conversation, where)
        affinity, read_ids, reward = EngineAffinity(), list[int](), 0.0
        for turn in range(terms.max_turns):
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
            response = await terms.clock.generating(turn_of_student)
            if not response.ids:
                break
            conversation.add_turn(read_ids, response)
            if response.truncated:
                conversation.truncated = True
                break
            answer = await environment.step(parse_message(renderer.text(response.ids), turn))
            reward += answer.reward
            if answer.done or turn + 1 == terms.max_turns:
                break
            read_ids = renderer.continuation(answer.messages, where)
            if read_ids[0] == response.ids[-1]:
                read_ids = read_ids[1:]  # the student has ended its turn as the template does
        conversation.reward = reward
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
