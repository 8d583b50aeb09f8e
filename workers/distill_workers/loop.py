"""On-policy distillation, as the algorithm reads (GKD, arXiv 2306.13649).

    repeat:
        the student writes responses to a batch of prompts       rollouts.py   (engines, weight version v)
        the teacher scores every token of them                   teacher.py
        the student takes one step down the divergence           megatron/     (loss: objective/)
        the engines get the new weights                          fleet.py      (weight version v + 1)

Rank 0 of the trainer runs this; the other ranks only take part in what `Team` announces. Weight version n means: the
weights after n optimiser steps.
"""

import asyncio
import dataclasses
import logging
import statistics
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from distill_api.job import DistillationJob
from distill_api.metrics import Stage
from distill_api.status import EvaluationScore, Result
from distill_api.wire import Phase
from distill_workers.evaluation import Evaluator, Measurement
from distill_workers.failures import Failure, Stopped
from distill_workers.fleet import Fleet
from distill_workers.objective.schedule import learning_rate
from distill_workers.preflight import preflight
from distill_workers.progress import Reporter, utc
from distill_workers.prompts import Cursor
from distill_workers.rollouts import Rollouts
from distill_workers.runfolder import RunFolder
from distill_workers.sample import Sample
from distill_workers.teacher import TeacherPool
from distill_workers.team import Team

log = logging.getLogger(__name__)
T = TypeVar("T")


