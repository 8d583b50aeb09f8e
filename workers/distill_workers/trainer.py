"""One rank of the trainer: `python -m distill_workers.trainer`, started by distill_workers.launch.

Rank 0 runs the loop; the others follow it. Ends with an exit code of distill_api.protocol and an exit report.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from distill_api.job import DistillationJob, load_job
from distill_api.protocol import JOB_FILE, TRAINER_PORT, ExitCode, ExitReason, Variable
from distill_workers import stacks
from distill_workers.data.cursor import Cursor
from distill_workers.data.findings import overlap
from distill_workers.data.prompts import load_data
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import Failure, Stopped, Superseded, is_full
from distill_workers.megatron.student import MegatronStudent
from distill_workers.metrics import Metrics
from distill_workers.model_folder import model_folder
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.progress_server import ProgressServer
from distill_workers.reporting.trackers import Trackers
from distill_workers.results.publisher import Publisher
from distill_workers.rewards.build import build_rewards
from distill_workers.rollout.conversations.build import build_episodes
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.rollout.student_teacher import student_teachers
from distill_workers.run.callbacks.traces import is_traced
from distill_workers.run.exit_report import classify_error, exit_report, write_exit_report
from distill_workers.run.loop import Loop
from distill_workers.run.preflight.environment import check_environment
from distill_workers.run.preflight.export import check_export
from distill_workers.run.preflight.model_agreement import (
    check_models,
    ends,
    load_tokenizer,
    size_notes,
    teacher_tokenizers,
)
from distill_workers.run.preflight.rewards import REWARD_SCORES, reward_scores
from distill_workers.run.trainer_ranks import TrainerRanks, follow
from distill_workers.run_folder.run_folder import RunFolder, write_whole
from distill_workers.teacher.cross_tokenizer.translators import translators
from distill_workers.teacher.stored_scores.job_stores import stores_of_job
from distill_workers.teacher.teachers import Teachers

log = logging.getLogger(__name__)
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


async def drive(job: DistillationJob, student: MegatronStudent, model: Path) -> str:
    """Put the parts together and run the loop, on rank 0. Returns how it ended, as a sentence."""
    spec, folder, metrics = job.spec, RunFolder(job), Metrics()
    ranks = TrainerRanks(student)
    try:
        changed = folder.claim()
        add_file_log(folder)
        reporter = ProgressReporter(folder, metrics, spec.schedule.steps, Trackers(job, folder.root, metrics))
        server = ProgressServer(reporter, folder)
        await server.start(int(os.environ.get("DISTILL_PORT", TRAINER_PORT)))
        tokenizer = load_tokenizer(model, "spec.student.model", trust_remote_code=spec.trust_remote_code)
        tokenizers = teacher_tokenizers(spec)
        prompts = load_data(spec, tokenizer, metrics, tokenizers)
        weights = {source.name: source.weight for source in spec.data.all_sources}
        cursor = Cursor(prompts, seed=spec.seed, shuffle=spec.data.shuffle, weights=weights)
        engines = EnginePool(job, folder, metrics)
        episodes = build_episodes(spec, tokenizer, engines, metrics)
        evaluators = [Evaluator(spec, e, tokenizer, metrics, episodes, tokenizers) for e in spec.evaluation]
        known = {e.name: overlap(prompts, e.prompts) for e in evaluators}
        notes = [*changed, *(f"HeldOut: evaluation {name}: {what}" for name, what in known.items() if what)]
        rewards = build_rewards(spec, metrics)
        teachers = Teachers.of_job(spec, os.environ, metrics, student_teachers(spec, engines, metrics))
        teachers.bound_ids(len(tokenizer))
        teachers.stores = await asyncio.to_thread(stores_of_job, spec, len(tokenizer), metrics)
        server.teachers = teachers.shared_requests
        agreement = check_models(spec, model, tokenizer)
        engines.stop_token_ids = agreement.stop_token_ids
        engines.ends = (*engines.stop_token_ids, *ends(model, tokenizer).ids)
        teachers.translate(translators(spec, tokenizer, engines.ends, tokenizers))
        notes += [*agreement.notes, *size_notes(spec, model)]
        check_export(spec, model, folder)
        notes += await Publisher(job, folder).probe()
        if episodes is not None:
            episodes.check_ends(engines.ends)
            notes += episodes.notes()
        try:
            notes += await REWARD_SCORES.passing(reward_scores(spec, prompts, rewards, evaluators))
            for note in notes:
                log.warning("preflight: %s", note)
            reporter.update(notes=notes)
            await both(teachers.start(), engines.start(str(model)))
            rollouts = RolloutPipeline(spec, cursor, engines, teachers, rewards, tokenizer, metrics, episodes)
            loop = Loop(job, folder, ranks, engines, teachers, cursor, rollouts, evaluators, reporter, tokenizer)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, loop.stop)
            try:
                return await loop.run()
            except Stopped:
                await loop.checkpoint()
                raise
            finally:
                rollouts.cancel()
                await asyncio.gather(*(traces.close() for traces in loop.traces))
        finally:
            await engines.close()
            await teachers.close()
            await server.close()
            await reporter.close()
            await asyncio.gather(*(r.close() for r in rewards.values()), *(e.close() for e in evaluators))
            if episodes is not None:
                await episodes.close()
    finally:
        ranks.dismiss()


async def both(*parts: Coroutine[Any, Any, None]) -> None:
    """Await all parts; where one fails, the others are cancelled and over before its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def add_file_log(folder: RunFolder) -> None:
    """Log into the run folder as well: a failed Job deletes its pods, and their logs with them."""
    (folder.root / "logs").mkdir(exist_ok=True)
    handler = logging.FileHandler(folder.root / "logs" / "rank-0.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)


def run(job: DistillationJob) -> str:
    """Run this rank to the end of the job. Returns how it ended, as a sentence."""
    model = model_folder(job.spec.student.model, "spec.student.model")
    student = MegatronStudent(job.spec, model)
    if dist.get_rank() == 0:
        return asyncio.run(drive(job, student, model))
    # Rank 0 decides when to stop, so that a checkpoint is still possible; if it is gone, its connection is too.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(student)
    return "rank 0 is done"


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a SIGTERM before the loop runs. Nothing is there to be kept, and what is waited for, Ray's head or a
    model, may take minutes; as the first process of a container, one that does not handle the signal is deaf to it."""
    write_exit_report(exit_report(None, Stopped.reason, "stopped by SIGTERM while it was starting"))
    os._exit(Stopped.code)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    logging.raiseExceptions = False  # where the log's volume is full there is no room for tracebacks about it either
    stacks.on_signal()
    signal.signal(signal.SIGTERM, stop_at_once)
    job: DistillationJob | None = None
    code, reason, message, superseded = ExitCode.DONE, ExitReason.COMPLETED, "", False
    try:
        job = load_job(Path(os.environ.get(Variable.JOB_FILE, JOB_FILE)))
        check_environment(os.environ)
        is_traced(os.environ)  # an address that no span can be sent to is said before anything starts
        if job.spec.on_cpu:
            from distill_workers.cpu import megatron_shim

            megatron_shim.install()
        message = run(job)
    except (Exception, asyncio.CancelledError) as error:
        code, reason, message = classify_error(error, job)
        superseded = isinstance(error, Superseded)
        named = isinstance(error, Failure | ValueError) or is_full(error)
        log.error("%s: %s", reason.value, message, exc_info=not named)
    # A configuration error may be that the folder is another run's, whose progress is not ours to tell.
    text = exit_report(None if superseded or code == ExitCode.CONFIGURATION else job, reason, message)
    write_exit_report(text)
    if job is not None and not superseded and int(os.environ.get("RANK", "0")) == 0:
        folder = RunFolder(job).root
        # The report stands in the termination message as well: a volume without room must not change the exit code.
        with contextlib.suppress(OSError):
            write_whole(folder / "exit.json", text)
    return code


def run_and_exit() -> NoReturn:
    """Run `main`, and end this process with its exit code."""
    status = main()
    with contextlib.suppress(OSError):  # the volume with its log is full
        sys.stderr.flush()
    # Ray's and gloo's threads may hold up an ordinary exit; everything that must be kept is written by now.
    os._exit(status)


if __name__ == "__main__":
    run_and_exit()
