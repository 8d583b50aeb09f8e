"""One rank of the trainer: `python -m distill_workers.trainer`, started by distill_workers.launch.

Rank 0 runs the loop; the others follow it. Ends with an exit code of distill_api.protocol and an exit report.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from distill_api.job import DistillationJob, InvalidManifest, load_job
from distill_api.protocol import JOB_FILE, TRAINER_PORT, ExitCode, ExitReason, ExitReport, ProgressReport, Variable
from distill_workers.data.prompts import Cursor, PromptError, load_data
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import Failure, Stopped, Superseded, TeacherLost, VolumeFull, is_full
from distill_workers.megatron.architecture import UnsupportedModel
from distill_workers.megatron.checkpoint.reader import IncompatibleCheckpoint
from distill_workers.megatron.student import MegatronStudent
from distill_workers.metrics import Metrics
from distill_workers.model_folder import model_folder
from distill_workers.reporting.progress import Reporter
from distill_workers.reporting.trackers import Trackers
from distill_workers.rewards.rewards import build_rewards
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.run.loop import Loop
from distill_workers.run.model_agreement import check_models, load_tokenizer
from distill_workers.run.team import Team, follow
from distill_workers.run_folder.checkpoints import DamagedCheckpoints
from distill_workers.run_folder.run_folder import ForeignRun, RunFolder, write_whole
from distill_workers.teacher.pool import TeacherUnreachable
from distill_workers.teacher.teachers import Teachers

log = logging.getLogger(__name__)
MESSAGE_BYTES = 4096
"""A longer termination message is cut off by Kubernetes, and would be no JSON."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


async def drive(job: DistillationJob, student: MegatronStudent, model: Path) -> str:
    """Rank 0: puts the parts together and runs the loop. Returns how it ended, as a sentence."""
    spec, folder, metrics = job.spec, RunFolder(job), Metrics()
    team = Team(student)
    try:
        folder.claim()
        keep_log(folder)
        reporter = Reporter(folder, metrics, spec.schedule.steps, Trackers(job, folder.root, metrics))
        await reporter.serve(int(os.environ.get("DISTILL_PORT", TRAINER_PORT)))
        tokenizer = load_tokenizer(model, "spec.student.model", trust_remote_code=spec.trust_remote_code)
        more_stop_ids = check_models(spec, model, tokenizer)
        prompts = load_data(spec, tokenizer, metrics)
        weights = {source.name: source.weight for source in spec.data.all_sources}
        cursor = Cursor(prompts, seed=spec.seed, shuffle=spec.data.shuffle, weights=weights)
        evaluators = [Evaluator(spec, e, tokenizer, metrics) for e in spec.evaluation]
        rewards = build_rewards(spec, metrics)
        teachers = Teachers.of_job(spec, os.environ, metrics)
        reporter.teachers = teachers.shared_requests
        engines = EnginePool(job, folder, metrics, more_stop_ids)
        try:
            await asyncio.gather(teachers.start(), engines.start(str(model)))
            rollouts = RolloutPipeline(spec, cursor, engines, teachers, rewards, tokenizer, metrics)
            loop = Loop(job, folder, team, engines, teachers, cursor, rollouts, evaluators, reporter, tokenizer)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, loop.stop)
            try:
                return await loop.run()
            except Stopped:
                await loop.checkpoint()
                raise
            finally:
                rollouts.cancel()
        finally:
            await engines.close()
            await teachers.close()
            await reporter.close()
            await asyncio.gather(*(r.close() for r in rewards.values()), *(e.close() for e in evaluators))
    finally:
        team.dismiss()


