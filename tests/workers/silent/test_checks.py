"""Each check of the preflight that needs no server names its fault, and passes what is right."""

import asyncio
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel, spec_of, tiny_tokenizer
from safetensors.torch import load_file

from distill_api.spec.job_spec import Evaluation, Objective
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import Response
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import ConfigurationError, PreflightFailed
from distill_workers.metrics import Metrics
from distill_workers.objective import loss as losses
from distill_workers.objective import teacher_top_k
from distill_workers.objective.coefficients import step_coefficients
from distill_workers.rewards.base import RewardError
from distill_workers.rewards.build import build_rewards
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.callbacks.engine_agreement import EngineAgreementCallback
from distill_workers.run.preflight.environment import check_environment
from distill_workers.run.preflight.model_agreement import size_notes
from distill_workers.run.preflight.model_limits import parameters
from distill_workers.run.preflight.objective import objective_distils
from distill_workers.run.preflight.resumption import cursor_continues
from distill_workers.run.preflight.rewards import reward_scores
from distill_workers.run.preflight.student import responses_end

TOP_K = {"support": "top-k"}
SPEC = spec_of(Path("/student"), Path("/teacher"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"discount": 0.9, "advantageClip": 0.1, "coefficient": 0.0, "reward": {"source": "math"}},
        TOP_K,
        {**TOP_K, "divergence": "forward-kl", "topK": 1},
        {**TOP_K, "divergence": "jsd", "jsdBeta": 0.2, "reward": {"source": "math"}},
    ],
)
async def test_the_objectives_as_they_are_pass(fields: dict[str, Any]) -> None:
    await objective_distils(Objective.model_validate(fields))


DIVERGENCE, GRADIENT = teacher_top_k.support_divergence, losses.policy_gradient


def without_a_tail_and_clamped(kind: Any, student: Any, teacher: Any, **_: Any) -> Any:
    """verl#7855: the sum over the top-k alone may be negative."""
    return torch.nan_to_num((student.exp() * (student - teacher)), nan=0.0).sum(-1).clamp(min=0)


def detached(kind: Any, student: Any, teacher: Any, **rest: Any) -> Any:
    return DIVERGENCE(kind, student.detach(), teacher, **rest)


def flipped(kind: Any, student: Any, teacher: Any, **rest: Any) -> Any:
    return DIVERGENCE(kind, teacher.masked_fill(student == -math.inf, -math.inf), student, **rest)


def with_minus_infinity(kind: Any, student: Any, teacher: Any, **_: Any) -> Any:
    """trl#5594: 0 times -inf is NaN."""
    return (student.exp() * (student - teacher)).sum(-1)


