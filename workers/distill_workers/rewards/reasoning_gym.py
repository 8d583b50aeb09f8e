"""The reward `reasoning-gym`: the score that the task itself gives to an answer."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from distill_workers.data.sample import Prompt
from distill_workers.rewards.base import WHOLE_RESPONSE, Grade


def grade_by_task(prompt: Prompt, response: str) -> Grade:
    """Return the task's score of what is inside <answer>, or of the whole response where it has no such tag.

    Raises ValueError for a prompt that reasoning-gym did not make.
    """
    from reasoning_gym.utils import extract_answer

    if "entry" not in prompt.metadata:
        raise ValueError(f"prompt {prompt.index} was not made by reasoning-gym")
    scorer = _scorer(prompt.metadata["task"], json.dumps(prompt.metadata["options"], sort_keys=True))
    answer = extract_answer(response)
    text = response.strip() if answer is None else answer
    score = float(scorer(text, prompt.metadata["entry"]))
    return Grade(score, text, WHOLE_RESPONSE if answer is None else "<answer> tag")


@cache
def _scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    """`options` are an object of JSON: some of them are lists, which are no keys of a cache."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(options))
    score: Callable[[str, dict[str, Any]], float] = dataset.score_answer
    return score
