"""Evaluation beside training: what is measured, kept and decided is of one step, as if training had waited for it.

The real loop over stages that sleep, on a virtual clock (bench/stages.py); evaluations say what the test wants.
"""

import asyncio
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import source_of
from huggingface_hub import ModelCard
from runs import REPO
from safetensors.torch import load_file

sys.path.insert(0, str(REPO / "bench"))
import stages as stages_module
from stages import SHAPES, Stages, Trainer, VirtualLoop, heldout, staged

from distill_workers.data.sample import Sample
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.evaluation.guards import Decision
from distill_workers.failures import ConfigurationError, Failure, Stopped
from distill_workers.metrics import Metrics
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.rewards.base import RewardError
from distill_workers.rollout.request_batching import RequestBatcher
from distill_workers.rollout.scheduler import SlotScheduler
from distill_workers.rollout.student_teacher import student_teachers
from distill_workers.run.loop import Loop
from distill_workers.teacher.protocol import BadScore, Scores
from distill_workers.teacher.refreshed import RefreshedTeacher
from distill_workers.teacher.teachers import Teachers

STAGES = Stages(1, 0.25, 0.5)
SMALL = {"promptsPerStep": 4, "samplesPerPrompt": 2}


class Weights(Trainer):
    """Remembers what was done, by the steps that the weights had then."""

    def __init__(self) -> None:
        super().__init__(STAGES)
        self.steps, self.coefficient = 0, 0.0
        self.events: list[tuple[str, float]] = []

    def note(self, what: str, value: float) -> None:
        self.events.append((what, value))

    def of(self, what: str) -> list[float]:
        return [value for name, value in self.events if name == what]

    async def accumulate(self, samples: list[Sample], coefficients: StepCoefficients) -> None:
        self.coefficient = coefficients.divergence
        await super().accumulate(samples, coefficients)

    async def update(self, learning_rate: float) -> dict[str, float]:
        self.note("update", self.coefficient)
        self.steps += 1
        return await super().update(learning_rate)

    async def discard(self) -> None:
        self.note("discard", self.steps)

    async def begin_save(self, folder: Path) -> None:
        self.note("save", self.steps)
        (folder / "rank").write_text(str(self.steps))

    async def load(self, folder: Path) -> None:
        self.steps = int((folder / "rank").read_text())
        self.note("load", self.steps)

    model_path = Path("/models/student")

    async def export(self, folder: Path, card: str | None) -> None:
        folder.mkdir()
        if card is not None:
            (folder / "README.md").write_text(card)


class Told:
    """An evaluation that takes its time, and finds a reverse KL that it was told, by step."""

    name = "heldout"

    content: ClassVar[dict[str, str]] = {}

    def __init__(self, found: dict[int, float], seconds: float = 0.5) -> None:
        self.found, self.seconds, self.begun = found, seconds, list[int]()

    async def measure(self, step: int, engines: Any, teacher: Any) -> Measurement:
        self.begun.append(step)
        await asyncio.sleep(self.seconds)
        return Measurement(self.name, step, reverse_kl=self.found.get(step, 1.0))


def virtually(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work())


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "stages" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def loop_of(folder: Path, trainer: Weights, told: Told, schedule: dict[str, Any], *guards: dict[str, Any]) -> Loop:
    fields = {"rollout": SMALL, "schedule": schedule, "evaluation": heldout(folder), "guards": list(guards)}
    return staged(STAGES, folder, trainer=trainer, evaluators=[told], **fields)[0]


async def train(loop: Loop) -> Decision | None:
    await loop.checkpoints.resume()
    stopped_by = await loop._train()
    await loop.checkpoints.finish()
    return stopped_by


class Counts(Weights):
    """Counts what it is given to train on."""

    async def accumulate(self, samples: list[Sample], coefficients: StepCoefficients) -> None:
        self.note("trained", len(samples))
        assert not any(s.truncated for s in samples)
        await super().accumulate(samples, coefficients)


