"""Published failures that leave a run green and its result wrong: which check names each, and in which words.

The list, with the report that each was found in, is the table in docs/reliability.md. Here faults are injected into the
log-probabilities of real tiny models, and into what real protocols answer; test_injected.py has real servers.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModel, hf_logprobs, spec_of

from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import EngineRefused, Response, read_response
from distill_workers.failures import ConfigurationError, PreflightFailed
from distill_workers.metrics import Metrics
from distill_workers.run.preflight.replicas import replicas_agree
from distill_workers.run.preflight.student import engine_matches_trainer, probe
from distill_workers.run.preflight.teacher import gap_nats, teacher_differs, teacher_is_sane
from distill_workers.teacher.protocol import BadScore, Scores
from distill_workers.teacher.sglang_protocol import read_scores
from distill_workers.teacher.teachers import Teachers

PROMPT, RESPONSE = list(range(60, 80)), [200, 301, 17, 2]
SPEC = spec_of(Path("/student"), Path("/teacher"))


@pytest.fixture(scope="session")
def logprobs(tiny_model: TinyModel) -> list[list[float]]:
    """Of the student, tiny_model(0), and of the teacher, tiny_model(1), of RESPONSE."""
    return [hf_logprobs(tiny_model(seed), PROMPT, RESPONSE) for seed in (0, 1)]


def sample(engine: list[float]) -> Sample:
    return Sample(0, 0, PROMPT, RESPONSE, engine, [0] * len(engine), False)


class PlayedTeacher:
    """A teacher whose servers give the log-probs of a real model, or what a fault makes of them."""

    def __init__(self, *servers: list[float]) -> None:
        self.servers, self.calls = servers, 0
        self.teacher, self.vocabulary = SPEC.all_teachers[0], 512

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        return Scores(self.servers[0], None, None)

    async def score_everywhere(self, *_: Any) -> list[tuple[str, Scores]]:
        """Each server in turn, behind one address."""
        self.calls += 1
        return [("10.0.0.1:30000", Scores(self.servers[self.calls % len(self.servers)], None, None))]


class PlayedTrainer:
    def __init__(self, found: list[float]) -> None:
        self.found = found

    async def logprobs(self, samples: list[Sample]) -> list[list[float]]:
        return [self.found for _ in samples]


class PlayedEngines:
    """Several engines, one of which has other weights; the pool gives each request to the least busy."""

    def __init__(self, *engines: list[float]) -> None:
        self.engines, self.busy = engines, [0] * len(engines)

    def count_placed(self) -> int:
        return len(self.engines)

    async def sample(self, prompt_ids: list[int], **_: Any) -> list[Response]:
        engine = self.busy.index(min(self.busy))
        self.busy[engine] += 1
        await asyncio.sleep(0)
        self.busy[engine] -= 1
        return [Response(RESPONSE, self.engines[engine], [0] * len(RESPONSE), False)]


class Prompts:
    def peek(self, count: int) -> list[Prompt]:
        return [Prompt(i, PROMPT, "") for i in range(count)]


def answer(ids: list[int], values: list[float | None]) -> dict[str, Any]:
    """As SGLang's /generate answers: the last token of the prompt first."""
    entries = [[None, PROMPT[-1], None], *([v, i, None] for v, i in zip(values, ids, strict=True))]
    return {"meta_info": {"input_token_logprobs": entries}}


async def test_healthy_models_pass_every_check(logprobs: list[list[float]]) -> None:
    student, teacher = logprobs
    parts: Any = (PlayedTeacher(teacher), PlayedTrainer(student), PlayedEngines(*[student] * 4), Prompts())
    samples = await probe(SPEC, parts[2], parts[3])
    assert len(samples) == 4
    scores = await teacher_is_sane(SPEC, samples, parts[0], 384)
    await teacher_differs(SPEC, {"teacher": gap_nats(samples, scores)})
    await replicas_agree(SPEC, samples, parts[0])
    await engine_matches_trainer(SPEC, samples, parts[1])


async def test_one_stale_engine_among_eight_is_named(logprobs: list[list[float]], tiny_model: TinyModel) -> None:
    student, stale = logprobs[0], hf_logprobs(tiny_model(2), PROMPT, RESPONSE)
    parts: Any = (PlayedEngines(*[student] * 7, stale), Prompts(), PlayedTrainer(student))
    samples = await probe(SPEC, *parts[:2])
    with pytest.raises(
        PreflightFailed, match=r"EngineMatchesTrainer: .*the weights in an engine are not the trainer's"
    ):
        await engine_matches_trainer(SPEC, samples, parts[2])


