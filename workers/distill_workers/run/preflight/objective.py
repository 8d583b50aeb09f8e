"""Whether the objective, as this installation computes it, has the value and the gradient of its definition.

An objective that is clamped at 0 (verl#7855), detached (miles#2362), a k1 estimate that is differentiated, or a
divergence in the other direction runs without an error, and what it minimises is not the distance to the teacher. Its
loss over six tokens is compared with the definition, written in probabilities and without a line of objective/.
"""

import math

import torch

from distill_api.spec.job_spec import Divergence, Objective, Support
from distill_workers.objective import loss as losses
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.run.preflight.check import Check

OBJECTIVE_DISTILS = Check(
    "ObjectiveDistils",
    promise="On a vocabulary of six tokens the loss and its gradient are those of the objective's definition.",
    cost="a few milliseconds, no request",
)
STUDENT = (0.3, -1.0, 0.7, 0.1, -0.4, 0.9)
TEACHER = (1.0, 0.2, -0.5, 0.0, 0.8, -1.2)
"""Logits of a student and its teacher, whose likeliest tokens are not the same."""
TOLERANCE = 1e-5
"""Relative and absolute, in float64. The tail of top-k is bounded at 1e-6."""


async def objective_distils(objective: Objective) -> None:
    """Compare value and gradient by every token of a vocabulary that the student may have sampled.

    The divergence alone: reward, reference, clips, corrections, baselines and weights are left out. A column of the
    support that the student lacks is among them: its -inf must not become NaN (trl#5594).
    """
    plain = Objective(
        divergence=objective.divergence,
        support=objective.support,
        jsd_beta=objective.jsd_beta,
        advantage_clip=1000.0,
        dataset_share=1.0 if objective.support is Support.TARGET else 0.0,
    )
    logits = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(TEACHER, dtype=torch.float64).log_softmax(-1)
    sampled = plain.support is Support.SAMPLED_TOKEN
    probes = {
        Support.SAMPLED_TOKEN: _of_sampled_token,
        Support.TOP_K: _of_top_k,
        Support.TARGET: _of_target,
    }
    found, expected = probes[plain.support](plain, logits, teacher)
    what = f"objective {plain.divergence.value}, support {plain.support.value}"
    advice = "what is installed does not minimise the distance to the teacher; install the release's own image again"
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise OBJECTIVE_DISTILS.failure(
            f"{what}: the loss of a probe is {_written(found)} nats and its definition gives {_written(expected)}; "
            + advice
        )
    weights = logits.detach().softmax(-1) if sampled else torch.ones_like(expected)
    right = torch.autograd.grad((weights * expected).sum(), logits, retain_graph=True)[0]
    if sampled:  # the gradient of an expectation is not the expectation of the estimate's gradient
        probabilities = logits.softmax(-1)
        right = torch.autograd.grad((probabilities * (probabilities.log() - teacher)).sum(), logits)[0]
    had = torch.zeros_like(right)
    if found.requires_grad:
        had = torch.autograd.grad((weights * found).sum(), logits)[0]
    if not torch.allclose(had, right, rtol=TOLERANCE, atol=TOLERANCE):
        raise OBJECTIVE_DISTILS.failure(
            f"{what}: the gradient of a probe's loss is {_written(had)} and its definition's is {_written(right)}; "
            + advice
        )


def _of_sampled_token(
    objective: Objective, logits: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token and the k1 estimate that it should be, both [tokens]."""
    logprobs = logits.log_softmax(-1)
    return _losses(objective, logprobs, teacher), logprobs - teacher


def _of_target(objective: Objective, logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token as the data set's, and its cross-entropy, both [tokens]; no teacher is in it."""
    return _losses(objective, logits.log_softmax(-1), torch.zeros_like(teacher)), -logits.softmax(-1).log()


def _of_top_k(objective: Objective, logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss where each token of the vocabulary was sampled, and the divergence by its definition."""
    logprobs, tokens = logits.log_softmax(-1), len(logits)
    top = teacher.topk(2).indices
    absent = torch.full((tokens, 1), -math.inf, dtype=torch.float64)
    student_top = torch.cat([logprobs[top].expand(tokens, 2), absent], -1)
    teacher_top = torch.cat([teacher[top].expand(tokens, 2), torch.full_like(absent, math.log(0.01))], -1)
    inside = torch.isin(torch.arange(tokens), top)
    found = _losses(
        objective,
        logprobs,
        teacher,
        support_logprobs=student_top,
        teacher_support_logprobs=teacher_top,
        sampled_in_support=inside,
    )
    p, q = logits.softmax(-1), teacher.exp()
    expected = []
    for sampled in range(tokens):
        members = sorted({*top.tolist(), sampled})
        s, t = (torch.cat([x[members], 1 - x[members].sum(0, keepdim=True)]) for x in (p, q))
        expected.append(_defined(objective, s, t))
    return found, torch.stack(expected)


def _defined(objective: Objective, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the divergence of two distributions [outcomes], nats."""
    match objective.divergence:
        case Divergence.REVERSE_KL:
            return (student * (student / teacher).log()).sum()
        case Divergence.FORWARD_KL:
            return (teacher * (teacher / student).log()).sum()
        case Divergence.JSD:
            beta = objective.jsd_beta
            middle = beta * teacher + (1 - beta) * student
            to_middle = [(x * (x / middle).log()).sum() for x in (teacher, student)]
            return beta * to_middle[0] + (1 - beta) * to_middle[1]


def _losses(
    objective: Objective, logprobs: torch.Tensor, teacher: torch.Tensor, **support: torch.Tensor
) -> torch.Tensor:
    """Return token_losses on-policy, of one response for each token."""
    sampled = logprobs.detach()
    loss, _ = losses.token_losses(
        objective,
        StepCoefficients(divergence=1.0, reward=0.0),
        logprobs=logprobs,
        old_logprobs=sampled,
        engine_logprobs=sampled,
        teacher_logprobs=teacher,
        advantages=torch.zeros_like(sampled),
        lengths=torch.ones(len(sampled), dtype=torch.long),
        supervised=torch.full((len(sampled),), objective.support is Support.TARGET),
        **support,
    )
    return loss


def _written(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.detach().tolist())
