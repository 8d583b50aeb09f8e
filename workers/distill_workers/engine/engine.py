"""A rollout engine: one supervised SGLang server of the student, called over loopback.

`Engine` runs as a Ray actor on a rollout worker, or in-process. All its methods are coroutines, so that one actor takes
many calls at once. A server that has ended or does not answer is an EngineUnavailable; `start` ends the whole process
group of the old server and starts a new one, which has the weights of its model folder until the first push.
"""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from distill_api.spec.job_spec import Spec
from distill_workers import stacks
from distill_workers.engine.request import (
    EngineRefused,
    EngineUnavailable,
    Request,
    Response,
    ResponseGenerator,
    read_response,
)
from distill_workers.serving.admin_key import bearer
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SHARED_MEMORY_LOADER, SGLangServer
from distill_workers.serving.server_devices import ServerDevices

__all__ = ["Engine", "EngineHandle", "EngineRefused", "EngineUnavailable", "Response", "read_response"]

CONTROL_TIMEOUT_SECONDS = 60.0
RESPONSE_TIMEOUT_SECONDS = 3600.0
START_TIMEOUT_SECONDS = 1800.0
"""A large model takes long to load; the operator's own deadline may be shorter."""


class EngineHandle(ResponseGenerator, Protocol):
    """The interface of an engine, wherever it runs. Any call may raise EngineUnavailable or EngineRefused."""

    incarnation: int
    """Number of starts: a restarted engine is in no weight group."""

    async def start(self, model: str) -> float:
        """(Re)start the server on a model folder, and return the seconds until it served."""

    async def stop(self) -> None:
        """End the server and all its processes."""

    async def health(self, timeout_seconds: float = 10.0) -> None:
        """Return if SGLang's scheduler answers, also while generation is paused or busy."""

    async def answer(self, request: dict[str, Any]) -> Any:
        """Return the JSON of the answer of SGLang's /generate to the body of any request, to score or to generate."""

    async def pause(self) -> None:
        """Pause generation: running requests wait, and go on with the weights that the engine has then."""

    async def resume(self) -> None:
        """Go on generating after `pause`."""

    async def join_group(
        self,
        name: str,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str,
        timeout_seconds: float,
    ) -> None:
        """Join a process group for weights; `rank` is that of the engine's first tensor parallel rank."""

    async def leave_group(self, name: str) -> None:
        """Leave a process group for weights."""

    async def begin_update(self) -> None:
        """Begin a session of weight updates, which `end_update` ends."""

    async def receive(
        self,
        group: str,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        version: int | None,
        timeout_seconds: float,
    ) -> None:
        """Receive one flattened bucket by broadcast; the last bucket of a push carries the version of the weights."""

    async def end_update(self) -> None:
        """End a session of weight updates."""

    async def load_folder(self, folder: str, version: int, timeout_seconds: float) -> None:
        """Load the weights of a Hugging Face folder."""

    async def load_shared(self, message: str, version: int | None, timeout_seconds: float) -> None:
        """Load one bucket from shared memory (weight_sync/shared_memory.py); the last one carries the version."""

    async def weight_version(self) -> int:
        """Return the version of the weights that the engine has."""


