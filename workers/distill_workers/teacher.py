"""The teacher pool: the client side of one or more SGLang servers that score the student's tokens.

Balances over all addresses behind a name (a headless Service) by outstanding tokens, but keeps the siblings of one
prompt where its prefix is cached: the first alone, the others once it is there. Requests that fail are sent again with
back-off, to another replica if there is one; a replica that keeps failing is left alone for a while. An answer that
cannot be right is a BadScore: it fails its sample, never the job.
"""

import asyncio
import logging
import math
import random
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import orjson

from distill_api.spec import Spec
from distill_workers.replicas import Replica, Replicas
from distill_workers.scores import BadScore, Scores, cached_tokens, read_scores, scoring_request

__all__ = ["BadScore", "Scores", "TeacherPool", "TeacherUnreachable"]

log = logging.getLogger(__name__)

BACKOFF_SECONDS = (0.2, 10.0)
TRIES = 6
"""Of one request, while others succeed."""
SHARED_PREFIX_TOKENS = 32
"""Shorter prompts are not worth waiting for."""
REMEMBERED_PREFIXES = 4096
PREFETCHES = 8
"""Prompts that are sent ahead at once: the others wait, so that scoring always finds free slots."""
JSON_HEADERS = {"Content-Type": "application/json"}


class TeacherUnreachable(Exception):
    """No replica has answered for longer than is waited."""


