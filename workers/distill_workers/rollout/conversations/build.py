"""The conversations of a job, built from its spec."""

from typing import Any

from distill_api.spec.job_spec import RewardSource, Spec
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.pool import EnvironmentPool
from distill_workers.environments.tools import read_tools
from distill_workers.environments.verifiers import SETTING as VERIFIERS
from distill_workers.environments.verifiers import check_verifiers, command_of
from distill_workers.metrics import Metrics
from distill_workers.rollout.conversations.agent_episodes import AgentEpisodes
from distill_workers.rollout.conversations.environment_episodes import EnvironmentEpisodes
from distill_workers.rollout.conversations.episodes import Episodes, of_evaluation
from distill_workers.rollout.engine_pool import EnginePool


def build_episodes(spec: Spec, tokenizer: Any, engines: EnginePool, metrics: Metrics) -> Episodes | None:
    """Return the conversations of a job; None for one whose responses are single turns.

    Raises ConfigurationError for an environment or an agent that cannot be called, tools that are none, or a chat
    template that cannot render conversations.
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
    if environment.agent is not None:
        return AgentEpisodes(spec, engines, renderers, metrics, environment.agent.command)
    if environment.verifiers is not None:
        check_verifiers(environment.verifiers)
        command = command_of(environment.verifiers)
        return AgentEpisodes(spec, engines, renderers, metrics, command, setting=VERIFIERS)
    pool = EnvironmentPool(environment)
    pool.check()
    return EnvironmentEpisodes(spec, engines, pool, renderers)
