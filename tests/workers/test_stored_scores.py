"""A run with a store of scores: what is asked of the teacher, what is trained on, and what the preflight says of it."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest
from aiohttp import web
from runs import arithmetic
from test_rollout_pipeline import Engines, Tokenizer
from test_teacher_pool import Fake, good, packed

from distill_api.job import parse_job
from distill_api.protocol import ExitCode
from distill_api.spec.job_spec import Spec
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.failures import ConfigurationError, PreflightFailed
from distill_workers.metrics import Metrics
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.run.exit_report import classify_error
from distill_workers.run.preflight import preflight as order
from distill_workers.run.preflight import teacher as checks
from distill_workers.run.preflight.teacher import scores_stored, stored_scores_agree
from distill_workers.run_folder.identity import fingerprint
from distill_workers.teacher.local_servers import TeacherServers
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.protocol import BadScore, Scores
from distill_workers.teacher.stored_scores.job_stores import stores_of_job
from distill_workers.teacher.teachers import Teachers
from distill_workers.teacher.token_ids import NOBODY

TOKENS = 128
PROMPTS = [Prompt(i, [i, 7], f"{i}?", response=f"={i}", teacher="teacher") for i in range(8)]
TOP_K = 4


class Teacher:
    """Never gives the same bits twice, as one whose batches differ, unless `steady`."""

    def __init__(self, steady: bool = False, shift: float = 0.0, fails: int = 0) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []
        self._random, self._steady, self._shift, self.fails = np.random.default_rng(5), steady, shift, fails
        self.teacher = parse_job(arithmetic(Path("/o"), "t")).spec.all_teachers[0]

    async def prefetch(self, prompt_ids: list[int]) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        assert top_k == TOP_K
        self.asked.append((prompt_ids, response_ids))
        if self.fails:
            self.fails -= 1
            raise BadScore("not_finite", "a log-probability is nan")
        random = np.random.default_rng([*prompt_ids, *response_ids]) if self._steady else self._random
        shape = (len(response_ids), top_k)
        logprobs = (-random.random(len(response_ids)) - self._shift).tolist()
        ids = random.integers(0, TOKENS, shape, dtype=np.int32)
        return Scores(logprobs, ids, -random.random(shape).astype(np.float32))


def spec_with(output: Path, how: str = "cached", share: float = 1.0, **objective: Any) -> Spec:
    chosen = {"support": "top-k", "topK": TOP_K, "datasetShare": share, "teacherLogprobs": how, **objective}
    prompts = {"path": "/prompts.jsonl", "responseField": "response"}
    rollout = {"promptsPerStep": 4, "samplesPerPrompt": 1}
    manifest = arithmetic(output, "stored", objective=chosen, data={"prompts": prompts}, rollout=rollout, evaluation=[])
    manifest["spec"]["teacher"] = {"model": "/gone/teacher"}
    return parse_job(manifest).spec


class Attempt:
    """One process of a run: a pipeline over the store, with its metrics; without a teacher where that is None."""

    def __init__(self, spec: Spec, teacher: Any, prompts: list[Prompt] | None = None) -> None:
        self.spec, self.metrics = spec, Metrics()
        pools: Any = {} if teacher is None else {"teacher": teacher}
        self.teachers = Teachers(pools)
        self.teachers.stores = stores_of_job(spec, TOKENS, self.metrics)
        self.cursor = Cursor(prompts or PROMPTS, seed=0, shuffle=True)
        parts: Any = (Engines(set()), self.teachers)
        self.rollouts = RolloutPipeline(spec, self.cursor, *parts, {}, Tokenizer(), self.metrics)

    async def steps(self, begin: int, end: int) -> list[Sample]:
        batches = [self.rollouts.take(step, end) for step in range(begin, end)]
        return [s for batch in batches async for part in batch.arrivals(in_order=True) for s in part]

    def results(self) -> dict[str, float]:
        lines = [x for x in self.metrics.text().decode().splitlines() if x.startswith("distill_stored_scores_total{")]
        return {line.split('result="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}

    def teacher_tokens(self) -> float:
        name = 'distill_tokens_total{kind="teacher"} '
        return sum(float(x.removeprefix(name)) for x in self.metrics.text().decode().splitlines() if x.startswith(name))


async def attempt(spec: Spec, teacher: Any, begin: int, end: int, **options: Any) -> tuple[Any, Attempt]:
    """Do some steps and end as a trainer does."""
    made = Attempt(spec, teacher, **options)
    await made.teachers.start()
    samples = await made.steps(begin, end)
    await made.teachers.close()
    return samples, made


def learned(samples: list[Sample]) -> dict[int, tuple[Any, ...]]:
    """All that a step takes from the teacher, to the bit, by the prompt."""
    found: dict[int, tuple[Any, ...]] = {}
    for s in samples:
        assert s.teacher_top_ids is not None and s.teacher_top_logprobs is not None
        bits = (np.array(s.teacher_logprobs).tobytes(), s.teacher_top_ids.tobytes(), s.teacher_top_logprobs.tobytes())
        shapes = (s.teacher_top_ids.shape, s.teacher_top_ids.dtype, s.teacher_top_logprobs.dtype)
        assert found.setdefault(s.prompt_index, (*bits, *shapes)) == (*bits, *shapes), "the same in each epoch"
    return found


async def test_a_second_epoch_makes_no_request_and_has_the_same_bits(tmp_path: Path) -> None:
    teacher, spec = Teacher(), spec_with(tmp_path)
    first = Attempt(spec, teacher)
    await first.teachers.start()
    one = await first.steps(0, 2)
    assert len(teacher.asked) == len(PROMPTS) and first.teacher_tokens() == 3 * len(PROMPTS)
    two = await first.steps(2, 6)
    assert len(teacher.asked) == len(PROMPTS) and first.teacher_tokens() == 3 * len(PROMPTS)
    assert first.results() == {"miss": 8.0, "hit": 16.0}
    assert len(learned([*one, *two])) == len(PROMPTS) and len(two) == 16
    await first.teachers.close()
    later, second = await attempt(spec, teacher, 0, 2)
    assert len(teacher.asked) == len(PROMPTS) and second.results() == {"hit": 8.0}
    assert learned(later) == learned(one), "in another process"


async def test_over_http_a_second_epoch_sends_no_request_and_has_the_bits_of_the_answers(tmp_path: Path) -> None:
    """Also where the teacher's likeliest tokens are none of the student's."""
    server, spec, random = Fake(), spec_with(tmp_path), np.random.default_rng(3)

    async def answer(body: dict[str, Any]) -> web.Response:
        message = good(body)
        info = message["meta_info"]
        for entry in info["input_token_logprobs"][1:]:
            entry[0] = -float(random.random(dtype=np.float32))
        count = (len(info["input_token_logprobs"]) - 1) * TOP_K
        info["input_top_logprobs_idx_flat_b64"] = packed(random.integers(0, 2 * TOKENS, count, dtype=np.int32))
        info["input_top_logprobs_val_flat_b64"] = packed(-random.random(count, dtype=np.float32))
        return web.json_response(message)

    server.answer = answer
    await server.start()
    try:
        pool = TeacherPool(f"127.0.0.1:{server.port}", spec, Metrics())
        pool.student_tokens = TOKENS
        live, _ = await attempt(spec, pool, 0, 4)  # both epochs are in flight at once
        assert len(server.bodies) == len(PROMPTS)
        assert any((s.teacher_top_ids == NOBODY).any() for s in live)
        again, _ = await attempt(spec, pool, 0, 4)
        assert len(server.bodies) == len(PROMPTS) and learned(again) == learned(live)
    finally:
        await server.stop()


async def test_without_a_store_each_epoch_is_scored(tmp_path: Path) -> None:
    teacher = Teacher(steady=True)
    samples, made = await attempt(spec_with(tmp_path, "live"), teacher, 0, 4)
    assert len(teacher.asked) == 16 and made.results() == {} and list(tmp_path.iterdir()) == []
    assert len(learned(samples)) == len(PROMPTS)


async def test_a_run_that_was_killed_scores_again_what_was_not_written_and_goes_on_with_the_same_bits(
    tmp_path: Path,
) -> None:
    teacher, spec = Teacher(steady=True), spec_with(tmp_path)
    whole, _ = await attempt(spec_with(tmp_path / "whole"), teacher, 0, 4)
    first = Attempt(spec, teacher)
    await first.teachers.start()
    await first.steps(0, 1)
    await first.teachers.stores["teacher"].flush()
    await first.steps(1, 2)  # killed here
    teacher.asked.clear()
    resumed, made = await attempt(spec, teacher, 0, 4)
    assert len(teacher.asked) == 4 and made.results() == {"hit": 12.0, "miss": 4.0}
    assert learned(resumed) == learned(whole)


async def test_the_students_own_responses_are_not_kept(tmp_path: Path) -> None:
    """They would fill the volume, and nobody says them again."""
    teacher, spec = Teacher(), spec_with(tmp_path, share=0.5)
    samples, made = await attempt(spec, teacher, 0, 4)
    of_data = {s.prompt_index for s in samples if s.supervised}
    assert len(samples) == 16 and sum(s.supervised for s in samples) == 8
    assert made.results()["miss"] == len(made.teachers.stores["teacher"]) == len(of_data)
    assert len(teacher.asked) == 8 + len(of_data)


async def test_what_the_teacher_scored_unusably_is_asked_again(tmp_path: Path) -> None:
    teacher, spec = Teacher(fails=1), spec_with(tmp_path)
    samples, made = await attempt(spec, teacher, 0, 4)
    assert (len(samples), len(teacher.asked)) == (15, 9) and made.results() == {"miss": 9.0, "hit": 7.0}


@pytest.mark.parametrize(
    "changes",
    [{"ids": [1, 8]}, {"privileged_ids": [3, 7]}, {"response": "=0 "}],
    ids=["prompt", "teacher's", "response"],
)
async def test_another_prompt_of_student_or_teacher_or_another_response_is_scored(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    teacher, spec = Teacher(), spec_with(tmp_path)
    await attempt(spec, teacher, 0, 2)
    changed = [dataclasses.replace(PROMPTS[0], **changes), *PROMPTS[1:]]
    _, made = await attempt(spec, teacher, 0, 2, prompts=changed)
    assert len(teacher.asked) == 9 and made.results() == {"hit": 7.0, "miss": 1.0}


async def test_precomputed_scores_need_no_teacher_and_have_the_bits_of_the_live_one(tmp_path: Path) -> None:
    live, _ = await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    offline, made = await attempt(spec_with(tmp_path, "precomputed"), None, 0, 6)
    assert learned(offline) == learned(live) and made.results() == {"hit": 24.0}


def teachers_of(spec: Spec, **environment: str) -> Teachers:
    return Teachers.of_job(spec, environment, Metrics())


def test_a_job_with_precomputed_scores_has_neither_servers_nor_addresses(tmp_path: Path) -> None:
    spec = spec_with(tmp_path, "precomputed")
    assert teachers_of(spec).pools == {} and spec.served_teachers == []
    assert TeacherServers(spec, tmp_path).addresses == ""
    with pytest.raises(ConfigurationError, match="has no address of teacher"):
        teachers_of(spec_with(tmp_path))


def test_where_the_scores_come_from_makes_no_other_run(tmp_path: Path) -> None:
    """So a run may go on from what it stored, once its teacher is gone."""
    jobs = []
    for how in ("live", "cached", "precomputed"):
        manifest = arithmetic(tmp_path, "stored", evaluation=[])
        manifest["spec"]["objective"] |= {"support": "top-k", "datasetShare": 1, "teacherLogprobs": how}
        manifest["spec"]["data"]["prompts"]["responseField"] = "answer"
        jobs.append(parse_job(manifest))
    assert len({fingerprint(job) for job in jobs}) == 1


async def stored(spec: Spec, prompts: list[Prompt] = PROMPTS, counted: Any = {}) -> None:  # noqa: B006
    """Check a store of `spec`, which counts neither hits nor misses."""
    made = Attempt(spec, None, prompts)
    await made.teachers.start()
    try:
        await scores_stored(spec, prompts, Tokenizer(), made.teachers.stores["teacher"])
    finally:
        assert made.results() == counted


async def test_the_preflight_names_the_responses_without_scores(tmp_path: Path) -> None:
    offline = spec_with(tmp_path, "precomputed")
    with pytest.raises(
        PreflightFailed, match=r"^ScoresStored: 8 of 8 responses .* prompts 0 \(response =0…\), .* and 3 more"
    ):
        await stored(offline)
    await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    await stored(offline)
    more = [*PROMPTS, Prompt(8, [8, 7], "8?", response="=8 of course, since that is what it is", teacher="teacher")]
    with pytest.raises(PreflightFailed) as refused:
        await stored(offline, more)
    assert refused.value.code == ExitCode.CONFIGURATION
    [folder] = (tmp_path / "teacher_scores").iterdir()
    assert str(refused.value) == (
        "ScoresStored: 1 of 9 responses of the data set have no undamaged scores of /gone/teacher (float32, topK 4, "
        f"128 tokens) in {folder}: those of the prompts 8 (response =8 of course, since that is wh…), counted from 0; "
        "run the job once, over the whole data set, with objective.teacherLogprobs cached"
    )


async def test_the_preflight_says_whose_scores_are_there_instead(tmp_path: Path) -> None:
    await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    with pytest.raises(
        PreflightFailed, match=r"what is stored there is of /gone/teacher \(float32, topK 4, 128 tokens\); run"
    ):
        await stored(spec_with(tmp_path, "precomputed", topK=5))


async def test_a_damaged_score_is_missing_before_the_first_step_and_ends_a_later_one(tmp_path: Path) -> None:
    await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    offline = spec_with(tmp_path, "precomputed")
    made = Attempt(offline, None)
    await made.teachers.start()
    [segment] = tmp_path.glob("teacher_scores/*/*.scores")
    damaged = bytearray(segment.read_bytes())
    damaged[-1] ^= 1
    segment.write_bytes(damaged)
    with pytest.raises(ConfigurationError, match=r"has not every score any more .* once with objective\.teacherLog"):
        await made.steps(0, 2)
    with pytest.raises(PreflightFailed, match="ScoresStored: 1 of 8 "):
        await stored(offline, counted={"refused": 1.0})


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (0.04, False), (0.06, True)])
async def test_a_teacher_that_scores_otherwise_than_when_it_was_stored_is_refused(
    tmp_path: Path, shift: float, refused: bool
) -> None:
    """As where an endpoint serves another model by now; kernels differ by less."""
    spec = spec_with(tmp_path)
    await attempt(spec, Teacher(steady=True), 0, 2)
    made, now = Attempt(spec, None), Teacher(steady=True, shift=shift)
    await made.teachers.start()
    check: Any = stored_scores_agree(spec, PROMPTS, Tokenizer(), made.teachers.stores["teacher"], now)  # type: ignore[arg-type]
    if refused:
        with pytest.raises(PreflightFailed, match=r"^StoredScoresAgree: .* by 0\.0600 nats .* remove that folder"):
            await check
    else:
        assert await check == []
    assert len(now.asked) == 2


async def agreement(made: Attempt, prompts: list[Prompt], teacher: Any) -> list[str]:
    """Open the store of an attempt, and return the notes of StoredScoresAgree."""
    await made.teachers.start()
    return await stored_scores_agree(made.spec, prompts, Tokenizer(), made.teachers.stores["teacher"], teacher)


async def test_stored_responses_are_sought_among_those_of_all_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first source may be one that has just been added."""
    monkeypatch.setattr(checks, "LOOKED_UP", 40)
    spec = spec_with(tmp_path)
    await attempt(spec, Teacher(steady=True), 0, 2)
    added = [Prompt(i, [i, 9], f"{i}!", response=f"-{i}", teacher="teacher") for i in range(40)]
    known = [dataclasses.replace(p, index=40 + i) for i, p in enumerate(PROMPTS)]
    with pytest.raises(PreflightFailed, match="StoredScoresAgree"):
        await agreement(Attempt(spec, None), [*added, *known], Teacher(steady=True, shift=1))


