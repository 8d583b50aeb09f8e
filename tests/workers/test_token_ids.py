"""Token ids that one of two models lacks: none is sent to a server, and none is anybody's support."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from conftest import spec_of

from distill_api.spec.job_spec import Spec
from distill_workers.failures import PreflightFailed
from distill_workers.metrics import Metrics
from distill_workers.run.preflight.vocabulary import same_vocabulary, top_k_fits
from distill_workers.teacher.pool import BadScore, TeacherPool
from distill_workers.teacher.protocol import Scores
from distill_workers.teacher.token_ids import NOBODY, AbsentTokens, of_student

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Words:
    """A tokenizer of whole words: the id of "wN" is N."""

    def __init__(self, size: int, text: str = "w") -> None:
        self.size, self.text = size, text
        self.all_special_ids = [0]

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"{self.text}{i}" for i in ids)


class Fragile:
    """An endpoint of SGLang's protocol that dies of an id without a row, as those before 0.5.13 do."""

    def __init__(self, rows: int, text: str = "w", takes_text: bool = True) -> None:
        self.rows, self.text, self.takes_text, self.alive = rows, text, takes_text, True
        self.longest = 0

    async def start(self) -> str:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "text" in body:
            if not self.takes_text:
                return web.json_response({"error": "skip_tokenizer_init"}, status=400)
            ids = [int(body["text"][1:])] if int(body["text"][1:]) < self.rows else [1]
        else:
            ids = body["input_ids"]
        self.longest = max(self.longest, *ids)
        self.alive = self.alive and self.longest < self.rows
        entries = [[-1.0, i, f"{self.text}{i}"] for i in ids[body["logprob_start_len"] :]]
        return web.json_response({"meta_info": {"input_token_logprobs": entries}})


async def pool_of(server: Fragile, **endpoint: Any) -> TeacherPool:
    spec = spec_of(Path("/s"), Path("/t"), teacher={"endpoint": {"url": await server.start(), **endpoint}})
    pool = TeacherPool("", spec, Metrics())
    await pool.start(20)
    return pool


async def closed(pool: TeacherPool, server: Fragile) -> None:
    await pool.close()
    await server.runner.cleanup()


async def test_an_endpoint_with_fewer_tokens_than_the_student_is_refused_and_lives() -> None:
    server = Fragile(rows=40)
    pool = await pool_of(server)
    with pytest.raises(
        PreflightFailed, match=r"SameVocabulary: .*no token id above 1 .*student has 100; .*vocabularySize"
    ):
        await same_vocabulary(Words(100), pool)
    assert server.alive
    await closed(pool, server)


async def test_an_endpoint_that_names_the_students_last_token_is_compared_over_all_of_them() -> None:
    server = Fragile(rows=128)
    pool = await pool_of(server)
    await same_vocabulary(Words(100), pool)
    assert server.alive and server.longest == 99
    with pytest.raises(PreflightFailed, match=r"token \d+ is 'v\d+' to the student and 'w\d+' to teacher"):
        await same_vocabulary(Words(100, "v1"), pool)
    await closed(pool, server)


async def test_an_endpoint_that_takes_no_text_needs_its_vocabulary_stated() -> None:
    server = Fragile(rows=128, takes_text=False)
    pool = await pool_of(server)
    with pytest.raises(PreflightFailed, match=r"spec\.teacher\.endpoint\.vocabularySize"):
        await same_vocabulary(Words(100), pool)
    await closed(pool, server)
    stated = await pool_of(server, vocabularySize=128)
    await same_vocabulary(Words(100), stated)
    await closed(stated, server)


async def test_no_id_beyond_a_stated_vocabulary_is_sent_nor_one_beyond_the_students_tokens_without() -> None:
    server = Fragile(rows=40)
    stated = await pool_of(server, vocabularySize=40)
    with pytest.raises(PreflightFailed, match="token 99 is outside the teacher's vocabulary of 40"):
        await same_vocabulary(Words(100), stated)
    with pytest.raises(BadScore, match="outside_vocabulary: token 40"):
        await stated.score([1], [40], None)
    await closed(stated, server)
    unstated = await pool_of(server)
    unstated.student_tokens = 30
    with pytest.raises(BadScore, match="outside_vocabulary: token 35"):
        await unstated.score([1], [35], None)
    assert (await unstated.score([1], [29], None)).logprobs == [-1.0]
    assert server.alive
    await closed(unstated, server)


async def test_a_likeliest_token_that_the_student_lacks_is_nobodys_and_the_others_stay() -> None:
    ids = np.array([[3, 151_700], [5, 7]], dtype=np.int32)
    scores = Scores([-1.0, -2.0], ids, np.zeros((2, 2), dtype=np.float32))
    found = of_student(scores, 151_665).top_ids
    assert found is not None and found.tolist() == [[3, NOBODY], [5, 7]] and found.dtype == np.int32
    assert of_student(scores, 151_701) is scores and of_student(scores, None) is scores


async def test_the_probability_of_tokens_that_the_student_lacks_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    logprobs = np.log(np.array([[0.5, 0.25], [0.5, 0.4]], np.float32))
    scores = Scores([-1.0, -1.0], np.array([[3, 900], [5, 7]], np.int32), logprobs)
    absent = AbsentTokens("large")
    with caplog.at_level("INFO"):
        assert absent.left_out(scores, None) is absent.left_out(scores, 901) is scores and caplog.messages == []
        for _ in range(2):
            found = absent.left_out(scores, 900).top_ids
            assert found is not None and found.tolist() == [[3, NOBODY], [5, 7]]
    [said] = caplog.messages
    assert said.startswith("teacher large: ") and "has 1 of 4 likeliest ones, with 0.12 of the teacher's" in said


async def test_more_likeliest_tokens_than_there_are_is_refused_in_one_sentence() -> None:
    def spec(k: int) -> Spec:
        return spec_of(Path("/s"), Path("/t"), objective={"support": "top-k", "topK": k})

    pool = TeacherPool("127.0.0.1:1", spec(16), Metrics())
    await top_k_fits(spec(16), 16, pool)
    with pytest.raises(PreflightFailed, match=r"TopKFits: objective.topK is 17, and .* has 16 tokens"):
        await top_k_fits(spec(17), 16, pool)
    pool._protocol.vocabulary = 8
    with pytest.raises(PreflightFailed, match=r"objective.topK is 16, and teacher teacher \(/t\) has 8 tokens"):
        await top_k_fits(spec(16), 16, pool)
