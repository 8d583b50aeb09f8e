"""Second tries at the tasks of reasoning-gym: an answer that is not right is said to be wrong, and may be given again.

`rollout.environment.function: distill_workers.environments.second_tries:SecondTries` names it, for prompts of
`reasoningGym`; `maxTurns` is the number of tries.
"""

from distill_workers.environments.protocol import AssistantMessage, Message, Row, Turn
from distill_workers.task_score import is_of_a_task, score_by_task

FEEDBACK = "That is not right. Look for the mistake, and give another answer."
RIGHT = 1.0
"""The score of a right answer; what a task gives for the form of an answer alone is less."""


class SecondTries:
    """The environment of one question. The reward of a conversation is the task's score of the last answer."""

    async def reset(self, row: Row) -> list[Message]:
        if not is_of_a_task(row.metadata):
            raise ValueError("the row was not made by reasoning-gym; prompts need reasoningGym")
        self._metadata, self._score = row.metadata, 0.0
        return row.messages

    async def step(self, message: AssistantMessage) -> Turn:
        score = score_by_task(self._metadata, message.content).score
        # Rewards are added up, and nobody knows which try is the last.
        gained, self._score = score - self._score, score
        if score >= RIGHT:
            return Turn(reward=gained, done=True)
        return Turn([{"role": "user", "content": FEEDBACK}], gained)
