"""OpenAI's completions protocol, /v1/completions, of servers that return log-probs of the prompt.

Two forms of answer are read; which of them the server gives is detected once.
- prompt_logprobs, as vLLM's: a list over all P + R tokens, null first, then {id: {logprob, rank, decoded_token}} with
  the n likeliest tokens and always the token itself. Looked up by id: a missing one is an error, never probability 1.
- echo with logprobs, as OpenAI had it and SGLang still has: token_logprobs over all tokens, null first. Its likeliest
  tokens are named by their texts, from which their ids do not follow, so an objective that takes a top-k cannot.
Both compute the whole prompt anew for each response: a cached prefix has no log-probs.
"""

import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from distill_workers.teacher.protocol import BadScore, Scores, TeacherRequest, WrittenResponse, checked, malformed
from distill_workers.teacher.token_ids import check_received

PATH = "/v1/completions"
VLLM_MINUS_INFINITY = -9999.0
"""vLLM writes this for a log-prob of minus infinity, which JSON lacks (clamp_prompt_logprobs)."""


class OpenAIProtocol:
    """The ScoringProtocol of /v1/completions."""

    shares_prefixes = False

    def __init__(self, model: str, vocabulary: int | None = None) -> None:
        """`model` is the name under which the server serves the model, `vocabulary` the ids that it has as the job
        says."""
        self._model, self.vocabulary = model, vocabulary
        self._echo = False

    async def detect(self, send: Callable[[TeacherRequest], Awaitable[Any]]) -> None:
        """Detect the form of the server's answers; what a server refuses altogether is reported by the preflight."""
        try:
            answer = await send(self._by_prompt_logprobs([1, 1], 0))
            self._echo = not _choice(answer).get("prompt_logprobs")
        except BadScore:
            # A server that refuses prompt_logprobs may support echo.
            self._echo = True

    def score_request(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> TeacherRequest:
        ids = [*prompt_ids, *response_ids]
        if not self._echo:
            return self._by_prompt_logprobs(ids, top_k or 0)
        if top_k is not None:
            raise BadScore(
                "refused",
                "the server gives no prompt_logprobs, and echo names the likeliest tokens by their texts alone, so "
                "an objective that takes the teacher's top-k cannot use it; take support sampled-token without "
                "baseline top-k and forwardKlAboveEntropy, or a server such as vLLM or SGLang's own",
            )
        return self._by_echo(ids)

    def read_scores(self, answer: Any, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        if self._echo:
            return _read_echo(answer, [*prompt_ids, *response_ids], len(response_ids))
        scores = _read_prompt_logprobs(answer, len(prompt_ids), response_ids, top_k)
        if scores.top_ids is not None:
            check_received(scores.top_ids.flatten().tolist(), self.vocabulary)
        return scores

    def text_request(self, text: str) -> TeacherRequest:
        return self._by_echo(text) if self._echo else self._by_prompt_logprobs(text, 0)

    def read_text_ids(self, answer: Any) -> list[int]:
        choice = _choice(answer)
        try:
            if (ids := choice.get("prompt_token_ids")) is not None:
                return [int(i) for i in ids]
            return [int(i) for entry in choice["prompt_logprobs"] if entry for i in entry]
        except (LookupError, TypeError, ValueError):
            raise malformed(answer) from None

    def cached_tokens(self, answer: Any) -> float:
        return math.inf

    def generation_request(self, prompt_ids: list[int], max_new_tokens: int) -> TeacherRequest:
        return self._completion_request(prompt_ids, max_tokens=max_new_tokens, return_token_ids=True)

    def read_generation(self, answer: Any) -> WrittenResponse:
        choice = _choice(answer)
        try:
            ids, reason = [int(i) for i in choice["token_ids"]], str(choice["finish_reason"])
        except (LookupError, TypeError, ValueError):
            raise BadScore("malformed", f"no token_ids or finish_reason in {str(answer)[:200]}") from None
        return WrittenResponse.of(ids, reason)

    def token_texts_request(self, ids: list[int]) -> TeacherRequest:
        # The first token has no log-prob, and in one form no text, so it is sent twice.
        again = [ids[0], *ids]
        return self._by_echo(again) if self._echo else self._by_prompt_logprobs(again, 0)

    def read_token_texts(self, answer: Any, ids: list[int]) -> list[str | None]:
        choice = _choice(answer)
        try:
            if self._echo:
                texts = choice["logprobs"]["tokens"][1 : len(ids) + 1]
                # SGLang gives the last id of the vocabulary as 0, and the size of the vocabulary is not known here.
                return [None if i == max(ids) else str(text) for i, text in zip(ids, texts, strict=True)]
            entries = choice["prompt_logprobs"][1:]
            return [entry[str(i)]["decoded_token"] for i, entry in zip(ids, entries, strict=True)]
        except (LookupError, TypeError, ValueError):
            raise malformed(answer) from None

    def _by_prompt_logprobs(self, ids: list[int] | str, likeliest: int) -> TeacherRequest:
        # vLLM generates at least one token.
        return self._completion_request(ids, max_tokens=1, prompt_logprobs=likeliest)

    def _by_echo(self, ids: list[int] | str) -> TeacherRequest:
        # SGLang refuses 0; the generated token comes after all that is read.
        return self._completion_request(ids, max_tokens=1, echo=True, logprobs=1, return_token_ids=True)

    def _completion_request(self, ids: list[int] | str, **fields: Any) -> TeacherRequest:
        return TeacherRequest(PATH, {"model": self._model, "prompt": ids, "temperature": 0, **fields})


def _choice(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (LookupError, TypeError):
        raise malformed(answer) from None
    if not isinstance(choice, dict):
        raise malformed(answer)
    return choice


def _read_prompt_logprobs(answer: Any, prompt_tokens: int, response_ids: list[int], top_k: int | None) -> Scores:
    positions = _choice(answer).get("prompt_logprobs")
    if not isinstance(positions, list):
        raise BadScore("malformed", f"no prompt_logprobs in {str(answer)[:200]}")
    entries = positions[prompt_tokens:]
    if len(entries) != len(response_ids):
        raise BadScore(
            "wrong_count", f"{len(entries)} scores came for {len(response_ids)} tokens after {prompt_tokens}"
        )
    tables = [_table(entry, answer) for entry in entries]
    for position, (token, table) in enumerate(zip(response_ids, tables, strict=True)):
        if token not in table:
            seen = sorted(table)[:3]
            raise BadScore("wrong_tokens", f"token {position} of the response was sent as {token} and scored as {seen}")
    logprobs = np.array([table[i][0] for i, table in zip(response_ids, tables, strict=True)], dtype=np.float64)
    top_ids, top_logprobs = None, None
    if top_k is not None:
        # The table has the token itself too; its rank tells whether it is one of the k likeliest.
        best = [sorted((rank, i, value) for i, (value, rank) in table.items() if rank <= top_k) for table in tables]
        if any([rank for rank, _, _ in row] != list(range(1, top_k + 1)) for row in best):
            raise BadScore("wrong_count", f"not {top_k} likeliest tokens for each, ranked from 1 to {top_k}")
        top_ids = np.array([[i for _, i, _ in row] for row in best], dtype=np.int32)
        top_logprobs = checked(np.array([[value for _, _, value in row] for row in best], dtype=np.float32))
    return Scores(checked(logprobs).tolist(), top_ids, top_logprobs)


def _table(entry: Any, answer: Any) -> dict[int, tuple[float, int]]:
    """Return log-prob and rank of each token in the entry of one position, by id."""
    try:
        found = {int(i): (float(told["logprob"]), int(told["rank"])) for i, told in entry.items()}
    except (AttributeError, LookupError, TypeError, ValueError):
        raise malformed(answer) from None
    return {i: (-math.inf if value == VLLM_MINUS_INFINITY else value, rank) for i, (value, rank) in found.items()}


def _read_echo(answer: Any, ids: list[int], response_tokens: int) -> Scores:
    choice = _choice(answer)
    try:
        values = choice["logprobs"]["token_logprobs"]
        logprobs = np.array(values[len(ids) - response_tokens : len(ids)], dtype=np.float64)
    except (LookupError, TypeError, ValueError):
        raise malformed(answer) from None
    if logprobs.shape != (response_tokens,):
        raise BadScore("wrong_count", f"{len(values)} scores came for {len(ids)} tokens")
    if (seen := choice.get("prompt_token_ids")) is not None and seen != ids:
        raise BadScore("wrong_tokens", f"{len(ids)} tokens were sent, and other tokens were scored")
    return Scores(checked(logprobs).tolist(), None, None)
