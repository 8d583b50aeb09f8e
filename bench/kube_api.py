"""A client of the API server for benchmarks: requests as an administrator, and watches that begin with a list."""

import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

Json = dict[str, Any]
MERGE = "application/merge-patch+json"


class Api:
    """The API server, as an administrator."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url

    async def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Json:
        """Raises RuntimeError with what the server said."""
        headers = {"Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        async with self.session.request(method, self.url + path, data=data, headers=headers) as answer:
            text = await answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
            found: Json = json.loads(text)
            return found

    async def watch(self, path: str) -> AsyncIterator[tuple[str, Json]]:
        """Type and object of everything that is there (ADDED) and then happens, for ever."""
        separator = "&" if "?" in path else "?"
        listed = await self.call("GET", path)
        for item in listed.get("items") or []:
            yield "ADDED", item
        version, rest = listed["metadata"]["resourceVersion"], b""
        while True:
            query = f"{separator}watch=true&resourceVersion={version}&timeoutSeconds=600"
            async with self.session.get(self.url + path + query) as answer:
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        event = json.loads(line)
                        version = event["object"]["metadata"]["resourceVersion"]
                        yield event["type"], event["object"]


def connect(kubeconfig: Path) -> Api:
    config = json.loads(kubeconfig.read_text())
    cluster, token = config["clusters"][0]["cluster"], config["users"][0]["user"]["token"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {token}"},
        connector=aiohttp.TCPConnector(ssl=context, limit=64),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
    )
    return Api(session, cluster["server"])
