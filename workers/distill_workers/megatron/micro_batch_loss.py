"""The loss of a micro-batch, from the hidden states that predict its response tokens."""

import torch

from distill_api.spec.job_spec import Objective
from distill_workers.megatron.batch import MicroBatch
from distill_workers.megatron.context import OwnTokens
from distill_workers.megatron.logprobs import Vocabulary, token_logprobs
from distill_workers.megatron.support_overlap import support_overlap
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.objective.loss import token_losses
from distill_workers.objective.statistics import Scope, sums

MEASURE_EVERY = 8
"""The overlap with the student's own top-k is measured at every so many positions: it computes the logits once more,
for a number that is only reported."""


def micro_batch_loss(
    objective: Objective,
    coefficients: StepCoefficients,
    batch: MicroBatch,
    own: OwnTokens,
    hidden: torch.Tensor,
    head: torch.Tensor,
    vocabulary: Vocabulary,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the tokens' losses, nats, with gradient, and the sums of the statistics, [statistics, 2].

    hidden [own, hidden], with gradient, the same on every rank of the vocabulary's group; head [rows + padding,
    hidden], this rank's part. Collective over that group and the one of `own`, each rank of which finds the same loss.
    """
    # Column 0 is the sampled token; the others are the teacher's, where the objective needs them.
    top_k = objective.teacher_top_k is not None
    ids = torch.cat([batch.targets[:, None], batch.support_ids], -1) if top_k else batch.targets[:, None]
    values, entropy = (own.join(x) for x in token_logprobs(hidden, head, own.pick(ids), vocabulary))
    losses, stats = token_losses(
        objective,
        coefficients,
        logprobs=values[:, 0],
        # One update for each batch: the policy before the step is the one at hand.
        old_logprobs=values[:, 0].detach(),
        engine_logprobs=batch.engine_logprobs,
        teacher_logprobs=batch.teacher_logprobs,
        advantages=batch.advantages,
        lengths=batch.lengths,
        supervised=batch.supervised,
        teacher_coefficients=batch.teacher_coefficients,
        baselines=batch.baselines,
        reference_logprobs=batch.reference_logprobs if objective.reference is not None else None,
        span_ends=batch.span_ends,
        entropy=entropy,
        support_logprobs=values[:, 1:] if top_k else None,
        teacher_support_logprobs=batch.teacher_support_logprobs if top_k else None,
        sampled_in_support=batch.sampled_in_support if top_k else None,
    )
    sampled = ~batch.supervised
    measured = sampled & (batch.positions % MEASURE_EVERY == 0)
    stats["entropy"] = entropy
    if top_k:
        here = own.pick(measured)
        found = support_overlap(hidden[here], head, own.pick(batch.support_ids)[here], vocabulary).to(entropy.dtype)
        stats["overlap_ratio"] = own.join(entropy.new_zeros(len(here)).masked_scatter_(here, found))
    scopes = {
        Scope.ALL: torch.ones_like(sampled),
        Scope.OWN: sampled,
        Scope.MEASURED: measured,
        Scope.TRANSLATED: sampled & batch.translated,
    }
    return losses.sum(), sums(stats, scopes)