@pytest.mark.parametrize(("cut", "ends_well"), [(2, True), (1, False)])
def test_masked_responses_are_in_the_steps_line_and_none_is_trained_on(
    cut: int, ends_well: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of nothing but masked ones ends the run with a sentence that says so."""
    generate, drawn = stages_module.Engine.generate, itertools.count()

    async def cut_off(self: Any, requests: list[Any]) -> list[Any]:
        found = await generate(self, requests)
        return [dataclasses.replace(r, truncated=next(drawn) % cut == 0) for r in found]

    monkeypatch.setattr(stages_module.Engine, "generate", cut_off)
    trainer = Counts()
    fields = {"rollout": {**SMALL, "truncated": "mask"}, "schedule": {"steps": 1}}
    loop = staged(STAGES, tmp_path, trainer=trainer, evaluators=[], **fields)[0]

    async def work() -> None:
        if ends_well:
            await train(loop)
        else:
            with pytest.raises(
                Failure, match=r"all 8 responses of step 1 were cut off .* rollout.truncated masks them"
            ):
                await train(loop)

    virtually(work)
    if ends_well:
        [line] = lines(tmp_path, "step")
        assert line["samples"] == 8 and line["truncated_ratio"] == 0.5 and sum(trainer.of("trained")) == 4


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            BadScore("refused", "1.2.3.4:5 answered 401: 'no key'"),
            ConfigurationError,
            "24 of 24 refused; the last: refused: 1.2.3.4:5 answered 401: 'no key'",
        ),
        (BadScore("malformed", "answered no JSON"), Failure, "24 of 24 malformed; the last: malformed: answered no"),
        (RewardError("KeyError: 'x'", permanent=True), ConfigurationError, "8 of 8 reward; the last: KeyError: 'x'"),
        (RewardError("http://r: 3 requests failed"), Failure, "8 of 8 reward; the last: http://r: 3 requests failed"),
    ],
)
def test_a_step_without_a_sample_ends_with_the_reason_and_a_permanent_one_is_not_tried_again(
    error: Exception, kind: type[Failure], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Any, *arguments: Any) -> None:
        raise error

    monkeypatch.setattr(stages_module.Teacher, "score", fail)
    loop = loop_of(tmp_path, Weights(), Told({}), {"steps": 1})

    async def work() -> None:
        with pytest.raises(Failure, match="no sample of step 1 could be scored: " + re.escape(sentence)) as raised:
            await train(loop)
        assert type(raised.value) is kind

    virtually(work)


FELL = {"name": "fell", "watch": "evaluation", "evaluation": "heldout", "drop": 0.5, "patience": 1}


@pytest.mark.parametrize("seconds", [0.01, 0.5, 5.0])
def test_every_evaluation_is_recorded_before_the_next_step_and_best_weights_are_saved_as_they_were(
    seconds: float, tmp_path: Path
) -> None:
    trainer, told = Weights(), Told({0: 3.0, 2: 1.0, 4: 2.0, 5: 0.5}, seconds)

    async def work() -> None:
        await train(loop_of(tmp_path, trainer, told, {"steps": 5, "evaluateEverySteps": 2, "keepBest": True}))

    virtually(work)
    text = (tmp_path / "stages" / "metrics.jsonl").read_text().splitlines()
    order = [(line["kind"], line["step"]) for line in map(json.loads, text)]
    steps, evaluations = [("step", n) for n in range(1, 6)], [("evaluation", n) for n in (0, 2, 4, 5)]
    assert order == sorted(steps + evaluations, key=lambda entry: (entry[1], entry[0] == "evaluation"))
    assert trainer.of("save") == [0, 2, 5], "the weights that were measured, where they were the best"
    assert trainer.of("discard") == []
    kept = json.loads((tmp_path / "stages" / "checkpoints" / "step-000005" / "state.json").read_text())
    assert kept["progress"]["evaluations"][0]["bestStep"] == 5


def test_training_waits_only_for_what_outlasts_the_next_batch(tmp_path: Path) -> None:
    def seconds_of(name: str, seconds: float) -> float:
        (tmp_path / name).mkdir()
        taken = 0.0

        async def work() -> None:
            nonlocal taken
            told = Told({}, seconds)
            await train(loop_of(tmp_path / name, Weights(), told, {"steps": 4, "evaluateEverySteps": 1}))
            taken = asyncio.get_running_loop().time()

        virtually(work)
        return taken

    nothing, short, long = seconds_of("nothing", 0.0), seconds_of("short", 0.1), seconds_of("long", 5.0)
    assert short - nothing == pytest.approx(0.1, abs=0.02), "that of the last step, which nothing runs beside"
    assert long == pytest.approx(5 * 5.0, rel=0.05), "the batches run beside"


@pytest.mark.parametrize("lag", [0, 1])
def test_an_evaluation_never_sees_newer_weights_than_its_step(lag: int, tmp_path: Path) -> None:
    async def work() -> None:
        rollout = {"maxPolicyLag": lag, "partial": bool(lag)}
        loop, _ = staged(
            SHAPES["all equal"], tmp_path, rollout=rollout, schedule={"steps": 3}, evaluation=heldout(tmp_path)
        )
        await loop.checkpoints.resume()
        async with loop._engines.updating_weights():
            await loop._load_engines()
        await loop._train()

    virtually(work)
    found = lines(tmp_path, "evaluation")
    assert [(line["step"], line["failed"]) for line in found] == [(step, 0) for step in range(4)]
    assert all(line["reverse_kl"] is not None for line in found)


def test_the_students_own_score_is_by_weights_between_those_of_the_sample_and_of_its_step(tmp_path: Path) -> None:
    """With maxPolicyLag, where new weights come while samples wait for a score: never in the middle of one."""

    class Engine(stages_module.Engine):
        async def answer(self, request: dict[str, Any]) -> Any:
            version, ids = self.version, request["input_ids"][request["logprob_start_len"] :]
            await asyncio.sleep(0.2)
            assert version == self.version
            entries = [[-1.0, token, None] for token in ids]
            return {"meta_info": {"input_token_logprobs": entries, "weight_version": str(version)}}

    class Trained(Weights):
        def __init__(self) -> None:
            super().__init__()
            self.samples = list[tuple[int, Sample]]()

        async def accumulate(self, samples: list[Sample], coefficients: StepCoefficients) -> None:
            self.samples += [(self.steps, sample) for sample in samples]
            await super().accumulate(samples, coefficients)

    trainer = Trained()
    hinted = {"path": "/prompts.jsonl", "teacherPrompt": "{prompt}!"}

    async def work() -> None:
        fields: dict[str, Any] = {"teacher": {"model": None, "student": {}}, "data": {"prompts": hinted}}
        loop, rollouts = staged(
            SHAPES["all equal"],
            tmp_path,
            trainer=trainer,
            rollout={**SMALL, "maxPolicyLag": 1, "maxConcurrentRequests": 3},
            schedule={"steps": 6, "checkpointEverySteps": 6},
            **fields,
        )
        engines: Any = loop._engines
        engines._engines[0] = engine = Engine(SHAPES["all equal"])
        engines._batchers[0] = RequestBatcher(engine)
        engines._scheduler = SlotScheduler(3)
        engines._scheduler.add(0)
        [own] = student_teachers(rollouts._spec, engines, Metrics()).values()
        rollouts._teachers = Teachers({"": own})
        await train(loop)

    virtually(work)
    versions = [(s.weight_version, s.teacher_version, step) for step, s in trainer.samples]
    assert len(versions) == 6 * 8
    assert all(drawn <= scored <= step for drawn, scored, step in versions if scored is not None)
    assert {step - scored for _, scored, step in versions if scored is not None} == {0, 1}
    assert any(drawn < scored for drawn, scored, _ in versions if scored is not None), "new weights came between"


def test_a_coefficient_that_an_evaluation_lowers_is_lower_from_its_step_on(tmp_path: Path) -> None:
    trainer, told = Weights(), Told({0: 1.0, 2: 2.0})
    lower = {**FELL, "action": "lower-coefficient", "factor": 0.5}

    async def work() -> None:
        await train(loop_of(tmp_path, trainer, told, {"steps": 4, "evaluateEverySteps": 2}, lower))

    virtually(work)
    assert trainer.of("update") == [1.0, 1.0, 0.5, 0.5]
    assert trainer.of("discard") == [2], "the gradient that knew nothing of it is computed again"
    assert told.begun == [0, 2, 4]
    assert [line["step"] for line in lines(tmp_path, "step")] == [1, 2, 3, 4]


def test_a_roll_back_leaves_the_step_that_was_begun_meanwhile(tmp_path: Path) -> None:
    trainer, told = Weights(), Told({0: 1.0, 1: 0.9, 2: 3.0})
    back = {**FELL, "action": "roll-back"}

    async def work() -> None:
        loop = loop_of(tmp_path, trainer, told, {"steps": 3, "evaluateEverySteps": 1, "keepBest": True}, back)
        told.found[2] = 3.0

        async def restored() -> None:
            trainer.note("teacher", trainer.steps)

        loop._teacher_weights.restore = restored  # type: ignore[method-assign]
        await loop.checkpoints.resume()
        training = asyncio.create_task(loop._train())
        while not trainer.of("load"):
            await asyncio.sleep(0.1)
        told.found[2] = 1.0
        await training
        await loop.checkpoints.finish()

    virtually(work)
    assert trainer.of("load") == [1] and trainer.of("discard") == [2]
    assert trainer.of("teacher") == [1], "a teacher that follows the student goes back with it"
    assert len(trainer.of("update")) == 4 and told.begun == [0, 1, 2, 2, 3]
    assert [line["step"] for line in lines(tmp_path, "step")] == [1, 2, 3]
    [event] = lines(tmp_path, "guard")
    assert (event["at_step"], event["step"]) == (2, 1)


class HeldTeacher(RefreshedTeacher):
    """Remembers, of each weights that it is given, the version, the folder and the steps that the trainer had done."""

    teacher: Any = None

    def __init__(self, _: Any) -> None:
        self.held = list[tuple[int, str, float]]()

    async def hold(self, version: int, folder: Path) -> None:
        [file] = folder.glob("*.safetensors")
        self.held.append((version, folder.name, float(load_file(file)["steps"])))

    async def prefetch(self, prompt_ids: list[int]) -> None:
        pass

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        return Scores([-1.0] * len(response_ids), None, None, version=self.held[-1][0] if self.held else 0)


def test_a_teacher_that_follows_the_student_goes_back_with_it_to_what_it_had_at_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 4, which has given it other weights, to step 3, which is no multiple of everySteps."""
    teachers = list[HeldTeacher]()
    monkeypatch.setattr(stages_module, "Teacher", lambda stages: teachers.append(HeldTeacher(stages)) or teachers[-1])
    told = Told({0: 1.0, 1: 0.9, 2: 0.8, 3: 0.7, 4: 3.0})
    trainer: Any = Weights()
    trainer.model_path = tmp_path / "student"
    trainer.model_path.mkdir()
    trainer.weights = lambda buffers: source_of([("steps", torch.tensor([float(trainer.steps)]))])(buffers)
    hinted = {"path": str(tmp_path / "heldout.jsonl"), "applyChatTemplate": False, "teacherPrompt": "{prompt}!"}
    fields: dict[str, Any] = {
        "teacher": {"model": None, "student": {"weights": "lagged", "everySteps": 2}},
        "data": {"prompts": hinted},
        "rollout": SMALL,
        "schedule": {"steps": 5, "evaluateEverySteps": 1, "keepBest": True},
        "evaluation": [{"name": "heldout", "prompts": hinted}],
        "guards": [{**FELL, "action": "roll-back"}],
    }

    async def work() -> None:
        loop = staged(STAGES, tmp_path, trainer=trainer, evaluators=[told], **fields)[0]
        await loop.checkpoints.resume()
        training = asyncio.create_task(loop._train())
        while not trainer.of("load"):
            await asyncio.sleep(0.1)
        told.found[4] = 0.6
        await training
        await loop.checkpoints.finish()

    virtually(work)
    assert trainer.of("load") == [3]
    two, four = (2, "version-000002", 2.0), (4, "version-000004", 4.0)
    assert teachers[0].held == [two, four, two, four]


def test_a_guard_may_stop_the_run_by_the_evaluation_of_its_last_step(tmp_path: Path) -> None:
    trainer, told = Weights(), Told({0: 1.0, 1: 0.9, 2: 3.0})

    async def work() -> None:
        schedule = {"steps": 2, "evaluateEverySteps": 1, "keepBest": True}
        loop = loop_of(tmp_path, trainer, told, schedule, {**FELL, "action": "stop"})
        assert await train(loop) is not None and loop._state.step == 1

    virtually(work)
    assert trainer.of("load") == [1] and len(trainer.of("update")) == 2


def test_an_evaluation_that_a_stop_cuts_short_is_made_by_the_next_attempt(tmp_path: Path) -> None:
    schedule = {"steps": 4, "evaluateEverySteps": 2, "checkpointEverySteps": 2}

    async def stopped() -> None:
        trainer, told = Weights(), Told({}, 50.0)
        loop = loop_of(tmp_path, trainer, told, schedule)
        loop._state.step = trainer.steps = 1  # the evaluation of step 0 is not the matter
        training = asyncio.create_task(loop._train())
        while told.begun != [2]:
            await asyncio.sleep(0.1)
        await asyncio.sleep(10)
        loop.stop()
        with pytest.raises(Stopped):
            await training
        await loop.checkpoint()
        assert lines(tmp_path, "evaluation") == []

    async def resumed() -> None:
        trainer, told = Weights(), Told({})
        await train(loop_of(tmp_path, trainer, told, schedule))
        assert told.begun == [2, 4] and trainer.of("save") == [2, 4]

    virtually(stopped)
    virtually(resumed)
    assert [line["step"] for line in lines(tmp_path, "evaluation")] == [2, 4]
    assert [line["step"] for line in lines(tmp_path, "step")] == [2, 3, 4]


@pytest.mark.parametrize(("last", "again"), [(4, [(2, 2, 2)]), (2, [])], ids=["with steps left", "with none"])
def test_each_attempt_is_checked_while_trainer_and_engines_have_the_weights_of_its_step(
    last: int, again: list[tuple[int, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[tuple[int, int, int]] = []

    async def check(spec: Any, tokenizer: Any, trainer: Any, engines: Any, *_: Any, step: int) -> None:
        checked.append((step, trainer.steps, engines._engines[0].version))

    monkeypatch.setattr("distill_workers.run.loop.preflight", check)

    async def stopped() -> None:
        trainer = Weights()
        loop = loop_of(tmp_path, trainer, Told({}), {"steps": 4})
        running = asyncio.create_task(loop.run())
        while trainer.steps < 2:
            await asyncio.sleep(0.1)
        loop.stop()
        with pytest.raises(Stopped):
            await running
        await loop.checkpoint()

    async def resumed() -> None:
        await loop_of(tmp_path, Weights(), Told({}), {"steps": last}).run()

    virtually(stopped)
    virtually(resumed)
    assert checked == [(0, 0, 0), *again]


def test_a_finished_run_exports_its_model_with_a_card_of_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def passed(*_: Any, step: int) -> None: ...

    monkeypatch.setattr("distill_workers.run.loop.preflight", passed)

    async def work() -> None:
        await loop_of(tmp_path, Weights(), Told({4: 0.25}), {"steps": 4, "evaluateEverySteps": 2}).run()

    virtually(work)
    card = ModelCard.load(tmp_path / "stages" / "model" / "README.md")
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("reverse_kl", 0.25)]
    assert "4 of 4 steps" in card.text


def test_a_model_is_exported_also_where_no_card_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def passed(*_: Any, step: int) -> None: ...

    def broken(*_: Any) -> str:
        raise KeyError("a line of metrics.jsonl")

    monkeypatch.setattr("distill_workers.run.loop.preflight", passed)
    monkeypatch.setattr("distill_workers.results.model_card.card_of_run", broken)

    async def work() -> None:
        await loop_of(tmp_path, Weights(), Told({4: 0.25}), {"steps": 4, "evaluateEverySteps": 2}).run()

    virtually(work)
    assert [path.name for path in (tmp_path / "stages" / "model").iterdir()] == []
    assert "exported without a card" in caplog.text and "a line of metrics.jsonl" in caplog.text
