"""A server's command line follows from the job alone, and the process is supervised."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of

from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SHARED_POOL_TOKENS, SGLangServer, sglang_command

STUDENT, TEACHER = Path("/models/s"), Path("/models/t")


def flags(role: Any = "engine", **changes: Any) -> tuple[list[str], dict[str, str]]:
    return sglang_command("/models/m", spec_of(STUDENT, TEACHER, **changes), role, "0.0.0.0", 30000)


def value(argv: list[str], flag: str) -> str:
    return argv[len(argv) - 1 - argv[::-1].index(flag) + 1]


@pytest.mark.parametrize("accelerator", ["none", "nvidia.com/gpu"])
def test_a_server_imports_the_models_that_are_trained_unless_the_user_names_a_package(
    accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_EXTERNAL_MODEL_PACKAGE", raising=False)
    package = flags(accelerator=accelerator)[1]["SGLANG_EXTERNAL_MODEL_PACKAGE"]
    assert package == "distill_workers.serving.architectures"
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "mine")
    assert flags(accelerator=accelerator)[1]["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "mine"


def test_a_gpu_server_is_sglangs_own_with_bfloat16() -> None:
    argv, environment = flags(accelerator="nvidia.com/gpu", rollout={"tensorParallelSize": 4}, seed=7)
    assert argv[4] == "distill_workers.serving.sglang_launch"
    assert [value(argv, f) for f in ("--tp-size", "--dtype", "--random-seed", "--port")] == [
        "4",
        "bfloat16",
        "7",
        "30000",
    ]
    assert "--sleep-on-idle" in argv and "--enable-metrics" in argv
    assert "--device" not in argv and "--max-total-tokens" not in argv and "--max-running-requests" not in argv
    assert "SGLANG_USE_CPU_ENGINE" not in environment


def test_a_gpu_server_keeps_logits_in_fp32_and_an_engine_outlives_a_peer_that_dies_in_a_push() -> None:
    for role in ("engine", "teacher"):
        argv, environment = flags(role, accelerator="nvidia.com/gpu")
        assert "--enable-fp32-lm-head" in argv
        assert environment.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == ("2" if role == "engine" else None)
    assert "--enable-fp32-lm-head" not in flags(accelerator="amd.com/gpu")[0], "torch has that product for CUDA alone"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in flags()[1]


def test_a_server_is_started_for_the_accelerator_of_its_own_role() -> None:
    mixed = {"accelerator": "nvidia.com/gpu", "teacher": {"model": "/models/teacher", "accelerator": "amd.com/gpu"}}
    assert "--enable-fp32-lm-head" not in flags("teacher", **mixed)[0]
    assert "--enable-fp32-lm-head" in flags("engine", **mixed)[0]


def test_a_cpu_server_is_started_through_the_cpu_package_with_a_bounded_cache() -> None:
    argv, environment = flags(rollout={"maxPromptTokens": 100, "maxResponseTokens": 60})
    assert argv[4] == "distill_workers.cpu.sglang_launch"
    assert value(argv, "--dtype") == "float32"
    assert value(argv, "--max-total-tokens") == str(16 * (160 + 64))
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    long, _ = flags(rollout={"maxPromptTokens": 100, "maxResponseTokens": 100_000})
    assert value(long, "--max-total-tokens") == str(100_164), "one whole sequence always fits"
    middle, _ = flags(rollout={"maxPromptTokens": 100, "maxResponseTokens": 30_000})
    assert value(middle, "--max-total-tokens") == str(SHARED_POOL_TOKENS)


@pytest.mark.parametrize("accelerator", ["none", "nvidia.com/gpu"])
def test_a_deterministic_server_takes_one_request_at_a_time_and_caches_no_prefix(accelerator: str) -> None:
    argv, environment = flags(accelerator=accelerator, deterministic=True)
    assert value(argv, "--max-running-requests") == "1" and "--disable-radix-cache" in argv
    seeded = environment.get("DISTILL_SEEDED_SAMPLING") == "1"
    assert seeded == (accelerator == "none")
    assert ("--enable-deterministic-inference" in argv) == (accelerator != "none")


def test_code_of_a_model_is_trusted_only_if_the_job_says_so() -> None:
    assert "--trust-remote-code" not in flags()[0]
    assert "--trust-remote-code" in flags(trustRemoteCode=True)[0]


@pytest.mark.parametrize("role", ["teacher", "engine"])
def test_arguments_of_the_user_come_last_and_are_those_of_the_role(role: str) -> None:
    teacher = {"model": "/models/t", "engineArgs": ["--dtype", "float16"]}
    argv, _ = flags(role, teacher=teacher, rollout={"engineArgs": ["--dtype", "half"]})
    assert argv[-2:] == ["--dtype", "float16" if role == "teacher" else "half"]


def test_a_hub_model_may_be_fetched_and_a_path_never_asks_the_hub() -> None:
    spec = spec_of(STUDENT, TEACHER)
    assert "HF_HUB_OFFLINE" not in sglang_command("Qwen/Qwen3-8B", spec, "engine", "h", 1)[1]
    assert sglang_command("/models/m", spec, "engine", "h", 1)[1]["HF_HUB_OFFLINE"] == "1"


def as_server(tmp_path: Path, code: str) -> SGLangServer:
    """A supervised process that is no SGLang: how it lives and dies is what is tested here."""
    server = SGLangServer("/models/m", spec_of(STUDENT, TEACHER), "engine", port=reserve_port(), log=tmp_path / "log")
    server._command = ([sys.executable, "-c", code], {})
    return server


def test_stop_ends_the_whole_process_group(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    server = as_server(tmp_path, code)
    server.start()
    deadline = time.monotonic() + 20
    while not (text := server.log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.alive()
    server.stop()
    assert not server.alive()
    state = Path(f"/proc/{text.strip()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


MAPS = """
import mmap, os, sys, time
mine = [path for path in sys.argv[1:] if "other" not in path]
for path in mine:
    os.truncate(path, 4096)
