"""Whatever the API server answers for a while, the operator is right within seconds once it is well again."""

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from aiohttp import ClientSession, ClientTimeout, StreamReader, TCPConnector, web
from operator_world import World, free_port

pytest_plugins = ["operator_fixtures"]

WATCHED = 6
"""Kinds that the operator watches."""
OUTAGE_SECONDS = 25.0
"""Longer than kopf's own patience, which the watches died of after 18 s."""


class Proxy:
    """Stands between the operator and the API server; while it has a `fault`, it answers with that and ends watches."""

    def __init__(self, kubeconfig: Path) -> None:
        self.fault = 0
        self.watching = 0
        """Watches that are under way."""
        self.port = free_port()
        cluster = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]
        self._server = cluster["server"]
        self._tls = ssl.create_default_context()
        self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(30)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._up.set()
        self._loop.run_forever()

    async def _serve(self) -> None:
        self._session = ClientSession(connector=TCPConnector(ssl=self._tls, limit=0), timeout=ClientTimeout(total=None))
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.fault:
            status = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "code": self.fault,
                "message": "played",
            }
            return web.json_response(status, status=self.fault)
        kept = {k: v for k, v in request.headers.items() if k.lower() in ("content-type", "accept", "authorization")}
        url, body = self._server + request.raw_path, await request.read()
        async with self._session.request(request.method, url, data=body or None, headers=kept) as answer:
            kind = answer.headers.get("Content-Type", "application/json")
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
            await response.prepare(request)
            is_watch = "watch=true" in request.query_string
            self.watching += is_watch
            try:
                await self._pass_on(answer.content, response)
            finally:
                self.watching -= is_watch
            return response

    async def _pass_on(self, content: StreamReader, response: web.StreamResponse) -> None:
        """Chunk by chunk, to the end or until there is a fault."""
        coming = asyncio.ensure_future(content.readany())
        while not self.fault:
            if not (await asyncio.wait({coming}, timeout=0.2))[0]:
                continue
            if not (chunk := coming.result()):
                return
            await response.write(chunk)
            coming = asyncio.ensure_future(content.readany())
        coming.cancel()


@pytest.fixture
def proxy(world: World, operator_kubeconfig: Path, tmp_path: Path) -> Iterator[Proxy]:
    found = Proxy(operator_kubeconfig)
    config = json.loads(operator_kubeconfig.read_text())
    config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{found.port}"}
    world.kubeconfig = tmp_path / "through-the-proxy"
    world.kubeconfig.write_text(json.dumps(config))
    yield found
    found.stop()


def notice(world: World, name: str) -> None:
    """A new job gets a status although nothing is listed for ten minutes: a watch has told of it."""
    world.submit(name)
    world.until(f"{name} is noticed", lambda: world.job(name).get("status", {}).get("conditions"))


@pytest.mark.usefixtures("kuberay")
@pytest.mark.parametrize("code", [503, 403])
def test_watches_outlive_an_outage(code: int, world: World, proxy: Proxy) -> None:
    operator = world.operator(DISTILL_RESYNC_SECONDS="600")
    world.submit("before")
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    proxy.fault = code
    time.sleep(OUTAGE_SECONDS)
    proxy.fault = 0
    notice(world, "after")
    assert operator.process.poll() is None
