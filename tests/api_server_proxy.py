"""A proxy between a client and the API server, which plays the API server's faults."""

import asyncio
import json
import ssl
import threading
from pathlib import Path

import yaml
from aiohttp import ClientSession, ClientTimeout, StreamReader, TCPConnector, web

from distill_workers.serving.ports import reserve_port

REFUSED, CUT = -1, -2
"""Faults that are no code: the connection is closed without an answer, or in the middle of it."""
ERROR = {"type": "ERROR", "object": {"kind": "Status", "status": "Failure", "code": 500, "message": "etcd: played"}}


class Proxy:
    """Stands between the operator and the API server; while it has a `fault`, it answers with that and ends watches."""

    def __init__(self, kubeconfig: Path) -> None:
        self.fault = 0
        """HTTP code, REFUSED or CUT; 0 passes everything on."""
        self.errors = 0
        """So many watches get an ERROR event next, and end."""
        self.requests = 0
        self.watching = 0
        """Watches that are under way."""
        self.port = reserve_port()
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
        self.requests += 1
        if self.fault > 0:
            status = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "code": self.fault,
                "message": "played",
            }
            return web.json_response(status, status=self.fault)
        if self.fault == REFUSED:
            return self._hang_up(request)
        kept = {k: v for k, v in request.headers.items() if k.lower() in ("content-type", "accept", "authorization")}
        url, body = self._server + request.raw_path, await request.read()
        async with self._session.request(request.method, url, data=body or None, headers=kept) as answer:
            kind = answer.headers.get("Content-Type", "application/json")
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
            is_watch = "watch=true" in request.query_string
            if self.fault == CUT:
                response.content_length = 1000
                await response.prepare(request)
                await response.write(b"{")
                return self._hang_up(request)
            await response.prepare(request)
            self.watching += is_watch
            try:
                await self._pass_on(answer.content, response, is_watch)
            finally:
                self.watching -= is_watch
            return response

    @staticmethod
    def _hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _pass_on(self, content: StreamReader, response: web.StreamResponse, is_watch: bool) -> None:
        """Chunk by chunk, to the end or until there is a fault."""
        coming = asyncio.ensure_future(content.readany())
        while not self.fault:
            if is_watch and self.errors:
                self.errors -= 1
                await response.write(json.dumps(ERROR).encode() + b"\n")
                break
            if not (await asyncio.wait({coming}, timeout=0.2))[0]:
                continue
            if not (chunk := coming.result()):
                return
            await response.write(chunk)
            coming = asyncio.ensure_future(content.readany())
        coming.cancel()
