"""The readiness probe of an SGLang server: `python -m distill_workers.probe score HOST:PORT` exits 0 if it scores.

It sends one real scoring request, since SGLang's own /health sleeps for a second and fails while generation is paused.
It imports the standard library alone, so that the kubelet may run it every few seconds.
"""

import http.client
import json
import math
import sys

PROBE_IDS = (1, 2, 3, 4)


class NotReady(Exception):
    """Raised when the server does not answer, or answers without scores."""


def score(host: str, port: int, timeout_seconds: float = 8.0) -> None:
    """Raise NotReady unless the server returns a finite log-prob for each probed token but the first."""
    body = json.dumps(
        {
            "input_ids": PROBE_IDS,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
    )
    connection = http.client.HTTPConnection(host, port, timeout=timeout_seconds)
    try:
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise NotReady(f"{host}:{port} does not answer: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise NotReady(f"{host}:{port} answered {answer.status}: {text[:200]!r}")
    try:
        entries = json.loads(text)["meta_info"]["input_token_logprobs"]
        logprobs, ids = [e[0] for e in entries], [e[1] for e in entries]
    except (ValueError, LookupError, TypeError):
        raise NotReady(f"{host}:{port} answered without input_token_logprobs: {text[:200]!r}") from None
    if ids != list(PROBE_IDS):
        raise NotReady(f"{host}:{port} scored the tokens {ids}, not {list(PROBE_IDS)}")
    if not all(isinstance(x, float | int) and math.isfinite(x) and x <= 0 for x in logprobs[1:]):
        raise NotReady(f"{host}:{port} gave invalid log-probabilities: {logprobs}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] != "score" or not arguments[1].rpartition(":")[2].isdigit():
        print("usage: python -m distill_workers.probe score HOST:PORT", file=sys.stderr)
        return 2
    host, _, port = arguments[1].rpartition(":")
    try:
        score(host, int(port))
    except NotReady as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
