"""Whatever the API server answers for a while, the operator is right within seconds once it is well again."""

import asyncio
import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession, ClientTimeout, StreamReader, TCPConnector, web
from operator_world import World

from distill_operator.rbac import NAMESPACED_RULES
from distill_workers.serving.ports import reserve_port

pytest_plugins = ["operator_fixtures"]

WATCHED = 6
"""Kinds that the operator watches."""
OUTAGE_SECONDS = 25.0
"""Longer than kopf's own patience, which the watches died of after 18 s."""
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


@pytest.mark.usefixtures("kuberay")
def test_a_leader_outlives_an_outage_that_costs_it_the_lease(world: World, proxy: Proxy) -> None:
    election = {"DISTILL_LEADER_ELECTION": "true", "DISTILL_LEASE_NAMESPACE": world.namespace}
    operator = world.operator(DISTILL_RESYNC_SECONDS="600", **election)
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    proxy.fault = 503
    world.until("the lease is lost", lambda: "standing for election again" in operator.log())
    proxy.fault = 0
    world.until("every kind is watched again", lambda: proxy.watching >= WATCHED)
    notice(world, "after")
    assert operator.process.poll() is None


@pytest.mark.usefixtures("kuberay")
@pytest.mark.parametrize(("fault", "everywhere"), [(503, True), (REFUSED, False), (CUT, True)])
def test_an_outage_while_the_operator_starts_is_outlived(
    fault: int, everywhere: bool, world: World, proxy: Proxy
) -> None:
    proxy.fault = fault
    scope = {"DISTILL_WATCH_NAMESPACES": ""} if everywhere else {}
    operator = world.operator(DISTILL_RESYNC_SECONDS="600", **scope)
    if fault == CUT:
        world.until("kopf has failed", lambda: "all watches begin anew" in operator.log())
    else:
        time.sleep(OUTAGE_SECONDS)
    proxy.fault = 0
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    notice(world, "after")
    assert operator.process.poll() is None


@pytest.mark.usefixtures("kuberay")
def test_an_error_within_a_watch_ends_no_watch_for_good(world: World, proxy: Proxy) -> None:
    operator = world.operator(DISTILL_RESYNC_SECONDS="600")
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    proxy.errors = WATCHED
    world.until("every watch has ended", lambda: not proxy.errors)
    world.until("every kind is watched again", lambda: proxy.watching >= WATCHED)
    notice(world, "after")
    assert operator.process.poll() is None
    restarts = re.search(r"distill_operator_watch_restarts_total (\d+)", operator.get("/metrics"))
    assert restarts and int(restarts[1]) >= 1


@pytest.fixture
def neighbour(crds_installed: Any, world: World, namespaced_kubeconfig: Path) -> Iterator[World]:
    """A second namespace in which the same operator has the same rights, until it is forbidden."""
    found = replace(world, namespace=f"{world.namespace}-b", operators=[])
    crds_installed.kubectl("create", "namespace", found.namespace)
    meta = {"name": "operator", "namespace": found.namespace}
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": meta,
        "rules": [*NAMESPACED_RULES],
    }
    crds_installed.kubectl("apply", "-f", "-", stdin=json.dumps(role))
    world.kubeconfig = namespaced_kubeconfig
    yield found


def set_allowed(server: Any, world: World, neighbour: World, *, allowed: bool) -> None:
    account = f"--serviceaccount=default:only-{world.namespace}"
    binding = ("rolebinding", "operator", "-n", neighbour.namespace)
    server.kubectl(*(("create", *binding, "--role=operator", account) if allowed else ("delete", *binding)))


@pytest.mark.usefixtures("kuberay")
def test_a_namespace_that_is_forbidden_touches_no_other_and_is_watched_again(
    crds_installed: Any, world: World, neighbour: World
) -> None:
    """What is left of a namespace that is deleted is the answer 403: its RoleBinding is gone with it."""
    names = {"DISTILL_WATCH_NAMESPACES": f"{world.namespace},{neighbour.namespace}"}
    operator = world.operator(DISTILL_RESYNC_SECONDS="2", **names)
    notice(world, "while-it-never-was")
    set_allowed(crds_installed, world, neighbour, allowed=True)
    notice(neighbour, "first")
    set_allowed(crds_installed, world, neighbour, allowed=False)
    world.until("it is noticed", lambda: "distill_operator_namespaces_failing 1.0" in operator.get("/metrics"))
    notice(world, "while-it-is-forbidden")
    set_allowed(crds_installed, world, neighbour, allowed=True)
    notice(neighbour, "second")
    assert "distill_operator_watch_restarts_total 0.0" in operator.get("/metrics")
    assert operator.process.poll() is None
