"""A teacher's pool: the client side of one or more servers that score the student's tokens.

Requests are balanced over all addresses behind a name (a headless Service) by outstanding tokens, but the samples of a
group are scored where their prompt is cached (prefix_affinity.py). A request that fails is sent again with back-off, to
another replica if there is one; a replica that keeps failing is skipped for a while. An answer that cannot be right is
a BadScore: it fails its sample, never the job. Protocols build the requests and read the answers: sglang_protocol.py,
openai_protocol.py.
"""

import asyncio
import contextlib
import logging
import random
import time
from typing import Any

import aiohttp
import orjson

from distill_api.spec.job_spec import NamedTeacherSource, Spec
from distill_workers.teacher.cross_tokenizer.translation import Translation, Translator
from distill_workers.teacher.endpoint import TeacherEndpoint
from distill_workers.teacher.prefix_affinity import NO_PREFERENCE, Placement, PrefixAffinity
from distill_workers.teacher.protocol import (
    BadScore,
    Observer,
    Scores,
    TeacherRequest,
    TeacherUnreachable,
    WrittenResponse,
)
from distill_workers.teacher.protocol_choice import scoring_protocol
from distill_workers.teacher.replica_admission import ReplicaAdmission
from distill_workers.teacher.replicas import NotAnswered, NotReached, Replica, Replicas, not_answered
from distill_workers.teacher.token_ids import AbsentTokens, check_received, check_sent

__all__ = ["BadScore", "Scores", "TeacherPool", "TeacherUnreachable"]

log = logging.getLogger(__name__)

BACKOFF_SECONDS = (0.2, 10.0)
TRIES = 6
"""A request that has failed so often, while others succeed, fails its sample; a server that is away is no failure."""
PREFETCHES = 8
"""Prompts that are prefetched at once: the others wait, so that scoring always finds free slots."""


