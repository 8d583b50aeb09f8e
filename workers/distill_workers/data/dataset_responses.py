"""Responses that the student did not write: a share of the samples is made of the data set's (GKD, arXiv 2306.13649,
algorithm 1), or of the teacher's in their place."""

import math
import random
from typing import Any

from distill_workers.data.sample import Prompt, Sample


def supervised_positions(
    dataset_share: float, seed: int, step: int, prompts: int, samples_per_prompt: int
) -> frozenset[int]:
    """Return which of the `prompts` of step `step` (from 0) are answered by the data set, once each, not by the
    student.

    The student answers each of the others `samples_per_prompt` times, so m of them are as many as make the data set's
    share of the sequences m / (m + samples_per_prompt (prompts - m)) = `dataset_share`: over any number of steps, to
    less than one prompt. The choice depends on seed and step alone, so that a resumed run makes the same.
    """
    k = samples_per_prompt
    wanted = prompts * k * dataset_share / (1 - dataset_share + k * dataset_share)
    # A share such as 1/3 is not exact: the slack keeps a whole number from being floored to the one below.
    count = math.floor(wanted * (step + 1) + 1e-9) - math.floor(wanted * step + 1e-9)
    return frozenset(random.Random(f"{seed}/supervised/{step}").sample(range(prompts), count))


def supervised_sample(prompt: Prompt, tokenizer: Any, max_response_tokens: int, weight_version: int) -> Sample:
    """Return the sample of the data set's response and the end token, cut off at `max_response_tokens`.

    `weight_version` is that of the sample's step: it is never stale. Raises ValueError without a response.
    """
    if prompt.response is None:
        raise ValueError(f"prompt {prompt.index} has no response of its own; set prompts.responseField")
    ids = [*tokenizer(prompt.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    kept = ids[:max_response_tokens]
    return given_sample(prompt, kept, weight_version, truncated=len(kept) < len(ids))


def given_sample(prompt: Prompt, ids: list[int], weight_version: int, *, truncated: bool) -> Sample:
    """Return the sample of a response that the student did not write, in its tokens."""
    return Sample(
        prompt_index=prompt.index,
        index_in_group=0,
        prompt_ids=prompt.ids,
        response_ids=ids,
        engine_logprobs=[0.0] * len(ids),
        token_versions=[weight_version] * len(ids),
        truncated=truncated,
        source=prompt.source,
        supervised=True,
        privileged_ids=prompt.privileged_ids,
    )
