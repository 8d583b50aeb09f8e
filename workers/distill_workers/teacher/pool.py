"""A teacher's pool: the client side of one or more servers that score the student's tokens.

Balances over all addresses behind a name (a headless Service) by outstanding tokens, but keeps the siblings of one
prompt where its prefix is cached (prefixes.py). Requests that fail are sent again with back-off, to another replica if
there is one; a replica that keeps failing is left alone for a while. An answer that cannot be right is a BadScore: it
fails its sample, never the job. What is asked and answered is the matter of a protocol: sglang_wire.py, openai_wire.py.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from distill_api import spec as api
from distill_api.spec import NamedTeacherSource, Spec
from distill_workers.teacher.endpoint import Origin
from distill_workers.teacher.openai_protocol import OpenAIWire
from distill_workers.teacher.prefix_affinity import ANYWHERE, Place, Prefixes
from distill_workers.teacher.protocol import Ask, BadScore, Observer, Scores, Wire
from distill_workers.teacher.replica_admission import Newcomers
from distill_workers.teacher.replicas import NotAnswered, Replica, Replicas
from distill_workers.teacher.sglang_protocol import SGLangWire

__all__ = ["BadScore", "Scores", "TeacherPool", "TeacherUnreachable"]

log = logging.getLogger(__name__)

BACKOFF_SECONDS = (0.2, 10.0)
TRIES = 6
"""Of one request, while others succeed."""
PREFETCHES = 8
"""Prompts that are sent ahead at once: the others wait, so that scoring always finds free slots."""


class TeacherUnreachable(Exception):
    """No replica has answered for longer than is waited."""


class TeacherPool:
    """Of one teacher. Each address that a host of its origin resolves to is a replica."""

    def __init__(
        self,
        address: str,
        spec: Spec,
        observer: Observer,
        *,
        teacher: NamedTeacherSource | None = None,
        key: str = "",
        unreachable_seconds: float = 300.0,
    ) -> None:
        """`address` is HOST:PORT, or several with commas; an endpoint has one of its own, and perhaps a key.
        `teacher`: the job's first if it is left out."""
        self.teacher = teacher or spec.all_teachers[0]
        endpoint = self.teacher.endpoint
        self._origin = Origin.of_endpoint(endpoint, key) if endpoint is not None else Origin.of_address(address)
        self._wire: Wire = SGLangWire(ours=endpoint is None)
        if endpoint is not None and endpoint.protocol is api.Protocol.OPENAI:
            assert endpoint.model is not None, "a rule of Endpoint"
            self._wire = OpenAIWire(endpoint.model)
        self._observer, self._limit = observer, unreachable_seconds
        self._timeout_seconds = float(self.teacher.request_timeout_seconds)
        self._start_seconds = float(spec.pre_running_deadline_seconds or 1800)
        self._replicas = Replicas(list(self._origin.names), self.teacher.max_concurrent_requests)
        # A deterministic server caches no prefix and takes one request at a time: nothing to wait for.
        self._prefixes = Prefixes(self._replicas, share=self._wire.shares_prefixes and not spec.deterministic)
        self._prefetching = asyncio.Semaphore(PREFETCHES)
        self._newcomers = Newcomers(self._replicas, self.teacher, self._score_on, observer)
        self._session: aiohttp.ClientSession | None = None
        self._last_success = time.monotonic()
        self.requests = 0
        """Waiting and under way."""

    async def start(self, timeout_seconds: float | None = None) -> None:
        """Waits until a replica scores: a large teacher takes long to load. Raises TeacherUnreachable."""
        # Shorter than the 5 s after which the server closes an idle connection: a reset would count as a failure.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self._session = aiohttp.ClientSession(connector=connector)
        usual, self._limit, self._last_success = self._limit, timeout_seconds or self._start_seconds, time.monotonic()
        await self._wire.learn(lambda ask: self._request(ask, 2))
        self._limit = usual

    async def close(self) -> None:
        self._newcomers.close()
        if self._session is not None:
            await self._session.close()

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        """log p of each response token given what is before it, nats; with `top_k`, the k likeliest at each position.
        Raises BadScore, TeacherUnreachable."""
        ask = self._scoring(prompt_ids, response_ids, top_k)
        async with self._prefixes.place(prompt_ids) as place:
            answer = await self._request(ask, len(prompt_ids) + len(response_ids), place)
        self._prefixes.found(place, self._wire.cached_tokens(answer))
        scores = self._wire.read_scores(answer, prompt_ids, response_ids, top_k)
        self._newcomers.learn(prompt_ids, response_ids, scores)
        return scores

    async def score_everywhere(
        self, prompt_ids: list[int], response_ids: list[int], top_k: int | None
    ) -> list[tuple[str, Scores]]:
        """The scores of each replica that is there now, with its address. Raises BadScore, TeacherUnreachable."""
        ask = self._scoring(prompt_ids, response_ids, top_k)
        await self._replicas.resolve(again=True)
        found: list[tuple[str, Scores]] = []
        for replica in self._replicas.all():
            try:
                answer = await self._send(replica, ask, 1, self._timeout_seconds, alone=True)
            except NotAnswered as error:
                log.warning("teacher %s: replica %s is not compared: %s", self.teacher.name, replica.address, error)
                continue
            found.append((replica.address, self._wire.read_scores(answer, prompt_ids, response_ids, top_k)))
        if not found:
            # One try each is not much: this one is sent again, and says what is wrong where nobody answers.
            found.append((self._origin.title, await self.score(prompt_ids, response_ids, top_k)))
        return found

    async def prefetch(self, prompt_ids: list[int]) -> None:
        """Has the prompt cached where its siblings will be scored, while they are still being drawn: then none of them
        need go alone. One try, of which no failure is raised: without it the first sibling does the same work."""
        if not self._prefixes.worth_sharing(prompt_ids):
            return
        async with self._prefetching:
            try:
                self._check_ids(prompt_ids)
                async with self._prefixes.ahead(prompt_ids) as replica:
                    if replica is not None:
                        ask = self._wire.scoring(prompt_ids, [], None)
                        await self._send(replica, ask, len(prompt_ids), self._timeout_seconds)
            except Exception as error:
                log.warning("a prompt of %d tokens was not prefetched: %s", len(prompt_ids), error)

    async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The teacher's own greedy response."""
        self._check_ids(prompt_ids)
        ask = self._wire.generation(prompt_ids, max_new_tokens)
        # Generation has no bound of its own in the job; it takes as long as it takes, within reason.
        answer = await self._request(ask, len(prompt_ids) + max_new_tokens, timeout_seconds=3600)
        return self._wire.read_generation(answer)

    async def token_texts(self, ids: list[int]) -> list[str | None]:
        """What the teacher's own tokenizer makes of each id, None where it does not tell. Raises BadScore for an id
        that it does not have."""
        self._check_ids(ids)
        return self._wire.read_names(await self._request(self._wire.naming(ids), len(ids)), ids)

    def _scoring(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Ask:
        if not response_ids:
            raise BadScore("empty", "an empty response has no token to score")
        self._check_ids([*prompt_ids, *response_ids])
        return self._wire.scoring(prompt_ids, response_ids, top_k)

    def _check_ids(self, ids: list[int]) -> None:
        """An id outside the embedding ends the whole SGLang server, so it must never be sent."""
        size = self._wire.vocabulary
        if size is not None and not all(0 <= i < size for i in ids):
            wrong = next(i for i in ids if not 0 <= i < size)
            raise BadScore("outside_vocabulary", f"token {wrong} is outside the teacher's vocabulary of {size}")

    async def _score_on(self, replica: Replica, prompt_ids: list[int], response_ids: list[int]) -> Scores:
        """By this replica, in one try. Raises BadScore, NotAnswered."""
        ask = self._wire.scoring(prompt_ids, response_ids, None)
        answer = await self._send(replica, ask, len(prompt_ids) + len(response_ids), self._timeout_seconds)
        return self._wire.read_scores(answer, prompt_ids, response_ids, None)

    async def _request(
        self,
        ask: Ask,
        tokens: int,
        place: Place = ANYWHERE,
        timeout_seconds: float | None = None,
    ) -> Any:
        """The JSON of an answer 200. Raises BadScore for a refusal, TeacherUnreachable."""
        timeout = timeout_seconds or self._timeout_seconds
        preferred = place.replica
        begin, tries, failed_on, why = time.monotonic(), 0, None, "its name has no address"
        while True:
            await self._replicas.resolve(again=failed_on is not None)
            self._newcomers.prove()
            replica: Replica | None
            if preferred is not None and preferred is not failed_on and self._replicas.usable(preferred):
                replica = preferred
            else:
                replica = self._replicas.least_loaded(but=failed_on)
            if replica is not None:
                try:
                    work = tokens - place.cached_tokens if replica is preferred else tokens
                    return await self._send(replica, ask, work, timeout)
                except NotAnswered as error:
                    self._observer.add("distill_teacher_retries")
                    failed_on, why, tries = replica, f"{replica.address}: {error}", tries + 1
            elif refused := [r.address for r in self._replicas.all() if r.refused]:
                why = f"{', '.join(refused)}: joined later, and scores otherwise than those before (maxDisagreement)"
            now = time.monotonic()
            if now - max(self._last_success, begin) > self._limit:
                raise TeacherUnreachable(
                    f"no teacher at {self._origin.title} has answered for {self._limit:.0f} s (last: {why}); "
                    "look at the logs of the teacher's pods"
                )
            if tries >= TRIES and self._last_success > begin:
                raise BadScore("failed", f"{tries} tries failed while other requests succeeded (last: {why})")
            pause = min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2 ** max(0, tries - 1))
            await asyncio.sleep(min(pause, self._limit / 4) * random.uniform(0.5, 1.0))

    @asynccontextmanager
    async def _slot(self, replica: Replica) -> AsyncIterator[None]:
        """One of the requests that the replica may have in flight, once one is free."""
        self.requests += 1
        try:
            self._observer.change("distill_teacher_queue_depth", 1)
            try:
                await replica.slots.acquire()
            finally:
                self._observer.change("distill_teacher_queue_depth", -1)
            try:
                yield
            finally:
                replica.slots.release()
        finally:
            self.requests -= 1

    async def _send(self, replica: Replica, ask: Ask, tokens: int, timeout: float, alone: bool = False) -> Any:
        """`alone`: over a connection of its own, behind which a load balancer may have another server."""
        assert self._session is not None, "start() comes first"
        replica.outstanding_tokens += tokens
        try:
            async with self._slot(replica):
                begin, code = time.monotonic(), "error"
                try:
                    async with self._session.post(
                        self._origin.url(replica.address, ask.path),
                        data=orjson.dumps(ask.body),
                        headers=self._origin.headers | ({"Connection": "close"} if alone else {}),
                        timeout=aiohttp.ClientTimeout(total=timeout),
                        server_hostname=self._origin.certificate_name,
                        allow_redirects=False,
                    ) as answer:
                        code = str(answer.status)
                        text = await answer.read()
                except TimeoutError:
                    replica.failed(time.monotonic())
                    raise NotAnswered(f"not answered within {timeout:.0f} s") from None
                except (aiohttp.ClientError, OSError) as error:
                    replica.failed(time.monotonic())
                    raise NotAnswered(f"{type(error).__name__}: {error}") from None
                finally:
                    self._observer.add("distill_teacher_requests", 1, code=code, teacher=self.teacher.name)
                    self._observer.observe("distill_teacher_request_duration_seconds", time.monotonic() - begin)
        finally:
            replica.outstanding_tokens -= tokens
        shown = self._origin.without_key(text)[:300]
        if answer.status >= 500 or answer.status == 429:
            replica.failed(time.monotonic())
            raise NotAnswered(f"answered {answer.status}: {shown!r}")
        replica.succeeded()
        replica.answered_tokens += tokens
        self._last_success = time.monotonic()
        if answer.status != 200:
            raise BadScore("refused", f"{replica.address} answered {answer.status}: {shown!r}")
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            raise BadScore("malformed", f"{replica.address} answered no JSON: {shown!r}") from None
