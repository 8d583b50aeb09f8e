"""What an evaluation says of a model: scores with honest intervals, of one version of the weights alone."""

import asyncio
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of, tiny_tokenizer
from rich.console import Console
from runs import MODELS, REPO

from distill_cli.main import main
from distill_workers.engine.engine import EngineRefused, Response
from distill_workers.evaluation.conversation_response import ConversationResponse
from distill_workers.evaluation.estimates import Estimate, interval, mean_score, pass_at_k, solves
from distill_workers.evaluation.evaluator import Evaluator, Measurement, Sampled
from distill_workers.local.evaluate import chosen, table
from distill_workers.metrics import Metrics
from distill_workers.teacher.protocol import BadScore, Scores, WrittenResponse
from distill_workers.teacher.teachers import Teachers


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_choices_of_k_responses_that_hold_a_correct_one(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        chosen = list(itertools.combinations(range(n), k))
        assert solves(n, correct, k) == pytest.approx(sum(min(c) < correct for c in chosen) / len(chosen))


def test_pass_at_k_is_given_for_powers_of_two_and_for_all_responses() -> None:
    found = pass_at_k([[1.0, 0.0, 0.3, 0.0, 0.0, 0.0], [0.0] * 6, [1.0] * 6])
    assert list(found) == [1, 2, 4, 6]
    assert found[1].value == pytest.approx((1 / 6 + 0 + 1) / 3)
    assert found[6].value == pytest.approx(2 / 3)
    assert pass_at_k([]) == {} and pass_at_k([[], []]) == {}


def test_a_prompt_with_too_few_graded_responses_is_left_out_of_the_larger_k() -> None:
    found = pass_at_k([[1.0], [0.0, 0.0], []])
    assert found[1].value == pytest.approx(0.5) and found[2].value == 0.0


def test_every_prompt_counts_alike_in_the_score() -> None:
    found = mean_score([[1.0, 1.0, 1.0], [0.0], []])
    assert found is not None and found.value == pytest.approx(0.5)
    assert mean_score([[], []]) is None


@pytest.mark.parametrize(("prompts", "count", "hopeless"), [(64, 1, 0.0), (64, 8, 0.3), (200, 4, 0.45)])
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(
    prompts: int, count: int, hopeless: float, rate: float
) -> None:
    """Some prompts are never solved, so that the responses to one prompt depend on each other."""
    draw, held = random.Random(f"{prompts}/{count}/{rate}"), 0
    for _ in range(400):
        rates = [0.0 if draw.random() < hopeless else rate for _ in range(prompts)]
        found = mean_score([[float(draw.random() < r) for _ in range(count)] for r in rates])
        assert found is not None and 0 <= found.low <= found.value <= found.high <= 1
        held += found.low <= rate * (1 - hopeless) <= found.high
    assert held / 400 >= 0.92


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_interval_is_not_a_point_where_all_prompts_agree(value: float) -> None:
    found = interval([value] * 64, 64 * 8)
    assert found is not None
    assert max(found.high - value, value - found.low) == pytest.approx(0.0566, abs=1e-3)


def test_rewards_outside_zero_to_one_have_a_normal_interval() -> None:
    values = [-3.0, 0.5, 4.0, 2.5]
    found = interval(values, 4)
    half = 1.96 * statistics.stdev(values) / 2
    assert found is not None and found.high - found.value == pytest.approx(half, rel=1e-3)
    assert found.value - found.low == pytest.approx(half, rel=1e-3)


class Engines:
    """Answer the text of `texts` in turn for the siblings of a prompt; `refused` are refused, `newer` are of newer
    weights."""

    def __init__(self, texts: Sequence[str], refused: frozenset[int] = frozenset(), newer: bool = False) -> None:
        self.tokenizer, self.texts, self.refused, self.newer = tiny_tokenizer(), texts, refused, newer
        self.calls = 0

    async def sample(self, prompt_ids: list[int], *, temperature: float, seeds: list[int], **_: Any) -> list[Response]:
        self.calls += 1
        if self.calls - 1 in self.refused:
            raise EngineRefused("too long")
        await asyncio.sleep(0)
        answers = [self.tokenizer(self.texts[n % len(self.texts)])["input_ids"] for n in range(len(seeds))]
        version = 6 if self.newer and temperature == 0 else 5
        return [Response(a, [-1.0] * len(a), [version] * len(a), False) for a in answers]


class Teacher:
    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        return Scores([-1.5] * len(response_ids), None, None)

    async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> WrittenResponse:
        raise BadScore("refused", "no")


def only(teacher: Any) -> Teachers:
    return Teachers({"teacher": teacher})


def evaluator(tmp_path: Path, of_prompts: dict[str, Any] | None = None, **fields: Any) -> Evaluator:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}", "answer": "42"}) + "\n" for n in range(3)))
    prompts = {"path": str(file), "answerField": "answer", "applyChatTemplate": False, **(of_prompts or {})}
    spec = spec_of(
        Path("/m"),
        Path("/m"),
        evaluation=[{"name": "sums", "prompts": prompts, "reward": {"source": "exact-match"}, **fields}],
    )
    return Evaluator(spec, spec.evaluation[0], tiny_tokenizer(), Metrics())


