"""The program that GPUs run is the program that is tested: one version of each package, one Python, one Megatron."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINNED = re.compile(r"^([a-z0-9][a-z0-9._-]*)(?:\[[^\]]*\])?==([^ ;\\]+)", re.MULTILINE)


def locked(name: str) -> dict[str, str]:
    """Versions by the package's name, of a lock of the workers."""
    return dict(PINNED.findall((ROOT / "workers" / name).read_text()))


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_a_gpu_runs_the_version_of_each_package_that_is_tested_on_a_cpu() -> None:
    cpu, gpu = locked("requirements-cpu.lock"), locked("requirements-gpu.lock")
    assert len(cpu) > 150
    assert {name: gpu.get(name) for name in cpu} == cpu


def test_the_gpu_lock_has_what_the_cpu_lock_leaves_out() -> None:
    gpu = locked("requirements-gpu.lock")
    left_out = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["override-dependencies"]
    of_the_models = {"llm", "llama-cpp-python", "llm-llama-server", "llm-gguf"}
    names = {entry.partition(" ")[0] for entry in left_out} - of_the_models
    assert {"flashinfer-python", "sglang-kernel", "sgl-deep-gemm", "nvidia-cutlass-dsl"} <= names
    assert names <= gpu.keys()
    assert not names & locked("requirements-cpu.lock").keys()


@pytest.mark.parametrize("name", ["requirements-cpu.lock", "requirements-gpu.lock", "requirements-verifiers.lock"])
def test_each_package_of_a_lock_has_its_hashes(name: str) -> None:
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / "workers" / name).read_text().strip())
    assert [e.splitlines()[0] for e in entries if "--hash=sha256:" not in e] == []


def test_the_gpu_lock_is_made_from_the_workers_requirements_without_the_overrides() -> None:
    command = [sys.executable, str(ROOT / "dev/requirements_apart.py"), str(ROOT / "pyproject.toml")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "sglang==0.5.23" in printed and "megatron-core==0.16.1" in printed
    assert not [line for line in printed if "never" in line]


def test_the_extra_of_verifiers_has_a_lock_of_its_own_since_sglang_needs_an_older_openai() -> None:
    apart, workers = locked("requirements-verifiers.lock"), locked("requirements-cpu.lock")
    [pinned] = [p for p in project()["optional-dependencies"]["verifiers"] if p.startswith("verifiers==")]  # type: ignore[index]
    assert f"verifiers=={apart['verifiers']}" == pinned
    assert "sglang" not in apart and "verifiers" not in workers
    # Of verifiers: openai>=2.9. Where they agree one day, one environment would do.
    assert tuple(map(int, workers["openai"].split("."))) < (2, 9) <= tuple(map(int, apart["openai"].split(".")))


def test_only_the_python_that_is_tested_is_allowed() -> None:
    assert project()["requires-python"] == ">=3.11,<3.12"


def test_the_image_refuses_a_base_of_other_versions_than_the_lock_has() -> None:
    dockerfile = (ROOT / "workers/Dockerfile").read_text()
    checked = dict(re.findall(r"assert v\('([a-z-]+)'\) == '([0-9.]+)'", dockerfile))
    gpu = locked("requirements-gpu.lock")
    assert checked == {"sglang": gpu["sglang"], "megatron-core": gpu["megatron-core"]}
    assert "assert sys.version_info[:2] == (3, 11)" in dockerfile


def test_the_image_keeps_the_path_of_its_base() -> None:
    assert "ENV PATH=/opt/venv/bin:$PATH " in (ROOT / "workers/Dockerfile").read_text()


def test_a_release_is_built_from_the_gpu_lock() -> None:
    script = (ROOT / "dev/images.sh").read_text()
    assert "${REQUIREMENTS:-workers/requirements-gpu.lock}" in script
    assert "requirements-gpu.txt" not in script
