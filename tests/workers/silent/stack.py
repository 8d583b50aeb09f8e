"""A real pair of tiny models in front of the whole preflight: SGLang as engine and as teacher, faults in between.

The trainer's log-probabilities are those of transformers, from the same model folder; Megatron's own are compared with
them elsewhere (test_megatron_logprobs.py).
"""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from conftest import hf_logprobs, tiny_tokenizer

from distill_api.spec.job_spec import Spec
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import Response
from distill_workers.metrics import Metrics
from distill_workers.run.preflight.preflight import preflight
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.teachers import Teachers

Change = Callable[[dict[str, Any], dict[str, Any]], Any]
"""Changes the JSON of a request and of its answer, in place; or a request alone, whose answer is still empty."""


@asynccontextmanager
async def between(ports: Sequence[int], change: Change | None = None) -> AsyncIterator[int]:
    """The port of a proxy before one or several servers, to which requests go in turn, as a load balancer's do."""
    turns = itertools.cycle(ports)

    async def pass_on(request: web.Request) -> web.Response:
        url = f"http://127.0.0.1:{next(turns)}{request.path_qs}"
        body = await request.json() if request.can_read_body else None
        scored = body is not None and body.get("return_logprob") and "input_ids" in body
        if change is not None and scored:
            change(body, {})
        async with session.request(request.method, url, json=body) as answer:
            if answer.content_type != "application/json" or answer.status != 200:
                return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
            found = await answer.json()
        if change is not None and scored:
            change(body, found)
        return web.json_response(found)

    application = web.Application(client_max_size=1 << 26)
    application.router.add_route("*", "/{path:.*}", pass_on)
    runner = web.AppRunner(application)
    async with aiohttp.ClientSession() as session:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()


class Engines:
    """The part of EnginePool that the preflight uses, over one real engine; `change` makes faults of its responses."""

    ends: tuple[int, ...] = ()

    def __init__(self, engine: Any, change: Callable[[Response], Response] = lambda r: r, **asked: Any) -> None:
        self._engine, self._change, self._asked = engine, change, asked

    def count_placed(self) -> int:
        return 1

    async def sample(self, prompt_ids: list[int], **fields: Any) -> list[Response]:
        return [self._change(r) for r in await self._engine.sample(prompt_ids, **{**fields, **self._asked})]


class Trainer:
    """The student on the trainer's side."""

    def __init__(self, model: Path) -> None:
        self._model = model

    async def logprobs(self, samples: list[Sample]) -> list[list[float]]:
        return await asyncio.to_thread(
            lambda: [hf_logprobs(self._model, s.prompt_ids, s.response_ids) for s in samples]
        )


async def start(spec: Spec, engines: Any, trainer: Any, *teachers: int, prompts: list[list[int]] | None = None) -> None:
    """The preflight of a run whose teacher has replicas at these ports."""
    pool = TeacherPool(",".join(f"127.0.0.1:{port}" for port in teachers), spec, Metrics())
    async with AsyncExitStack() as stack:
        stack.push_async_callback(pool.close)
        pool.student_tokens = 384
        await pool.start(60)
        rows = [Prompt(i, ids, "") for i, ids in enumerate(prompts or [list(range(60, 80)), list(range(90, 110))])]
        cursor = Cursor(rows, seed=spec.seed, shuffle=True)
        of_job = Teachers({spec.all_teachers[0].name: pool})
        await preflight(spec, tiny_tokenizer(), trainer, engines, of_job, cursor)


def finished(response: Response) -> Response:
    return dataclasses.replace(response, truncated=False)


def without_logprobs(response: Response) -> Response:
    return dataclasses.replace(response, logprobs=[0.0] * len(response.ids))