async def test_an_evaluation_has_score_pass_at_k_and_reverse_kl(tmp_path: Path) -> None:
    teacher = only(Teacher())
    made = evaluator(tmp_path, samplesPerPrompt=4)
    found = await made.measure(5, Engines(["42", "no", "no", "no"]), teacher)
    assert (found.score, found.step, found.prompts, found.failed) == (0.25, 5, 3, 0)
    assert found.score_low is not None and found.score_high is not None
    assert 0 < found.score_low < 0.25 < found.score_high < 1
    assert {k: e.value for k, e in found.pass_at.items()} == {1: 0.25, 2: 0.5, 4: 1.0}
    assert found.reverse_kl == pytest.approx(0.5)
    await made.close()


async def test_a_privileged_teacher_scores_and_answers_what_it_is_asked_itself(tmp_path: Path) -> None:
    asked: list[str] = []
    tokenizer = tiny_tokenizer()

    class Privileged(Teacher):
        async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
            asked.append(tokenizer.decode(prompt_ids))
            return await super().score(prompt_ids, response_ids, top_k)

        async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> WrittenResponse:
            asked.append(tokenizer.decode(prompt_ids))
            return await super().generate(prompt_ids, max_new_tokens)

    made = evaluator(tmp_path, {"teacherPrompt": "{prompt} is {answer}"}, scoreTeacher=True)
    sampled = await made.sample(5, Engines(["42"]))
    sampled.step = 0
    await made.grade(sampled, only(Privileged()))
    assert sorted(asked) == sorted([f"{n} is 42" for n in range(3)] * 2)


async def test_the_reference_scores_and_answers_the_students_own_prompt(tmp_path: Path) -> None:
    asked: list[str] = []
    tokenizer = tiny_tokenizer()

    class Reference(Teacher):
        async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
            asked.append(tokenizer.decode(prompt_ids))
            return await super().score(prompt_ids, response_ids, top_k)

        async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> WrittenResponse:
            asked.append(tokenizer.decode(prompt_ids))
            return await super().generate(prompt_ids, max_new_tokens)

    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "12 + 30", "answer": "42"}\n')
    hinted = {"path": str(file), "answerField": "answer", "applyChatTemplate": False, "teacherPrompt": "is {answer}"}
    drift = {"name": "drift", "prompts": hinted, "teacher": "base", "reward": {"source": "exact-match"}}
    spec = spec_of(
        Path("/m"),
        Path("/m"),
        teacher=None,
        teachers=[{"name": "expert", "model": "/e"}, {"name": "base", "model": "/b"}],
        data={"prompts": {"path": str(file)}, "defaultTeacher": "expert"},
        objective={"reference": "base", "referenceCoefficient": 0.1},
        evaluation=[{**drift, "scoreTeacher": True}],
    )
    pools: Any = {"base": Reference()}
    made, teachers = Evaluator(spec, spec.evaluation[0], tokenizer, Metrics()), Teachers(pools)
    sampled = await made.sample(5, Engines(["42"]))
    sampled.step = 0
    await made.grade(sampled, teachers)
    assert asked == ["12 + 30", "12 + 30"]
    conversation = ConversationResponse(
        [5, 6], [-1.0, -1.0], [5, 5], False, 1.0, [True, True], tokenizer("hinted")["input_ids"], made.prompts[0].ids
    )
    asked.clear()
    await made.grade(Sampled(5, as_trained=[[conversation]]), teachers)
    assert asked == ["12 + 30"]


async def test_responses_that_fail_are_counted_and_leave_no_score_of_their_own(tmp_path: Path) -> None:
    teacher = only(Teacher())
    made = evaluator(tmp_path, samplesPerPrompt=2, measureReverseKL=False)
    found = await made.measure(5, Engines(["42"], refused=frozenset({0})), teacher)
    assert (found.score, found.failed) == (1.0, 2)
    nothing = await made.measure(5, Engines(["42"], refused=frozenset({0, 1, 2})), teacher)
    assert (nothing.score, nothing.pass_at, nothing.failed) == (None, {}, 6)


