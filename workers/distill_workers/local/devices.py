"""The accelerators and models of this machine, as placement.py counts them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_workers.child_processes import end_with_parent
from distill_workers.local.placement import Device, Footprint, Placement, place
from distill_workers.model_folder import model_folder, read_config
from distill_workers.serving.server_devices import CUDA

LOOK = """
import json, torch
count = torch.cuda.device_count()
print(json.dumps([torch.cuda.get_device_properties(i).total_memory for i in range(count)]))
"""
LOOK_SECONDS = 120


def visible_devices(environment: Mapping[str, str] = os.environ) -> list[Device]:
    """Return the devices that this process may use, in their order; none where torch sees none.

    A process of its own asks torch: its CUDA context, some 500 MB on the first device, ends with it.
    """
    looked = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK],
        capture_output=True,
        text=True,
        timeout=LOOK_SECONDS,
        check=False,
        preexec_fn=end_with_parent,
    )
    sizes = json.loads(looked.stdout) if looked.returncode == 0 else []
    return named(sizes, environment.get(CUDA))


def named(sizes: list[int], visible: str | None) -> list[Device]:
    """Return the devices of these sizes, by the names in CUDA_VISIBLE_DEVICES where that is set."""
    names = [str(i) for i in range(len(sizes))] if visible is None else [n.strip() for n in visible.split(",")]
    # CUDA ends the list at the first name that is no device.
    return [Device(name, size) for name, size in zip(names, sizes, strict=False)]


def footprint(folder: Path, dtype: str) -> Footprint:
    """Return what a model takes of a server: the weights of its files, and by its config the keys and values."""
    config = read_config(folder / "config.json")
    text: dict[str, Any] = config.get("text_config", config)
    wide = 4 if dtype == "float32" else 2
    stored = 4 if text.get("dtype", text.get("torch_dtype")) == "float32" else 2
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * wide // stored
    heads = text.get("num_attention_heads", 1)
    head = text.get("head_dim") or text.get("hidden_size", 0) // heads
    groups = text.get("num_key_value_heads") or heads
    return Footprint(weights, max(1, 2 * text.get("num_hidden_layers", 0) * groups * head * wide))


def place_here(spec: Spec, student: str, field: str, *, ranks: int, engines: int, teachers: bool) -> Placement | None:
    """Return the placement of a job's roles on this machine (placement.place); None for a job on the CPU.

    student: the model that the engines serve, which `field` of the job or of the command line names.
    """
    if spec.on_cpu:
        return None
    devices = visible_devices()
    found: dict[str, Footprint] = {}
    if len(devices) == 1:
        found["student"] = footprint(model_folder(student, field), spec.dtype)
        for teacher in spec.served_teachers if teachers else []:
            assert teacher.model is not None, "a served teacher has a model"
            found[teacher.name] = footprint(model_folder(teacher.model, f"{teacher.path}.model"), spec.dtype)
    return place(spec, devices, found, ranks=ranks, engines=engines, teachers=teachers)