class Engine:
    """An EngineHandle of a server on this machine."""

    def __init__(
        self,
        spec: Spec,
        number: int,
        *,
        host: str,
        port: int | None,
        log_folder: str,
        devices: ServerDevices | None = None,
    ) -> None:
        """`devices` are those of this engine where other roles are on this machine; without, it takes what it sees."""
        stacks.on_signal()
        self._spec, self._host, self._devices = spec, host, devices
        self._port = port or reserve_port()
        self._log = Path(log_folder) / f"engine-{number}.log"
        self._server: SGLangServer | None = None
        self._session: aiohttp.ClientSession | None = None
        self.incarnation = 0
        self.stop_token_ids: tuple[int, ...] = ()
        """Ids that end a response of `sample`, besides those of the model's own files."""

    async def start(self, model: str) -> float:
        await self.stop()
        self._server = SGLangServer(
            model, self._spec, "engine", host=self._host, port=self._port, log=self._log, devices=self._devices
        )
        self._server.start()
        self._session = aiohttp.ClientSession(
            f"http://127.0.0.1:{self._port}",
            # The server closes a connection that is idle for 5 s, perhaps just as it is used again: that reset looks
            # like a dead engine. A new connection over loopback costs next to nothing.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=bearer(self._server.key),
        )
        self.incarnation += 1
        return await asyncio.to_thread(self._server.wait_ready, START_TIMEOUT_SECONDS)

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._server is not None:
            self._server.stop()
            self._server = None

    async def info(self) -> dict[str, Any]:
        """Return host, process ids and port, for logs and tests."""
        server = self._server
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "server_pid": server.pid if server else None,
            "port": server.port if server else None,
        }

    async def health(self, timeout_seconds: float = 10.0) -> None:
        await self._get("/v1/loads?include=core", timeout_seconds)

    async def generate(
        self, requests: list[Request], timeout_seconds: float = RESPONSE_TIMEOUT_SECONDS
    ) -> list[Response]:
        body = {
            "input_ids": [request.prompt_ids for request in requests],
            "sampling_params": [request.sampling() for request in requests],
            "return_logprob": True,
        }
        return [read_response(answer) for answer in await self._post("/generate", body, timeout_seconds)]

    async def answer(self, request: dict[str, Any]) -> Any:
        return await self._post("/generate", request, RESPONSE_TIMEOUT_SECONDS)

    async def sample(
        self,
        prompt_ids: list[int],
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        timeout_seconds: float = RESPONSE_TIMEOUT_SECONDS,
    ) -> list[Response]:
        """Return one response to the prompt for each seed."""
        stop = self.stop_token_ids
        requests = [Request(prompt_ids, seed, max_new_tokens, temperature, top_p, stop) for seed in seeds]
        return await self.generate(requests, timeout_seconds)

    async def pause(self) -> None:
        # retract: running requests go back to the queue without their key-value cache, which is of the old weights.
        await self._post("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        await self._post("/continue_generation", {})

    async def join_group(
        self,
        name: str,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str,
        timeout_seconds: float,
    ) -> None:
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        await self._post("/init_weights_update_group", body, timeout_seconds)

    async def leave_group(self, name: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": name})

    async def begin_update(self) -> None:
        await self._post("/begin_weight_update", {})

    async def receive(
        self,
        group: str,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        version: int | None,
        timeout_seconds: float,
    ) -> None:
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": version is not None,
            "weight_version": None if version is None else str(version),
        }
        await self._post("/update_weights_from_distributed", body, timeout_seconds)

    async def end_update(self) -> None:
        await self._post("/end_weight_update", {})

    async def load_folder(self, folder: str, version: int, timeout_seconds: float) -> None:
        body = {"model_path": folder, "weight_version": str(version), "flush_cache": True}
        await self._post("/update_weights_from_disk", body, timeout_seconds)

    async def load_shared(self, message: str, version: int | None, timeout_seconds: float) -> None:
        body = {
            "serialized_named_tensors": [message] * self._spec.rollout.tensor_parallel_size,
            "load_format": SHARED_MEMORY_LOADER,
            "flush_cache": version is not None,
            "weight_version": None if version is None else str(version),
        }
        await self._post("/update_weights_from_tensor", body, timeout_seconds)

    async def weight_version(self) -> int:
        return int((await self._get("/model_info", CONTROL_TIMEOUT_SECONDS))["weight_version"])

    async def _get(self, path: str, timeout_seconds: float) -> Any:
        return await self._request("GET", path, None, timeout_seconds)

    async def _post(self, path: str, body: dict[str, Any], timeout_seconds: float = CONTROL_TIMEOUT_SECONDS) -> Any:
        return await self._request("POST", path, body, timeout_seconds)

    async def _request(self, method: str, path: str, body: Any, timeout_seconds: float) -> Any:
        server, session = self._server, self._session
        if server is None or session is None:
            raise EngineUnavailable("the engine has not been started")
        if not server.alive():
            raise EngineUnavailable(f"the SGLang server has ended; {server.tail()}")
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            async with session.request(method, path, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise EngineRefused(f"{path} answered {answer.status}: {(await answer.text())[:500]}")
                return await answer.json(content_type=None)
        except TimeoutError:
            raise EngineUnavailable(f"{path} was not answered within {timeout_seconds:.0f} s") from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            # RuntimeError: the session was closed by a restart while the request was waiting.
            state = "the SGLang server still runs" if server.alive() else "the SGLang server has ended"
            raise EngineUnavailable(f"{path}: {type(error).__name__}: {error}; {state}") from None