async def test_responses_of_other_weights_are_not_taken_for_those_of_the_step(tmp_path: Path) -> None:
    teacher = only(Teacher())
    found = await evaluator(tmp_path).measure(5, Engines(["42"], newer=True), teacher)
    assert found.score is None and found.failed == 3
    assert found.reverse_kl == pytest.approx(0.5), "that of the right weights is measured"


async def test_what_was_sampled_is_graded_without_an_engine(tmp_path: Path) -> None:
    """So that training need wait for the drawing alone."""
    teacher = only(Teacher())
    made, engines = evaluator(tmp_path), Engines(["42"])
    sampled = await made.sample(5, engines)
    calls = engines.calls
    found = await made.grade(sampled, teacher)
    assert engines.calls == calls == 6 and found.score == 1.0 and found.reverse_kl == pytest.approx(0.5)


async def test_responses_sampled_as_in_training_serve_for_score_and_reverse_kl(tmp_path: Path) -> None:
    made, engines = evaluator(tmp_path, sampling={"temperature": 1.0}, samplesPerPrompt=2), Engines(["42", "no"])
    sampled = await made.sample(5, engines)
    assert engines.calls == 3 and [len(responses) for responses in sampled.as_trained] == [1, 1, 1]
    found = await made.grade(sampled, only(Teacher()))
    assert found.score == 0.5 and found.reverse_kl == pytest.approx(0.5)
    nucleus, engines = evaluator(tmp_path, sampling={"temperature": 1.0, "topP": 0.9}), Engines(["42"])
    await nucleus.sample(5, engines)
    assert engines.calls == 6, "of another distribution"


async def test_without_a_teacher_nothing_is_sampled_for_the_reverse_kl(tmp_path: Path) -> None:
    engines = Engines(["42"])
    found = await evaluator(tmp_path, scoreTeacher=True).measure(5, engines, None)
    assert found.score == 1.0 and found.reverse_kl is None and engines.calls == 3


@pytest.mark.timeout(300)
def test_distill_evaluate_measures_a_finished_model_and_leaves_no_process(tmp_path: Path) -> None:
    """The teacher itself, as the model: it adds, and is no nat away from itself."""
    command = [
        sys.executable,
        "-m",
        "distill_cli",
        "evaluate",
        "--model",
        str(MODELS / "arithmetic" / "teacher"),
    ]
    command += ["-f", str(REPO / "examples" / "arithmetic-cpu.yaml"), "--volume", f"/models={MODELS}", "--teacher"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--output", "json"], capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = json.loads(done.stdout)["evaluations"]
    assert (found["name"], found["prompts"], found["failed"]) == ("heldout", 256, 0)
    assert found["score"] == found["teacher_score"] >= 0.97
    assert found["score_low"] < found["score"] <= found["score_high"] <= 1
    assert found["pass_at"]["1"]["value"] == found["score"]
    assert abs(found["reverse_kl"]) < 1e-3
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False).returncode == 1


def test_the_table_shows_every_number_once(tmp_path: Path) -> None:
    measured = Measurement("sums", 0, 0.25, 0.125, 0.5, {1: Estimate(0.25, 0.125, 0.5)}, None, 0.75, 3, 1)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table("/model", [measured]))
    shown = console.export_text()
    for text in ("score", "0.2500", "0.1250 to 0.5000", "pass@1", "teacher's score", "0.7500", "3, 1"):
        assert text in shown
    assert "reverse KL" not in shown


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["--evaluation", "none"], "spec.evaluation has no none: it has heldout", 1),
        (["--model", "/nowhere"], "--model: /nowhere is no Hugging Face checkpoint", 78),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_starts(
    arguments: list[str], sentence: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(REPO / "examples" / "arithmetic-cpu.yaml")
    assert main(["evaluate", "-f", job, "--model", "/m", "--volume", f"/models={MODELS}", *arguments]) == code
    assert sentence in capsys.readouterr().err


def test_an_evaluation_of_the_reverse_kl_alone_asks_for_the_teacher() -> None:
    only = {"name": "kl", "prompts": {"reasoningGym": {"task": "chain_sum"}}}
    spec = spec_of(Path("/m"), Path("/m"), evaluation=[only])
    assert [e.name for e in chosen(spec, [], with_teacher=True)] == ["kl"]
    with pytest.raises(ValueError, match=r"evaluation kl has no reward, .*: add --teacher"):
        chosen(spec, [], with_teacher=False)
