"""Prompt and Sample, the one type of ragged data: a response of the student with all that is known of its tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
COPIED_TOKENS = 4
"""Shortest run of tokens that counts as copied from a text: shorter ones stand in any two texts."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `index` is its number among the prompts of a run, in the order of the data."""

    index: int
    ids: list[int]
    text: str
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    """Name of the data source that it came from."""
    response: str | None = None
    """The data set's own response, where there is one (GKD mixing)."""
    teacher: str = ""
    """Name of the teacher that scores its responses."""
    key: int = 0
    """Hash of what is asked, but for white space, system prompt and template: the same for copies, in this process."""
    privileged_ids: list[int] | None = None
    """What the teacher is asked instead (prompts.teacherPrompt), or the same in tokens of its own (teacher.tokenizer);
    None where it is asked the same."""
    messages: list[dict[str, Any]] | None = None
    """The prompt as chat messages, which an environment is given; None in a job without one."""

    @property
    def teacher_ids(self) -> list[int]:
        """Ids of the prompt as the teacher is asked it."""
        return self.ids if self.privileged_ids is None else self.privileged_ids


@dataclass(slots=True)
class Sample:
    """One response to a prompt, the student's own unless `supervised`. Per-token lists are [response].

    A conversation with an environment is one sample: its response is everything after the prompt, and `loss_mask` says
    which tokens are the student's.
    """

    prompt_index: int
    index_in_group: int
    """Number of the sample within the group, that is, among the samples of the same prompt."""
    prompt_ids: list[int]
    response_ids: list[int]
    engine_logprobs: list[float]
    """Log-prob of each response token by the engine that sampled it, nats."""
    token_versions: list[int]
    """Version of the weights that each token was sampled with; they differ with rollout.partial, and between turns."""
    truncated: bool
    """Cut off at maxResponseTokens."""
    teacher_logprobs: list[float] = field(default_factory=list)
    teacher_top_ids: npt.NDArray[np.int32] | None = None
    """[response, k], likeliest first"""
    teacher_top_logprobs: npt.NDArray[np.float32] | None = None
    """[response, k]"""
    teacher: str = ""
    """Name of the teacher that scored it."""
    coefficient: float = 1.0
    """A factor of the sample's divergence: the coefficient of that teacher, times the weight of the outcome."""
    source: str = ""
    """Name of the data source of the prompt."""
    supervised: bool = False
    """The response is the data set's, not the student's: no engine sampled it, and engine_logprobs are 0. So are
    teacher_logprobs where it is the target itself (support target), which no teacher scores."""
    masked: bool = False
    """None of its tokens is trained on (rollout.truncated)."""
    reward: float | None = None
    advantage: float = 0.0
    """Advantage of the reward (objective.advantage), without its coefficient; the same for every token."""
    baseline: float = 0.0
    """Mean divergence at the tokens of the other responses, nats: to the prompt, where objective.baseline is
    leave-one-out, or of the step, where it is batch-mean."""
    reference_logprobs: list[float] = field(default_factory=list)
    """By objective.reference, given the student's own prompt; empty without one."""
    privileged_ids: list[int] | None = None
    """What the teacher is asked instead of the prompt; None where it is asked the same."""
    loss_mask: list[bool] | None = None
    """[response], False at the tokens of an environment, which both models read and nobody is trained on, and at those
    that a teacher with another tokenizer could not score. What per-token lists say there means nothing. None where
    every token is trained on."""
    span_ends: list[bool] | None = None
    """[response], by a teacher with a tokenizer of its own: the last token of each run that is the same text to both,
    over which teacher_logprobs add up to its score. None where each token was scored by itself."""
    teacher_version: int | None = None
    """Version of the weights that scored it, where the teacher is the student itself."""

    def trained(self, values: Sequence[T]) -> Sequence[T]:
        """Return those of [response] values whose tokens are trained on."""
        return values if self.loss_mask is None else list(compress(values, self.loss_mask))

    @property
    def trained_tokens(self) -> int:
        """Tokens of the response that are trained on."""
        return len(self.response_ids) if self.loss_mask is None else sum(self.loss_mask)

    @property
    def turns(self) -> list[range]:
        """Places in the response of each of the student's turns, between which stand the environment's tokens."""
        if self.loss_mask is None:
            return [range(len(self.response_ids))]
        return list(_runs_of_true(self.loss_mask))

    @property
    def teacher_prompt_ids(self) -> list[int]:
        """Ids of the prompt before the response as the teacher is asked it."""
        return self.prompt_ids if self.privileged_ids is None else self.privileged_ids

    @property
    def copied_share(self) -> float | None:
        """Share of what the student wrote in runs of COPIED_TOKENS tokens which the teacher's prompt has and the
        student's lacks: what the student cannot know. None without privileged context, and where the teacher's tokens
        are not the student's."""
        if self.privileged_ids is None or self.span_ends is not None:
            return None
        hints = _runs(self.privileged_ids) - _runs(self.prompt_ids)
        ids, found = self.response_ids, set[int]()
        for turn in self.turns:
            for i in range(turn.start, turn.stop - COPIED_TOKENS + 1):
                if tuple(ids[i : i + COPIED_TOKENS]) in hints:
                    found.update(range(i, i + COPIED_TOKENS))
        return len(found) / max(self.trained_tokens, 1)

    @property
    def weight_version(self) -> int:
        """Version of the weights of the first token, the oldest of the response."""
        return self.token_versions[0]

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


def _runs_of_true(mask: Sequence[bool]) -> Iterator[range]:
    begin = 0
    for is_true, group in groupby(mask):
        end = begin + len(list(group))
        if is_true:
            yield range(begin, end)
        begin = end


def _runs(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + COPIED_TOKENS]) for i in range(len(ids) - COPIED_TOKENS + 1)}