@pytest.mark.parametrize("fault", [lambda x: x / 0.7, lambda x: 0.0, lambda x: float("nan")])
async def test_engine_log_probabilities_at_another_temperature_or_not_computed_are_named(
    fault: Any, logprobs: list[list[float]]
) -> None:
    ranks: Any = PlayedTrainer(logprobs[0])
    with pytest.raises(PreflightFailed, match=r"EngineMatchesTrainer: .*or it samples at another temperature"):
        await engine_matches_trainer(SPEC, [sample([fault(x) for x in logprobs[0]])], ranks)


async def test_a_teacher_that_is_the_student_is_named(logprobs: list[list[float]]) -> None:
    student, teacher = logprobs
    same, other = gap_nats([sample(student)], [student]), gap_nats([sample(student)], [teacher])
    with pytest.raises(PreflightFailed, match=r"TeacherDiffers: teacher a gives .* so there is nothing to learn"):
        await teacher_differs(SPEC, {"a": same})
    await teacher_differs(SPEC, {"a": same, "b": other})
    rewarded: dict[str, Any] = {"reward": {"source": "python", "function": "m:f"}}
    await teacher_differs(spec_of(Path("/s"), Path("/s"), objective=rewarded), {"a": same})


async def test_zeros_for_what_a_teacher_did_not_compute_are_named(logprobs: list[list[float]]) -> None:
    teacher: Any = PlayedTeacher([0.0] * len(RESPONSE))
    with pytest.raises(
        PreflightFailed, match=r"TeacherSane: .* writes 0 for a log-probability that it did not compute"
    ):
        await teacher_is_sane(SPEC, [sample(logprobs[0])], teacher, 384)


async def test_one_log_probability_for_all_tokens_is_named_unless_the_teacher_is_sure_of_each() -> None:
    def says(nats: float) -> Any:
        return PlayedTeacher([nats] * len(RESPONSE))

    with pytest.raises(PreflightFailed, match=r"TeacherSane: .* the same -6\.20 nats, whatever they are"):
        await teacher_is_sane(SPEC, [sample([-1.0] * 4)], says(-6.2), 384)
    await teacher_is_sane(SPEC, [sample([-1.0] * 4)], says(-1e-6), 384)


async def test_two_models_behind_one_address_are_named(logprobs: list[list[float]], tiny_model: TinyModel) -> None:
    teacher: Any = PlayedTeacher(logprobs[1], hf_logprobs(tiny_model(2), PROMPT, RESPONSE))
    with pytest.raises(PreflightFailed, match=r"ReplicasAgree: .* twice at 10\.0\.0\.1:30000, and the two differ by"):
        await replicas_agree(SPEC, [sample(logprobs[0])], teacher)


@pytest.mark.parametrize(
    ("ids", "values", "reason"),
    [
        (
            [PROMPT[-1], *RESPONSE[:-1]],
            [-1.0] * 4,
            "wrong_tokens: token 0 .* sent as 200 and scored as 79",
        ),
        (RESPONSE[:-1], [-1.0] * 3, "wrong_count: 3 scores came for 4 tokens"),
        ([*PROMPT, *RESPONSE], [-1.0] * 24, "wrong_count: 24 scores came for 4 tokens"),
        ([200, 300, 301, 17], [-1.0] * 4, "wrong_tokens: token 1 of the response"),
        (RESPONSE, [-1.0, None, -1.0, -1.0], "not_finite"),
        (RESPONSE, [-1.0, float("-inf"), -1.0, -1.0], "not_finite"),
        (RESPONSE, [-1.0, 0.5, -1.0, -1.0], "positive"),
    ],
    ids=["shifted by one", "one short", "all for none", "tokenised again", "missing", "padding", "no log-probability"],
)
def test_what_a_teacher_says_of_other_tokens_or_of_none_fails_with_a_reason(
    ids: list[int], values: list[float | None], reason: str
) -> None:
    with pytest.raises(BadScore, match=reason):
        read_scores(answer(ids, values), len(PROMPT), RESPONSE, None)


def test_a_teacher_without_a_server_is_named() -> None:
    with pytest.raises(ConfigurationError, match="has no address of teacher teacher"):
        Teachers.of_job(SPEC, {}, Metrics())


def test_a_response_that_was_cut_off_is_not_taken_for_a_finished_one() -> None:
    info = {"output_token_logprobs": [[-1.0, 5, None]], "weight_version": "0"}
    assert [
        read_response({"meta_info": {**info, "finish_reason": {"type": kind}}}).truncated for kind in ("stop", "length")
    ] == [False, True]
    with pytest.raises(EngineRefused, match="not finite"):
        read_response(
            {"meta_info": {**info, "output_token_logprobs": [[None, 5, None]], "finish_reason": {"type": "stop"}}}
        )
