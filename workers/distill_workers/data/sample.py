"""The one type of ragged data: a prompt, and a response of the student with everything known about its tokens."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `index` is its own among the prompts of a run, in the order of the data."""

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


@dataclass(slots=True)
class Sample:
    """One response to a prompt, the student's own unless `supervised`. Per-token lists are [response]."""

    prompt_index: int
    index_in_group: int
    """Number of the response among those to the same prompt."""
    prompt_ids: list[int]
    response_ids: list[int]
    engine_logprobs: list[float]
    """log p of each response token, as the engine drew it, nats."""
    token_versions: list[int]
    """Version of the weights that each token was drawn with; they differ only with rollout.partial."""
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
    """That teacher's: multiplies the divergence of the sample."""
    source: str = ""
    """Name of the data source of the prompt."""
    supervised: bool = False
    """The response is the data set's, not the student's: no engine drew it, and engine_logprobs are 0."""
    reward: float | None = None
    advantage: float = 0.0
    """Of the reward (objective.advantage), without its coefficient: the same for every token."""

    @property
    def weight_version(self) -> int:
        """Of the oldest token, and so of the whole response."""
        return self.token_versions[0]

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)
