"""Teachers that somebody else runs: real SGLang servers as endpoints of both protocols, keys, and replicas that
disagree."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from conftest import TinyModel, hf_logprobs, spec_of
from transformers import AutoTokenizer

from distill_api.spec.job_spec import Spec
from distill_workers.data.sample import Sample
from distill_workers.failures import PreflightFailed
from distill_workers.metrics import Metrics
from distill_workers.run.preflight.replicas import replicas_agree
from distill_workers.run.preflight.teacher import teacher_answers, teacher_is_sane
from distill_workers.run.preflight.vocabulary import same_vocabulary
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.protocol import BadScore

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT, RESPONSE = list(range(60, 110)), [200, 301, 17, 2]
PROBE = [Sample(0, 0, PROMPT, RESPONSE, [-1.0] * 4, [0] * 4, False), Sample(1, 0, [9], [17], [-1.0], [0], False)]
KEY = "key-that-no-log-may-show"


def external(url: str, protocol: str = "sglang", **changes: Any) -> Spec:
    endpoint = {"url": url, "protocol": protocol, **({"model": "big"} if protocol == "openai" else {})}
    return spec_of(Path("/s"), Path("/t"), **{"teacher": {"endpoint": endpoint}, **changes})


async def pool_of(spec: Spec, address: str = "", **options: Any) -> TeacherPool:
    pool = TeacherPool(address, spec, Metrics(), **options)
    await pool.start(60)
    return pool


@pytest.fixture(scope="module")
def other_server(tiny_model: TinyModel, tiny_spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real teacher with other weights than `teacher_server` has."""
    log = tmp_path_factory.mktemp("other") / "teacher.log"
    server = SGLangServer(str(tiny_model(2)), tiny_spec, "teacher", port=reserve_port(), log=log)
    server.start()
    try:
        server.wait_ready(240)
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("protocol", ["sglang", "openai"])
@pytest.mark.parametrize("path", ["", "/v1/"])
async def test_a_real_sglang_scores_as_an_endpoint_by_its_own_protocol_and_by_openais_echo(
    protocol: str, path: str, teacher_server: Any, tiny_model: TinyModel
) -> None:
    pool = await pool_of(external(f"http://127.0.0.1:{teacher_server.port}{path}", protocol))
    scores = await pool.score(PROMPT, RESPONSE, None)
    assert scores.logprobs == pytest.approx(hf_logprobs(tiny_model(1), PROMPT, RESPONSE), abs=1e-4)
    assert 1 <= len((await pool.generate(PROMPT, 6)).ids) <= 6
    await pool.close()


@pytest.mark.parametrize("protocol", ["sglang", "openai"])
async def test_the_preflight_takes_an_endpoint_that_is_right(
    protocol: str, teacher_server: Any, tiny_model: TinyModel
) -> None:
    spec = external(f"http://127.0.0.1:{teacher_server.port}", protocol)
    pool = await pool_of(spec)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(0))
    await teacher_answers(pool)
    await same_vocabulary(tokenizer, pool)
    await teacher_is_sane(spec, PROBE, pool, len(tokenizer))
    await replicas_agree(spec, PROBE, pool)
    await pool.close()


@pytest.mark.parametrize("protocol", ["sglang", "openai"])
async def test_the_preflight_refuses_an_endpoint_whose_tokens_mean_something_else(
    protocol: str, teacher_server: Any, tiny_model: TinyModel
) -> None:
    class Shifted:
        """A student's tokenizer in which each id means what the next one means to the teacher."""

        def __init__(self) -> None:
            self.all_special_ids: list[int] = []
            self._right = AutoTokenizer.from_pretrained(tiny_model(0))

        def __len__(self) -> int:
            return len(self._right) - 1

        def decode(self, ids: list[int]) -> str:
            return str(self._right.decode([ids[0] + 1]))

    pool = await pool_of(external(f"http://127.0.0.1:{teacher_server.port}", protocol))
    with pytest.raises(
        PreflightFailed, match=r"SameVocabulary: token \d+ is .* to the student and .* to teacher teacher"
    ):
        await same_vocabulary(Shifted(), pool)
    await pool.close()


async def test_top_k_from_a_server_that_only_echoes_fails_the_preflight_with_what_to_do(teacher_server: Any) -> None:
    objective = {"support": "top-k", "topK": 8}
    spec = external(f"http://127.0.0.1:{teacher_server.port}", "openai", objective=objective)
    pool = await pool_of(spec)
    with pytest.raises(
        PreflightFailed, match=r"TeacherScores: .*8 likeliest tokens, objective.topK.*take support sampled-token"
    ):
        await teacher_is_sane(spec, PROBE, pool, 384)
    await pool.close()


