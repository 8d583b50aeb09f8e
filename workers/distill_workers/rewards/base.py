"""What every reward is: a number for a whole response, and the part of the response that it was given for."""

from dataclasses import dataclass
from typing import Protocol

from distill_workers.data.sample import Prompt

WHOLE_RESPONSE = "whole response"


class RewardError(Exception):
    """Raised when a response gets no reward: its sample fails, the job goes on."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        """Whether the same response would get none again."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The score of one response, and what of the response was graded."""

    score: float
    extracted: str
    """The part of the response that was compared or scored; empty where the response has no answer."""
    origin: str
    """Where that part was found, such as `last box`."""


class Reward(Protocol):
    """A way of grading responses."""

    async def score(self, prompt: Prompt, response: str) -> float:
        """Return the score of the response, a finite number. Raises RewardError, ConfigurationError."""

    async def grade(self, prompt: Prompt, response: str) -> Grade:
        """Return the score together with what it was given for. Raises RewardError, ConfigurationError."""

    async def close(self) -> None:
        """Release the processes and connections that the reward holds."""


def reference_of(prompt: Prompt) -> str:
    """Return the reference answer of the prompt. Raises ValueError where it has none."""
    if prompt.answer is None:
        raise ValueError(f"prompt {prompt.index} has no reference answer; set prompts.answerField")
    return prompt.answer
