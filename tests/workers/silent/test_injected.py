"""Published failures, injected into a real engine and a real teacher: preflight names each before the first step."""

import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from conftest import TinyModel, hf_logprobs, spec_of
from stack import Change, Engines, Trainer, between, finished, start, without_logprobs

import soak
from distill_api.spec.job_spec import Spec
from distill_workers.failures import PreflightFailed

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]
SECONDS = 10.0
"""That the whole preflight of a tiny pair may take."""


@pytest_asyncio.fixture(loop_scope="session")
async def student(engine: Any, tiny_model: TinyModel) -> AsyncIterator[Any]:
    """The real engine with the student's own weights, before and after."""
    await engine.load_folder(str(tiny_model(0)), 0, 60)
    yield engine
    await engine.load_folder(str(tiny_model(0)), 0, 60)


@pytest.fixture
def trainer(tiny_model: TinyModel) -> Trainer:
    return Trainer(tiny_model(0))


def port_of(engine: Any) -> int:
    return int(engine._server.port)


async def test_a_healthy_pair_passes_within_ten_seconds_and_the_log_says_the_seconds_of_each_check(
    tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):  # the best of three: another process may have had the processors meanwhile
        caplog.clear()
        with caplog.at_level(logging.INFO):
            await start(tiny_spec, Engines(student), trainer, teacher_server.port)
        [whole] = re.findall(r"preflight: all checks passed in ([0-9.]+) s", caplog.text)
        if float(whole) < SECONDS:
            break
    said = [m for m in caplog.messages if m.startswith("preflight: ") and " s): " in m]
    names = [m.removeprefix("preflight: ").split(" ")[0] for m in said]
    assert names == [
        "ObjectiveDistils", "SameVocabulary", "EngineGenerates", "ResponsesEnd", "TeacherSane", "ReplicasAgree",
        "TeacherDiffers", "EngineMatchesTrainer",
    ]  # fmt: skip
    print(f"\npreflight of a tiny pair: {whole} s;", "; ".join(m.removeprefix("preflight: ") for m in said))
    assert float(whole) < SECONDS


async def test_an_engine_that_kept_other_weights_is_named(
    tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any, tiny_model: TinyModel
) -> None:
    await student.load_folder(str(tiny_model(2)), 0, 60)
    with pytest.raises(PreflightFailed, match=r"EngineMatchesTrainer: .*weights in an engine are not the trainer's"):
        await start(tiny_spec, Engines(student), trainer, teacher_server.port)


@pytest.mark.parametrize(
    ("engines", "said"),
    [
        ({"temperature": 0.6}, "EngineMatchesTrainer: .* or it samples at another temperature"),
        ({"change": without_logprobs}, "EngineMatchesTrainer: .* differ by"),
        ({"change": finished}, r"ResponsesEnd: .* response of 16 tokens is finished, .*rollout\.stopTokenIds"),
    ],
    ids=["scaled by a temperature", "previous log-probabilities 0", "cut off and finished"],
)
async def test_faults_of_the_engine_are_named(
    engines: dict[str, Any], said: str, tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any
) -> None:
    with pytest.raises(PreflightFailed, match=said):
        await start(tiny_spec, Engines(student, **engines), trainer, teacher_server.port)


def entries(answer: dict[str, Any]) -> list[Any]:
    """[log-prob, id, text] of the positions that were scored; none before the server has answered."""
    return list(answer["meta_info"]["input_token_logprobs"]) if answer else []


def shifted(body: dict[str, Any], answer: dict[str, Any]) -> None:
    """The scores of position t - 1 for those of t."""
    if scored := entries(answer):
        answer["meta_info"]["input_token_logprobs"] = [[None, 0, None], *scored[:-1]]


def all_for_none(body: dict[str, Any], answer: dict[str, Any]) -> None:
    """scores[-0:] of an empty slice."""
    if not answer:
        body["logprob_start_len"] = 0


def tokenised_again(body: dict[str, Any], answer: dict[str, Any]) -> None:
    """A text has more than one row of tokens."""
    if not answer and len(body["input_ids"]) > 4:
        body["input_ids"] = [*body["input_ids"][:-2], *reversed(body["input_ids"][-2:])]
        body["input_ids"][-1] = (body["input_ids"][-1] + 1) % 300


def read_as_zero(body: dict[str, Any], answer: dict[str, Any]) -> None:
    if scored := entries(answer):
        answer["meta_info"]["input_token_logprobs"] = [scored[0], *([0.0, i, t] for _, i, t in scored[1:])]


def minus_infinity(body: dict[str, Any], answer: dict[str, Any]) -> None:
    """What padding is masked with comes as null."""
    if scored := entries(answer):
        answer["meta_info"]["input_token_logprobs"] = [*scored[:-1], [None, *scored[-1][1:]]]


