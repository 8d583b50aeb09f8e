"""The conversations of one response, with an environment or an agent, as an evaluation's response."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from distill_workers.data.sample import Sample
from distill_workers.engine.request import Response


@dataclass(frozen=True, slots=True)
class ConversationResponse(Response):
    """All that followed the first messages; per-token lists are as in a Sample.

    Of several conversations of an agent it is the longest, and has the others.
    """

    reward: float = 0.0
    loss_mask: list[bool] = field(default_factory=list)
    """[response], True at the student's own tokens."""
    teacher_prompt_ids: list[int] = field(default_factory=list)
    """What stands before the response as the teacher reads it."""
    prompt_ids: list[int] = field(default_factory=list)
    """What stands before it as the student reads it."""
    others: "tuple[ConversationResponse, ...]" = ()

    @staticmethod
    def of(samples: Sequence[Sample]) -> "ConversationResponse":
        """Return the conversations of the samples that rollout/conversations/episodes.py made of one response."""
        longest, *others = sorted(samples, key=lambda sample: len(sample.response_ids), reverse=True)
        assert longest.reward is not None and longest.loss_mask is not None
        response = (longest.response_ids, longest.engine_logprobs, longest.token_versions, longest.truncated)
        rest = tuple(ConversationResponse.of([sample]) for sample in others)
        asked = longest.teacher_prompt_ids, longest.prompt_ids
        return ConversationResponse(*response, longest.reward, longest.loss_mask, *asked, rest)


def conversations_of(response: Response) -> list[Response]:
    """Return all conversations of a response; one that is no conversation is alone."""
    return [response, *response.others] if isinstance(response, ConversationResponse) else [response]
