"""What compares a response with others: the advantage of its reward, and the baseline of its divergence."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from distill_api.spec.job_spec import Objective
from distill_workers.data.sample import Sample
from distill_workers.objective.advantages import reward_advantages
from distill_workers.objective.baselines import leave_one_out_values
from distill_workers.objective.reference import sampled_divergence
from distill_workers.objective.spans import Spans

Responses = Sequence[Sequence[Sample]]
"""Responses, each as its samples, of which an agent's may have several. All have at least one."""


def by_response(part: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Yield the samples of each response to one prompt."""
    for _, samples in groupby(part, key=lambda sample: sample.index_in_group):
        yield list(samples)


def set_advantages(objective: Objective, group: Responses) -> None:
    """Set the advantage of each response, by its reward and those of the others of its group."""
    rewards = torch.tensor([samples[0].reward for samples in group], dtype=torch.float64)
    advantages = reward_advantages(objective.advantage, rewards, torch.zeros(len(group), dtype=torch.long))
    for samples, advantage in zip(group, advantages.tolist(), strict=True):
        for sample in samples:
            sample.advantage = advantage


def set_baselines(objective: Objective, responses: Responses) -> None:
    """Set the baseline of each response: the mean divergence over the others, by the engines' log-probs, nats."""
    samples = [sample for response in responses for sample in response]

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
    lengths = torch.tensor([sum(s.trained_tokens for s in response) for response in responses], dtype=torch.long)
    for response, baseline in zip(responses, leave_one_out_values(divergences, lengths).tolist(), strict=True):
        for sample in response:
            sample.baseline = baseline


def set_baselines_of_step(objective: Objective, parts: Responses) -> None:
    """Set the baseline of each response of a step, whose parts are each of one prompt."""
    set_baselines(objective, [samples for part in parts for samples in by_response(part)])
