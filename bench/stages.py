"""The real loop, pipeline and slots over stages that only sleep: how well the loop hides one stage behind another.

Two cores cannot overlap real work, so nothing else shows it here. Lengths are log-normal with a cut-off, as responses
of reasoning models are (mean 64 tokens, longest 256: a sixty-fourth of mean 4,096, longest 16,384). All responses of a
step run at once, each at the same speed; scoring and training are one server each, and take time by the token.

Run in virtual time (`virtual`), a step costs milliseconds and the result is exact: that is the schedule's own model.
"""

import asyncio
import contextlib
import itertools
import math
import random
import selectors
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.job import parse_job
from distill_api.names import ONLY_TEACHER
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import Request, Response
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.metrics import Metrics
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.rollout.request_batching import RequestBatcher
from distill_workers.rollout.scheduler import SlotScheduler
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.loop import Loop
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.teacher.protocol import Scores
from distill_workers.teacher.teachers import Teachers

PROMPTS, SIBLINGS, MEAN, LONGEST = 64, 8, 64, 256
WEIGHT_SYNC, OPTIMISER = 0.05, 0.03
"""Of the longest stage; the optimiser is a part of training."""


@dataclass(frozen=True)
class Stages:
    """Seconds of a step's stages if each ran alone: generation of a batch from its first token to its last."""

    generate: float
    score: float
    train: float

    @property
    def longest(self) -> float:
        return max(self.generate, self.score, self.train)

    @property
    def one_after_another(self) -> float:
        return self.generate + self.score + self.train + WEIGHT_SYNC * self.longest


def length_of(seed: int) -> int:
    """p99 of the uncut distribution is the longest."""
    draw = random.Random(seed)
    sigma = 0.75
    return max(1, min(LONGEST, round(draw.lognormvariate(math.log(MEAN) - sigma**2 / 2, sigma))))


class Engine:
    """Draws as many tokens a second as make the longest response take the time of generation."""

    incarnation, version, placed = 0, 0, True

    def __init__(self, stages: Stages) -> None:
        self._token_seconds = stages.generate / LONGEST

    async def generate(self, requests: list[Request]) -> list[Response]:
        return await asyncio.gather(*map(self._one, requests))

    async def _one(self, request: Request) -> Response:
        length, began_with = min(length_of(request.seed), request.max_new_tokens), self.version
        await asyncio.sleep(length * self._token_seconds)
        return Response([1] * length, [-1.0] * length, [began_with] * (length - 1) + [self.version], False)


class StubEnginePool(EnginePool):
    """An engine pool's own scheduling and draining, over one engine."""

    def __init__(self, job: Any, stages: Stages) -> None:
        self._job, self._stages = job, stages
        self._engines: Any = {0: Engine(stages)}
        self._batchers = {0: RequestBatcher(self._engines[0])}
        self._scheduler = SlotScheduler(PROMPTS * SIBLINGS)
        self._scheduler.add(0)
        self._weights_lock = asyncio.Lock()

    async def push(self, source: Any, version: int) -> None:
        await asyncio.sleep(WEIGHT_SYNC * self._stages.longest)
        self._engines[0].version = version


class Teacher:
    def __init__(self, stages: Stages) -> None:
        self._token_seconds = stages.score / (PROMPTS * SIBLINGS * MEAN_CUT)
        self._turn = asyncio.Lock()

    async def prefetch(self, prompt_ids: list[int]) -> None:
        pass

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        async with self._turn:
            await asyncio.sleep(len(response_ids) * self._token_seconds)
        return Scores([-1.0] * len(response_ids), None, None)


class Trainer:
    """Every rank of the trainer as one that sleeps."""

    replicas = 1

    def __init__(self, stages: Stages) -> None:
        self._optimiser_seconds = OPTIMISER * stages.longest
        self._token_seconds = (stages.train - self._optimiser_seconds) / (PROMPTS * SIBLINGS * MEAN_CUT)

    async def accumulate(self, samples: list[Sample], _: StepCoefficients) -> None:
        await asyncio.sleep(sum(len(s.response_ids) for s in samples) * self._token_seconds)

    async def update(self, learning_rate: float) -> dict[str, float]:
        await asyncio.sleep(self._optimiser_seconds)
        keys = ("reverse_kl", "loss", "grad_norm", "entropy", "trainer_engine_gap", "importance_capped_ratio")
        return {**dict.fromkeys(keys, 0.0), "learning_rate": learning_rate, "skipped": 0.0}

    async def logprobs(self, samples: list[Sample]) -> list[list[float]]:
        return [s.engine_logprobs for s in samples]

    async def discard(self) -> None: ...

    async def begin_save(self, folder: Path) -> None: ...

    async def finish_save(self) -> None: ...

    async def written(self) -> None: ...

    async def weights(self) -> list[Any]:
        return []


MEAN_CUT = sum(map(length_of, range(20_000))) / 20_000
"""Tokens of a response on average, cut off."""


