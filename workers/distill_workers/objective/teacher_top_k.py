"""The teacher's top-k tokens at each response token, and the divergences over them, the sampled token and a tail."""

import math
from dataclasses import dataclass

import torch

from distill_api.spec.job_spec import Divergence
from distill_workers.objective.divergences import coarsen, support_divergence


@dataclass(frozen=True)
class TeacherTopK:
    """Log-probs of both models at the teacher's top-k, [tokens, k], and at the sampled token, [tokens]."""

    student: torch.Tensor
    """[tokens, k], with gradient; -inf at an id that the student lacks."""
    teacher: torch.Tensor
    """[tokens, k]"""
    student_sampled: torch.Tensor
    """[tokens], with gradient."""
    teacher_sampled: torch.Tensor
    """[tokens]"""
    sampled_inside: torch.Tensor
    """[tokens], bool: the sampled token is one of the k, and not counted again."""

    def divergence(self, kind: Divergence, jsd_beta: float = 0.5, entry_clip: float | None = None) -> torch.Tensor:
        """Return the divergence over top-k, sampled token and tail, nats: [tokens], with gradient."""
        student = torch.cat([self.student, self.student_sampled[:, None]], -1)
        teacher = torch.cat([self.teacher, self.teacher_sampled[:, None]], -1)
        present = torch.cat([self._known, ~self.sampled_inside[:, None]], -1)
        return support_divergence(kind, student, teacher, present=present, jsd_beta=jsd_beta, entry_clip=entry_clip)

    def teacher_entropy(self) -> torch.Tensor:
        """Return the teacher's entropy over top-k and tail, nats: [tokens], a lower bound of that of the vocabulary.

        The sampled token has no column of its own, so that a state has one entropy, whatever was sampled in it.
        """
        outcomes = coarsen(self.teacher.detach(), self._known)
        return -(outcomes.exp() * outcomes).sum(-1).to(self.teacher.dtype)

    def statistics(self, forward_kl: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is reported of the top-k, each [tokens]: with its forward KL and the teacher's entropy."""
        return {
            "forward_kl": forward_kl,
            "teacher_entropy": entropy,
            "student_mass": self.student.exp().sum(-1),
            "teacher_mass": torch.where(self._known, self.teacher.exp(), 0.0).sum(-1),
        }

    @property
    def _known(self) -> torch.Tensor:
        """[tokens, k], bool: the student has the id. Not isfinite: NaN must not pass for an id that it lacks."""
        return self.student != -math.inf
