"""The key that SGLang's administration requires: for weights, pause, flush, profiles, and what later versions add.

SGLang has an --admin-api-key of its own, but writes it into its log and shows it in /server_info to anybody (0.5.23).
So the key stays out of its arguments: a middleware around its application refuses every path that is not plainly
inference or reading. The key is in the environment; where it is not, a server makes one that nobody knows.
"""

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from distill_api.protocol import Variable

OPEN_PATHS = ("/generate", "/model_info", "/ping", "/ready")
OPEN_PREFIXES = ("/v1/", "/health", "/metrics")
"""Paths for the kubelet, Prometheus and clients of the model. /server_info is not open: it shows the arguments."""

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def admin_key() -> str:
    """Return the key in this process's environment, or a new one where there is none: a server is never open."""
    return os.environ.get(Variable.KEY) or secrets.token_urlsafe(32)


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries the key."""
    return {"Authorization": f"Bearer {key}"}


class AdminKeyMiddleware:
    """An ASGI middleware that lets open paths through, and all others only with the key; without it they get a 401."""

    def __init__(self, app: App, key: str) -> None:
        self._app, self._expected = app, bearer(key)["Authorization"].encode()

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan" or (kind == "http" and (is_open(scope["path"]) or self._has_key(scope))):
            await self._app(scope, receive, send)
        elif kind == "http":
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "this path needs the key of the job"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: Message) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
