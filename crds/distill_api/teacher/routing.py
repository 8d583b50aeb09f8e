"""The rules of routing: which of several teachers scores a prompt, set by the job for a source, or by each row.

The reference of an objective is one of the teachers, and no training prompt is routed to it.
"""

from typing import Any

from distill_api.rules import Rule

ROUTE_NEEDED = (
    "each source and each evaluation that asks the teacher must say which of spec.teachers it means: by teacher, by "
    "prompts.teacherField, or all by data.defaultTeacher"
)
_NO_ROUTE = "!has({0}.teacher) && !has({0}.prompts.teacherField)"


def _routed(part: Any) -> bool:
    return part.teacher is not None or part.prompts.teacher_field is not None


def _needs_teacher(evaluation: Any) -> bool:
    return bool(evaluation.measure_reverse_kl or evaluation.score_teacher)


def _all_routed(spec: Any) -> bool:
    data = spec.data
    if not spec.teachers or data.default_teacher is not None:
        return True
    own = data.prompts is None or data.prompts.teacher_field is not None
    return own and all(map(_routed, data.sources)) and all(_routed(e) for e in spec.evaluation if _needs_teacher(e))


def _named_teachers(spec: Any) -> set[str]:
    found = {spec.data.default_teacher, *(part.teacher for part in (*spec.data.sources, *spec.evaluation))}
    return found - {None}


def _names_no_teacher(spec: Any) -> bool:
    prompts = [s.prompts for s in spec.data.all_sources] + [e.prompts for e in spec.evaluation]
    return not _named_teachers(spec) and all(p.teacher_field is None for p in prompts)


def _knows_its_reference(spec: Any) -> bool:
    name = spec.objective.reference
    trains = {spec.data.default_teacher, *(source.teacher for source in spec.data.sources)}
    return name is None or (name not in trains and any(t.name == name and t.coefficient == 1 for t in spec.teachers))


ONE_ROUTE = Rule(
    "set teacher or prompts.teacherField, not both",
    "!has(self.teacher) || !has(self.prompts.teacherField)",
    lambda part: part.teacher is None or part.prompts.teacher_field is None,
)
"""The rule of a source and of an evaluation."""

RULES = (
    Rule(
        "set exactly one of teacher and teachers",
        "has(self.teacher) != (self.teachers.size() > 0)",
        lambda spec: (spec.teacher is not None) != bool(spec.teachers),
    ),
    Rule(
        ROUTE_NEEDED,
        "self.teachers.size() == 0 || has(self.data.defaultTeacher) || ("
        "(!has(self.data.prompts) || has(self.data.prompts.teacherField)) && "
        f"!self.data.sources.exists(s, {_NO_ROUTE.format('s')}) && "
        f"!self.evaluation.exists(e, (e.measureReverseKL || e.scoreTeacher) && {_NO_ROUTE.format('e')}))",
        _all_routed,
    ),
    Rule(
        "teacher of a source or an evaluation, prompts.teacherField and data.defaultTeacher go with spec.teachers only",
        "self.teachers.size() > 0 || (!has(self.data.defaultTeacher) && "
        "(!has(self.data.prompts) || !has(self.data.prompts.teacherField)) && "
        "self.data.sources.all(s, !has(s.teacher) && !has(s.prompts.teacherField)) && "
        "self.evaluation.all(e, !has(e.teacher) && !has(e.prompts.teacherField)))",
        lambda spec: bool(spec.teachers) or _names_no_teacher(spec),
    ),
    Rule(
        "data.defaultTeacher, and teacher of a source or an evaluation, must be the name of one of spec.teachers",
        "self.teachers.size() == 0 || ("
        "(!has(self.data.defaultTeacher) || self.teachers.exists(t, t.name == self.data.defaultTeacher)) && "
        "self.data.sources.all(s, !has(s.teacher) || self.teachers.exists(t, t.name == s.teacher)) && "
        "self.evaluation.all(e, !has(e.teacher) || self.teachers.exists(t, t.name == e.teacher)))",
        lambda spec: not spec.teachers or _named_teachers(spec) <= {t.name for t in spec.teachers},
    ),
    Rule(
        "objective.reference must be the name of one of spec.teachers, with coefficient 1, and neither "
        "data.defaultTeacher nor the teacher of a source: it teaches nobody",
        "!has(self.objective.reference) || ("
        "self.teachers.exists(t, t.name == self.objective.reference && t.coefficient == 1.0) && "
        "(!has(self.data.defaultTeacher) || self.data.defaultTeacher != self.objective.reference) && "
        "self.data.sources.all(s, !has(s.teacher) || s.teacher != self.objective.reference))",
        _knows_its_reference,
    ),
)
"""The rules of a spec."""
