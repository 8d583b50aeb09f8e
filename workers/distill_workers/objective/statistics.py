"""Statistics of a step: sums over tokens, and the means that are reported.

Each statistic is a mean over the tokens that it concerns: the reverse KL, for one, over those that the student sampled
itself. trainer_engine_gap is the train-rollout mismatch, mean |log pi_trainer - log pi_engine|. Sums and counts of any
split of a step into micro-batches, groups and ranks add up to the same.
"""

from collections.abc import Mapping
from enum import Enum

import torch


class Scope(Enum):
    """The response tokens that a statistic is the mean of."""

    ALL = "all"
    OWN = "own"
    """Those that the student sampled: not the data set's."""
    MEASURED = "measured"
    """Those of its own at which the student's top-k was looked up (megatron/support_overlap.py)."""
    TRANSLATED = "translated"
    """Those of its own that a teacher with a tokenizer of its own scored."""


SCOPES = {
    "loss": Scope.ALL,
    "divergence": Scope.ALL,
    "forward_kl": Scope.ALL,
    "student_mass": Scope.ALL,
    "teacher_mass": Scope.ALL,
    "teacher_entropy": Scope.ALL,
    "uncertain_ratio": Scope.ALL,
    "divergence_weight": Scope.ALL,
    "selected_ratio": Scope.ALL,
    "reverse_kl": Scope.OWN,
    "reverse_kl_k2": Scope.OWN,
    "reverse_kl_k3": Scope.OWN,
    "trainer_engine_gap": Scope.OWN,
    "importance_weight": Scope.OWN,
    "importance_capped_ratio": Scope.OWN,
    "importance_gated_ratio": Scope.OWN,
    "sequence_masked_ratio": Scope.OWN,
    "ratio_clipped_ratio": Scope.OWN,
    "advantage_clipped_ratio": Scope.OWN,
    "advantage_square": Scope.OWN,
    "baseline": Scope.OWN,
    "reference_kl": Scope.OWN,
    "implicit_reward": Scope.OWN,
    "aligned_ratio": Scope.TRANSLATED,
    "entropy": Scope.OWN,
    "overlap_ratio": Scope.MEASURED,
}
"""Every statistic of a step's tokens. divergence is what is minimised: with sampled-token the k1 estimate, extrapolated
with a reference, of which there are reference_kl, the k1 estimate to it, and implicit_reward, log pi_T - log pi_ref;
with a control it is what the job without one would minimise. importance_weight is the factor of a token's policy
gradient. advantage_square, of sampled-token, is the square of what the divergence adds to a token's advantage, without
coefficients: a baseline is to lower it. Only where the teacher's top-k is at hand are there forward_kl, that of teacher
to student over the top-k and the tail; student_mass and teacher_mass, the mass that each gives to that top-k;
teacher_entropy over it and the tail; and overlap_ratio, the share of the student's own top-k among it (as verl reports
them). divergence_weight is the factor of a token's divergence but for the coefficient of the step, and selected_ratio
the share of tokens at which it is above 0. aligned_ratio is the share of tokens that are a span by themselves
(spans.py), among those that a teacher with a tokenizer of its own scored."""


def no_sums(device: torch.device) -> torch.Tensor:
    """Return the sums of no tokens: [statistics, 2], sum and count of each, float64."""
    return torch.zeros(len(SCOPES), 2, dtype=torch.float64, device=device)


def sums(stats: Mapping[str, torch.Tensor], scopes: Mapping[Scope, torch.Tensor]) -> torch.Tensor:
    """Return sum and count of each statistic over the tokens of its scope: [statistics, 2], float64.

    stats: values [tokens] by name; one that is left out is not counted. scopes: the tokens of each, [tokens], bool.
    """
    rows = []
    for name, scope in SCOPES.items():
        counted = scopes[scope] if name in stats else torch.zeros_like(scopes[scope])
        values = torch.where(counted, stats[name], 0.0) if name in stats else counted
        rows.append(torch.stack([values.double().sum(), counted.double().sum()]))
    return torch.stack(rows)


def means(totals: torch.Tensor) -> dict[str, float]:
    """Return the mean of each statistic from sums and counts [statistics, 2]; statistics of no token are left out."""
    rows = zip(SCOPES, totals.tolist(), strict=True)
    return {name: total / count for name, (total, count) in rows if count}