def constant(body: dict[str, Any], answer: dict[str, Any]) -> None:
    if scored := entries(answer):
        answer["meta_info"]["input_token_logprobs"] = [scored[0], *([-6.2, i, t] for _, i, t in scored[1:])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shifted, "TeacherScores: .*wrong_tokens: token 0 of the response was sent as"),
        (all_for_none, "TeacherScores: .*wrong_count: .* scores came for"),
        (tokenised_again, "TeacherScores: .*wrong_tokens"),
        (read_as_zero, "TeacherSane: .* writes 0 for a log-probability that it did not compute; serve it by another"),
        (minus_infinity, "TeacherScores: .*not_finite"),
        (constant, "TeacherSane: .* the same -6.20 nats, whatever they are"),
    ],
)
async def test_faults_of_the_teachers_answers_are_named(
    change: Change, said: str, tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any
) -> None:
    async with between([teacher_server.port], change) as port:
        with pytest.raises(PreflightFailed, match=said):
            await start(tiny_spec, Engines(student), trainer, port)


async def test_a_teacher_whose_path_fell_back_to_the_student_is_named(
    tiny_spec: Spec, student: Any, trainer: Trainer
) -> None:
    with pytest.raises(
        PreflightFailed, match=r"TeacherDiffers: .* there is nothing to learn; is its model the student"
    ):
        await start(tiny_spec, Engines(student), trainer, port_of(student))


async def test_one_address_before_two_models_is_named(
    tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any
) -> None:
    """Two real servers behind a real balancer. An odd number of requests for each probe would meet one of them only."""
    endpoint = {"endpoint": {"url": "http://127.0.0.1:1", "protocol": "sglang", "vocabularySize": 512}}
    async with between([teacher_server.port, port_of(student)]) as port:
        endpoint["endpoint"]["url"] = f"http://127.0.0.1:{port}"
        spec = spec_of(Path(tiny_spec.student.model), Path("/t"), teacher=endpoint)
        with pytest.raises(PreflightFailed, match=r"ReplicasAgree: .* twice at .* must hold the same weights"):
            await start(spec, Engines(student), trainer, port)


@pytest.fixture(scope="session")
def quantised(tiny_model: TinyModel) -> Any:
    """The teacher with weights rounded to 8 bits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(1), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    return model


async def test_one_replica_in_eight_bits_is_named(
    tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any, quantised: Any
) -> None:
    def rounded(body: dict[str, Any], answer: dict[str, Any]) -> None:
        if len(scored := entries(answer)) < 2:
            return
        count = len(scored) - 1
        values = hf_logprobs(quantised, body["input_ids"][:-count], body["input_ids"][-count:])
        texts = [[v, *one[1:]] for v, one in zip(values, scored[1:], strict=True)]
        answer["meta_info"]["input_token_logprobs"] = [scored[0], *texts]

    async with between([teacher_server.port], rounded) as port:
        said = r"ReplicasAgree: .* at 127\.0\.0\.1:\d+ and at 127\.0\.0\.1:\d+, and the two differ by .* same precision"
        with pytest.raises(PreflightFailed, match=said):
            await start(tiny_spec, Engines(student), trainer, teacher_server.port, port)


OBJECTIVES: list[dict[str, Any]] = [
    {"support": "sampled-token"},
    {"support": "top-k", "topK": 8},
    {"support": "top-k", "divergence": "forward-kl"},
    {"support": "top-k", "divergence": "jsd", "jsdBeta": 0.3},
]


async def healthy(seeds: Iterator[int], engine: Any, trainer: Trainer, port: int, tiny_spec: Spec) -> int:
    """How many starts passed, with other prompts, seeds and objectives; the first alarm is raised."""
    starts = 0
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 200, (4,), generator=draw).tolist()
        prompts = [torch.randint(3, 384, (n,), generator=draw).tolist() for n in lengths]
        models = Path(tiny_spec.student.model), Path(tiny_spec.teacher.model or "")
        spec = spec_of(*models, seed=seed, objective=OBJECTIVES[seed % len(OBJECTIVES)])
        await start(spec, Engines(engine), trainer, port, prompts=prompts)
        starts += 1
    return starts


async def test_a_dozen_healthy_starts_raise_no_alarm(
    tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any
) -> None:
    assert await healthy(iter(range(12)), student, trainer, teacher_server.port, tiny_spec) == 12


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_two_hundred_healthy_starts_raise_no_alarm(
    tiny_spec: Spec, student: Any, trainer: Trainer, teacher_server: Any
) -> None:
    seeds = soak.seeds(0.05, first=12, at_least=200)
    starts = await healthy(seeds, student, trainer, teacher_server.port, tiny_spec)
    print(f"\n{starts} healthy starts without an alarm", flush=True)
