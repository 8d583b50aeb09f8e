"""Requests to a rollout engine, its responses, and the two errors that it can end in."""

import math
from dataclasses import dataclass
from typing import Any, Protocol


class EngineUnavailable(Exception):
    """Raised when the engine has ended, hangs or cannot be reached: it must be restarted."""


class EngineRefused(Exception):
    """Raised when the engine runs and refuses the request."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one response."""

    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the response, besides those of the model's own files."""

    def sampling(self) -> dict[str, Any]:
        """Return the sampling_params of SGLang's /generate."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "sampling_seed": self.seed,
            **({"stop_token_ids": list(self.stop_token_ids)} if self.stop_token_ids else {}),
        }


@dataclass(frozen=True, slots=True)
class Response:
    """One response; `logprobs` are nats, one for each id, at the temperature of the request."""

    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    """Version of the weights that each token was sampled with."""
    truncated: bool
    """Cut off at max_new_tokens."""


class ResponseGenerator(Protocol):
    """The interface through which responses are generated."""

    async def generate(self, requests: list[Request]) -> list[Response]:
        """Return a response to each request, once all are generated.

        Raises EngineRefused if one of them is refused, EngineUnavailable.
        """


def read_response(answer: dict[str, Any]) -> Response:
    """Parse one answer of SGLang's /generate. Raises EngineRefused for a response that cannot be trained on."""
    info = answer["meta_info"]
    reason = info["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise EngineRefused(f"a response ended by {reason}: {info['finish_reason'].get('message', 'no message')}")
    tokens = info["output_token_logprobs"]
    logprobs = [t[0] for t in tokens]
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
        raise EngineRefused("a response has log-probabilities that are not finite; the weights may have diverged")
    # SGLang gives spans only for a response during which the weights changed.
    spans = info.get("weight_versions") or [{"version": info["weight_version"], "start": 0, "end": len(tokens)}]
    versions = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    if len(versions) != len(tokens):
        raise EngineRefused(f"a response of {len(tokens)} tokens names the weights of {len(versions)}")
    return Response([t[1] for t in tokens], logprobs, versions, reason == "length")