class Observer(Protocol):
    """What is told about each request; distill_workers.metrics.Metrics is one."""

    def add(self, name: str, amount: float = 1, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...

    def change(self, name: str, amount: float) -> None: ...


@dataclass(eq=False)
class Prefix:
    """Where a prompt is cached, once `cached` is set."""

    replica: Replica
    cached: asyncio.Event = field(default_factory=asyncio.Event)
    """Also set after a failure, or siblings would wait for ever."""
    lost: bool = False
    """It could not be prefetched: the first sibling goes alone after all."""
    used_at: int = 0
    """answered_tokens of the replica when the prompt was last used there."""

    @property
    def age_tokens(self) -> int:
        return self.replica.answered_tokens - self.used_at


@dataclass(frozen=True)
class Place:
    """Where a request should go, and what of it is expected to be cached there."""

    replica: Replica | None = None
    cached_tokens: int = 0
    age_tokens: int = 0


class _Retry(Exception):
    """A failure of transport or server, which another try may not have."""


class TeacherPool:
    """`address` is HOST:PORT, or several with commas; each address that HOST resolves to is a replica."""

    def __init__(self, address: str, spec: Spec, observer: Observer, *, unreachable_seconds: float = 300.0) -> None:
        self._names = [a.strip() for a in address.split(",") if a.strip()]
        self._spec, self._observer, self._limit = spec, observer, unreachable_seconds
        self._replicas = Replicas(self._names, spec.teacher.max_concurrent_requests)
        self._prefixes: OrderedDict[int, Prefix] = OrderedDict()
        self._kept_tokens = math.inf
        """What may go through a replica's cache before it loses a prompt, as learnt from those that it lost."""
        self._prefetching = asyncio.Semaphore(PREFETCHES)
        self._session: aiohttp.ClientSession | None = None
        self._last_success = time.monotonic()
        self._vocabulary: int | None = None
        # A deterministic server caches no prefix and takes one request at a time: nothing to wait for.
        self._share = not spec.deterministic

    async def start(self, timeout_seconds: float | None = None) -> None:
        """Waits until a replica scores: a large teacher takes long to load. Raises TeacherUnreachable."""
        limit = timeout_seconds or float(self._spec.pre_running_deadline_seconds or 1800)
        # Shorter than the 5 s after which the server closes an idle connection: a reset would count as a failure.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self._session = aiohttp.ClientSession(connector=connector)
        usual, self._limit, self._last_success = self._limit, limit, time.monotonic()
        self._vocabulary = await self._ask_vocabulary()
        self._limit = usual

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        """log p of each response token given what is before it, nats; with `top_k`, the k likeliest at each position.
        Raises BadScore, TeacherUnreachable."""
        if not response_ids:
            raise BadScore("empty", "an empty response has no token to score")
        self._check_ids([*prompt_ids, *response_ids])
        body = scoring_request(prompt_ids, response_ids, top_k)
        async with self._affinity(prompt_ids) as place:
            answer = await self._request(body, len(prompt_ids) + len(response_ids), place)
        if place.cached_tokens and cached_tokens(answer) < place.cached_tokens // 2:
            self._kept_tokens = min(self._kept_tokens, place.age_tokens / 2)
        return read_scores(answer, len(prompt_ids), response_ids, top_k, self._vocabulary)

    async def prefetch(self, prompt_ids: list[int]) -> None:
        """Has the prompt cached where its siblings will be scored, while they are still being drawn: then none of them
        need go alone. One try, of which no failure is raised: without it the first sibling does the same work."""
        if not self._worth_sharing(prompt_ids):
            return
        key = hash(tuple(prompt_ids))
        async with self._prefetching:
            try:
                self._check_ids(prompt_ids)
                await self._replicas.resolve()
                replica = self._replicas.least_loaded()
                # A sibling, or another prefetch, may have been faster.
                known = self._prefixes.get(key)
                if replica is None or (known is not None and not self._may_be_lost(known)):
                    return
                with self._caching(key, replica) as prefix:
                    prefix.lost = True
                    body = scoring_request(prompt_ids, [], None)
                    timeout = float(self._spec.teacher.request_timeout_seconds)
                    await self._send(replica, body, len(prompt_ids), timeout)
                    prefix.lost = False
            except Exception as error:
                log.warning("a prompt of %d tokens was not prefetched: %s", len(prompt_ids), error)

    async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The teacher's own greedy response."""
        self._check_ids(prompt_ids)
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0}
        body = {"input_ids": prompt_ids, "sampling_params": sampling}
        # Generation has no bound of its own in the job; it takes as long as it takes, within reason.
        answer = await self._request(body, len(prompt_ids) + max_new_tokens, timeout_seconds=3600)
        try:
            return [int(i) for i in answer["output_ids"]]
        except (LookupError, TypeError, ValueError):
            raise BadScore("malformed", f"no output_ids in {str(answer)[:200]}") from None

    async def token_texts(self, ids: list[int]) -> list[str | None]:
        """What the teacher's own tokenizer makes of each id. Raises BadScore for an id that it does not have."""
        self._check_ids(ids)
        body = {
            **scoring_request(ids[:1], ids[1:], None),
            "return_text_in_logprobs": True,
            "logprob_start_len": 0,
        }
        answer = await self._request(body, len(ids))
        entries = answer["meta_info"]["input_token_logprobs"]
        # SGLang names the last id of the vocabulary 0; its text would be that of token 0.
        return [text if seen == sent else None for sent, (_, seen, text) in zip(ids, entries, strict=True)]

    def _check_ids(self, ids: list[int]) -> None:
        """An id outside the embedding ends the whole SGLang server, so it must never be sent."""
        if self._vocabulary is not None and not all(0 <= i < self._vocabulary for i in ids):
            wrong = next(i for i in ids if not 0 <= i < self._vocabulary)
            raise BadScore(
                "outside_vocabulary",
                f"token {wrong} is outside the teacher's vocabulary of {self._vocabulary}",
            )

    async def _ask_vocabulary(self) -> int | None:
        """Size of the teacher's embedding. SGLang tells it in no answer but in the refusal of an impossible id."""
        body = {**scoring_request([1], [1], None), "token_ids_logprob": [2**31 - 1]}
        try:
            await self._request(body, 2)
        except BadScore as refused:
            if match := re.search(r"valid range is \[0, (\d+)\)", str(refused)):
                return int(match[1])
        log.warning("the teacher did not tell the size of its vocabulary; token ids are sent unchecked")
        return None

    @asynccontextmanager
    async def _affinity(self, prompt_ids: list[int]) -> AsyncIterator[Place]:
        """The replica that has the prompt, once it has it; for the first sibling the replica that shall get it, and
        also for one so late that the prompt may be lost there."""
        if not self._worth_sharing(prompt_ids):
            yield Place()
            return
        await self._replicas.resolve()
        key = hash(tuple(prompt_ids))
        while (prefix := self._prefixes.get(key)) is not None:
            if self._may_be_lost(prefix):
                break
            self._prefixes.move_to_end(key)
            await prefix.cached.wait()
            if prefix.lost:
                continue
            best = self._replicas.least_loaded()
            # Going elsewhere costs the prompt once more: worth it where more than that is waiting.
            stay = best is None or prefix.replica.outstanding_tokens <= best.outstanding_tokens + len(prompt_ids)
            yield Place(prefix.replica, len(prompt_ids) - 1, prefix.age_tokens) if stay else Place()
            if stay:
                prefix.used_at = prefix.replica.answered_tokens
            return
        replica = self._replicas.least_loaded()
        if replica is None:
            yield Place()
            return
        with self._caching(key, replica):
            yield Place(replica)

    def _worth_sharing(self, prompt_ids: list[int]) -> bool:
        return self._share and len(prompt_ids) >= SHARED_PREFIX_TOKENS

    def _may_be_lost(self, prefix: Prefix) -> bool:
        return prefix.cached.is_set() and prefix.age_tokens > self._kept_tokens

    @contextmanager
    def _caching(self, key: int, replica: Replica) -> Iterator[Prefix]:
        """While the first request of a prompt is under way; others wait for its end. A failure is forgotten."""
        prefix = self._prefixes[key] = Prefix(replica)
        while len(self._prefixes) > REMEMBERED_PREFIXES:
            self._prefixes.popitem(last=False)[1].cached.set()
        try:
            yield prefix
            prefix.used_at = replica.answered_tokens
        except BaseException:
            if self._prefixes.get(key) is prefix:
                del self._prefixes[key]
            raise
        finally:
            prefix.cached.set()

    async def _request(
        self,
        body: dict[str, Any],
        tokens: int,
        place: Place = Place(),  # frozen
        timeout_seconds: float | None = None,
    ) -> Any:
        """The JSON of an answer 200. Raises BadScore for a refusal, TeacherUnreachable."""
        timeout = timeout_seconds or float(self._spec.teacher.request_timeout_seconds)
        preferred = place.replica
        begin, tries, failed_on, why = time.monotonic(), 0, None, "its name has no address"
        while True:
            await self._replicas.resolve(again=failed_on is not None)
            replica: Replica | None
            if preferred is not None and preferred is not failed_on and self._replicas.usable(preferred):
                replica = preferred
            else:
                replica = self._replicas.least_loaded(but=failed_on)
            if replica is not None:
                try:
                    work = tokens - place.cached_tokens if replica is preferred else tokens
                    return await self._send(replica, body, work, timeout)
                except _Retry as error:
                    self._observer.add("distill_teacher_retries")
                    failed_on, why, tries = replica, f"{replica.address}: {error}", tries + 1
            now = time.monotonic()
            if now - max(self._last_success, begin) > self._limit:
                raise TeacherUnreachable(
                    f"no teacher at {', '.join(self._names)} has answered for {self._limit:.0f} s (last: {why}); "
                    "look at the logs of the teacher's pods"
                )
            if tries >= TRIES and self._last_success > begin:
                raise BadScore("failed", f"{tries} tries failed while other requests succeeded (last: {why})")
            pause = min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2 ** max(0, tries - 1))
            await asyncio.sleep(min(pause, self._limit / 4) * random.uniform(0.5, 1.0))

    @asynccontextmanager
    async def _slot(self, replica: Replica) -> AsyncIterator[None]:
        """One of the requests that the replica may have in flight, once one is free."""
        self._observer.change("distill_teacher_queue_depth", 1)
        try:
            await replica.slots.acquire()
        finally:
            self._observer.change("distill_teacher_queue_depth", -1)
        try:
            yield
        finally:
            replica.slots.release()

    async def _send(self, replica: Replica, body: dict[str, Any], tokens: int, timeout: float) -> Any:
        assert self._session is not None, "start() comes first"
        replica.outstanding_tokens += tokens
        try:
            async with self._slot(replica):
                begin, code = time.monotonic(), "error"
                try:
                    limit = aiohttp.ClientTimeout(total=timeout)
                    url = f"http://{replica.address}/generate"
                    async with self._session.post(
                        url, data=orjson.dumps(body), headers=JSON_HEADERS, timeout=limit
                    ) as answer:
                        code = str(answer.status)
                        text = await answer.read()
                except TimeoutError:
                    replica.failed(time.monotonic())
                    raise _Retry(f"not answered within {timeout:.0f} s") from None
                except (aiohttp.ClientError, OSError) as error:
                    replica.failed(time.monotonic())
                    raise _Retry(f"{type(error).__name__}: {error}") from None
                finally:
                    self._observer.add("distill_teacher_requests", 1, code=code)
                    self._observer.observe("distill_teacher_request_duration_seconds", time.monotonic() - begin)
        finally:
            replica.outstanding_tokens -= tokens
        if answer.status >= 500 or answer.status == 429:
            replica.failed(time.monotonic())
            raise _Retry(f"answered {answer.status}: {text[:200]!r}")
        replica.succeeded()
        replica.answered_tokens += tokens
        self._last_success = time.monotonic()
        if answer.status != 200:
            raise BadScore("refused", f"{replica.address} answered {answer.status}: {text[:300]!r}")
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            raise BadScore("malformed", f"{replica.address} answered no JSON: {text[:200]!r}") from None
