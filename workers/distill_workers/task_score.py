"""The score that a task of reasoning-gym gives to an answer to one of its own questions."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a task gives to a text."""

    score: float
    answer: str
    """The part of the text that was scored."""
    is_tagged: bool
    """Whether it stood inside <answer>; else it is the whole text."""


def is_of_a_task(metadata: Mapping[str, Any]) -> bool:
    """Return whether reasoning-gym has made the row with this metadata."""
    return "entry" in metadata


def score_by_task(metadata: Mapping[str, Any], text: str) -> TaskScore:
    """Return the task's score of what is inside <answer>, or of the whole text where it has no such tag.

    `metadata` are of a row that reasoning-gym has made.
    """
    from reasoning_gym.utils import extract_answer

    scorer = _scorer(metadata["task"], json.dumps(metadata["options"], sort_keys=True))
    tagged = extract_answer(text)
    answer = text.strip() if tagged is None else tagged
    return TaskScore(float(scorer(answer, metadata["entry"])), answer, tagged is not None)


@cache
def _scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    """`options` are an object of JSON: some of them are lists, which are no keys of a cache."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(options))
    score: Callable[[str, dict[str, Any]], float] = dataset.score_answer
    return score