async def test_a_store_of_which_nothing_was_compared_is_noted(tmp_path: Path) -> None:
    spec, teacher = spec_with(tmp_path), Teacher(steady=True)
    await attempt(spec, teacher, 0, 2)
    teacher.asked.clear()
    others = [Prompt(i, [i, 9], f"{i}!", response=f"-{i}", teacher="teacher") for i in range(5)]
    [note] = await agreement(Attempt(spec, None), others, Mock(teacher=Mock(title="/gone/teacher")))
    assert note.startswith("StoredScoresAgree: none of 5 responses that were drawn from the data set has undamaged ")
    assert "among the 8 in " in note and teacher.asked == []


async def test_precomputed_scores_are_all_looked_up_and_some_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million of them on a network's volume would take an hour, in each attempt."""
    await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    made = Attempt(spec_with(tmp_path, "precomputed"), None)
    await made.teachers.start()
    store = made.teachers.stores["teacher"]
    monkeypatch.setattr(checks, "READ_RESPONSES", 3)
    read = AsyncMock(wraps=store.read)
    monkeypatch.setattr(store, "read", read)
    await scores_stored(made.spec, PROMPTS, Tokenizer(), store)
    assert read.await_count == 3
    more = [*PROMPTS, *(Prompt(8 + i, [i, 9], "?", response="!", teacher="teacher") for i in range(4))]
    with pytest.raises(PreflightFailed, match=r"ScoresStored: 4 of 12 .* prompts 8 .* 9 .* 10 .* 11 "):
        await scores_stored(made.spec, more, Tokenizer(), store)


