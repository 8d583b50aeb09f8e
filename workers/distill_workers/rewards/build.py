"""The rewards of a job, built from its spec."""

from functools import partial

from distill_api.spec.job_spec import Reward as RewardSpec
from distill_api.spec.job_spec import RewardSource, Spec
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics
from distill_workers.rewards.base import Reward
from distill_workers.rewards.exact_match import grade_exactly
from distill_workers.rewards.function import FunctionReward
from distill_workers.rewards.http import HttpReward
from distill_workers.rewards.math import grade_mathematically
from distill_workers.rewards.reasoning_gym import grade_by_task
from distill_workers.rewards.user_function import UserFunction, build_user_reward


def build_rewards(spec: Spec, metrics: Metrics) -> dict[str, Reward]:
    """Return the reward of each source of training prompts by its name; a source without one is not among them, nor
    one whose reward is the environment's. Raises ConfigurationError."""
    if spec.rollout.environment is not None:
        return {}
    chosen = {source.name: source.reward or spec.objective.reward for source in spec.data.all_sources}
    made: dict[RewardSpec, Reward] = {}
    for reward in chosen.values():
        if reward.source is not RewardSource.NONE and reward not in made:
            made[reward] = build_reward(reward, metrics)
    return {name: made[reward] for name, reward in chosen.items() if reward in made}


def build_reward(reward: RewardSpec, metrics: Metrics) -> Reward:
    """Return the reward that the spec describes.

    Raises ConfigurationError for a function that cannot be imported or called and for source environment, ValueError
    for source none.
    """
    limit = float(reward.timeout_seconds)
    match reward.source:
        case RewardSource.EXACT_MATCH:
            return FunctionReward(grade_exactly, False, limit)
        case RewardSource.MATH:
            grade = partial(grade_mathematically, extract=reward.extract)
            return FunctionReward(grade, True, limit, imports=("math_verify",))
        case RewardSource.REASONING_GYM:
            return FunctionReward(grade_by_task, False, limit)
        case RewardSource.PYTHON:
            assert reward.function is not None
            return build_user_reward(UserFunction(reward.function), limit)
        case RewardSource.HTTP:
            assert reward.url is not None
            return HttpReward(reward.url, limit, reward.retries, metrics)
        case RewardSource.ENVIRONMENT:
            raise ConfigurationError(
                "reward.source environment is that of conversations with rollout.environment; it grades no response "
                "by itself"
            )
        case RewardSource.NONE:
            raise ValueError("source none computes no reward")
