"""How the trainer ended: an exit code and a reason that the operator acts on, and a sentence for people."""

import logging
import os
import shutil
from pathlib import Path

from distill_api.job import DistillationJob, InvalidManifest
from distill_api.protocol import ExitCode, ExitReason, ExitReport, ProgressReport, Variable
from distill_workers.failures import Failure, TeacherLost, VolumeFull, is_full
from distill_workers.megatron.architecture import UnsupportedModel
from distill_workers.megatron.checkpoint.reader import IncompatibleCheckpoint
from distill_workers.run_folder.checkpoints import DamagedCheckpoints
from distill_workers.run_folder.run_folder import ForeignRun, RunFolder
from distill_workers.teacher.pool import TeacherUnreachable

log = logging.getLogger(__name__)

MESSAGE_BYTES = 4096
"""A longer termination message is cut off by Kubernetes, and would be no JSON."""


def classify_error(error: BaseException, job: DistillationJob | None) -> tuple[ExitCode, ExitReason, str]:
    """Return exit code, reason and sentence of whatever ended the run. `job` is None where it could not be read."""
    refused = InvalidManifest | ForeignRun | UnsupportedModel | IncompatibleCheckpoint | DamagedCheckpoints
    if isinstance(error, refused):
        return ExitCode.CONFIGURATION, ExitReason.CONFIGURATION_ERROR, str(error)
    if isinstance(error, TeacherUnreachable):
        return TeacherLost.code, TeacherLost.reason, str(error)
    if job is not None and (isinstance(error, VolumeFull) or (is_full(error) and _in_output(error, job))):
        return VolumeFull.code, VolumeFull.reason, f"the output volume is full: {error}; {_make_room(job)}"
    if is_full(error):
        return VolumeFull.code, ExitReason.INTERNAL_ERROR, f"a volume is full: {error}; make room there"
    if isinstance(error, Failure):
        return error.code, error.reason, str(error)
    return ExitCode.TEMPORARY, ExitReason.INTERNAL_ERROR, f"{type(error).__name__}: {error}"


def _in_output(error: BaseException, job: DistillationJob) -> bool:
    """Return whether a failed write was to the output volume. A write to an open file does not say where:
    nearly all are there."""
    name = error.filename if isinstance(error, OSError) else None
    return name is None or Path(name).is_relative_to(job.spec.output.path)


def _make_room(job: DistillationJob) -> str:
    """Return what to do about a full output volume, as the end of a sentence."""
    path = job.spec.output.path
    usage = shutil.disk_usage(path)
    left = f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free"
    return (
        f"remove what nobody needs under {path} ({left}), or enlarge the volume; "
        "the next attempt goes on from the last whole checkpoint"
    )


def exit_report(job: DistillationJob | None, reason: ExitReason, message: str) -> str:
    """Return the exit report as JSON of at most MESSAGE_BYTES: with rank 0's last progress, as far as that fits."""
    report = ExitReport(reason=reason, message=message[:1500])
    rank = int(os.environ.get("RANK", "0"))
    state = RunFolder(job).root / "state.json" if job is not None and rank == 0 else None
    final: ProgressReport | None = None
    try:
        if state is not None:
            final = ProgressReport.model_validate_json(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass  # none was written yet, or a volume lost it: that changes nothing about the end
    if final is None:
        return report.model_dump_json(by_alias=True, exclude_none=True)
    evaluations, events = final.progress.evaluations, final.progress.guard_events
    # First the notes go, of which polls have told, then evaluations.
    for kept in range(len(evaluations) + 1, -1, -1):
        shown = events if kept >= len(evaluations) else events[-1:]
        notes = final.notes if kept > len(evaluations) else []
        progress = final.progress.model_copy(update={"evaluations": evaluations[:kept], "guard_events": shown})
        whole = report.model_copy(
            update={"final": final.model_copy(update={"progress": progress, "notes": notes}), "step": progress.step}
        )
        text = whole.model_dump_json(by_alias=True, exclude_none=True)
        if len(text.encode()) <= MESSAGE_BYTES:
            return text
    return report.model_dump_json(by_alias=True, exclude_none=True)


def write_exit_report(text: str) -> None:
    """Write the exit report where the operator reads it, the container's termination message.

    Where that fails, the exit code and the log still tell how the trainer ended.
    """
    if path := os.environ.get(Variable.TERMINATION_LOG):
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            log.error("the exit report cannot be written: %s", error)
