"""The SGLang server of a job's teacher, or of a Teacher, as a command line and what its environment has beside ours."""

from pathlib import Path

from distill_api.job import load_job
from distill_api.manifest import read_manifest
from distill_api.teacher.kind import parse_teacher
from distill_workers.failures import ConfigurationError
from distill_workers.model_folder import model_folder
from distill_workers.serving.server import sglang_command

Command = tuple[list[str], dict[str, str]]


def of_job(file: Path, name: str, host: str, port: int) -> Command:
    """Raises InvalidManifest, ConfigurationError."""
    spec = load_job(file).spec
    teacher = next((t for t in spec.served_teachers if t.name == name), None)
    if teacher is None or teacher.model is None:
        served = ", ".join(t.name for t in spec.served_teachers) or "none"
        raise ConfigurationError(f"the job serves no teacher {name}; it serves {served}")
    model = model_folder(teacher.model, f"{teacher.path}.model")
    return sglang_command(str(model), spec, "teacher", host, port, teacher)


def of_shared_teacher(file: Path, host: str, port: int) -> Command:
    """Raises InvalidManifest, ConfigurationError."""
    spec = parse_teacher(read_manifest(file.read_text(encoding="utf-8"))).spec
    return sglang_command(str(model_folder(spec.model, "spec.model")), spec, "teacher", host, port)
