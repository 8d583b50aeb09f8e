"""Where the teacher's log-probs of the data set's responses come from, and the rules for learning from these."""

from enum import StrEnum

from distill_api.rules import Rule


class TeacherLogprobs(StrEnum):
    LIVE = "live"
    CACHED = "cached"
    PRECOMPUTED = "precomputed"


class DatasetResponses(StrEnum):
    ROW = "row"
    TEACHER = "teacher"


# The policy gradient of a token that the student did not sample would be no gradient of its divergence.
SUPPORT = Rule(
    "datasetShare goes with support top-k or target only: sampled-token needs the student's own samples",
    "self.support != 'sampled-token' || self.datasetShare == 0.0",
    lambda o: o.support != "sampled-token" or o.dataset_share == 0,
)
"""The rule of an objective that learns from given responses, for its support."""

DATASET_SHARE = Rule(
    "teacherLogprobs cached goes with datasetShare above 0, and precomputed with 1: only the data set's responses come "
    "again",
    "self.teacherLogprobs == 'live' || self.datasetShare == 1.0 || "
    "(self.teacherLogprobs == 'cached' && self.datasetShare > 0.0)",
    lambda o: (
        o.teacher_logprobs is TeacherLogprobs.LIVE
        or o.dataset_share == 1
        or (o.teacher_logprobs is TeacherLogprobs.CACHED and o.dataset_share > 0)
    ),
)
"""The rule of an objective."""

# The forward KL from the target, all of whose mass is at one token, is the cross-entropy: no teacher is in it.
TARGET = Rule(
    "support target goes with divergence forward-kl, datasetShare 1 and teacherLogprobs live, and without entryClip, "
    "weighting.prefix and reference: it is the cross-entropy of the data set's responses",
    "self.support != 'target' || (self.divergence == 'forward-kl' && self.datasetShare == 1.0 && "
    "self.teacherLogprobs == 'live' && !has(self.entryClip) && self.weighting.prefix == 0.0 && !has(self.reference))",
    lambda o: (
        o.support != "target"
        or (
            (o.divergence, o.dataset_share, o.teacher_logprobs) == ("forward-kl", 1, TeacherLogprobs.LIVE)
            and o.entry_clip is None
            and o.weighting.prefix == 0
            and o.reference is None
        )
    ),
)
"""The rule of an objective that learns from the data set's responses alone."""

DATASET_RESPONSES = Rule(
    "datasetResponses teacher goes with datasetShare above 0 and teacherLogprobs live only: they are written anew",
    "self.datasetResponses == 'row' || (self.datasetShare > 0.0 && self.teacherLogprobs == 'live')",
    lambda o: (
        o.dataset_responses is DatasetResponses.ROW
        or (o.dataset_share > 0 and o.teacher_logprobs is TeacherLogprobs.LIVE)
    ),
)
"""The rule of an objective whose off-policy responses the teacher writes."""

RULES = (
    Rule(
        "objective.datasetShare above 0 needs prompts.responseField, of each source, or datasetResponses teacher: what "
        "is learned from there",
        "self.objective.datasetShare == 0.0 || self.objective.datasetResponses == 'teacher' || "
        "(has(self.data.prompts) ? has(self.data.prompts.responseField) : "
        "self.data.sources.all(s, has(s.prompts.responseField)))",
        lambda spec: (
            spec.objective.dataset_share == 0
            or spec.objective.dataset_responses is DatasetResponses.TEACHER
            or all(s.prompts.response_field is not None for s in spec.data.all_sources)
        ),
    ),
    Rule(
        "objective.teacherLogprobs precomputed goes with evaluations that ask no teacher: measureReverseKL and "
        "scoreTeacher must be false",
        "self.objective.teacherLogprobs != 'precomputed' || "
        "self.evaluation.all(e, !e.measureReverseKL && !e.scoreTeacher)",
        lambda spec: (
            spec.objective.teacher_logprobs is not TeacherLogprobs.PRECOMPUTED
            or not any(e.measure_reverse_kl or e.score_teacher for e in spec.evaluation)
        ),
    ),
)
"""The rules of a spec."""
