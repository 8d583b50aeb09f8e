"""Phases: which objective a step has, what ends a phase, and that a run that was interrupted decides alike.

The decision is pure; the loop around it is the real one over stages that sleep (test_loop.py).
"""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of
from runs import arithmetic
from test_loop import SMALL, STAGES, Told, Weights, lines, staged, train, virtually

from distill_api.job import parse_job
from distill_api.learning import obstacles
from distill_api.protocol import Phase, ProgressReport
from distill_api.spec.job_spec import Spec, Support
from distill_api.status import EvaluationScore, Progress
from distill_api.training_phases import Plateau, TrainingPhase, objectives, teacher_top_k
from distill_workers.evaluation.guards import Guards
from distill_workers.objective.phases import Phases, begins, flat_at
from distill_workers.reporting.metrics_file import read_run
from distill_workers.reporting.report import page
from distill_workers.results.method import method
from distill_workers.run.loop import Loop
from distill_workers.run_folder.run_folder import fingerprint

HELD_OUT = {"name": "heldout", "prompts": {"path": "/data/test.jsonl"}}
DATA = {"prompts": {"path": "/data/train.jsonl", "responseField": "response"}}
WARM_START = {"name": "warm-start", "objective": {"divergence": "forward-kl", "support": "target", "datasetShare": 1}}
DISTIL = {"name": "distil"}
REINFORCE = {"name": "reinforce", "objective": {"coefficient": 0, "rewardCoefficient": 1}}
FLAT = {"evaluation": "heldout", "patience": 2, "minimumGain": 0.1}


def phases(*ends: dict[str, Any]) -> list[TrainingPhase]:
    """As many phases, and one more."""
    return [TrainingPhase.model_validate({"name": f"p{i}", **end}) for i, end in enumerate((*ends, {}))]


def spec(*parts: dict[str, Any], **changes: Any) -> Spec:
    base: dict[str, Any] = {"data": DATA, "evaluation": [HELD_OUT], "schedule": {"steps": 100}}
    return spec_of(Path("/student"), Path("/teacher"), **{**base, "phases": list(parts), **changes})


def measured(step: int, reverse_kl: float | None, score: float | None = None) -> EvaluationScore:
    decimals = {"reverse_kl": reverse_kl, "score": score}
    texts = {name: None if value is None else f"{value:.5f}" for name, value in decimals.items()}
    return EvaluationScore(name="heldout", step=step, **texts)


@pytest.mark.parametrize(
    ("values", "since", "expected"),
    [
        ([1, 2, 3, 4], 0, math.inf),
        ([1, 2, 2, 2], 0, 3),
        ([1, 2, 2, 3, 3, 3], 0, 5),
        ([1, 1.04, 1.08, 1.2], 0, 2),
        ([1, 1.06, 1.12, 1.18, 1.24], 0, math.inf),
        ([1, 1.2, 1.1, 1.4, 1.3, 1.2, 9], 0, 5),
        ([3, 3, 3, 3, 3], 1, 3),
        ([], 0, math.inf),
    ],
    ids=[
        "it gains",
        "flat",
        "a gain begins the count anew",
        "gains that are too small",
        "a slow rise, from the best that counted",
        "noise below the best is none",
        "what was before the phase does not count",
        "nothing measured",
    ],
)
def test_an_evaluation_is_flat_after_patience_without_a_gain(values: list[float], since: int, expected: float) -> None:
    plateau = Plateau(evaluation="heldout", patience=2, minimum_gain=0.1)
    assert flat_at(plateau, list(enumerate(values)), since) == expected


