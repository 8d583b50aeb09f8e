"""Whether a teacher scores, and scores as a teacher of this student would."""

import math
import statistics

from distill_api.spec.job_spec import Spec, Support
from distill_workers.data.sample import Sample
from distill_workers.run.preflight.check import Check
from distill_workers.teacher.pool import BadScore, TeacherPool

TEACHER_ANSWERS = Check(
    "TeacherAnswers",
    promise="The endpoint that a job names scores a request.",
    cost="two tokens scored",
)
TEACHER_SCORES = Check(
    "TeacherScores",
    promise="The teacher scores the student's own responses, with the top-k that the objective needs.",
    cost="that of TeacherSane and ReplicasAgree, which find it out",
)
TEACHER_SANE = Check(
    "TeacherSane",
    promise="The student's tokens are likelier to the teacher than far below chance.",
    cost="two short responses scored",
)


async def teacher_answers(teacher: TeacherPool) -> None:
    """An endpoint is somebody else's, and may be another than the job says."""
    try:
        # Not token 0: SGLang takes a prompt of nothing else for an empty one.
        await teacher.score([1], [1], None)
    except BadScore as error:
        raise TEACHER_ANSWERS.failure(
            f"{named(teacher)} does not score a request of two tokens: {error}; check url, protocol, model and "
            f"keySecret of {teacher.teacher.path}.endpoint",
        ) from None


async def teacher_is_sane(spec: Spec, samples: list[Sample], teacher: TeacherPool, vocabulary: int) -> None:
    """It scores as training will ask it to, and what it says of the student's tokens is no nonsense."""
    top_k = spec.objective.top_k if spec.objective.support is Support.TOP_K else None
    try:
        scores = [await teacher.score(s.prompt_ids, s.response_ids, top_k) for s in samples]
    except BadScore as error:
        hint = "" if top_k is None else f" (it must give {top_k} likeliest tokens, objective.topK)"
        raise TEACHER_SCORES.failure(f"{named(teacher)} scored a probe unusably{hint}: {error}") from None
    mean = statistics.fmean(x for s in scores for x in s.logprobs)
    if mean < -3 * math.log(vocabulary):
        raise TEACHER_SANE.failure(
            f"{named(teacher)} gives the student's tokens {mean:.1f} nats on average, far below chance "
            f"({-math.log(vocabulary):.1f}); is it the right model?",
        )


def named(teacher: TeacherPool) -> str:
    """The teacher's name and model or address, as messages call it."""
    return f"teacher {teacher.teacher.name} ({teacher.teacher.title})"
