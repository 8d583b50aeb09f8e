"""Advantages of rewards."""

from collections.abc import Callable

import pytest
import torch

from distill_api.spec.job_spec import Advantage
from distill_workers.objective.advantages import group_advantages, leave_one_out_advantages, reward_advantages


def test_advantages_are_the_centred_and_scaled_rewards_of_each_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 9.0])
    groups = torch.tensor([7, 7, 7, 7, 2, 2])

    advantages = group_advantages(rewards, groups)

    for group in (7, 2):
        own = rewards[groups == group]
        expected = (own - own.mean()) / (own.std() + 1e-6)
        torch.testing.assert_close(advantages[groups == group], expected)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e6])
def test_a_group_of_equal_rewards_gets_exactly_zero(reward: float) -> None:
    advantages = group_advantages(torch.tensor([reward] * 3 + [1.0, 2.0]), torch.tensor([0, 0, 0, 1, 1]))

    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[3] < 0 < advantages[4]


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out_advantages])
def test_a_group_of_one_gets_exactly_zero(advantages: Callable[..., torch.Tensor]) -> None:
    assert advantages(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 1, 1]))[0] == 0.0


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 0.0, 5.0, 0.0, 1.0, 9.0], dtype=torch.float64)
    groups = torch.tensor([7, 7, 2, 7, 7, 2])

    advantages = leave_one_out_advantages(rewards, groups)

    for i, group in enumerate(groups.tolist()):
        others = [r for j, r in enumerate(rewards.tolist()) if groups[j] == group and j != i]
        assert advantages[i].item() == pytest.approx(rewards[i].item() - sum(others) / len(others), abs=1e-12)


def test_the_spec_chooses_the_advantage() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3, dtype=torch.long)

    torch.testing.assert_close(reward_advantages(Advantage.GROUP, rewards, groups), group_advantages(rewards, groups))
    torch.testing.assert_close(
        reward_advantages(Advantage.LEAVE_ONE_OUT, rewards, groups), leave_one_out_advantages(rewards, groups)
    )
    torch.testing.assert_close(reward_advantages(Advantage.NONE, rewards, groups), rewards)


def test_rewards_and_groups_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must both be \[samples\]"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.long))