@pytest.mark.parametrize(
    ("ends", "values", "lag", "expected"),
    [
        ([], [], 0, [0]),
        ([{"untilStep": 3}, {"untilStep": 7}], [], 0, [0, 3, 7]),
        ([{"untilStep": 3}, {"untilStep": 7}], [], 4, [0, 3, 7]),
        ([{"untilFlat": FLAT}], [1, 2, 2, 2], 0, [0, 4]),
        ([{"untilFlat": FLAT}], [1, 2, 2, 2], 3, [0, 7]),
        ([{"untilFlat": FLAT}], [1, 2, 3], 0, [0]),
        ([{"untilFlat": FLAT, "untilStep": 3}], [1, 2, 2, 2], 0, [0, 3]),
        ([{"untilFlat": FLAT, "untilStep": 9}], [1, 2, 2, 2], 0, [0, 4]),
        ([{"untilFlat": FLAT, "untilStep": 2}], [1, 2, 3, 4, 4, 4], 0, [0, 2]),
        ([{"untilFlat": FLAT}, {"untilFlat": FLAT}], [2, 2, 2, 2, 2, 2, 2], 0, [0, 3, 6]),
        ([{"untilFlat": FLAT}, {"untilStep": 2}], [2, 2, 2], 0, [0, 3, 3]),
    ],
    ids=[
        "one phase",
        "steps",
        "steps, whatever the lag",
        "flat",
        "flat, behind the batches under way",
        "not flat yet",
        "the step comes first",
        "flat comes first",
        "flat once the phase is over",
        "each phase judges its own evaluations",
        "a phase whose end has passed has no step",
    ],
)
def test_a_phase_ends_by_its_step_or_where_its_evaluation_is_flat(
    ends: list[dict[str, Any]], values: list[float], lag: int, expected: list[int]
) -> None:
    assert begins(phases(*ends), {"heldout": list(enumerate(values))}, lag) == expected


def number(begun: list[int], step: int) -> int:
    return max(i for i, begin in enumerate(begun) if begin <= step)


@pytest.mark.parametrize("lag", [0, 2])
def test_what_is_measured_later_changes_no_step_whose_batch_has_begun(lag: int) -> None:
    """The batches of v to v + maxPolicyLag have begun before the evaluation of step v is known."""
    ends = [{"untilFlat": FLAT}, {"untilFlat": FLAT, "untilStep": 9}, {"untilFlat": FLAT}]
    curve = [(step, value) for step, value in enumerate([1, 2, 2, 2, 2, 5, 5, 5, 5, 5, 5, 5, 5])]
    known = [begins(phases(*ends), {"heldout": curve[: v + 1]}, lag) for v in range(len(curve))]
    for v, (before, now) in enumerate(itertools.pairwise(known), start=1):
        assert [number(before, step) for step in range(v + lag + 1)] == [
            number(now, step) for step in range(v + lag + 1)
        ]
    assert len(known[-1]) == 4


def test_a_step_has_the_objective_and_the_coefficients_of_its_phase_whose_schedules_begin_with_it() -> None:
    fading = {"coefficientSchedule": {"decay": "linear", "steps": 4, "endValue": 0.0}}
    parts = [{**WARM_START, "untilStep": 2}, {**DISTIL, "objective": fading, "untilStep": 8}, REINFORCE]
    reward = {"reward": {"source": "exact-match"}, "rewardCoefficient": 0}
    data = {"prompts": {**DATA["prompts"], "answerField": "answer"}}
    of = Phases(spec(*parts, data=data, objective=reward))
    assert [of.name(step) for step in (0, 1, 2, 7, 8, 99)] == [
        *("warm-start", "warm-start", "distil", "distil", "reinforce", "reinforce")
    ]
    supports = [of.objective(step).support for step in (0, 2, 8)]
    assert supports == [Support.TARGET, Support.SAMPLED_TOKEN, Support.SAMPLED_TOKEN]
    assert [of.coefficients(step).divergence for step in (0, 1, 2, 3, 4, 7, 8)] == [1, 1, 1, 0.75, 0.5, 0, 0]
    assert [(c.reward, c.phase) for c in (of.coefficients(step) for step in (0, 2, 8))] == [(0, 0), (0, 1), (1, 2)]
    assert of.objective(8).reward == of.objective(0).reward, "what a phase does not change is that of all"


