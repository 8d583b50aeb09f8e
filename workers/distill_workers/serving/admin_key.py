"""The key that SGLang's administration asks for: weights, pause, flush, profiles, and whatever its next version adds.

SGLang has an --admin-api-key of its own, but it writes it into its log and shows it to anybody who asks for
/server_info (0.5.23). So the key stays out of its arguments: a layer around its application refuses every path that is
not plainly inference or reading. The key comes by the environment; where none is, a server makes one that nobody knows.
"""

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from distill_api.protocol import Variable

OPEN_PATHS = ("/generate", "/model_info", "/ping", "/ready")
OPEN_PREFIXES = ("/v1/", "/health", "/metrics")
"""What kubelet, Prometheus and clients of the model ask. /server_info is not among them: it shows the arguments."""

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def admin_key() -> str:
    """The job's key, or a new one where the environment has none: a server is never open."""
    return os.environ.get(Variable.KEY) or secrets.token_urlsafe(32)


def bearer(key: str) -> dict[str, str]:
    """The header that administration asks for."""
    return {"Authorization": f"Bearer {key}"}


class AdminKeyMiddleware:
    """ASGI: lets through what is open to all, and the rest only with the key. Everybody else gets a 401."""

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
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
