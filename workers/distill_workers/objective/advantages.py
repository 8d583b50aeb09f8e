"""Advantages of task rewards: the reward of a response relative to those of its group, the samples of its prompt."""

import torch

from distill_api.spec.job_spec import Advantage


def reward_advantages(advantage: Advantage, rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the advantages [samples] that the spec chooses. rewards, groups [samples]; a group is an integer."""
    match advantage:
        case Advantage.GROUP:
            return group_advantages(rewards, groups)
        case Advantage.LEAVE_ONE_OUT:
            return leave_one_out_advantages(rewards, groups)
        case Advantage.NONE:
            return rewards


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor, *, epsilon: float = 1e-6) -> torch.Tensor:
    """Return (r - mean of its group) / (standard deviation of its group + epsilon) (GRPO, arXiv 2402.03300, eq. 3).

    A group whose rewards are all equal, a group of one included, carries no signal and gets exactly 0.
    """
    centred, index, count = _centred(rewards, groups)
    # The unbiased variance, as the GRPO implementations use it; a group of one has none.
    variance = rewards.new_zeros(len(count)).index_add(0, index, centred.square()) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + epsilon)[index]


def leave_one_out_advantages(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return r - mean of the others of its group = n / (n - 1) (r - mean of the group) (RLOO, arXiv 2402.14740).

    A group of one has no baseline, and gets exactly 0.
    """
    centred, index, count = _centred(rewards, groups)
    return centred * count[index] / (count - 1).clamp(min=1)[index]


def _centred(rewards: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return r - mean of its group [samples], the index of its group [samples], and the size of each group [groups]."""
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {list(rewards.shape)} and groups {list(groups.shape)} must both be [samples]")
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(count))
    centred = rewards - (zeros.index_add(0, index, rewards) / count)[index]
    lowest = torch.full_like(zeros, torch.inf).scatter_reduce(0, index, rewards, "amin")
    highest = torch.full_like(zeros, -torch.inf).scatter_reduce(0, index, rewards, "amax")
    # The mean of equal numbers can differ from them in the last bit: decide by comparison, not by the difference.
    return torch.where((lowest == highest)[index], 0.0, centred), index, count