def test_a_spec_without_phases_is_one_phase_without_a_name() -> None:
    of = Phases(spec(objective={"coefficient": 0.5}))
    assert (of.name(7), of.number(7), of.objective(7).coefficient) == (None, 0, 0.5)
    of.after_evaluation(measured(0, 1.0))
    assert of.state() == {"curves": {}}


def test_a_score_is_judged_where_there_is_one_and_an_evaluation_without_any_says_nothing() -> None:
    scored = {**HELD_OUT, "prompts": {**HELD_OUT["prompts"], "answerField": "a"}, "reward": {"source": "exact-match"}}
    of = Phases(spec({**DISTIL, "untilFlat": FLAT}, REINFORCE, evaluation=[scored]))
    for step, score in enumerate([0.1, 0.5, None, 0.5]):
        of.after_evaluation(measured(step, reverse_kl=9.0 - step, score=score))
    assert of.name(99) == "distil"
    of.after_evaluation(measured(4, reverse_kl=0.0, score=0.55))
    assert (of.name(4), of.name(5)) == ("distil", "reinforce")


def test_a_phase_restored_from_json_decides_as_it_would_have() -> None:
    parts = [{**DISTIL, "untilFlat": FLAT}, REINFORCE]
    curve = [3.0, 2.0, 1.95, 1.94, 1.0]
    for cut in range(len(curve)):
        whole, first = Phases(spec(*parts)), Phases(spec(*parts))
        for step, value in enumerate(curve):
            whole.after_evaluation(measured(step, value))
            if step < cut:
                first.after_evaluation(measured(step, value))
        resumed = Phases(spec(*parts))
        resumed.restore(json.loads(json.dumps(first.state())))
        for step in range(cut, len(curve)):
            resumed.after_evaluation(measured(step, curve[step]))
        assert resumed.state() == whole.state()
        assert [resumed.name(step) for step in range(9)] == [*["distil"] * 4, *["reinforce"] * 5]


# The real loop.

FALLS = {0: 3.0, 1: 2.0, 2: 1.95, 3: 1.94, 4: 1.0, 5: 0.5, 6: 0.4, 7: 0.3, 8: 0.2}
"""Flat at step 3, with the plateau above."""
TWO = [{"name": "distil", "untilFlat": FLAT}, {"name": "weak", "objective": {"coefficient": 0.5}}]


