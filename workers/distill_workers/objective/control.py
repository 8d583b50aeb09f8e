"""The control: what stands in place of everything that a teacher says, and knows nothing of it.

"Does on-policy distillation really distill?" (arXiv 2608.31046, section 3.2) replaces every advantage log pi_T - log pi
by one number, A = -0.5, at the fifth of each response's tokens that the student itself finds least likely, and reports
that the student gains as much as from its teacher: what helped was then to push down unlikely tokens, which needs no
teacher. A run with this advantage is therefore what a run with a teacher has to be better than.

Ours differs in one thing: the paper divides by the tokens that were chosen, and here, as in every objective, the sum is
divided by all response tokens of a step. Adam's steps do not depend on that factor; the clip of the gradient may.
"""

import torch

from distill_workers.objective.responses import highest_share

ADVANTAGE = -0.5
"""Of each chosen token, in place of log pi_T - log pi, nats."""
SHARE = 0.2
"""Part of each response's tokens that are chosen, rounded up."""


def least_likely(logprobs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the tokens at which ADVANTAGE stands, the least likely of each response: [tokens], bool.

    logprobs [tokens]: the student's at its sampled tokens, before the step. Whole responses; lengths [responses].
    """
    return highest_share(-logprobs.detach(), lengths, SHARE)