@pytest.mark.parametrize(
    ("divergence", "said"),
    [
        (without_a_tail_and_clamped, "the loss of a probe is"),
        (detached, r"the gradient of a probe's loss is 0\.000, 0\.000"),
        (flipped, "the loss of a probe is"),
        (with_minus_infinity, "the loss of a probe is nan"),
    ],
)
async def test_a_divergence_that_does_not_distil_is_named_before_the_first_step(
    divergence: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In objective/teacher_top_k.py, which is what training runs."""
    monkeypatch.setattr(teacher_top_k, "support_divergence", divergence)
    with pytest.raises(PreflightFailed, match=f"ObjectiveDistils: objective reverse-kl, support top-k: {said}"):
        await objective_distils(Objective.model_validate(TOP_K))


async def test_a_k1_estimate_that_is_differentiated_is_named_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its value is right, and the expectation of its gradient is 0 whatever the teacher says."""

    def differentiated(logprobs: Any, old: Any, advantages: Any, clip: float) -> Any:
        return logprobs - old - advantages, torch.zeros_like(logprobs, dtype=torch.bool)

    monkeypatch.setattr(losses, "policy_gradient", differentiated)
    with pytest.raises(PreflightFailed, match=r"ObjectiveDistils: .* support sampled-token: the gradient of a probe's"):
        await objective_distils(Objective())


def rewarded(source: str, function: str | None = None) -> Any:
    reward = {"source": source} | ({"function": function} if function else {})
    return spec_of(Path("/s"), Path("/t"), objective={"reward": reward}, rollout={"samplesPerPrompt": 2})


def scored(spec: Any, *answers: str | None) -> list[str]:
    async def score() -> list[str]:
        rewards = build_rewards(spec, Metrics())
        try:
            name = spec.data.all_sources[0].name
            prompts = [Prompt(i, [1], "Add.", answer, source=name) for i, answer in enumerate(answers)]
            return await reward_scores(spec, prompts, rewards)
        finally:
            await asyncio.gather(*(r.close() for r in rewards.values()))

    return asyncio.run(score())


@pytest.mark.parametrize("answers", [("12", "7"), ("so it is 12\n#### 12",), ("", None), (r"\frac{1}{2}", "x")])
def test_references_that_the_math_reward_reads_pass(answers: tuple[str | None, ...]) -> None:
    assert scored(rewarded("math"), *answers) == []


def test_references_that_no_response_could_match_are_named() -> None:
    """Solutions whose last line was cut off: every reward of the run would fail, or be 0."""
    said = (
        r"RewardScores: reward math of source .* gives 0 to 2 reference answers, .* \(the first is '5 and 7\\n####'\)"
    )
    with pytest.raises(PreflightFailed, match=said + r".*distill grade"):
        scored(rewarded("math"), "5 and 7\n####", "2 and 2\n####")
    assert scored(rewarded("math"), "5 and 7\n####", "4") == []


@pytest.mark.parametrize("broken", ["first", "second"])
def test_each_source_is_graded_with_its_own_references(broken: str) -> None:
    names = ("first", "second")
    where = {"path": "/p.jsonl", "answerField": "answer"}
    data = {"sources": [{"name": name, "prompts": where} for name in names]}
    sizes = {"samplesPerPrompt": 2}
    spec = spec_of(Path("/s"), Path("/t"), data=data, objective={"reward": {"source": "math"}}, rollout=sizes)
    answers = {name: "5 and 7\n####" if name == broken else "12" for name in names}
    prompts = [Prompt(i, [1], "Add.", answers[name], source=name) for i, name in enumerate(names)]

    async def score() -> list[str]:
        rewards = build_rewards(spec, Metrics())
        try:
            return await reward_scores(spec, prompts, rewards)
        finally:
            await asyncio.gather(*(r.close() for r in rewards.values()))

    with pytest.raises(PreflightFailed, match=f"RewardScores: reward math of source {broken} gives 0 to 1 reference"):
        asyncio.run(score())


def test_a_function_that_gives_no_reference_a_reward_is_noted_and_one_without_a_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def strict(response, answer, metadata):\n    return float('final answer:' in response)\n\n"
        "def right(response, answer, metadata):\n    return float(answer in response)\n\n"
        "def nothing(response, answer, metadata):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    [note] = scored(rewarded("python", "own_rewards:strict"), "12", "7")
    assert note.startswith("RewardScores: reward python of source ") and "gives 0 to 2 reference answers" in note
    assert scored(rewarded("python", "own_rewards:right"), "12", "7") == []
    with pytest.raises(ConfigurationError, match="own_rewards:nothing"):
        scored(rewarded("python", "own_rewards:nothing"), "12")


def test_an_evaluation_whose_references_no_response_could_match_is_named(tmp_path: Path) -> None:
    """Without a reward in training nothing else reads its answers: its curve would be 0 to the end."""
    file, spec = tmp_path / "p.jsonl", spec_of(Path("/s"), Path("/t"))

    async def noted(answer: str) -> list[str]:
        file.write_text(json.dumps({"prompt": "Add.", "answer": answer}) + "\n")
        entry = {"name": "sums", "prompts": {"path": str(file), "answerField": "answer"}, "reward": {"source": "math"}}
        evaluator = Evaluator(spec, Evaluation.model_validate(entry), tiny_tokenizer(), Metrics())
        try:
            return await reward_scores(spec, [Prompt(0, [1], "Add.")], {}, [evaluator])
        finally:
            await evaluator.close()

    assert asyncio.run(noted("12")) == []
    with pytest.raises(PreflightFailed, match="RewardScores: reward math of evaluation sums gives 0 to 1 reference"):
        asyncio.run(noted("12\n####"))


async def test_a_reward_service_that_does_not_answer_is_waited_for_once() -> None:
    class Away:
        calls = 0

        async def score(self, prompt: Prompt, response: str) -> float:
            self.calls += 1
            raise RewardError("http://r: 3 requests failed")

    away: Any = Away()
    spec = spec_of(Path("/s"), Path("/t"))
    name = spec.data.all_sources[0].name
    [note] = await reward_scores(spec, [Prompt(0, [1], "Add.", "1", source=name)], {name: away})
    assert away.calls == 1 and note.startswith("RewardScores: ")


def test_larger_students_than_their_teachers_are_noted(tiny_model: TinyModel) -> None:
    small, large = tiny_model(0), tiny_model(0, hidden=128)
    count = sum(t.numel() for t in load_file(small / "model.safetensors").values())
    assert parameters(small) == count
    assert size_notes(spec_of(small, large), small) == size_notes(spec_of(small, small), small) == []
    [note] = size_notes(spec_of(large, small), large)
    assert note.startswith("TeacherIsLarger: the student has ") and note.endswith("swapped?")
    assert size_notes(spec_of(small, Path("/elsewhere")), small) == []


async def test_a_response_that_was_cut_off_and_counts_as_finished_is_named() -> None:
    tokenizer = tiny_tokenizer()

    def of(last: int, truncated: bool) -> Sample:
        return Sample(0, 0, [60], [200, last], [-1.0, -1.0], [0, 0], truncated)

    end = tokenizer.eos_token_id
    await responses_end([of(201, True), of(end, False), of(300, False)], tokenizer, (300,))
    with pytest.raises(PreflightFailed, match=r"ResponsesEnd: .* response of 2 tokens is finished, .* \(id 201\)"):
        await responses_end([of(end, False), of(201, False)], tokenizer, (300,))


def test_a_cursor_that_begins_anew_is_named() -> None:
    prompts = [Prompt(i, [1], "", source="ab"[i % 2]) for i in range(20)]
    steps = SPEC.rollout.prompts_per_step
    for some in (prompts, prompts[::2]):
        cursor = Cursor(some, seed=0, shuffle=True)
        fresh = cursor.state()
        for step in range(4):
            cursor_continues(SPEC, step, cursor.state())
            cursor.next(steps)
        cursor_continues(SPEC, 4, cursor.state())
        with pytest.raises(PreflightFailed, match=rf"CursorContinues: .* of step 4, which has used up {4 * steps} "):
            cursor_continues(SPEC, 4, fresh)


def test_variables_of_services_are_named() -> None:
    check_environment({"RAY_ADDRESS": "ray://head:10001", "PATH": "/bin", "KUBERNETES_PORT": "tcp://10.0.0.1:443"})
    with pytest.raises(
        PreflightFailed, match=r"ServiceLinks: SGLANG_PORT is tcp://10\.0\.0\.7:30000, which Kubernetes"
    ):
        check_environment({"SGLANG_PORT": "tcp://10.0.0.7:30000"})


def step(index: int, gap: float, version: int) -> TrainStep:
    drawn = Sample(0, 0, [1], [2], [-1.0], [version], False)
    return TrainStep(index, step_coefficients(Objective(), 0), samples=[drawn], stats={"trainer_engine_gap": gap})


class Sampled:
    """Engines, prompts and trainer, whose log-probabilities of a probe differ by `gap`, nats."""

    def __init__(self, gap: float) -> None:
        self.gap, self.probes = gap, 0

    def peek(self, count: int) -> list[Prompt]:
        return [Prompt(0, [1], "")]

    def count_placed(self) -> int:
        return 1

    async def sample(self, *_: Any, **__: Any) -> list[Response]:
        self.probes += 1
        return [Response([5, 6], [-1.0, -2.0], [1, 1], True)]

    async def logprobs(self, samples: list[Sample]) -> list[list[float]]:
        return [[x + self.gap for x in s.engine_logprobs] for s in samples]


def agreement(spec: Any, sampled: Any) -> EngineAgreementCallback:
    return EngineAgreementCallback(spec, sampled, sampled, sampled)


async def test_engines_that_do_not_follow_the_trainer_are_named_within_ten_steps() -> None:
    check = agreement(SPEC, Sampled(1.0))
    for fine in (step(0, 1e-4, 0), step(3, 1e-4, 3), step(3, 1.0, 2), step(9, 1e-4, 9), step(10, 1.0, 10)):
        await check.after_step(fine)
    for gap in (0.1, math.nan):
        with pytest.raises(PreflightFailed, match=r"EngineFollowsTrainer: after 1 steps .* not what is trained"):
            await check.after_step(step(1, gap, 1))


@pytest.mark.parametrize(("steps", "looked_at"), [(20, 10), (4, 4)])
async def test_with_a_lag_engines_that_do_not_follow_are_named_by_a_probe(steps: int, looked_at: int) -> None:
    """No sample of a step is of the trainer's own weights then."""
    spec = spec_of(Path("/s"), Path("/t"), rollout={"maxPolicyLag": 1}, schedule={"steps": steps})
    follows, other = Sampled(1e-4), Sampled(0.1)
    for index in range(steps - 1):
        if index + 1 != looked_at:
            await agreement(spec, other).after_step(step(index, 1.0, index - 1))
    await agreement(spec, follows).after_step(step(looked_at - 1, 1.0, looked_at - 2))
    assert (follows.probes, other.probes) == (1, 0)
    said = rf"EngineFollowsTrainer: after {looked_at} steps: EngineMatchesTrainer: .* not what is trained"
    with pytest.raises(PreflightFailed, match=said):
        await agreement(spec, other).after_step(step(looked_at - 1, 0.0, looked_at - 2))


async def test_after_steps_on_given_responses_alone_the_engines_are_probed() -> None:
    """A warm start has no samples of the engines: what no push brings would be found in the next phase, or never."""
    given = {"divergence": "forward-kl", "support": "target", "datasetShare": 1, "datasetResponses": "teacher"}
    phases = [{"name": "warm-start", "objective": given, "untilStep": 15}, {"name": "distil"}]
    spec = spec_of(Path("/s"), Path("/t"), phases=phases, schedule={"steps": 20})

    def of_data(index: int) -> TrainStep:
        sample = Sample(0, 0, [1], [2], [0.0], [index], False, supervised=True)
        return TrainStep(index, step_coefficients(Objective(), 0), samples=[sample], stats={})

    follows, other = Sampled(1e-4), Sampled(0.1)
    check = agreement(spec, follows)
    for index in range(12):
        await check.after_step(of_data(index))
    assert follows.probes == 1
    with pytest.raises(PreflightFailed, match=r"EngineFollowsTrainer: after 10 steps: EngineMatchesTrainer"):
        await agreement(spec, other).after_step(of_data(9))
    seen = agreement(spec, other)
    await seen.after_step(step(3, 1e-4, 3))
    await seen.after_step(of_data(9))
    assert other.probes == 1, "one step of the student's own has shown it"
