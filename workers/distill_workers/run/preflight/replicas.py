"""Whether a teacher's servers hold the same weights, and compute the same from them each time."""

import logging

import numpy as np

from distill_api.spec.job_spec import Spec
from distill_workers.data.sample import Sample
from distill_workers.run.preflight.check import Check
from distill_workers.run.preflight.student import TOLERANCE_NATS
from distill_workers.run.preflight.teacher import TEACHER_SCORES, named
from distill_workers.teacher.pool import BadScore, TeacherPool

log = logging.getLogger(__name__)

TIMES = 2
"""That each replica scores the probe."""
TIMES_BEHIND_ONE_ADDRESS = 4
"""Of servers that somebody else runs: a load balancer may hide several, and gives each connection to one of them."""
REPLICAS_AGREE = Check(
    "ReplicasAgree",
    promise="All servers of a teacher give the same tokens the same log-probabilities, within maxDisagreement.",
    cost=f"two short responses scored {TIMES} times by each replica, {TIMES_BEHIND_ONE_ADDRESS} times by an endpoint",
)
TEACHER_DETERMINISTIC = Check(
    "TeacherDeterministic",
    promise="A server that the job runs scores the same request the same way twice.",
    cost="none beside ReplicasAgree",
)


async def replicas_agree(spec: Spec, samples: list[Sample], teacher: TeacherPool) -> None:
    """The same tokens, scored by each replica more than once, have the same log-probabilities."""
    own = teacher.teacher.model is not None or teacher.teacher.student is not None
    found: dict[tuple[str, int], list[float]] = {}
    try:
        for sample in samples:
            asked = sample.teacher_prompt_ids
            # One after the other: where an address is a load balancer, they go to different servers.
            for time in range(TIMES if own else TIMES_BEHIND_ONE_ADDRESS):
                for address, scores in await teacher.score_everywhere(asked, sample.response_ids, None):
                    found.setdefault((address, time), []).extend(scores.logprobs)
    except BadScore as error:
        raise TEACHER_SCORES.failure(f"{named(teacher)} scored a probe unusably: {error}") from None
    # One that came or went meanwhile has not seen all of the probe.
    whole = max(map(len, found.values()))
    runs = [(address, values) for (address, _), values in found.items() if len(values) == whole]
    logprobs = np.array([values for _, values in runs])
    gaps = np.abs(logprobs[:, None] - logprobs[None])  # [runs, runs, tokens]
    means, most = gaps.mean(axis=-1), teacher.teacher.max_disagreement
    i, j = map(int, np.unravel_index(means.argmax(), means.shape))
    where = f"at {runs[i][0]} and at {runs[j][0]}" if runs[i][0] != runs[j][0] else f"twice at {runs[i][0]}"
    log.info("preflight: teacher %s: scores differ by %.2e nats at most, %s", teacher.teacher.name, means[i, j], where)
    if means[i, j] > most:
        raise REPLICAS_AGREE.failure(
            f"{named(teacher)} scored the same {gaps.shape[-1]} tokens {where}, and the two differ by "
            f"{means[i, j]:.4f} nats per token on average (allowed {most}, maxDisagreement); all of its servers must "
            "hold the same weights in the same precision",
        )
    places = np.array([address for address, _ in runs])
    twice = float(gaps[places[:, None] == places[None]].max())
    if own and twice > TOLERANCE_NATS[spec.dtype]:
        raise TEACHER_DETERMINISTIC.failure(
            f"the same request twice to {named(teacher)} differed by {twice:.4f} nats at a token (allowed "
            f"{TOLERANCE_NATS[spec.dtype]})",
        )
