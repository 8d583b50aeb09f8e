"""Routing: which of a job's teachers scores the responses to a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_api.names import ONLY_TEACHER
from distill_api.spec.job_spec import Evaluation, Source, Spec
from distill_workers.data.fields import MISSING, find
from distill_workers.failures import PromptError


@dataclass(frozen=True)
class Route:
    """The route of the prompts of one source. Without a default, each prompt must name a teacher."""

    known: tuple[str, ...] = (ONLY_TEACHER,)
    fixed: str | None = None
    """The teacher of all prompts of the source."""
    default: str | None = ONLY_TEACHER

    @classmethod
    def of(cls, spec: Spec, part: Source | Evaluation) -> "Route":
        """Return the route of a data source or an evaluation. The reference scores prompts of evaluations alone."""
        known = tuple(t.name for t in (spec.routed_teachers if isinstance(part, Source) else spec.all_teachers))
        return cls(known, part.teacher, spec.data.default_teacher if spec.teachers else ONLY_TEACHER)

    def teacher(self, field: str | None, row: Mapping[str, Any], where: str) -> str:
        """Return the teacher that a row names in `field`, or the default. Raises PromptError."""
        if self.fixed is not None:
            return self.fixed
        named = None if field is None else find(row, field)
        if isinstance(named, str) and named in self.known:
            return named
        if self.default is not None:
            return self.default
        what = "is missing" if named is None or named is MISSING else f"is {named!r}"
        raise PromptError(
            f"{where}: field {field} (prompts.teacherField) {what}; it must name one of spec.teachers "
            f"({', '.join(self.known)}), or data.defaultTeacher says who scores such a prompt"
        )
