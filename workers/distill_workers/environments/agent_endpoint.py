"""The endpoint of agents: an HTTP server with the part of OpenAI's API that a chat needs, on this machine alone.

Each episode of an agent has a key of its own, by which its requests find it.
"""

import asyncio
import hashlib
import hmac
import itertools
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from aiohttp import web

from distill_workers.environments.chat_completions import (
    MODEL,
    ApiError,
    ChatRequest,
    Completion,
    answer,
    chunks,
    read_request,
)

log = logging.getLogger(__name__)
MOST_BYTES = 8_000_000
"""Of the body of a request: of its messages MOST_CHARACTERS are read, each of which JSON may write in six bytes."""


class Episode(Protocol):
    """What answers the requests that come with the key of one episode."""

    refusal: str
    """What the last refused request was told."""

    async def complete(self, request: ChatRequest) -> Completion:
        """Return the student's next message. Raises ApiError for a request that is refused."""


class AgentEndpoint:
    """A server of chat completions for the episodes that are open."""

    def __init__(self) -> None:
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()
        self._secret = secrets.token_bytes(32)
        self._numbers = itertools.count(1)
        self._episodes: dict[str, Episode] = {}
        self._passed_over = set[str]()
        self.url = ""
        """Base URL of the API, once `start` has been called."""

    async def start(self) -> None:
        """Listen on a free port of this machine, unless that is done. Raises OSError."""
        async with self._starting:
            if self._runner is not None:
                return
            app = web.Application(client_max_size=MOST_BYTES)
            app.router.add_post("/v1/chat/completions", self._with_errors_as_json(self._complete))
            app.router.add_get("/v1/models", self._with_errors_as_json(self._models))
            app.router.add_route("*", "/{path:.*}", self._with_errors_as_json(self._unknown))
            # A request whose agent has gone is given up: nobody reads its answer, and no turn is recorded. No engine
            # aborts what it generates for it.
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
            try:
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", 0).start()
            except OSError:
                await runner.cleanup()
                raise
            self._runner = runner
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @contextmanager
    def open(self, episode: Episode) -> Iterator[str]:
        """Give an episode a key, which finds it until the context is left."""
        number = str(next(self._numbers))
        key = f"distill-{number}-{self._signature(number)}"
        self._episodes[key] = episode
        try:
            yield key
        finally:
            del self._episodes[key]

    def _signature(self, number: str) -> str:
        return hmac.new(self._secret, number.encode(), hashlib.sha256).hexdigest()[:32]

    def _episode(self, request: web.Request) -> Episode:
        """Return the episode of a request's key. Raises ApiError."""
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        name, _, signature = key.strip().rpartition("-")
        number = name.removeprefix("distill-")
        signed = self._signature(number).encode()
        if kind.lower() != "bearer" or not hmac.compare_digest(signature.encode(errors="replace"), signed):
            raise ApiError(
                "the key is of no episode: use OPENAI_API_KEY, which each episode has its own of",
                status=401,
                code="invalid_api_key",
            )
        episode = self._episodes.get(key.strip())
        if episode is None:
            raise ApiError(
                "the episode of this key has ended, so nothing more is generated for it",
                status=410,
                code="episode_ended",
            )
        return episode

    def _with_errors_as_json(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler, with what it raises as the JSON that OpenAI's clients read."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except ApiError as error:
                return web.json_response(error.body(), status=error.status)

        return handle

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        episode = self._episode(request)
        try:
            chat_request = read_request(await _json(request))
            for what in chat_request.passed_over:
                self._tell_once(what)
            completion = await episode.complete(chat_request)
        except ApiError as error:
            episode.refusal = str(error)
            raise
        name, created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        if not chat_request.stream:
            return web.json_response(answer(completion, name, created))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        for chunk in chunks(completion, name, created, with_usage=chat_request.with_usage):
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._episode(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "distillation"}
        return web.json_response({"object": "list", "data": [model]})

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        raise ApiError(
            f"{request.method} {request.path} is not there; the student is reached by POST /v1/chat/completions alone",
            status=404,
            code="unknown_url",
        )

    def _tell_once(self, what: str) -> None:
        """Log what agents ask of the sampling, once for each field."""
        field = what.partition(" ")[0]
        if field not in self._passed_over:
            self._passed_over.add(field)
            log.info("an agent asks for %s, which is passed over: the student is sampled as the job says", what)


async def _json(request: web.Request) -> Any:
    """Return the body of a request. Raises ApiError for one that is no JSON."""
    try:
        return json.loads(await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise ApiError(f"the body has more than {MOST_BYTES:,} bytes", status=413) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error}") from None