def keep_log(folder: RunFolder) -> None:
    """A failed Job deletes its pods with their logs: what they said is kept in the run folder too."""
    (folder.root / "logs").mkdir(exist_ok=True)
    handler = logging.FileHandler(folder.root / "logs" / "rank-0.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)


def run(job: DistillationJob) -> str:
    """Returns how it ended, as a sentence."""
    model = model_folder(job.spec.student.model, "spec.student.model")
    student = MegatronStudent(job.spec, model)
    if dist.get_rank() == 0:
        return asyncio.run(drive(job, student, model))
    # Rank 0 decides when to stop, so that a checkpoint is still possible; if it is gone, its connection is too.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(student)
    return "rank 0 is done"


def explain(error: BaseException, job: DistillationJob | None) -> tuple[ExitCode, ExitReason, str]:
    """Exit code, reason and sentence of whatever ended the run. `job` is None where it could not be read."""
    refused = (
        InvalidManifest | PromptError | ForeignRun | UnsupportedModel | IncompatibleCheckpoint | DamagedCheckpoints
    )
    if isinstance(error, refused):
        return ExitCode.CONFIGURATION, ExitReason.CONFIGURATION_ERROR, str(error)
    if isinstance(error, TeacherUnreachable):
        return TeacherLost.code, TeacherLost.reason, str(error)
    if job is not None and (isinstance(error, VolumeFull) or (is_full(error) and _in_output(error, job))):
        return VolumeFull.code, VolumeFull.reason, f"the output volume is full: {error}; {_make_room(job)}"
    if isinstance(error, Failure):
        return error.code, error.reason, str(error)
    return ExitCode.TEMPORARY, ExitReason.INTERNAL_ERROR, f"{type(error).__name__}: {error}"


def _in_output(error: BaseException, job: DistillationJob) -> bool:
    """Whether a write was to the output volume. A write to an open file does not say where: nearly all are there."""
    name = error.filename if isinstance(error, OSError) else None
    return name is None or Path(name).is_relative_to(job.spec.output.path)


def _make_room(job: DistillationJob) -> str:
    """What to do about a full output volume, as the end of a sentence."""
    path = job.spec.output.path
    usage = shutil.disk_usage(path)
    left = f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free"
    return (
        f"remove what nobody needs under {path} ({left}), or enlarge the volume; "
        "the next attempt goes on from the last whole checkpoint"
    )


def exit_text(job: DistillationJob | None, reason: ExitReason, message: str) -> str:
    """The exit report as JSON of at most MESSAGE_BYTES: with rank 0's last progress, as far as that fits."""
    report = ExitReport(reason=reason, message=message[:1500])
    rank = int(os.environ.get("RANK", "0"))
    state = RunFolder(job).root / "state.json" if job is not None and rank == 0 else None
    if state is None or not state.exists():
        return report.model_dump_json(by_alias=True, exclude_none=True)
    final = ProgressReport.model_validate_json(state.read_text(encoding="utf-8"))
    evaluations, events = final.progress.evaluations, final.progress.guard_events
    for kept in range(len(evaluations), -1, -1):
        told = events if kept == len(evaluations) else events[-1:]
        progress = final.progress.model_copy(update={"evaluations": evaluations[:kept], "guard_events": told})
        whole = report.model_copy(
            update={"final": final.model_copy(update={"progress": progress}), "step": progress.step}
        )
        text = whole.model_dump_json(by_alias=True, exclude_none=True)
        if len(text.encode()) <= MESSAGE_BYTES:
            return text
    return report.model_dump_json(by_alias=True, exclude_none=True)


def tell(text: str) -> None:
    """The exit report, to the operator."""
    if path := os.environ.get(Variable.TERMINATION_LOG):
        Path(path).write_text(text, encoding="utf-8")


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """SIGTERM before the first step. Nothing is there to be kept, and what is waited for, Ray's head or a model, may
    take minutes; as the first process of a container, one that does not handle the signal is deaf to it."""
    tell(exit_text(None, Stopped.reason, "stopped by SIGTERM while it was starting"))
    os._exit(Stopped.code)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    signal.signal(signal.SIGTERM, stop_at_once)
    job: DistillationJob | None = None
    code, reason, message, superseded = ExitCode.DONE, ExitReason.COMPLETED, "", False
    try:
        job = load_job(Path(os.environ.get(Variable.JOB_FILE, JOB_FILE)))
        if job.spec.on_cpu:
            from distill_workers.cpu import megatron_shim

            megatron_shim.install()
        message = run(job)
    except (Exception, asyncio.CancelledError) as error:
        code, reason, message = explain(error, job)
        superseded = isinstance(error, Superseded)
        log.error("%s: %s", reason.value, message, exc_info=not isinstance(error, Failure | ValueError))
    # A configuration error may be that the folder is another run's, whose progress is not ours to tell.
    text = exit_text(None if superseded or code == ExitCode.CONFIGURATION else job, reason, message)
    tell(text)
    if job is not None and not superseded and int(os.environ.get("RANK", "0")) == 0:
        folder = RunFolder(job).root
        # The report stands in the termination message as well: a volume without room must not change the exit code.
        with contextlib.suppress(OSError):
            write_whole(folder / "exit.json", text)
    return code


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Ray's and gloo's threads may hold up an ordinary exit; everything that must be kept is written by now.
    os._exit(status)
