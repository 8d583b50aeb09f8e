"""What the preflight checks of an attempt that goes on from a checkpoint, and what it leaves as it was."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import spec_of, tiny_tokenizer

from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import Response
from distill_workers.failures import PreflightFailed
from distill_workers.run.preflight.preflight import preflight
from distill_workers.teacher.protocol import Scores

SPEC = spec_of(Path("/student"), Path("/teacher"))
TOKENIZER = tiny_tokenizer()
SAID = [200, 201, 202, TOKENIZER.eos_token_id]
STUDENT, OTHER, SURE = (-1.0, -0.7, -1.3, -0.2), (-0.5, -2.0, -1.5, -0.1), (0.0, 0.0, 0.0, 0.0)


class Engines:
    """Engines whose student gives the tokens of its one response these log-probabilities, nats."""

    ends = ()

    def __init__(self, *logprobs: float) -> None:
        self._logprobs = list(logprobs)

    def count_placed(self) -> int:
        return 1

    async def sample(self, prompt_ids: list[int], *, seeds: list[int], **_: Any) -> list[Response]:
        return [Response(SAID, self._logprobs, [3] * len(SAID), False) for _ in seeds]


class Trainer:
    def __init__(self, *logprobs: float) -> None:
        self._logprobs = list(logprobs)

    async def logprobs(self, samples: list[Sample]) -> list[list[float]]:
        return [self._logprobs for _ in samples]


class Teacher:
    teacher = SPEC.all_teachers[0]
    vocabulary = len(TOKENIZER)
    translator = None

    def __init__(self, *logprobs: float, shift: int = 0) -> None:
        self._logprobs, self._shift = list(logprobs), shift

    async def token_texts(self, ids: list[int]) -> list[str]:
        return [TOKENIZER.decode([(i + self._shift) % self.vocabulary]) for i in ids]

    async def score(self, *_: Any) -> Scores:
        return Scores(self._logprobs, None, None)

    async def score_everywhere(self, *_: Any) -> list[tuple[str, Scores]]:
        return [("127.0.0.1:1", await self.score())]


def used_cursor() -> Cursor:
    cursor = Cursor([Prompt(i, [60 + i], "") for i in range(5)], seed=0, shuffle=True)
    cursor.next(8)
    return cursor


async def check(
    step: int, teacher: Teacher, engines: Engines | None = None, trainer: Trainer | None = None, cursor: Any = None
) -> None:
    class Teachers:
        pools = {"": teacher}  # noqa: RUF012
        stores = {}  # noqa: RUF012

    of: Any = (trainer or Trainer(*STUDENT), engines or Engines(*STUDENT), Teachers())
    await preflight(SPEC, TOKENIZER, *of, cursor or used_cursor(), step=step)


async def test_an_attempt_that_goes_on_takes_no_prompt_and_no_random_number() -> None:
    cursor = used_cursor()
    before = cursor.state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    await check(3, Teacher(*OTHER), cursor=cursor)
    assert before == (
        cursor.state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("logprobs", "said"),
    [(STUDENT, "TeacherDiffers: .* nothing to learn"), (SURE, "TeacherSane: .* probability 1")],
    ids=["as its teacher", "and sure"],
)
async def test_a_trained_student_may_be_as_its_teacher_is_and_an_untrained_one_may_not(
    logprobs: tuple[float, ...], said: str
) -> None:
    """A teacher that is sure of its answers gives those of its student probability 1."""
    parts = Teacher(*logprobs), Engines(*logprobs), Trainer(*logprobs)
    await check(3, *parts)
    with pytest.raises(PreflightFailed, match=said):
        await check(0, *parts)


async def test_an_engine_without_the_weights_of_the_step_is_named_whatever_the_step() -> None:
    for step in (0, 3):
        with pytest.raises(PreflightFailed, match=r"EngineMatchesTrainer: .*not the trainer's"):
            await check(step, Teacher(*OTHER), trainer=Trainer(*OTHER))


async def test_a_run_that_goes_on_is_not_ended_by_what_its_kernels_differ_by() -> None:
    slightly = [x - 0.003 for x in STUDENT]
    await check(3, Teacher(*OTHER), trainer=Trainer(*slightly))
    with pytest.raises(PreflightFailed, match="EngineMatchesTrainer"):
        await check(0, Teacher(*OTHER), trainer=Trainer(*slightly))


async def test_a_teacher_that_was_changed_for_one_of_other_tokens_is_named_by_the_next_attempt() -> None:
    with pytest.raises(PreflightFailed, match="SameVocabulary: token"):
        await check(3, Teacher(*OTHER, shift=1))
    with pytest.raises(PreflightFailed, match=r"TeacherSane: .* far below chance"):
        await check(3, Teacher(-30.0, -31.0, -40.0, -50.0))
