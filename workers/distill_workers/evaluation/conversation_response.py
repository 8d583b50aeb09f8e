"""A conversation with an environment as an evaluation's response."""

from dataclasses import dataclass, field

from distill_workers.data.sample import Sample
from distill_workers.engine.request import Response


@dataclass(frozen=True, slots=True)
class ConversationResponse(Response):
    """All that followed the first messages; per-token lists are as in a Sample."""

    reward: float = 0.0
    loss_mask: list[bool] = field(default_factory=list)
    """[response], True at the student's own tokens."""
    teacher_prompt_ids: list[int] = field(default_factory=list)
    """What stands before the response as the teacher reads it."""

    @staticmethod
    def of(sample: Sample) -> "ConversationResponse":
        """Return the conversation of a sample that rollout/episodes.py made."""
        assert sample.reward is not None and sample.loss_mask is not None
        response = (sample.response_ids, sample.engine_logprobs, sample.token_versions, sample.truncated)
        return ConversationResponse(*response, sample.reward, sample.loss_mask, sample.teacher_prompt_ids)