class Tokenizer:
    """A token for each letter."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return str(ids)


def staged(
    stages: Stages,
    folder: Path,
    *,
    trainer: Any = None,
    evaluators: list[Any] | None = None,
    episodes: Callable[[Any, Any], Any] | None = None,
    **changes: Any,
) -> tuple[Loop, RolloutPipeline]:
    """The loop over these stages; `episodes` makes the conversations of spec and engines, where responses are such;
    `changes` are camelCase fields of the spec, merged one level deep."""
    (folder / "heldout.jsonl").write_text('{"prompt": "a"}\n' * PROMPTS)
    spec: dict[str, Any] = {
        "accelerator": "none",
        "student": {"model": "/student"},
        "teacher": {"model": "/teacher"},
        "data": {"prompts": {"path": "/prompts.jsonl"}},
        "rollout": {"promptsPerStep": PROMPTS, "samplesPerPrompt": SIBLINGS},
        "trainer": {"maxTokensPerMicroBatch": 1024},
        "schedule": {"steps": 1000, "evaluateEverySteps": 1, "checkpointEverySteps": 1000, "keepBest": False},
        "output": {"path": str(folder)},
    }
    for key, value in changes.items():
        spec[key] = {**spec.get(key, {}), **value} if isinstance(value, dict) else value
    manifest = {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": "stages"},
        "spec": spec,
    }
    job = parse_job(manifest)
    run_folder, metrics, tokenizer = RunFolder(job), Metrics(), Tokenizer()
    run_folder.claim()
    stub: Any = Teacher(stages)
    engines, teacher = StubEnginePool(job, stages), Teachers({"": stub, ONLY_TEACHER: stub})
    cursor = Cursor([Prompt(i, [i], "", messages=[]) for i in range(PROMPTS)], seed=0, shuffle=False)
    pipeline: Any = (cursor, engines, teacher, {}, tokenizer, metrics)
    rollouts = RolloutPipeline(job.spec, *pipeline, None if episodes is None else episodes(job.spec, engines))
    if evaluators is None:
        evaluators = [Evaluator(job.spec, each, tokenizer, metrics) for each in job.spec.evaluation]
    reporter = ProgressReporter(run_folder, metrics, job.spec.schedule.steps)
    parts: Any = (trainer or Trainer(stages), engines, teacher, cursor, rollouts, evaluators, reporter, tokenizer)
    return Loop(job, run_folder, *parts), rollouts


def heldout(folder: Path) -> list[dict[str, Any]]:
    """An evaluation of the reverse KL: one response to each of as many prompts as a step has."""
    return [{"name": "heldout", "prompts": {"path": str(folder / "heldout.jsonl"), "applyChatTemplate": False}}]


async def step_seconds(
    stages: Stages, *, max_policy_lag: int, partial: bool, steps: int, folder: Path, evaluate: bool = False
) -> float:
    """Mean time of a step, in seconds of the running event loop, once the pipeline is full; `evaluate`: and of its
    evaluation."""
    rollout = {"maxPolicyLag": max_policy_lag, "partial": partial}
    loop, rollouts = staged(stages, folder, rollout=rollout, evaluation=heldout(folder) if evaluate else [])
    return await mean_step(loop, rollouts, max_policy_lag + 1, steps)


async def mean_step(loop: Loop, rollouts: RolloutPipeline, warm_up: int, steps: int) -> float:
    """Mean time of `steps` steps after the first `warm_up`, in seconds of the running event loop."""
    stopwatch = Stopwatch(warm_up + steps)
    loop.callbacks.after.append(stopwatch)
    with contextlib.suppress(Enough):
        await loop._steps()
    await loop.evaluation.await_evaluation()
    rollouts.cancel()
    return (stopwatch.ended[-1] - stopwatch.ended[warm_up - 1]) / steps


class Enough(Exception):
    """Raised when as many steps are done as are measured."""


class Stopwatch:
    """A callback that notes when each step ended, and ends the loop after `steps` of them."""

    def __init__(self, steps: int) -> None:
        self._steps, self.ended = steps, list[float]()

    async def after_step(self, step: TrainStep) -> None:
        self.ended.append(asyncio.get_running_loop().time())
        if len(self.ended) == self._steps:
            raise Enough


class _VirtualSelector(selectors.SelectSelector):
    """Instead of waiting, moves the clock of its loop on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout:
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeping takes no time."""

    def __init__(self) -> None:
        self._virtual = _VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def virtual(work: Callable[[Path], Coroutine[Any, Any, float]]) -> float:
    """The result of `work` on a clock that jumps from event to event."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work(Path(folder)))


SHAPES = {
    "generation longest": Stages(1, 0.25, 0.5),
    "generation and training longest": Stages(1, 0.3, 1),
    "all equal": Stages(1, 1, 1),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "maxPolicyLag 0": {"max_policy_lag": 0, "partial": False},
    "maxPolicyLag 1": {"max_policy_lag": 1, "partial": False},
    "maxPolicyLag 1, partial": {"max_policy_lag": 1, "partial": True},
}
CASES = list(itertools.product(SHAPES, SCHEDULES))
