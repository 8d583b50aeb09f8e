"""The rules of a teacher with a tokenizer of its own: what compares the tokens themselves cannot go with it."""

from typing import Any

from distill_api.rules import Rule


def _has_own(spec: Any) -> bool:
    return any(teacher.tokenizer is not None for teacher in spec.all_teachers)


_NO_OWN = "(!has(self.teacher) || !has(self.teacher.tokenizer)) && self.teachers.all(t, !has(t.tokenizer))"

RULES = (
    Rule(
        "tokenizer of a teacher goes without support top-k, baseline top-k and forwardKlAboveEntropy: the likeliest "
        "tokens of another vocabulary are none of the student's",
        f"({_NO_OWN}) || (self.objective.support != 'top-k' && self.objective.baseline != 'top-k' && "
        "!has(self.objective.forwardKlAboveEntropy))",
        lambda spec: not _has_own(spec) or spec.objective.teacher_top_k is None,
    ),
    Rule(
        "tokenizer of a teacher goes without objective.datasetResponses teacher: those are in tokens of its own",
        f"({_NO_OWN}) || self.objective.datasetResponses != 'teacher'",
        lambda spec: not _has_own(spec) or spec.objective.dataset_responses != "teacher",
    ),
    Rule(
        "tokenizer of a teacher goes without objective.reference: what it takes of both models is of one token",
        f"({_NO_OWN}) || !has(self.objective.reference)",
        lambda spec: not _has_own(spec) or spec.objective.reference is None,
    ),
    Rule(
        "tokenizer of a teacher goes without rollout.environment: a conversation is the student's own row of tokens",
        f"({_NO_OWN}) || !has(self.rollout.environment)",
        lambda spec: not _has_own(spec) or spec.rollout.environment is None,
    ),
)
"""The rules of a spec."""
