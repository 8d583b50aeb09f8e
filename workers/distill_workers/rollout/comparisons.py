"""What compares a sample with others: the advantage of its reward, and the baseline of its divergence."""

from collections.abc import Sequence

import torch

from distill_api.spec.job_spec import Objective
from distill_workers.data.sample import Sample
from distill_workers.objective.advantages import reward_advantages
from distill_workers.objective.baselines import leave_one_out_values
from distill_workers.objective.reference import sampled_divergence
from distill_workers.objective.spans import Spans


def set_advantages(objective: Objective, group: Sequence[Sample]) -> None:
    """Set the advantage of each sample, by its reward and those of the others of its group."""
    rewards = torch.tensor([sample.reward for sample in group], dtype=torch.float64)
    advantages = reward_advantages(objective.advantage, rewards, torch.zeros(len(group), dtype=torch.long))
    for sample, advantage in zip(group, advantages.tolist(), strict=True):
        sample.advantage = advantage


def set_baselines(objective: Objective, samples: Sequence[Sample]) -> None:
    """Set the baseline of each sample: the mean divergence over the others, by the engines' log-probs, nats."""

    def per_token(values: Sequence[Sequence[float]]) -> torch.Tensor:
        parts = zip(samples, values, strict=True)
        return torch.tensor([x for s, of_one in parts for x in s.trained(of_one)], dtype=torch.float64)

    of_tokens = sampled_divergence(
        objective,
        per_token([s.engine_logprobs for s in samples]),
        per_token([s.teacher_logprobs for s in samples]),
        None if objective.reference is None else per_token([s.reference_logprobs for s in samples]),
    )
    ends = [end for s in samples for end in s.trained(s.span_ends or [True] * len(s.response_ids))]
    of_spans = Spans(torch.tensor(ends, dtype=torch.bool)).totals(of_tokens)
    divergences = of_spans.clamp(-objective.advantage_clip, objective.advantage_clip)
    lengths = torch.tensor([s.trained_tokens for s in samples], dtype=torch.long)
    for sample, baseline in zip(samples, leave_one_out_values(divergences, lengths).tolist(), strict=True):
        sample.baseline = baseline
