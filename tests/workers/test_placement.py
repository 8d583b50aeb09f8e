"""Which devices `distill run` and `distill evaluate` give to each role, with device counts that are not there."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModel, spec_of
from runs import arithmetic

from distill_api.job import parse_job
from distill_api.spec.job_spec import Spec
from distill_cli.main import main
from distill_workers.engine.engine import Engine
from distill_workers.failures import ConfigurationError
from distill_workers.local.devices import footprint, named
from distill_workers.local.evaluate import HERE, evaluate
from distill_workers.local.placement import Device, Footprint, Placement, place
from distill_workers.local.run import LocalRun
from distill_workers.serving import server_devices
from distill_workers.serving.server import SGLangServer, sglang_command
from distill_workers.serving.server_devices import ServerDevices
from distill_workers.teacher.local_servers import TeacherServers
from distill_workers.weight_sync.broadcast import DistributedSync
from distill_workers.weight_sync.shared_memory import SharedMemorySync
from distill_workers.weight_sync.transport import choose_transport

GB = 10**9
SMALL = Footprint(weight_bytes=1_200_000_000, token_bytes=114_688)
"""Of Qwen3-0.6B in bfloat16."""


def gpu_spec(student: Path = Path("/m/s"), teacher: Path = Path("/m/t"), /, **changes: Any) -> Spec:
    return spec_of(student, teacher, accelerator="nvidia.com/gpu", **changes)


def devices(count: int, gigabytes: int = 80) -> list[Device]:
    return [Device(str(number), gigabytes * GB) for number in range(count)]


def placed(spec: Spec, there: list[Device], footprint: Footprint = SMALL) -> Placement:
    found = {"student": footprint} | {t.name: footprint for t in spec.all_teachers}
    trainer = spec.trainer
    ranks = trainer.nodes * trainer.gpus_per_node
    return place(spec, there, found, ranks=ranks, engines=spec.rollout.replicas, teachers=True)


FLAGSHIP: dict[str, Any] = {
    "trainer": {"gpusPerNode": 2, "parallelism": {"tensor": 2}},
    "rollout": {"replicas": 4},
    "teacher": {"model": "/m/t", "tensorParallelSize": 2},
}


def test_every_rank_of_every_role_has_a_device_of_its_own() -> None:
    found = placed(gpu_spec(**FLAGSHIP), devices(9))
    assert found.trainer == ("0", "1")
    assert [engine.names for engine in found.engines] == [("2",), ("3",), ("4",), ("5",)]
    assert [server.names for server in found.teachers["teacher"]] == [("6", "7")]
    assert not found.shared


def test_replicas_and_tensor_parallel_ranks_of_several_teachers_are_counted() -> None:
    teachers = [
        {"name": "math", "model": "/m/a", "replicas": 2, "tensorParallelSize": 2},
        {"name": "code", "model": "/m/b"},
    ]
    prompts = {"reasoningGym": {"task": "chain_sum", "size": 8}}
    data = {"defaultTeacher": "math", "prompts": prompts}
    spec = gpu_spec(teacher=None, teachers=teachers, data=data, rollout={"tensorParallelSize": 2})
    found = placed(spec, devices(8))
    assert [engine.names for engine in found.engines] == [("1", "2")]
    assert [server.names for server in found.teachers["math"]] == [("3", "4"), ("5", "6")]
    assert [server.names for server in found.teachers["code"]] == [("7",)]


def test_too_few_devices_are_one_sentence_that_counts_what_is_asked_and_what_is_there() -> None:
    with pytest.raises(ConfigurationError) as refused:
        placed(gpu_spec(**FLAGSHIP), devices(7))
    assert str(refused.value).startswith(
        "the job asks for 8 accelerators on this machine (trainer 2, engines 4 × 1, teacher teacher 1 × 2), and 7 are "
        "visible: lower trainer.gpusPerNode"
    )
    assert "share one" not in str(refused.value), "two ranks of NCCL do not share a device"
    with pytest.raises(ConfigurationError, match=r"asks for 3 .* 2 are visible: .* CUDA_VISIBLE_DEVICES=0$"):
        placed(gpu_spec(), devices(2))
    with pytest.raises(ConfigurationError, match=r"asks for 3 .* none is visible: see nvidia-smi"):
        placed(gpu_spec(), [])


def test_one_device_is_not_shared_by_ranks_that_speak_by_nccl() -> None:
    for changes in ({"trainer": {"gpusPerNode": 2}}, {"rollout": {"tensorParallelSize": 2}}):
        with pytest.raises(ConfigurationError, match="1 is visible"):
            placed(gpu_spec(**changes), devices(1))


def test_on_one_device_a_small_pair_fits_beside_its_trainer() -> None:
    spec = gpu_spec(rollout={"maxPromptTokens": 1024, "maxResponseTokens": 4096})
    found = placed(spec, devices(1, 24))
    assert found.trainer == ("0",) and found.shared
    [engine], [teacher] = found.engines, found.teachers["teacher"]
    assert engine.names == teacher.names == ("0",)
    for server in (engine, teacher):
        assert server.cache_tokens is not None
        assert SMALL.weight_bytes + server.cache_tokens * SMALL.token_bytes <= 0.15 * 24 * GB
        assert server.cache_tokens > 20_000
    assert 0.6 * 24 * GB > 0.6e9 * 18, "all weights are trained"


def test_a_cache_on_a_shared_device_is_no_larger_than_the_job_can_use() -> None:
    spec = gpu_spec(rollout={"maxPromptTokens": 100, "maxResponseTokens": 60})
    [engine] = placed(spec, devices(1, 141), Footprint(1000, 100)).engines
    assert engine.cache_tokens == 256 * (160 + 64)


def test_a_model_that_does_not_fit_its_share_is_refused_with_the_bytes() -> None:
    spec = gpu_spec(rollout={"maxPromptTokens": 1024, "maxResponseTokens": 16384})
    with pytest.raises(
        ConfigurationError, match=r"has 8\.0 GB, of which an engine may take 1\.2 GB, and it needs 3\.2 GB"
    ):
        placed(spec, devices(1, 8))


def test_names_are_those_of_cuda_visible_devices() -> None:
    assert named([GB, GB], None) == [Device("0", GB), Device("1", GB)]
    assert named([GB, 2 * GB], "GPU-a, GPU-b") == [Device("GPU-a", GB), Device("GPU-b", 2 * GB)]
    assert named([GB], "3,-1,2") == [Device("3", GB)]
    assert named([], "") == []


def test_the_footprint_of_a_model_is_read_from_its_files(tiny_model: TinyModel) -> None:
    folder = tiny_model(0)
    weights = (folder / "model.safetensors").stat().st_size
    # Keys and values of 2 layers, 2 heads of 16, in 2 bytes.
    assert footprint(folder, "bfloat16") == Footprint(weights // 2, 2 * 2 * 2 * 16 * 2)
    assert footprint(folder, "float32").weight_bytes == weights


def test_a_server_on_a_shared_device_is_bounded_by_tokens_before_the_users_arguments() -> None:
    spec = gpu_spec(rollout={"engineArgs": ["--max-total-tokens", "7"]})
    argv, environment = sglang_command("/m", spec, "engine", "h", 1, devices=ServerDevices(("3",), 9000))
    assert environment["CUDA_VISIBLE_DEVICES"] == "3" and environment["SGLANG_LOGPROB_CHUNK_SIZE"] == "256"
    assert argv[argv.index("--max-total-tokens") + 1] == "9000" and argv[-1] == "7"
    argv, environment = sglang_command("/m", spec, "engine", "h", 1, devices=ServerDevices(("3", "5")))
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert "--mem-fraction-static" not in argv and "SGLANG_LOGPROB_CHUNK_SIZE" not in environment


class Child:
    """The environment of a server's process, in place of the process."""

    environments: list[dict[str, str]]

    def __init__(self, argv: list[str], *, env: dict[str, str], **options: Any) -> None:
        type(self).environments.append(env)
        self.pid, self.returncode = 2**22, 0

    def poll(self) -> int:
        return 0

    def wait(self, *arguments: Any) -> int:
        return 0


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of the servers that are started, none of which runs."""
    Child.environments = []
    monkeypatch.setattr("distill_workers.serving.server.subprocess.Popen", Child)
    return Child.environments


def test_an_engine_beside_a_trainer_has_its_own_devices_and_no_growing_segments(
    children: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    engine = Engine(gpu_spec(), 0, host="h", port=1, log_folder=str(tmp_path), devices=ServerDevices(("2",)))
    monkeypatch.setattr(SGLangServer, "wait_ready", lambda self, seconds: 0.0)

    async def start() -> None:
        await engine.start("/m")
        await engine.stop()

    asyncio.run(start())
    SGLangServer("/m", gpu_spec(), "engine", port=1, log=tmp_path / "log").start()
    beside, alone = children
    assert beside["CUDA_VISIBLE_DEVICES"] == "2" and "PYTORCH_ALLOC_CONF" not in beside
    assert alone["CUDA_VISIBLE_DEVICES"] == "0,1" and "PYTORCH_ALLOC_CONF" in alone, "a pod's own stay"


def test_each_replica_of_a_teacher_has_its_own_devices(
    children: list[dict[str, str]], tiny_model: TinyModel, tmp_path: Path
) -> None:
    spec = gpu_spec(teacher={"model": str(tiny_model(1)), "replicas": 2})
    servers = TeacherServers(spec, tmp_path, {"teacher": (ServerDevices(("5",)), ServerDevices(("6",)))})
    servers.start()
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in children] == ["5", "6"]


def test_the_devices_of_an_engine_reach_it_through_the_trainers_environment() -> None:
    engines = (ServerDevices(("2",)), ServerDevices(("3", "4"), 500))
    environment = {server_devices.ENGINES: server_devices.written(engines)}
    assert server_devices.of_engine(1, environment) == engines[1]
    assert server_devices.of_engine(0, {}) is None


def test_on_one_device_weights_go_through_memory_since_nccl_refuses_two_ranks_there(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tiny_model(0), tiny_model(1))

    def transport(*engines: ServerDevices) -> Any:
        monkeypatch.setenv(server_devices.ENGINES, server_devices.written(engines))
        return choose_transport(spec, tiny_model(0), tmp_path, address="127.0.0.1", one_machine=True)

    assert isinstance(transport(ServerDevices(("1",))), DistributedSync)
    shared = transport(ServerDevices(("0",), 9000))
    assert isinstance(shared, SharedMemorySync)
    asyncio.run(shared.close())


PRINTER = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))
sys.exit(78)
"""


