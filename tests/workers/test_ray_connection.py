"""The same engine handle over a real Ray: an actor that dies is made again, and errors keep their meaning."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import ray
from conftest import TinyModel, hf_logprobs, spec_of, weights_of

from distill_api.base import API_VERSION, KIND
from distill_api.job import parse_job
from distill_workers.engine.ray_connection import RayUnreachable, connect, disconnect
from distill_workers.engine.ray_engine import RayEngine
from distill_workers.engine.request import EngineRefused, EngineUnavailable, Request
from distill_workers.weight_sync.broadcast import DistributedSync

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = list(range(40, 60))


async def test_an_engine_actor_serves_is_updated_and_comes_back_when_it_dies(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    spec = spec_of(tiny_model(0), tiny_model(1))
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "local"}}
    job = parse_job({**manifest, "spec": spec.model_dump(mode="json", by_alias=True)})
    await asyncio.to_thread(connect, None)
    assert set(ray._private.worker._global_node.all_processes) == {"gcs_server", "raylet"}, (
        "no dashboard, no autoscaler"
    )
    engine = RayEngine(0, job, local=True, log_folder=str(tmp_path))
    sync = DistributedSync(spec, "127.0.0.1", timeout_seconds=30)
    try:
        with pytest.raises(EngineUnavailable, match="has not been started"):
            await engine.health()
        await engine.start(str(tiny_model(0)))
        with pytest.raises(EngineRefused, match="context length"):
            await engine.generate([Request([5] * 5000, 0, 4)])
        where = await engine.info()
        os.kill(where["pid"], signal.SIGKILL)
        with pytest.raises(EngineUnavailable):
            await engine.generate([Request(PROMPT, 0, 4)])
        await engine.start(str(tiny_model(0)))
        assert (await engine.info())["pid"] != where["pid"]
        assert not alive(where["server_pid"]), "a server ends with its actor"
        assert engine.incarnation == 2
        await sync.push(weights_of(tiny_model(2)), 5, {0: engine})
        [response] = await engine.generate([Request(PROMPT, 1, 8)])
        assert set(response.versions) == {5}
        assert response.logprobs == pytest.approx(hf_logprobs(tiny_model(2), PROMPT, response.ids), abs=1e-3)
    finally:
        await sync.close()
        await engine.stop()
        await asyncio.to_thread(disconnect)


async def test_a_private_ray_that_was_too_slow_to_start_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [RuntimeError("The current node timed out during startup.")]
    folders: list[str] = []

    def init(*, _temp_dir: str, **_: object) -> None:
        folders.append(_temp_dir)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(ray, "init", init)
    connect(None)
    assert len(set(folders)) == 2
    failures += [RuntimeError("the second"), RuntimeError("the first")]
    with pytest.raises(RayUnreachable, match=f"on this machine .RuntimeError: the second.*{folders[0][:9]}") as raised:
        connect(None)
    assert "pod" not in str(raised.value)
    disconnect()
    assert not any(Path(folder).exists() for folder in folders)


async def test_a_lost_connection_is_not_mended_by_a_ray_of_the_trainers_own(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As after a lost head: Ray would start one by itself, and new actors would wait there for a worker for ever."""
    spec = spec_of(tiny_model(0), tiny_model(1))
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "local"}}
    job = parse_job({**manifest, "spec": spec.model_dump(mode="json", by_alias=True)})
    engine = RayEngine(0, job, local=False, log_folder=str(tmp_path))
    try:
        with pytest.raises(EngineUnavailable, match="no actor can be created"):
            await asyncio.wait_for(engine.start(str(tiny_model(0))), 60)
        assert not ray.is_initialized()
    finally:
        await asyncio.to_thread(disconnect)


async def test_an_actor_whose_process_does_not_come_up_is_created_anew_on_one_machine(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Met once on a busy machine, where the run stood still for ten minutes."""
    spec = spec_of(tiny_model(0), tiny_model(1))
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "local"}}
    job = parse_job({**manifest, "spec": spec.model_dump(mode="json", by_alias=True)})
    created, killed, called = [], [], []

    class Played(RayEngine):
        def _create_actor(self) -> str:
            created.append(f"actor {len(created)}")
            return created[-1]

        async def _kill(self) -> None:
            killed.append(self._actor)
            self._actor = None

        async def _call(self, method: str, *arguments: object, timeout_seconds: float = 0) -> float:
            called.append((method, timeout_seconds))
            if method == "info" and len(created) < 3:
                raise EngineUnavailable("info was not answered")
            return 1.0

    assert await Played(0, job, local=True, log_folder=str(tmp_path)).start("/model") == 1.0
    assert (created, killed) == (["actor 0", "actor 1", "actor 2"], ["actor 0", "actor 1"])
    assert [seconds for method, seconds in called if method == "info"] == [120.0] * 3
    created.clear()
    with pytest.raises(EngineUnavailable, match="info was not answered"):
        await Played(0, job, local=False, log_folder=str(tmp_path)).start("/model")
    assert created == ["actor 0"] and called[-1] == ("info", 600.0), "a pod may take long to be made again"


async def test_a_ray_that_is_not_there_is_an_error_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's own patience with one connection, half a minute, is not what is tested.
    monkeypatch.setattr("ray.util.client.worker.INITIAL_TIMEOUT_SEC", 0.2)
    monkeypatch.setattr("ray.util.client.worker.MAX_TIMEOUT_SEC", 0.5)
    monkeypatch.setattr("ray.util.client.worker.CONNECTION_RETRIES", 1, raising=False)
    with pytest.raises(RayUnreachable, match=r"no Ray at ray://127\.0\.0\.1:1 within 1 s"):
        await asyncio.to_thread(connect, "ray://127.0.0.1:1", 1.0)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"
