"""The checks in their order: what is cheap, and what the later ones need, first."""

import logging
import time
from dataclasses import replace
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_api.training_phases import objectives, teacher_top_k
from distill_workers.data.cursor import Cursor
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.run.preflight.objective import OBJECTIVE_DISTILS, objective_distils
from distill_workers.run.preflight.replicas import REPLICAS_AGREE, replicas_agree
from distill_workers.run.preflight.student import (
    ENGINE_GENERATES,
    ENGINE_MATCHES_TRAINER,
    PROBE_PROMPTS,
    RESPONSES_END,
    engine_matches_trainer,
    probe,
    probe_of,
    responses_end,
)
from distill_workers.run.preflight.teacher import (
    SCORES_STORED,
    STORED_SCORES_AGREE,
    TEACHER_ANSWERS,
    TEACHER_DIFFERS,
    TEACHER_SANE,
    gap_nats,
    named,
    scores_stored,
    stored_scores_agree,
    teacher_answers,
    teacher_differs,
    teacher_is_sane,
)
from distill_workers.run.preflight.vocabulary import (
    SAME_VOCABULARY,
    TOKENS_ALIGN,
    TOP_K_FITS,
    same_vocabulary,
    tokens_align,
    top_k_fits,
)
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.teacher.teachers import Teachers

log = logging.getLogger(__name__)


async def preflight(
    spec: Spec,
    tokenizer: Any,
    trainer: TrainerRanks,
    engines: EnginePool,
    teachers: Teachers,
    cursor: Cursor,
    *,
    step: int = 0,
) -> list[str]:
    """Check the parts of an attempt that goes on from `step`, with the weights of that step in trainer and engines.

    Each attempt is checked: meanwhile an endpoint may serve another model, a teacher's pods may hold other weights, and
    its engines are new. A trained student may be as its teacher is, so what tells the two apart is looked at before the
    first step only. Nothing of the run changes: no prompt is taken from the cursor, and no sample counts. Returns notes
    of what could not be checked. Raises PreflightFailed with the name of the check, what was expected, what came and
    what to do.
    """
    notes = list[str]()
    begin = time.monotonic()
    for objective in objectives(spec):
        await OBJECTIVE_DISTILS.passing(objective_distils(objective))
    for teacher in teachers.pools.values():
        if teacher.teacher.endpoint is not None:
            await TEACHER_ANSWERS.passing(teacher_answers(teacher))
        if teacher_top_k(spec) is not None:
            await TOP_K_FITS.passing(top_k_fits(spec, len(tokenizer), teacher))
        await SAME_VOCABULARY.passing(same_vocabulary(tokenizer, teacher))
    for name, store in teachers.stores.items():
        stored = (spec, [p for p in cursor.prompts if p.teacher == name], tokenizer, store)
        if name in teachers.pools:
            notes += await STORED_SCORES_AGREE.passing(stored_scores_agree(*stored, teachers.of(name)))
        else:
            await SCORES_STORED.passing(scores_stored(*stored))
    samples = await ENGINE_GENERATES.passing(probe(spec, engines, cursor))
    await RESPONSES_END.passing(responses_end(samples, tokenizer, engines.ends))
    gaps = dict[str, float]()
    for teacher in teachers.pools.values():
        is_reference = teacher.teacher.name == spec.objective.reference
        own = probe_of(spec, samples, teacher.teacher)
        if not own:
            log.warning("preflight: %s has no prompt among the probes, so its scores are not checked", named(teacher))
            continue
        if teacher.teacher.tokenizer is not None:
            await TOKENS_ALIGN.passing(tokens_align(spec, own, tokenizer, teacher))
        few = own[:PROBE_PROMPTS]
        # The reference is given the student's own prompt, and may be the student.
        asked = [replace(s, privileged_ids=None) for s in few] if is_reference else few
        scores = await TEACHER_SANE.passing(teacher_is_sane(spec, asked, teacher, len(tokenizer), trained=step > 0))
        if not is_reference:
            gaps[teacher.teacher.name] = gap_nats(few, scores)
        await REPLICAS_AGREE.passing(replicas_agree(spec, asked, teacher))
    if step == 0 and gaps:
        await TEACHER_DIFFERS.passing(teacher_differs(spec, gaps))
    await ENGINE_MATCHES_TRAINER.passing(engine_matches_trainer(spec, samples, trainer, trained=step > 0))
    for note in notes:
        log.warning("preflight: %s", note)
    log.info("preflight: all checks passed in %.1f s", time.monotonic() - begin)
    return notes
