"""SGLang's administration needs the job's key, and the key is nowhere to be seen."""

import asyncio
import importlib.util
import re
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from conftest import TinyModel, weights_of

from distill_workers.serving.admin_key import AdminKeyMiddleware, bearer, is_open
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.sglang_launch import freeze_gc, unguarded_servers
from distill_workers.weight_sync.broadcast import DistributedSync

session_loop = pytest.mark.asyncio(loop_scope="session")


async def answer(middleware: Any, path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await middleware({"type": kind, "path": path, "headers": list(headers)}, None, send)
    return sent


def guarded() -> tuple[AdminKeyMiddleware, list[str]]:
    """A guard, and the paths that it has let through."""
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    return AdminKeyMiddleware(app, "k1"), passed


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer ", b"Bearer k2", b"Bearer k11", b"k1", b"Basic k1", b"\xff"], ids=repr
)
def test_only_the_key_itself_opens_the_administration(header: bytes | None) -> None:
    middleware, passed = guarded()
    headers = [] if header is None else [(b"authorization", header)]
    sent = asyncio.run(answer(middleware, "/flush_cache", *headers))
    assert (sent[0]["status"], passed) == (401, [])
    asyncio.run(answer(middleware, "/flush_cache", (b"authorization", b"Bearer k1")))
    assert passed == ["/flush_cache"]


def test_what_nobody_has_heard_of_is_closed_and_so_are_websockets() -> None:
    middleware, passed = guarded()
    for path in ("/a_new_way_to_change_weights", "/server_info", "/generate/../flush_cache", "//generate", ""):
        assert asyncio.run(answer(middleware, path))[0]["status"] == 401
    assert asyncio.run(answer(middleware, "/v1/realtime", kind="websocket"))[0]["type"] == "websocket.close"
    assert passed == []


def test_nothing_that_sglang_itself_calls_administration_is_open() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "srt/entrypoints/http_server.py").read_text()
    administration = re.findall(r'@app\.\w+\(\s*"([^"]+)"[^@]*?\)\n\s*@auth_level\(AuthLevel.ADMIN', source)
    assert {"/pause_generation", "/update_weights_from_disk", "/flush_cache"} < set(administration)
    assert not [path for path in administration if is_open(path)]


@pytest.mark.parametrize(
    ("door", "value"), [("tokenizer_worker_num", 2), ("grpc_port", 1), ("use_ray", True), ("encoder_only", True)]
)
def test_a_way_past_the_guard_is_found_by_its_name(door: str, value: Any) -> None:
    modes = dict.fromkeys(("smg_grpc_mode", "grpc_mode", "encoder_only", "use_ray"), False)
    usual = {**modes, "grpc_port": None, "tokenizer_worker_num": 1}
    assert unguarded_servers(SimpleNamespace(**usual), rust_server=False) == []
    [found] = unguarded_servers(SimpleNamespace(**{**usual, door: value}), rust_server=False)
    assert found.startswith(f"--{door.replace('_', '-')}")


def test_a_server_that_listens_late_gets_the_request_to_itself_and_a_proxy_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port, proxy = reserve_port(), reserve_port()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy}")
    asked = threading.Thread(target=freeze_gc, args=(f"http://127.0.0.1:{port}", "k1", True))
    asked.start()
    time.sleep(1.0)
    got: list[tuple[str, str | None]] = []

    class Late(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", port), Late) as server:
        server.timeout = 20
        server.handle_request()
    asked.join()
    assert got == [("/freeze_gc", "Bearer k1")] and "freeze_gc failed" not in caplog.text


@session_loop
async def test_a_real_server_answers_401_to_who_has_no_key_and_serves_all_the_same(
    engine: Any, tiny_spec: Any, tiny_model: TinyModel
) -> None:
    sync = DistributedSync(tiny_spec, "127.0.0.1", timeout_seconds=20)
    # The weights and the version that it has: others share this engine.
    await sync.push(weights_of(tiny_model(0)), 0, {0: engine})
    await sync.close()
    server = engine._server
    closed = ("/flush_cache", "/server_info", "/pause_generation", "/update_weights_from_disk", "/start_profile")
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as stranger:
        for path in closed:
            async with stranger.post(path, json={"model_path": str(tiny_model(2))}) as refused:
                assert refused.status == 401, path
        for path in ("/model_info", "/metrics/", "/v1/loads?include=core"):
            async with stranger.get(path) as served:
                assert served.status == 200, path
        async with stranger.get("/server_info", headers=bearer(server.key)) as shown:
            assert shown.status == 200 and server.key not in await shown.text()
    assert await engine.weight_version() == 0
    [response] = await engine.sample([5, 6, 7], seeds=[1], max_new_tokens=2)
    assert set(response.versions) == {0}


@session_loop
async def test_the_key_stands_in_no_log_and_in_no_process_list(engine: Any) -> None:
    server = engine._server
    itself, log = 'POST /freeze_gc HTTP/1.1" 200', ""
    for _ in range(600):
        log = server.log.read_text(errors="replace")
        if itself in log:
            break
        await asyncio.sleep(0.1)
    assert itself in log, f"SGLang's request to itself has the key\n{log[-1500:]}"
    assert server.key not in log
    lines = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "sglang" in lines and server.key not in lines
