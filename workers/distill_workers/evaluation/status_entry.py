"""An evaluation's entry in status: its first, newest and best values."""

from typing import Any

from distill_api.status import EvaluationScore
from distill_workers.evaluation.evaluator import Measurement


def updated_entry(old: EvaluationScore | None, new: Measurement) -> EvaluationScore:
    """Return the evaluation's entry in status once `new` is known. Better is a higher score, or a lower KL without
    one."""
    score, kl = decimal(new.score), decimal(new.reverse_kl)
    entry = old or EvaluationScore(
        name=new.name, first_score=score, first_reverse_kl=kl, teacher_score=decimal(new.teacher_score)
    )
    changes: dict[str, Any] = {"step": new.step, "score": score, "reverse_kl": kl}
    changes |= {"score_low": decimal(new.score_low), "score_high": decimal(new.score_high)}
    changes["pass_at_k"] = decimal(new.pass_at[max(new.pass_at)].value) if new.pass_at else None
    if new.score is not None:
        better = entry.best_score is None or new.score > float(entry.best_score)
    elif entry.best_score is not None:
        better = False  # all of its responses failed, which says nothing about the student
    else:
        lowest = entry.best_reverse_kl
        better = new.reverse_kl is not None and (lowest is None or new.reverse_kl < float(lowest))
    if better:
        changes |= {"best_step": new.step, "best_score": score, "best_reverse_kl": kl}
    return entry.model_copy(update=changes)


def decimal(value: float | None) -> str | None:
    """Return a number as status holds it."""
    return None if value is None else f"{value:.5f}"
