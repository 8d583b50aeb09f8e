"""Whether the model can be written at the end of a run: nothing may fail then that could be known before."""

import json
import math
import shutil
from pathlib import Path

import torch

from distill_api.spec.job_spec import Spec
from distill_workers.failures import ConfigurationError, VolumeFull
from distill_workers.megatron.checkpoint.companions import companions
from distill_workers.megatron.checkpoint.tensor_file import BadTensorFile, TensorFile
from distill_workers.run_folder.run_folder import RunFolder


def check_export(spec: Spec, student: Path, folder: RunFolder) -> None:
    """Read what the export takes over from the student's folder, and look for room in the run's folder.

    Raises ConfigurationError for a file that cannot be read and for a model that the export would replace, VolumeFull
    for too little room.
    """
    for path in (folder.model, *((folder.model.with_name("adapter"),) if spec.trainer.lora else ())):
        _check_destination(spec, student, path)
    files = companions(student, trust_remote_code=spec.trust_remote_code)
    needed = _weight_bytes(student, getattr(torch, spec.dtype))
    for name in files:
        try:
            with (student / name).open("rb") as file:
                file.read(1)
            needed += (student / name).stat().st_size
        except OSError as error:
            raise ConfigurationError(
                f"Export: {student / name} cannot be read ({error.strerror or error}), and the exported model takes it "
                "over; make it readable, or remove it"
            ) from None
    if not folder.model.exists():
        # Those of the best step and of a checkpoint are exported beside it.
        needed *= 1 + spec.output.publishes_best + bool(spec.output.at_checkpoints)
    usage = shutil.disk_usage(folder.root)
    if usage.free < needed:
        raise VolumeFull(
            f"Export: the exported model takes {needed / 2**20:,.0f} MiB, and {usage.free / 2**20:,.0f} MiB of the "
            f"volume of {folder.root} are free"
        )


def _check_destination(spec: Spec, student: Path, destination: Path) -> None:
    """Raise ConfigurationError where `destination` is no folder, or holds a model of the job."""
    if destination.exists() and not destination.is_dir():
        raise ConfigurationError(f"Export: {destination} is no folder, and the model is written there; remove it")
    models = {"spec.student.model": student} | {
        f"{t.path}.model": Path(t.model).expanduser() for t in spec.all_teachers if t.model is not None
    }
    for field, model in models.items():
        if model.is_dir() and model.resolve().is_relative_to(destination.resolve()):
            raise ConfigurationError(
                f"{field}: {model} is where the run writes its own model, which would replace it; choose another "
                "metadata.name or spec.output.path, or copy the model elsewhere"
            )


def _weight_bytes(student: Path, dtype: torch.dtype) -> int:
    """Return the size of the student's weights in the run's dtype, by the headers of its files."""
    elements = 0
    index = student / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
        for name in names or {"model.safetensors"}:
            with TensorFile(student / name) as file:
                elements += sum(math.prod(entry.shape) for entry in file.entries.values())
    except (BadTensorFile, OSError, ValueError, KeyError, AttributeError):
        return 0  # the student has been loaded by now: what it was read from is another check's
    return elements * dtype.itemsize
