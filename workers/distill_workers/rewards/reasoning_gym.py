"""The reward `reasoning-gym`: the score that the task itself gives to an answer."""

from distill_workers.data.sample import Prompt
from distill_workers.rewards.base import WHOLE_RESPONSE, Grade
from distill_workers.task_score import is_of_a_task, score_by_task


def grade_by_task(prompt: Prompt, response: str) -> Grade:
    """Return the task's score of what is inside <answer>, or of the whole response where it has no such tag.

    Raises ValueError for a prompt that reasoning-gym did not make.
    """
    if not is_of_a_task(prompt.metadata):
        raise ValueError(f"prompt {prompt.index} was not made by reasoning-gym")
    found = score_by_task(prompt.metadata, response)
    return Grade(found.score, found.answer, "<answer> tag" if found.is_tagged else WHOLE_RESPONSE)
