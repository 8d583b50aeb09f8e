"""Group-normalised advantages of task rewards (GRPO, arXiv 2402.03300, eq. 3)."""

import torch


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor, *, epsilon: float = 1e-6) -> torch.Tensor:
    """(r - mean of its group) / (standard deviation of its group + epsilon).

    rewards [samples]; groups [samples], an integer for each prompt. Returns [samples]. A group whose rewards are all
    equal, a group of one included, carries no signal and gets exactly 0.
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {list(rewards.shape)} and groups {list(groups.shape)} must both be [samples]")
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(count))
    mean = zeros.index_add(0, index, rewards) / count
    centred = rewards - mean[index]
    # The unbiased variance, as the GRPO implementations use it; a group of one has none.
    variance = zeros.index_add(0, index, centred.square()) / (count - 1).clamp(min=1)
    advantages = centred / (variance.sqrt() + epsilon)[index]
    lowest = torch.full_like(zeros, torch.inf).scatter_reduce(0, index, rewards, "amin")
    highest = torch.full_like(zeros, -torch.inf).scatter_reduce(0, index, rewards, "amax")
    # The mean of equal numbers can differ from them in the last bit: decide by comparison, not by the variance.
    return torch.where((lowest == highest)[index], torch.zeros_like(advantages), advantages)