class Loop:
    """The state of one run: how many steps are done, what was measured."""

    def __init__(
        self,
        job: DistillationJob,
        folder: RunFolder,
        team: Team,
        fleet: Fleet,
        teacher: TeacherPool,
        cursor: Cursor,
        rollouts: Rollouts,
        evaluators: list[Evaluator],
        reporter: Reporter,
        tokenizer: Any,
    ) -> None:
        self._spec, self._folder, self._team, self._fleet = job.spec, folder, team, fleet
        self._teacher, self._cursor, self._rollouts, self._evaluators = teacher, cursor, rollouts, evaluators
        self._reporter, self._metrics, self._tokenizer = reporter, reporter.metrics, tokenizer
        self._step = 0
        self._evaluations: dict[str, EvaluationScore] = {}
        self._stages: dict[str, float] = {}
        self._step_seconds: list[float] = []
        self._checkpoint_step = -1
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ends the run at the next moment at which the state is whole; `run` then raises Stopped."""
        self._stopping.set()

    async def run(self) -> None:
        spec, total = self._spec, self._spec.schedule.steps
        await self._resume()
        self._metrics.set("distill_train_max_steps", total)
        async with self._fleet.weights_change():
            await self._push()
        if self._step == 0:
            self._reporter.update(phase=Phase.PREFLIGHT)
            checks = preflight(spec, self._tokenizer, self._team, self._fleet, self._teacher, self._cursor)
            await self._unless_stopped(checks)
        self._reporter.update(phase=Phase.TRAINING, preflight_passed=True)
        if self._step == 0:
            await self._evaluate()
        while self._step < total:
            await self._train_step(total)
            if self._step % spec.schedule.evaluate_every_steps == 0 or self._step == total:
                await self._evaluate()
            if self._step % spec.schedule.checkpoint_every_steps == 0 or self._step == total:
                await self.checkpoint()
        self._reporter.update(phase=Phase.EXPORTING)
        await self._team.run(self._team.export, self._folder.model)
        self._reporter.update(
            phase=Phase.DONE,
            result=Result(model_path=str(self._folder.model), step=self._step, best_step=self._best_step()),
        )

    async def _train_step(self, total: int) -> None:
        spec, begin = self._spec, time.monotonic()
        self._stages = {}
        batch, samples = await self._unless_stopped(self._rollouts.batch(self._step, total))
        if not samples:
            raise Failure(f"no sample of step {self._step + 1} could be scored; the log names the reasons")
        # Seconds that training really waited, split at the moment the last response was there.
        self._stage(Stage.ROLLOUT, max(0.0, batch.generated_at - begin))
        self._stage(Stage.TEACHER_SCORE, time.monotonic() - max(begin, batch.generated_at))
        rate = learning_rate(spec.trainer.optimizer, self._step)
        async with self._fleet.weights_change():
            with self._timed(Stage.TRAIN):
                trained = await self._team.run(self._team.train, samples, rate)
            if trained["skipped"]:
                raise Failure(
                    f"the gradient of step {self._step + 1} was not finite, so nothing was updated; if the next "
                    "attempt ends here too, lower trainer.optimizer.learningRate or objective.coefficient"
                )
            lag = statistics.fmean(self._step - s.weight_version for s in samples)
            self._cursor_state = batch.cursor_after
            self._step += 1
            with self._timed(Stage.WEIGHT_SYNC):
                await self._push()
        self._report(samples, trained, rate, lag, time.monotonic() - begin, total)

    async def _push(self) -> None:
        """The engines get the weights after `step` steps."""
        weights = await self._team.run(self._team.weights)
        await self._fleet.push(weights, self._step)
        self._metrics.set("distill_weight_version", self._step)

    async def _evaluate(self) -> None:
        with self._timed(Stage.EVALUATE):
            for evaluator in self._evaluators:
                self._note(await self._unless_stopped(evaluator.measure(self._step, self._fleet, self._teacher)))
        self._reporter.progress(evaluations=list(self._evaluations.values()))

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that changes no state, or Stopped as soon as `stop` is called."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                raise Stopped(f"stopped by SIGTERM after step {self._step}; the next attempt goes on from there")
            return task.result()
        finally:
            stop.cancel()
            task.cancel()

    def _note(self, measured: Measurement) -> None:
        """Adds a measurement to status, metrics and files."""
        name, step, old = measured.name, measured.step, self._evaluations.get(measured.name)
        score, kl = _decimal(measured.score), _decimal(measured.reverse_kl)
        if old is None:
            new = EvaluationScore(
                name=name, step=step, score=score, reverse_kl=kl, first_score=score, first_reverse_kl=kl
            )
            new = new.model_copy(update={"best_score": score, "best_step": step})
        else:
            new = old.model_copy(update={"step": step, "score": score, "reverse_kl": kl})
            if _better(measured, old):
                new = new.model_copy(update={"best_score": score, "best_step": step})
        if measured.teacher_score is not None:
            new = new.model_copy(update={"teacher_score": _decimal(measured.teacher_score)})
        self._evaluations[name] = new
        if measured.score is not None:
            self._metrics.set("distill_evaluation_score", measured.score, evaluation=name)
        if measured.reverse_kl is not None:
            self._metrics.set("distill_evaluation_reverse_kl_nats", measured.reverse_kl, evaluation=name)
        line = dataclasses.asdict(measured)
        for example in line.pop("examples"):
            self._folder.append("samples.jsonl", {"evaluation": name, "step": step, **example})
        self._folder.append("metrics.jsonl", {"kind": "evaluation", "time": time.time(), **line})
        log.info("evaluation %s at step %d: score %s, reverse KL %s", name, step, score, kl)

    def _best_step(self) -> int | None:
        return next((e.best_step for e in self._evaluations.values()), None)

    def _report(
        self, samples: list[Sample], trained: dict[str, float], rate: float, lag: float, seconds: float, total: int
    ) -> None:
        rewards = [s.reward for s in samples if s.reward is not None]
        tokens = sum(len(s.response_ids) for s in samples)
        line: dict[str, Any] = {
            "kind": "step",
            "step": self._step,
            "time": time.time(),
            "seconds": seconds,
            "samples": len(samples),
            "response_tokens": tokens,
            "reverse_kl": trained["reverse_kl"],
            "loss": trained["loss"],
            "grad_norm": trained["grad_norm"],
            "entropy": trained["entropy"],
            "trainer_engine_gap": trained["trainer_engine_gap"],
            "importance_capped_ratio": trained["importance_capped_ratio"],
            "learning_rate": rate,
            "policy_lag": lag,
            "truncated_ratio": statistics.fmean(s.truncated for s in samples),
            "reward": statistics.fmean(rewards) if rewards else None,
            "stages": self._stages,
        }
        self._folder.append("metrics.jsonl", line)
        gauges = {
            "distill_train_step": self._step,
            "distill_last_step_timestamp_seconds": line["time"],
            "distill_reverse_kl_nats": line["reverse_kl"],
            "distill_policy_rollout_kl_nats": line["trainer_engine_gap"],
            "distill_entropy_nats": line["entropy"],
            "distill_loss": line["loss"],
            "distill_grad_norm": line["grad_norm"],
            "distill_learning_rate": rate,
            "distill_importance_capped_ratio": line["importance_capped_ratio"],
            "distill_response_tokens_mean": tokens / len(samples),
            "distill_truncated_ratio": line["truncated_ratio"],
            "distill_policy_lag_steps": lag,
        }
        if rewards:
            gauges |= {"distill_reward_mean": line["reward"], "distill_reward_stddev": statistics.pstdev(rewards)}
        for name, value in gauges.items():
            self._metrics.set(name, value)
        self._metrics.add("distill_tokens", tokens, kind="train")
        self._step_seconds = [*self._step_seconds[-9:], seconds]
        self._reporter.progress(
            step=self._step,
            percent=100 * self._step // total,
            reverse_kl=_decimal(line["reverse_kl"]),
            reward=_decimal(line["reward"]),
            tokens_per_second=f"{tokens / seconds:.1f}",
            estimated_remaining_seconds=round((total - self._step) * statistics.fmean(self._step_seconds)),
            policy_lag=f"{lag:.2f}",
            weight_version=self._step,
            bottleneck=max(self._stages, key=lambda stage: self._stages[stage]),
            last_step_time=utc(line["time"]),
        )
        log.info(
            "step %d/%d: reverse KL %.4f, loss %.4f, %.1f s",
            self._step,
            total,
            line["reverse_kl"],
            line["loss"],
            seconds,
        )

    async def checkpoint(self) -> None:
        """Saves the run after `step` steps, unless that is done. The last good state is on disk at every moment:
        written aside, renamed, `latest` moved last."""
        if self._checkpoint_step == self._step:
            return
        with self._timed(Stage.CHECKPOINT):
            aside = self._folder.checkpoint_aside(self._step)
            await self._team.run(self._team.save, aside)
            state = {
                "step": self._step,
                "cursor": self._cursor_state,
                "evaluations": [e.model_dump(mode="json", by_alias=True) for e in self._evaluations.values()],
                "progress": self._reporter.report.progress.model_dump(mode="json", by_alias=True),
            }
            self._folder.publish_checkpoint(aside, state, self._spec.schedule.keep_checkpoints)
        self._metrics.set("distill_checkpoint_last_success_timestamp_seconds", time.time())
        self._checkpoint_step = self._step
        self._reporter.progress(checkpoint_step=self._step)

    async def _resume(self) -> None:
        self._cursor_state = self._cursor.state()
        newest = self._folder.latest_checkpoint()
        if newest is None:
            self._folder.trim(-1)
            return
        path, state = newest
        await self._team.run(self._team.load, path)
        self._step = self._checkpoint_step = state["step"]
        self._cursor_state = state["cursor"]
        self._cursor.restore(state["cursor"])
        self._evaluations = {e["name"]: EvaluationScore.model_validate(e) for e in state["evaluations"]}
        self._folder.trim(self._step)
        restored = type(self._reporter.report.progress).model_validate(state["progress"])
        self._reporter.update(
            progress=restored.model_copy(
                update={"total_steps": self._spec.schedule.steps, "checkpoint_step": self._step}
            )
        )
        log.info("resumed from %s", path)

    def _stage(self, stage: Stage, seconds: float) -> None:
        self._stages[stage.value] = self._stages.get(stage.value, 0.0) + seconds
        self._metrics.observe("distill_step_duration_seconds", seconds, stage=stage.value)

    @contextmanager
    def _timed(self, stage: Stage) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._stage(stage, time.monotonic() - begin)


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.5f}"


def _better(new: Measurement, old: EvaluationScore) -> bool:
    """By score where there is one, by reverse KL otherwise."""
    if new.score is not None:
        return old.best_score is None or new.score > float(old.best_score)
    if new.reverse_kl is not None:
        return old.reverse_kl is None or new.reverse_kl < float(old.reverse_kl)
    return False
