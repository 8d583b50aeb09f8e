"""What is asked of an engine, and what comes back: requests, responses, and the two ways in which it can fail."""

import math
from dataclasses import dataclass
from typing import Any, Protocol


class EngineUnavailable(Exception):
    """The engine is dead, hung or gone: it must be started again."""


class EngineRefused(Exception):
    """The engine lives and answered that it will not do this."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response is wanted."""

    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def sampling(self) -> dict[str, Any]:
        """As /generate takes it."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "sampling_seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class Response:
    """One response; `logprobs` are nats, one for each id, at the temperature that was asked for."""

    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    """Version of the weights that each token was drawn with."""
    truncated: bool


class ResponseGenerator(Protocol):
    """An engine, wherever it runs."""

    async def generate(self, requests: list[Request]) -> list[Response]:
        """A response to each, once all are there. Raises EngineRefused for all if one is; EngineUnavailable."""


def read_response(answer: dict[str, Any]) -> Response:
    """One answer of /generate. Raises EngineRefused for one that cannot be trained on."""
    info = answer["meta_info"]
    reason = info["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise EngineRefused(f"a response ended by {reason}: {info['finish_reason'].get('message', 'no message')}")
    tokens = info["output_token_logprobs"]
    logprobs = [t[0] for t in tokens]
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
        raise EngineRefused("a response has log-probabilities that are not finite; the weights may have diverged")
    # Spans only of a response that was under way while weights changed.
    spans = info.get("weight_versions") or [{"version": info["weight_version"], "start": 0, "end": len(tokens)}]
    versions = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    if len(versions) != len(tokens):
        raise EngineRefused(f"a response of {len(tokens)} tokens names the weights of {len(versions)}")
    return Response([t[1] for t in tokens], logprobs, versions, reason == "length")