def environment_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, tiny_model: TinyModel, **changes: Any
) -> dict[str, str]:
    """What the trainer of `distill run` is given on a machine with so many devices."""
    manifest = arithmetic(tmp_path, "placed", accelerator="nvidia.com/gpu", evaluation=[], **changes)
    manifest["spec"]["student"]["model"] = manifest["spec"]["teacher"]["model"] = str(tiny_model(0))
    written = tmp_path / "environment.json"
    monkeypatch.setattr("distill_workers.local.run.TRAINER", (sys.executable, "-c", PRINTER, str(written)))
    monkeypatch.setattr("distill_workers.local.run.POLL_SECONDS", 0.05)
    monkeypatch.setattr("distill_workers.local.devices.visible_devices", lambda: devices(count))
    monkeypatch.setattr(SGLangServer, "start", lambda self: None)
    assert LocalRun(parse_job(manifest)).run(lambda report: None, lambda text: None) == 78
    found: dict[str, str] = json.loads(written.read_text())
    return found


def test_the_trainer_of_distill_run_sees_its_devices_alone_and_is_told_those_of_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    changes = {"trainer": {"gpusPerNode": 2, "parallelism": {"tensor": 2}}, "rollout": {"replicas": 2}}
    found = environment_of_run(tmp_path, monkeypatch, 8, tiny_model, **changes)
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert [e["names"] for e in json.loads(found[server_devices.ENGINES])] == [["2"], ["3"]]
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert [found[n] for n in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_CUMEM_HOST_ENABLE")] == ["0", "0", "0"]


def test_what_the_user_sets_for_nccl_holds_for_both_ends_unless_a_flag_of_sglang_goes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    flags = {"rollout": {"engineArgs": ["--enable-nccl-nvls"]}}
    found = environment_of_run(tmp_path, monkeypatch, 3, tiny_model, **flags)
    assert (found["NCCL_CUMEM_ENABLE"], found["NCCL_NVLS_ENABLE"], found["NCCL_DEBUG"]) == ("1", "1", "INFO")


def test_distill_run_and_evaluate_refuse_too_few_devices_with_one_sentence_and_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = arithmetic(tmp_path, "few", accelerator="nvidia.com/gpu", rollout={"tensorParallelSize": 4})
    manifest["spec"]["student"]["model"] = manifest["spec"]["teacher"]["model"] = str(tiny_model(0))
    job = tmp_path / "job.json"
    job.write_text(json.dumps(manifest))
    monkeypatch.setattr("distill_workers.local.devices.visible_devices", lambda: devices(2))
    assert main(["run", "-f", str(job)]) == 78
    run = capsys.readouterr().err
    assert run.startswith("distill: the job asks for 6 accelerators") and run.count("\n") == 1
    assert main(["evaluate", "-f", str(job), "--model", str(tiny_model(0)), "--teacher"]) == 78
    measured = capsys.readouterr().err
    assert "asks for 5 accelerators on this machine (engines 1 × 4, teacher teacher 1 × 1), and 2 are" in measured


def test_an_evaluation_places_its_engine_and_its_teacher(
    children: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    spec = gpu_spec(
        tiny_model(0), tiny_model(1), evaluation=[{"name": "kl", "prompts": {"reasoningGym": {"task": "chain_sum"}}}]
    )
    monkeypatch.setattr("distill_workers.local.devices.visible_devices", lambda: devices(2))

    def stop(self: SGLangServer, seconds: float) -> float:
        raise ConfigurationError("no further")

    monkeypatch.setattr(SGLangServer, "wait_ready", stop)
    monkeypatch.setattr(SGLangServer, "exit_code", lambda self: None)
    with pytest.raises(ConfigurationError, match="no further"):
        asyncio.run(evaluate(spec, str(tiny_model(0)), [], HERE))
    assert sorted(environment["CUDA_VISIBLE_DEVICES"] for environment in children) == ["0", "1"]


def test_a_job_without_accelerators_is_not_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    def never() -> list[Device]:
        raise AssertionError("no device is looked for")

    from distill_workers.local.devices import place_here

    monkeypatch.setattr("distill_workers.local.devices.visible_devices", never)
    spec = spec_of(tiny_model(0), tiny_model(1))
    assert place_here(spec, str(tiny_model(0)), "--model", ranks=1, engines=1, teachers=True) is None
    assert server_devices.ENGINES not in os.environ
