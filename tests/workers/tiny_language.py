"""A language of four tokens and responses of two: few enough that every expectation over responses is a sum."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from distill_api.spec.job_spec import Objective
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.objective.loss import token_losses

VOCABULARY, TOKENS, TOP = 4, 2, 2
RESPONSES = list(product(range(VOCABULARY), repeat=TOKENS))
STATES = [(), *((first,) for first in range(VOCABULARY))]


@dataclass(frozen=True)
class TinyLanguage:
    """A student, a teacher and a reference that all depend on the token before, in float64."""

    logits: torch.Tensor
    """[states, vocabulary] of the student, a leaf with gradient; state 0 is the prompt, state 1 + v follows token v."""
    teacher: torch.Tensor
    """[states, vocabulary] log-probs."""
    responses: list[tuple[int, ...]] = field(default_factory=lambda: list(RESPONSES))
    reference: torch.Tensor | None = None
    """[states, vocabulary] log-probs."""

    @classmethod
    def random(cls, seed: int = 0, sharpness: float = 1.0, distance: float = 1.0) -> "TinyLanguage":
        """The teacher's logits are `sharpness` times the student's, and noise."""
        generator = torch.Generator().manual_seed(seed)
        student, other, third = (
            torch.randn(len(STATES), VOCABULARY, dtype=torch.float64, generator=generator) for _ in range(3)
        )
        teacher = (sharpness * student + distance * other).log_softmax(-1)
        return cls(student.requires_grad_(), teacher, reference=(teacher + 2 * third).log_softmax(-1))

    @property
    def student(self) -> torch.Tensor:
        """[states, vocabulary] log-probs, with gradient."""
        return self.logits.log_softmax(-1)

    @property
    def probabilities(self) -> torch.Tensor:
        """[responses], with gradient."""
        return self._drawn(self.student).view(-1, TOKENS).sum(-1).exp()

    def token_losses(self, objective: Objective, **given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each token of every response, on-policy, with no reward unless one is given."""
        states, drawn = self._places()
        student = self._drawn(self.student)
        ids = self.teacher.topk(TOP, -1).indices[states]
        defaults: dict[str, Any] = {
            "logprobs": student,
            "old_logprobs": student.detach(),
            "engine_logprobs": student.detach(),
            "teacher_logprobs": self._drawn(self.teacher),
            "advantages": torch.zeros_like(student).detach(),
            "lengths": torch.full((len(self.responses),), TOKENS),
            "supervised": torch.zeros(len(student), dtype=torch.bool),
            "entropy": -(self.student.exp() * self.student).sum(-1).detach()[states],
        }
        if objective.reference is not None:
            assert self.reference is not None
            defaults["reference_logprobs"] = self._drawn(self.reference)
        if objective.teacher_top_k is not None:
            defaults |= {
                "support_logprobs": self.student[states].gather(-1, ids),
                "teacher_support_logprobs": self.teacher[states].gather(-1, ids),
                "sampled_in_support": (ids == drawn[:, None]).any(-1),
            }
        coefficients = StepCoefficients(objective.coefficient, objective.reward_coefficient)
        return token_losses(objective, coefficients, **{**defaults, **given})

    def reverse_kl(self, target: torch.Tensor | None = None) -> torch.Tensor:
        """[states] to the target, the teacher if it is left out, over the whole vocabulary, with gradient."""
        return (self.student.exp() * (self.student - (self.teacher if target is None else target))).sum(-1)

    def optimum(self, objective: Objective) -> torch.Tensor:
        """[states, vocabulary] log-probs of the student that an objective of each token alone is least for: the
        teacher, or pi_T^(lambda / (1 + beta)) pi_ref^(1 - lambda / (1 + beta)), normalised."""
        if objective.reference is None:
            return self.teacher
        assert self.reference is not None
        share = objective.extrapolation / (1 + objective.reference_coefficient / objective.coefficient)
        return (share * self.teacher + (1 - share) * self.reference).log_softmax(-1)

    def visits(self) -> torch.Tensor:
        """[states]: expected number of times that a response passes each, with gradient."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.student[0].exp()])

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        """[states, vocabulary] of a scalar."""
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before each token and the token: both [tokens]."""
        states = [STATES.index(response[:place]) for response in self.responses for place in range(TOKENS)]
        return torch.tensor(states), torch.tensor([token for response in self.responses for token in response])

    def _drawn(self, rows: torch.Tensor) -> torch.Tensor:
        """The log-prob of each token of each response: [tokens]."""
        states, drawn = self._places()
        return rows[states, drawn]
