"""The reward `http`: a service grades the response.

It is sent prompt, response, answer and metadata as JSON by POST, and answers {"reward": number}.
"""

import asyncio
import json
import math
import random

import aiohttp

from distill_workers.data.sample import Prompt
from distill_workers.metrics import Metrics
from distill_workers.rewards.base import WHOLE_RESPONSE, Grade, RewardError

CONNECTIONS = 64
"""Requests to one service at the same time; further ones wait."""
BACKOFF_SECONDS = (0.25, 10.0)
"""The pause before the first retry, and the longest one: each is twice as long as the one before."""


class HttpReward:
    """A reward by a service, asked again after a lost connection, a timeout, a 429 or a 5xx."""

    def __init__(self, url: str, timeout_seconds: float, retries: int, metrics: Metrics) -> None:
        self._url, self._timeout, self._retries, self._metrics = url, timeout_seconds, retries, metrics
        # Of the connector, the wait for a free connection would count as the service's time.
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._session: aiohttp.ClientSession | None = None

    async def grade(self, prompt: Prompt, response: str) -> Grade:
        return Grade(await self.score(prompt, response), response.strip(), WHOLE_RESPONSE)

    async def score(self, prompt: Prompt, response: str) -> float:
        question = {
            "prompt": prompt.text,
            "response": response,
            "answer": prompt.answer,
            "metadata": prompt.metadata,
        }
        # A data set may hold dates, decimals and bytes, which JSON has not.
        body = json.dumps(question, default=str).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                pause = min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2 ** (attempt - 1))
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            code, answer = await self._post(body)
            if code is not None and code < 500 and code != 429:
                return self._read(code, answer)
        raise RewardError(f"{self._url}: {self._retries + 1} requests failed; the last: {answer[:200]}")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, body: bytes) -> tuple[int | None, str]:
        """Return the status and the text of the answer; without an answer, None and why there is none."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=self._timeout),
            )
        code: int | None = None
        try:
            async with self._slots, self._session.post(self._url, data=body) as answer:
                text = await answer.text(errors="replace")
                code = answer.status
                return code, text if code == 200 else f"answered {code}: {text}"
        except TimeoutError:
            return None, f"not answered within {self._timeout:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            return None, f"{type(error).__name__}: {error}"
        finally:
            self._metrics.add("distill_reward_requests", code="error" if code is None else str(code))

    def _read(self, code: int, answer: str) -> float:
        if code != 200:
            raise RewardError(f"{self._url} {answer[:200]}", permanent=True)
        try:
            value = json.loads(answer)["reward"]
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except (ValueError, TypeError, KeyError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(f'{self._url} answered {answer[:200]!r}; it must be {{"reward": NUMBER}}', permanent=True)
        return number
