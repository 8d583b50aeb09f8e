"""Whatever comes in the API server's place, the client answers with an error of its own, which is tried again."""

import json
import logging
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from kubernetes.aio import client

from distill_operator.kinds import Kind
from distill_operator.runtime.client import KubernetesCluster
from distill_operator.runtime.errors import ApiError
from distill_operator.runtime.logs import is_worth_saying


class Server:
    """Answers every request with the same."""

    status = 200
    body = ""
    cut = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if not self.cut:
            return web.Response(status=self.status, text=self.body)
        response = web.StreamResponse()
        response.content_length = 1000
        await response.prepare(request)
        await response.write(b"{")
        assert request.transport is not None
        request.transport.abort()
        return response


@pytest.fixture
async def played() -> AsyncIterator[tuple[Server, KubernetesCluster]]:
    server, app = Server(), web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    cluster = KubernetesCluster(client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")), "test")
    yield server, cluster
    await cluster.close()
    await runner.cleanup()


@pytest.mark.parametrize("body", ["<html>sign in</html>", "", "[1]", '"text"'])
async def test_a_page_in_place_of_an_object_is_an_error_of_the_api_server(
    body: str, played: tuple[Server, KubernetesCluster]
) -> None:
    server, cluster = played
    server.body = body
    with pytest.raises(ApiError) as raised:
        await cluster.get(Kind.JOB, "ns", "x")
    assert raised.value.status == 0
    assert cluster.requests["get", "error"] == 1


async def test_an_answer_that_is_cut_off_is_an_error_of_the_api_server(
    played: tuple[Server, KubernetesCluster],
) -> None:
    server, cluster = played
    server.cut = True
    with pytest.raises(ApiError):
        await cluster.get(Kind.JOB, "ns", "x")


@pytest.mark.parametrize(("status", "may_pass"), [(401, False), (403, True), (429, True), (503, True)])
async def test_only_credentials_that_are_refused_need_a_new_process(
    status: int, may_pass: bool, played: tuple[Server, KubernetesCluster]
) -> None:
    server, cluster = played
    server.status, server.body = status, json.dumps({"kind": "Status", "message": "no"})
    with pytest.raises(ApiError) as raised:
        await cluster.list(Kind.JOB, "ns")
    assert raised.value.status == status and raised.value.may_pass is may_pass


def test_a_request_that_is_tried_again_for_ever_is_logged_ever_less_often() -> None:
    def said(message: str) -> bool:
        return bool(is_worth_saying(logging.LogRecord("kopf", logging.ERROR, "", 0, message, None, None)))

    tries = [n for n in range(1, 1000) if said(f"Request attempt #{n} failed; will retry: GET /api -> 503")]
    assert tries == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert said("Request attempt #3 failed; escalating: GET /api")