class Seen:
    """A callback that notes each step: phase, coefficient, and that of the objective its batch was prepared for."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, str | None, float, float]] = []

    async def after_step(self, step: Any) -> None:
        prepared = step.batch.objective.coefficient
        self.steps.append((step.index, step.phase, step.coefficients.divergence, prepared))


def loop_in(folder: Path, told: Told, steps: int, *guards: dict[str, Any], lag: int = 0, **schedule: Any) -> Loop:
    fields: dict[str, Any] = {
        "rollout": {**SMALL, "maxPolicyLag": lag},
        "schedule": {"steps": steps, "evaluateEverySteps": 1, **schedule},
        "evaluation": [{**HELD_OUT, "prompts": {"path": str(folder / "heldout.jsonl"), "applyChatTemplate": False}}],
        "guards": list(guards),
        "phases": TWO,
    }
    return staged(STAGES, folder, trainer=Weights(), evaluators=[told], **fields)[0]


@pytest.mark.parametrize(("lag", "begin"), [(0, 4), (1, 5)])
def test_a_flat_evaluation_ends_the_phase_behind_the_batches_that_were_prepared_for_it(
    lag: int, begin: int, tmp_path: Path
) -> None:
    seen = Seen()

    async def work() -> None:
        loop = loop_in(tmp_path, Told(FALLS), 8, lag=lag)
        loop.callbacks.after.append(seen)
        await train(loop)

    virtually(work)
    expected = [("distil", 1.0, 1.0)] * begin + [("weak", 0.5, 0.5)] * (8 - begin)
    assert seen.steps == [(index, *what) for index, what in enumerate(expected)]
    of_lines = [(line["phase"], line["phase_number"]) for line in lines(tmp_path, "step")]
    assert of_lines == [("distil", 1)] * begin + [("weak", 2)] * (8 - begin)
    progress = json.loads((tmp_path / "stages" / "state.json").read_text())["progress"]
    assert progress["objectivePhase"] == "weak"


FALLS_LATE = {**FALLS, 1: 2.95, 3: 1.94, 4: 1.93}
"""Flat at step 4; the evaluation of step 0, counted twice, would end the phase at step 1."""


@pytest.mark.parametrize(
    ("step", "falls"),
    [(0, FALLS_LATE), (2, FALLS), (3, FALLS), (4, FALLS), (6, FALLS)],
    ids=["before the first step", "inside", "as it is decided", "between two", "inside the next"],
)
def test_a_run_that_goes_on_from_any_step_has_the_phases_of_one_that_was_not_interrupted(
    step: int, falls: dict[int, float], tmp_path: Path
) -> None:
    whole, seen, part = Seen(), Seen(), tmp_path / "part"
    keep = {"checkpointEverySteps": 1, "keepLast": 100, "keepBest": step == 0}
    (tmp_path / "whole").mkdir()

    async def uninterrupted() -> None:
        loop = loop_in(tmp_path / "whole", Told(falls), 8, **keep)
        loop.callbacks.after.append(whole)
        await train(loop)

    async def resumed() -> None:
        loop = loop_in(part, told := Told(falls), 8, **keep)
        loop.callbacks.after.append(seen)
        await train(loop)
        # The first evaluation is made by each attempt that begins with the first step.
        assert told.begun == list(range(step + 1 if step else 0, 9)), "what was measured is not measured again"

    virtually(uninterrupted)
    shutil.copytree(tmp_path / "whole", part)
    (part / "stages" / "checkpoints" / "latest").write_text(f"step-{step:06d}")
    virtually(resumed)
    assert seen.steps == whole.steps[step:]
    assert [line["phase"] for line in lines(part, "step")] == [name for _, name, _, _ in whole.steps]


def test_a_roll_back_takes_up_the_phase_of_its_checkpoint(tmp_path: Path) -> None:
    """Flat at step 3, so that the second phase begins with step 4; what it makes worse sends the run back to step 1."""
    back = {"name": "fell", "watch": "evaluation", "evaluation": "heldout", "drop": 2, "patience": 1}
    seen, told = Seen(), Told({0: 3.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 9.0})

    async def work() -> None:
        loop = loop_in(tmp_path, told, 8, {**back, "action": "roll-back"}, keepBest=True)
        load, trainer = loop._trainer.load, loop._trainer

        async def and_learn(folder: Path) -> None:
            await load(folder)
            told.found = {step: 1.0 - 0.2 * step for step in range(9)}

        trainer.load = and_learn  # type: ignore[method-assign]
        loop.callbacks.after.append(seen)
        await train(loop)

    virtually(work)
    names = [(index, name) for index, name, _, _ in seen.steps]
    assert names[:5] == [(0, "distil"), (1, "distil"), (2, "distil"), (3, "distil"), (4, "weak")]
    assert names[5:] == [(index, "distil") for index in range(1, 8)], "back in the first, which now gains to the end"


def test_a_guard_begins_anew_with_each_phase() -> None:
    """The reverse KL of reinforcement is above that of distillation by right."""
    rises = {"name": "rises", "watch": "reverse-kl", "aboveRatio": 2, "window": 2, "patience": 1, "action": "stop"}

    def decided(*names: str) -> list[bool]:
        guards = Guards(spec({**DISTIL, "untilStep": 4}, REINFORCE, guards=[rises]))
        found = []
        for step, (name, kl) in enumerate(zip(names, [0.5] * 4 + [5.0] * 2 + [50.0], strict=True), start=1):
            line = {"step": step, "phase": name, "reverse_kl": kl, "entropy": 1.0, "response_tokens": 4, "samples": 4}
            found.append(guards.after_step(line) is not None)
            guards_of_json = json.loads(json.dumps(guards.state()))
            guards = Guards(spec({**DISTIL, "untilStep": 4}, REINFORCE, guards=[rises]))
            guards.restore(guards_of_json)
        return found

    assert decided(*["distil"] * 7) == [*[False] * 4, True, True, True]
    assert decided(*["distil"] * 4, *["reinforce"] * 3) == [*[False] * 6, True]


def test_phases_and_the_period_of_what_ends_them_make_another_run(tmp_path: Path) -> None:
    def of(parts: list[dict[str, Any]], every: int = 5) -> str:
        schedule = {"steps": 40, "evaluateEverySteps": every}
        return fingerprint(parse_job(arithmetic(tmp_path, "phases", phases=parts, schedule=schedule)))

    by_step = [{**DISTIL, "untilStep": 10}, {"name": "weak", "objective": {"coefficient": 0.5}}]
    by_plateau = [{**DISTIL, "untilFlat": FLAT}, {"name": "weak", "objective": {"coefficient": 0.5}}]
    weaker = [by_step[0], {"name": "weak", "objective": {"coefficient": 0.25}}]
    later = [{**DISTIL, "untilStep": 11}, by_step[1]]
    assert len({of(parts) for parts in ([], by_step, by_plateau, weaker, later)}) == 5
    assert of(by_step, every=10) == of(by_step), "what only measures makes none"
    assert of(by_plateau, every=10) != of(by_plateau)


def test_the_likeliest_tokens_are_asked_for_as_the_phase_that_wants_most_of_them() -> None:
    wide = {"name": "wide", "objective": {"support": "top-k", "topK": 32}, "untilStep": 5}
    assert teacher_top_k(spec(wide, DISTIL)) == 32 and teacher_top_k(spec(DISTIL)) is None
    assert [o.teacher_top_k for o in objectives(spec(wide, DISTIL))] == [32, None]


def test_a_phase_that_teaches_nothing_is_said_before_it_costs_anything() -> None:
    [said] = obstacles(spec({**DISTIL, "untilStep": 5}, REINFORCE))
    assert said.startswith("spec.phases[reinforce].objective: coefficient is 0 and there is no reward")


def test_a_report_of_a_run_without_phases_is_as_operators_before_them_read_it() -> None:
    def progress(name: str | None) -> dict[str, Any]:
        report = ProgressReport(phase=Phase.TRAINING, progress=Progress(step=3, objective_phase=name))
        found: dict[str, Any] = json.loads(report.model_dump_json(by_alias=True))["progress"]
        return found

    assert "objectivePhase" not in progress(None) and progress("distil")["objectivePhase"] == "distil"


def test_report_and_card_tell_the_phases(tmp_path: Path) -> None:
    step = {"kind": "step", "time": 0.0, "seconds": 1.0, "stages": {}, "response_tokens": 8, "samples": 2}
    names = ["warm-start", "warm-start", "distil"]
    rows = [{**step, "step": number, "phase": name} for number, name in enumerate(names, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path / "metrics.jsonl")
    assert run.phases == [("warm-start", 1, 2), ("distil", 3, 3)]
    parts = [{**WARM_START, "untilStep": 2}, {**DISTIL, "untilFlat": FLAT}, {"name": "last"}]
    objective = {"support": "sampled-token", "topK": 16}
    job = parse_job(arithmetic(tmp_path, "told", phases=parts, data=DATA, objective=objective))
    shown = page(run, [], job, "<svg></svg>", {})
    assert "<td>warm-start</td><td>1 – 2</td>" in shown and "<td>distil</td><td>3 – 3</td>" in shown
    first, second, last = method(job.spec)
    assert first.startswith("Phase `warm-start`, until step 2: Supervised fine-tuning")
    assert "until 2 evaluations `heldout` in a row without a gain of more than 0.1: On-policy" in second
    assert last.startswith("Phase `last`, to the end: ")
