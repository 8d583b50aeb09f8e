"""Requests of a machine to itself, which must pass by every HTTP proxy that the environment names.

A proxy refuses them, answers in place of the server, or is not there. Only the standard library is imported here.
"""

import http.client
from collections.abc import Mapping

NAMES = ("127.0.0.1", "localhost", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep requests to this machine off the proxies of an environment; none without one.

    urllib, requests and gRPC read them, some in capitals and some not. What they name already stays.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return {}
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    known = [name.strip() for name in given.split(",") if name.strip()]
    text = ",".join([*known, *(name for name in NAMES if name not in known)])
    return {"no_proxy": text, "NO_PROXY": text}


def get(port: int, path: str, timeout_seconds: float) -> bytes:
    """Return the body of a GET to a port of this machine. Raises OSError unless it is answered with status 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except http.client.HTTPException as error:
        raise OSError(f"127.0.0.1:{port}{path}: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"127.0.0.1:{port}{path} answered {answer.status}")
    return body
