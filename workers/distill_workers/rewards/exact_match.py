"""The reward `exact-match`: the response is the reference, character by character, but for white space around it."""

from distill_workers.data.sample import Prompt
from distill_workers.rewards.base import WHOLE_RESPONSE, Grade, reference_of


def grade_exactly(prompt: Prompt, response: str) -> Grade:
    """Return 1 for a response that equals the reference, else 0. Raises ValueError without a reference."""
    text = response.strip()
    return Grade(float(text == reference_of(prompt).strip()), text, WHOLE_RESPONSE)