async def test_replicas_with_other_weights_are_refused_with_their_addresses_and_the_difference(
    teacher_server: Any, other_server: Any, tiny_model: TinyModel
) -> None:
    spec = spec_of(tiny_model(0), tiny_model(1), teacher={"model": str(tiny_model(1)), "replicas": 2})
    addresses = [f"127.0.0.1:{server.port}" for server in (teacher_server, other_server)]
    pool = await pool_of(spec, ",".join(addresses))
    with pytest.raises(PreflightFailed) as error:
        await replicas_agree(spec, PROBE, pool)
    said = str(error.value)
    assert said.startswith(f"ReplicasAgree: teacher teacher ({tiny_model(1)}) scored the same 5 tokens at ")
    assert all(address in said for address in addresses)
    found = re.search(r"differ by ([0-9.]+) nats per token on average \(allowed 0.05, maxDisagreement\)", said)
    truth = [[x for s in PROBE for x in hf_logprobs(tiny_model(seed), s.prompt_ids, s.response_ids)] for seed in (1, 2)]
    expected = sum(abs(a - b) for a, b in zip(*truth, strict=True)) / 5
    assert found and float(found[1]) == pytest.approx(expected, abs=1e-3)
    await pool.close()


async def test_a_wider_limit_takes_them(teacher_server: Any, other_server: Any, tiny_model: TinyModel) -> None:
    model = {"model": str(tiny_model(1)), "maxDisagreement": 50}
    spec = spec_of(tiny_model(0), tiny_model(1), teacher=model)
    pool = await pool_of(spec, f"127.0.0.1:{teacher_server.port},127.0.0.1:{other_server.port}")
    await replicas_agree(spec, PROBE, pool)
    await pool.close()


async def test_servers_behind_one_address_that_disagree_are_found(
    teacher_server: Any, other_server: Any, tiny_model: TinyModel
) -> None:
    """A load balancer that gives each connection to the next of two real servers."""
    import asyncio

    turn = iter([teacher_server.port, other_server.port] * 100)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", next(turn))

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
            target.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))

    balancer = await asyncio.start_server(forward, "127.0.0.1", 0)
    port = balancer.sockets[0].getsockname()[1]
    spec = external(f"http://127.0.0.1:{port}")
    pool = await pool_of(spec)
    with pytest.raises(PreflightFailed, match=rf"ReplicasAgree: .* twice at 127\.0\.0\.1:{port}"):
        await replicas_agree(spec, PROBE, pool)
    await pool.close()
    balancer.close()


class Guarded:
    """A server that asks for a key, and says in its refusals what it was given."""

    def __init__(self, key: str) -> None:
        self.key, self.seen = key, list[tuple[str, str]]()

    async def start(self) -> int:
        async def handle(request: web.Request) -> web.Response:
            given = request.headers.get("Authorization", "")
            self.seen.append((request.path, request.headers["Host"]))
            if given != f"Bearer {self.key}":
                return web.json_response({"error": f"{given} is no key"}, status=401)
            ids = (await request.json())["prompt"]
            entries = [None, *({str(i): {"logprob": -1.5, "rank": 1, "decoded_token": "x"}} for i in ids[1:])]
            return web.json_response({"choices": [{"prompt_logprobs": entries}]})

        app = web.Application()
        app.router.add_post("/{path:.*}", handle)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return int(self.runner.addresses[0][1])


async def test_the_key_and_the_name_of_the_host_go_with_each_request() -> None:
    server = Guarded(KEY)
    port = await server.start()
    pool = await pool_of(external(f"http://127.0.0.1:{port}/team/v1", "openai"), key=KEY)
    assert (await pool.score(PROMPT, RESPONSE, None)).logprobs == [-1.5] * 4
    assert set(server.seen) == {("/team/v1/completions", f"127.0.0.1:{port}")}
    await pool.close()
    await server.runner.cleanup()


async def test_a_refused_key_fails_the_preflight_and_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    server = Guarded("another")
    port = await server.start()
    with caplog.at_level(logging.DEBUG):
        pool = await pool_of(external(f"http://127.0.0.1:{port}", "openai"), key=KEY)
        with pytest.raises(BadScore) as refused:
            await pool.score(PROMPT, RESPONSE, None)
        with pytest.raises(
            PreflightFailed, match=r"TeacherAnswers: .*answered 401.*keySecret of spec.teacher.endpoint"
        ) as e:
            await teacher_answers(pool)
    assert KEY not in caplog.text + str(refused.value) + str(e.value) + repr(vars(pool))
    assert "***" in str(refused.value)
    await pool.close()
    await server.runner.cleanup()
