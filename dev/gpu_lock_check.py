"""Says how far the program of workers/requirements-gpu.lock comes without a GPU, and where each part stops.

    python3.11 -m uv venv --python python3.11 /tmp/gpu && python3.11 -m uv pip sync --require-hashes \
        --python /tmp/gpu/bin/python workers/requirements-gpu.lock
    PYTHONPATH=crds:workers:cli /tmp/gpu/bin/python dev/gpu_lock_check.py

It prints a table and ends with 1 where something stops for another reason than the absent driver. Where a driver is,
nothing may stop.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
import sysconfig
import traceback
from importlib.metadata import version
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples/qwen3-8b-opd.yaml"
PACKAGES = ("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python", "megatron-core", "ray", "transformers")
LIBRARIES = ("flashinfer", "deep_gemm", "sgl_kernel", "triton", "megatron.core", "ray", "transformers")
SGLANG = (
    "sglang.launch_server",
    "sglang.srt.server_args",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.qwen3",
    "sglang.srt.models.qwen3_moe",
)
ABSENT_DRIVER = (
    "libcuda.so",
    "libnvidia-ml.so",
    "NVIDIA driver",
    "No CUDA",
    "no CUDA",
    "CUDA device",
    "NVML",
    "No GPU",
)
"""What says that there is no driver or no device, in the words of those that need one."""


def stops(module: str) -> str | None:
    """Where an import stops: the error, and the innermost line of a file; None where it does not."""
    try:
        importlib.import_module(module)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = " ".join(str(error).split())
        why = why if len(why) <= 300 else f"… {why[-300:]}"
        return f"{type(error).__name__}: {why} ({Path(place.filename).name}:{place.lineno})"
    return None


def own_modules() -> list[str]:
    """Every module of the workers but those that replace something for the CPU mode."""
    import distill_workers

    found = pkgutil.walk_packages(distill_workers.__path__, "distill_workers.")
    return [m.name for m in found if not m.name.startswith("distill_workers.cpu") and not m.name.endswith("__main__")]


def server_arguments(role: str) -> str:
    """What SGLang makes of the flagship example's command line, for CUDA."""
    import torch
    from sglang.srt.server_args import ServerArgs

    from distill_api.job import load_job
    from distill_workers.serving.server import sglang_command

    spec = load_job(EXAMPLE).spec
    command, _ = sglang_command("Qwen/Qwen3-8B", spec, "teacher" if role == "teacher" else "engine", "0.0.0.0", 30000)
    arguments = command[command.index("-m") + 2 :]
    import argparse

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args([*arguments, "--device", "cuda"])
    made = ServerArgs.from_cli_args(parsed)
    return f"tp {made.tp_size}, dtype {made.dtype}, device {made.device}, torch built for CUDA {torch.version.cuda}"


def in_own_process(call: str) -> tuple[bool, str]:
    """Whether one call of this file's functions went well, and its value or the end of what it wrote."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gpu_lock_check as c; print(c.{call})"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600)
    text = done.stdout if done.returncode == 0 else done.stderr
    return done.returncode == 0, (text.strip().splitlines() or [""])[-1]


def main() -> int:
    import torch

    # DeepGEMM and FlashInfer look for nvcc there, as the image says.
    os.environ.setdefault("CUDA_HOME", f"{sysconfig.get_path('purelib')}/nvidia/cu13")
    driver = torch.cuda.is_available()
    print("versions:", ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print("driver and device:", "yes" if driver else "none")
    wrong = []

    def tell(name: str, why: str | None) -> None:
        print(f"{name:45} {'imports' if why is None else 'stops: ' + why}")
        if why is not None and (driver or not any(word in why for word in ABSENT_DRIVER)):
            wrong.append(name)

    for name in (*LIBRARIES, *SGLANG):
        _, said = in_own_process(f"stops({name!r})")
        tell(name, None if said == "None" else said)
    own = {name: stops(name) for name in own_modules()}
    for name, why in own.items():
        if why is not None:
            tell(name, why)
    print(f"modules of ours that import: {sum(why is None for why in own.values())} of {len(own)}")
    for role in ("teacher", "engine"):
        well, said = in_own_process(f"server_arguments({role!r})")
        print(f"{'ServerArgs of the ' + role:45} {said if well else 'stops: ' + said}")
        if not well:
            wrong.append(role)
    print("stopped for another reason than the absent driver:", ", ".join(wrong) or "nothing")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