class TeacherPool:
    """The pool of one teacher. Each address that a host of its endpoint resolves to is a replica."""

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
        """`address` is HOST:PORT, or several with commas; a teacher with an endpoint needs none, and may need a key.

        `teacher` is the job's first if it is left out.
        """
        self.teacher = teacher or spec.all_teachers[0]
        endpoint = self.teacher.endpoint
        self._endpoint = (
            TeacherEndpoint.of_endpoint(endpoint, key) if endpoint is not None else TeacherEndpoint.of_address(address)
        )
        self._protocol = scoring_protocol(self.teacher)
        self.student_tokens: int | None = None
        """Tokens of the student's tokenizer, or of the teacher's own. Likeliest ones beyond are nobody's support."""
        self.translator: Translator | None = None
        """Of a teacher with a tokenizer of its own: its prompts are in its own tokens, responses in the student's."""
        self._absent = AbsentTokens(self.teacher.name)
        self._observer, self._limit = observer, unreachable_seconds
        self._timeout_seconds = float(self.teacher.request_timeout_seconds)
        self._start_seconds = float(spec.pre_running_deadline_seconds or 1800)
        self._replicas = Replicas(list(self._endpoint.names), self.teacher.max_concurrent_requests)
        # A deterministic server caches no prefix and takes one request at a time, so there is nothing to wait for.
        self._affinity = PrefixAffinity(self._replicas, share=self._protocol.shares_prefixes and not spec.deterministic)
        self._prefetching = asyncio.Semaphore(PREFETCHES)
        self._admission = ReplicaAdmission(self._replicas, self.teacher, self._score_by, observer)
        self._session: aiohttp.ClientSession | None = None
        self._last_success = time.monotonic()
        self.requests = 0
        """Requests that wait or are in flight."""

    @property
    def vocabulary(self) -> int | None:
        """The ids that the teacher has; None for an endpoint whose job does not say it."""
        return self._protocol.vocabulary

    async def start(self, timeout_seconds: float | None = None) -> None:
        """Wait until a replica scores: a large teacher takes long to load. Raises TeacherUnreachable."""
        # Shorter than the 5 s after which the server closes an idle connection: a reset would count as a failure.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self._session = aiohttp.ClientSession(connector=connector)
        usual, self._limit, self._last_success = self._limit, timeout_seconds or self._start_seconds, time.monotonic()
        await self._protocol.detect(lambda request: self._request(request, 2))
        self._limit = usual

    async def close(self) -> None:
        """Close all connections."""
        self._admission.close()
        if self._session is not None:
            await self._session.close()

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        """Return the log-prob of each response token given all tokens before it, nats; with `top_k`, also the k
        likeliest tokens at each position. Raises BadScore, TeacherUnreachable."""
        sent, request = await self._score_request(prompt_ids, response_ids, top_k)
        async with self._affinity.placement(prompt_ids) as placement:
            answer = await self._request(request, len(prompt_ids) + len(sent.ids), placement)
        self._affinity.observe(placement, self._protocol.cached_tokens(answer))
        scores = self._protocol.read_scores(answer, prompt_ids, sent.ids, top_k)
        self._admission.observe(prompt_ids, sent.ids, scores)
        return sent.of_student(self._absent.left_out(scores, self.student_tokens))

    async def score_everywhere(
        self, prompt_ids: list[int], response_ids: list[int], top_k: int | None
    ) -> list[tuple[str, Scores]]:
        """Return the scores of each replica that answers, with its address. Raises BadScore, TeacherUnreachable."""
        sent, request = await self._score_request(prompt_ids, response_ids, top_k)
        await self._replicas.resolve(again=True)
        found: list[tuple[str, Scores]] = []
        for replica in self._replicas.all():
            try:
                answer = await self._send(replica, request, 1, self._timeout_seconds, own_connection=True)
            except NotAnswered as error:
                log.warning("teacher %s: replica %s is not compared: %s", self.teacher.name, replica.address, error)
                continue
            scores = self._protocol.read_scores(answer, prompt_ids, sent.ids, top_k)
            found.append((replica.address, sent.of_student(scores)))
        if not found:
            # Each replica had one try; `score` retries, and its error says what is wrong if none answers.
            found.append((self._endpoint.title, await self.score(prompt_ids, response_ids, top_k)))
        return found

    async def prefetch(self, prompt_ids: list[int]) -> None:
        """Have a replica cache the prompt while the samples of its group are still being generated.

        Then no sample has to be scored ahead of the others. There is one try, and a failure is logged and not raised:
        the first sample of the group then does the same work.
        """
        if not self._affinity.is_shared(prompt_ids):
            return
        async with self._prefetching:
            try:
                self._check_ids(prompt_ids)
                async with self._affinity.prefetching(prompt_ids) as replica:
                    if replica is not None:
                        request = self._protocol.score_request(prompt_ids, [], None)
                        await self._send(replica, request, len(prompt_ids), self._timeout_seconds)
            except Exception as error:
                log.warning("a prompt of %d tokens was not prefetched: %s", len(prompt_ids), error)

    async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> WrittenResponse:
        """Return the teacher's own greedy response."""
        self._check_ids(prompt_ids)
        request = self._protocol.generation_request(prompt_ids, max_new_tokens)
        # The job sets no limit for generation, which may take long.
        answer = await self._request(request, len(prompt_ids) + max_new_tokens, timeout_seconds=3600)
        written = self._protocol.read_generation(answer)
        check_received(written.ids, self.vocabulary)
        return written

    async def token_texts(self, ids: list[int]) -> list[str | None]:
        """Return what the teacher's own tokenizer makes of each id, None where it does not tell.

        Raises BadScore for an id that the teacher lacks.
        """
        self._check_ids(ids)
        return self._protocol.read_token_texts(
            await self._request(self._protocol.token_texts_request(ids), len(ids)), ids
        )

    async def text_ids(self, text: str) -> list[int]:
        """Return the ids that the teacher's own tokenizer makes of a text. Raises BadScore if it does not tell."""
        return self._protocol.read_text_ids(await self._request(self._protocol.text_request(text), len(text)))

    async def _score_request(
        self, prompt_ids: list[int], response_ids: list[int], top_k: int | None
    ) -> tuple[Translation, TeacherRequest]:
        if not response_ids:
            raise BadScore("empty", "an empty response has no token to score")
        sent = Translation(response_ids)
        if self.translator is not None:  # long ones take tenths of a second, in which the event loop goes on
            sent = await asyncio.to_thread(self.translator.translate, response_ids)
        self._check_ids([*prompt_ids, *sent.ids])
        return sent, self._protocol.score_request(prompt_ids, sent.ids, top_k)

    def _check_ids(self, ids: list[int]) -> None:
        """Raise BadScore for an id that could end the server. By the preflight an endpoint has the student's tokens."""
        check_sent(ids, self.vocabulary if self.teacher.endpoint is None else self.vocabulary or self.student_tokens)

    async def _score_by(self, replica: Replica, prompt_ids: list[int], response_ids: list[int]) -> Scores:
        """Return the scores of this replica, which has one try. Raises BadScore, NotAnswered."""
        request = self._protocol.score_request(prompt_ids, response_ids, None)
        answer = await self._send(replica, request, len(prompt_ids) + len(response_ids), self._timeout_seconds)
        return self._protocol.read_scores(answer, prompt_ids, response_ids, None)

    async def _request(
        self,
        request: TeacherRequest,
        tokens: int,
        placement: Placement = NO_PREFERENCE,
        timeout_seconds: float | None = None,
    ) -> Any:
        """Return the JSON of an answer with status 200. Raises BadScore for a refusal, TeacherUnreachable."""
        timeout = timeout_seconds or self._timeout_seconds
        preferred = placement.replica
        begin, tries, failures, failed_on, why = time.monotonic(), 0, 0, None, "its name has no address"
        while True:
            await self._replicas.resolve(again=failed_on is not None)
            self._admission.admit_pending()
            replica: Replica | None
            if preferred is not None and preferred is not failed_on and self._replicas.usable(preferred):
                replica = preferred
            else:
                replica = self._replicas.least_loaded(but=failed_on)
            if replica is not None:
                try:
                    work = tokens - placement.cached_tokens if replica is preferred else tokens
                    return await self._send(replica, request, work, timeout)
                except NotAnswered as error:
                    self._observer.add("distill_teacher_retries")
                    failed_on, why, tries = replica, f"{replica.address}: {error}", tries + 1
                    failures += not isinstance(error, NotReached)
            elif rejected := [r.address for r in self._replicas.all() if r.rejected]:
                why = f"{', '.join(rejected)}: joined later, and scores otherwise than those before (maxDisagreement)"
            now = time.monotonic()
            if now - max(self._last_success, begin) > self._limit:
                raise TeacherUnreachable(
                    f"no teacher at {self._endpoint.title} has answered for {self._limit:.0f} s (last: {why}); "
                    + ("see the log of the teacher's server" if self.teacher.endpoint is None else "see endpoint.url")
                )
            if failures >= TRIES and self._last_success > begin:
                raise BadScore("failed", f"{failures} tries failed while other requests succeeded (last: {why})")
            pause = min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2 ** max(0, tries - 1))
            await asyncio.sleep(min(pause, self._limit / 4) * random.uniform(0.5, 1.0))

    async def _send(
        self, replica: Replica, request: TeacherRequest, tokens: int, timeout: float, own_connection: bool = False
    ) -> Any:
        """Send a request once, and return the JSON of the answer. Raises NotAnswered, BadScore.

        `own_connection` is for a load balancer, behind which each connection may reach another server.
        """
        assert self._session is not None, "start() comes first"
        replica.outstanding_tokens += tokens
        self.requests += 1
        try:
            async with replica.slot(lambda by: self._observer.change("distill_teacher_queue_depth", by)):
                begin, code = time.monotonic(), "error"
                try:
                    async with self._session.post(
                        self._endpoint.url(replica.address, request.path),
                        data=orjson.dumps(request.body),
                        headers=self._endpoint.headers | ({"Connection": "close"} if own_connection else {}),
                        timeout=aiohttp.ClientTimeout(total=timeout),
                        server_hostname=self._endpoint.certificate_name,
                        allow_redirects=False,
                    ) as answer:
                        code = str(answer.status)
                        text = await answer.read()
                except TimeoutError:
                    replica.failed(begin)
                    raise NotAnswered(f"not answered within {timeout:.0f} s") from None
                except (aiohttp.ClientError, OSError) as error:
                    replica.failed(begin)
                    raise not_answered(error) from None
                finally:
                    self._observer.add("distill_teacher_requests", 1, code=code, teacher=self.teacher.name)
                    self._observer.observe("distill_teacher_request_duration_seconds", time.monotonic() - begin)
        finally:
            self.requests -= 1
            replica.outstanding_tokens -= tokens
        shown = self._endpoint.without_key(text)[:300]
        if answer.status >= 500 or answer.status == 429:
            replica.failed(begin)
            raise NotAnswered(f"answered {answer.status}: {shown!r}")
        found = None
        if answer.status == 200:
            with contextlib.suppress(orjson.JSONDecodeError):
                self._check_weights(found := orjson.loads(text))
        replica.succeeded()
        replica.answered_tokens += tokens
        self._last_success = time.monotonic()
        if answer.status != 200:
            raise BadScore("refused", f"{replica.address} answered {answer.status}: {shown!r}")
        if found is None:
            raise BadScore("malformed", f"{replica.address} answered no JSON: {shown!r}")
        return found

    def _check_weights(self, answer: Any) -> None:
        """Raise NotAnswered for an answer by other weights than the teacher's, which are fixed here."""
