"""The condition Published, which rests on what the trainer reports of the places of spec.output.publish. Pure."""

from distill_api.job import DistillationJob
from distill_api.protocol import ProgressReport
from distill_api.status import ConditionType, Reason, Status
from distill_operator.model import conditions
from distill_operator.model.conditions import FALSE, TRUE, UNKNOWN, ConditionValue

AHEAD = ConditionValue(UNKNOWN, Reason.PENDING, "the model is published after the last step")
NOT_TOLD = ConditionValue(
    UNKNOWN, Reason.PENDING, "the trainer's last report is lost; published.json in the run folder says what was done"
)


def published(
    job: DistillationJob, status: Status, report: ProgressReport | None, *, complete: bool = False
) -> dict[ConditionType, ConditionValue]:
    """Return the condition; none for a job that publishes nothing. `complete` says that no report comes any more."""
    if not job.spec.output.publish:
        return {}
    told = report.publications if report else []
    if not told:
        known = conditions.value_of(status, ConditionType.PUBLISHED, AHEAD)
        value = NOT_TOLD if complete and known.reason is Reason.PENDING else known
    else:
        text = "; ".join(f"{p.to}: {'' if p.done else 'not published: '}step {p.step}, {p.message}" for p in told)
        done = all(p.done for p in told)
        value = ConditionValue(TRUE if done else FALSE, Reason.PUBLISHED if done else Reason.NOT_PUBLISHED, text)
    return {ConditionType.PUBLISHED: value}