async def test_a_volume_that_does_not_answer_is_tried_again_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with the scores: exit code 78 would end the job."""
    await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    made = Attempt(spec_with(tmp_path, "precomputed"), None)
    await made.teachers.start()

    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("distill_workers.teacher.stored_scores.store.read_entry", stale)
    for work in (scores_stored(made.spec, PROMPTS, Tokenizer(), made.teachers.stores["teacher"]), made.steps(0, 2)):
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)) as raised:
            await work
        assert classify_error(raised.value, None)[0] == ExitCode.TEMPORARY
    assert made.results() == {}


async def test_nothing_is_asked_of_a_teacher_of_which_nothing_is_stored(tmp_path: Path) -> None:
    spec, teacher = spec_with(tmp_path), Teacher()
    made = Attempt(spec, None)
    await made.teachers.start()
    await stored_scores_agree(spec, PROMPTS, Tokenizer(), made.teachers.stores["teacher"], teacher)  # type: ignore[arg-type]
    assert teacher.asked == []


async def test_the_preflight_of_precomputed_scores_asks_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    made = Attempt(spec_with(tmp_path, "precomputed"), None)
    await made.teachers.start()
    for name in ("probe", "responses_end", "engine_matches_trainer"):
        monkeypatch.setattr(order, name, AsyncMock(return_value=[]))
    rest: Any = Mock()
    with caplog.at_level("INFO"):
        await order.preflight(made.spec, Tokenizer(), rest, rest, made.teachers, made.cursor)
    said = [record.args[0] for record in caplog.records if isinstance(record.args, tuple) and len(record.args) == 4]
    assert said == ["ObjectiveDistils", "ScoresStored", "EngineGenerates", "ResponsesEnd", "EngineMatchesTrainer"]


async def test_the_folder_says_whose_scores_it_has(tmp_path: Path) -> None:
    await attempt(spec_with(tmp_path), Teacher(), 0, 2)
    [label] = tmp_path.glob("teacher_scores/*/teacher.json")
    assert json.loads(label.read_text()) == {
        "teacher": "/gone/teacher", "weights": "", "precision": "float32", "engine_args": [], "top_k": 4,
        "student_tokens": 128, "models": ["/gone/teacher"],
    }  # fmt: skip