kept = [mmap.mmap(os.open(path, os.O_RDWR), 4096) for path in mine]
print("mapped", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("crashed", [False, True])
def test_a_server_that_is_ended_leaves_nothing_of_its_own_in_shared_memory(
    crashed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("sglang_loads_{}.shm", "sgl_shm_kind_{}", "sglang_loads_other_{}.shm", "distill-weights-{}")
    files = [Path("/dev/shm") / name.format(f"test{os.getpid()}") for name in names]
    for file in files:
        file.touch()
    monkeypatch.setattr("distill_workers.serving.server.probe.score", lambda host, port: None)
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {MAPS!r}, *{list(map(str, files))!r}])"
    try:
        server = as_server(tmp_path, child)
        server.start()
        deadline = time.monotonic() + 20
        while "mapped" not in server.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        server.wait_ready(20)
        if crashed:
            assert server.pid is not None
            os.killpg(server.pid, signal.SIGKILL)
            time.sleep(0.2)
        server.stop()
        assert [file.exists() for file in files] == [False, False, True, True], "another's, and weights, stay"
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_server, pathlib; "
        "s = test_server.as_server(pathlib.Path(sys.argv[2]), 'import time; time.sleep(60)'); "
        "s.start(); print(s.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 5
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


def test_a_server_that_ends_early_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    from distill_workers.serving.server import ServerFailed

    server = as_server(tmp_path, "print('no such model'); raise SystemExit(4)")
    server.start()
    with pytest.raises(ServerFailed, match=r"(?s)ended with code 4; .*no such model"):
        server.wait_ready(20)
    server.stop()


def test_a_server_that_is_not_ready_in_time_is_reported(tmp_path: Path) -> None:
    from distill_workers.serving.server import ServerFailed

    server = as_server(tmp_path, "import time; time.sleep(60)")
    server.start()
    with pytest.raises(ServerFailed, match=r"not ready within 1 s: .*does not answer"):
        server.wait_ready(1)
    server.stop()


def test_rays_environment_does_not_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", "1")
    monkeypatch.setenv("KEPT", "yes")
    server = as_server(
        tmp_path, "import os; print([k for k in os.environ if k.startswith('RAY_')], os.environ['KEPT'])"
    )
    server.start()
    assert server._process is not None
    server._process.wait(20)
    assert server.log.read_text().strip() == "[] yes"
    server.stop()


def test_the_teachers_entry_point_refuses_a_job_that_it_cannot_serve(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill_workers.serve", "teacher"],
        env={**os.environ, "DISTILL_JOB_FILE": str(tmp_path / "none.yaml")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78 and "cannot be read" in done.stderr
