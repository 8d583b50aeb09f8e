"""The entry point of teacher pods: this process becomes an SGLang server.

`python -m distill_workers.serve teacher [NAME]` serves the job's teacher, or one of several; `... serve shared-teacher`
serves an object of kind Teacher. The job, or the Teacher, is read from DISTILL_JOB_FILE; the server listens on
0.0.0.0:30000 unless --host and --port change that.
"""

import argparse
import os
import sys
from pathlib import Path

from distill_api.job import InvalidManifest, load_job
from distill_api.manifest import read_manifest
from distill_api.names import ONLY_TEACHER
from distill_api.protocol import JOB_FILE, SGLANG_PORT, ExitCode, Variable
from distill_api.teacher import parse_teacher
from distill_workers.failures import ConfigurationError
from distill_workers.model_folder import model_folder
from distill_workers.serving.server import sglang_command

Command = tuple[list[str], dict[str, str]]


def of_job(file: Path, name: str, host: str, port: int) -> Command:
    """Return the command of one teacher of a job. Raises InvalidManifest, ConfigurationError."""
    spec = load_job(file).spec
    teacher = next((t for t in spec.served_teachers if t.name == name), None)
    if teacher is None or teacher.model is None:
        served = ", ".join(t.name for t in spec.served_teachers) or "none"
        raise ConfigurationError(f"the job serves no teacher {name}; it serves {served}")
    model = model_folder(teacher.model, f"{teacher.path}.model")
    return sglang_command(str(model), spec, "teacher", host, port, teacher)


def of_shared_teacher(file: Path, host: str, port: int) -> Command:
    """Return the command of an object of kind Teacher. Raises InvalidManifest, ConfigurationError."""
    spec = parse_teacher(read_manifest(file.read_text(encoding="utf-8"))).spec
    return sglang_command(str(model_folder(spec.model, "spec.model")), spec, "teacher", host, port)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distill_workers.serve", description="Serve the teacher of a job.")
    parser.add_argument("role", choices=["teacher", "shared-teacher"])
    parser.add_argument("name", nargs="?", default=ONLY_TEACHER, help="its name in spec.teachers")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=SGLANG_PORT)
    args = parser.parse_args(arguments)
    file = Path(os.environ.get(Variable.JOB_FILE, JOB_FILE))
    try:
        if args.role == "teacher":
            argv, environment = of_job(file, args.name, args.host, args.port)
        else:
            argv, environment = of_shared_teacher(file, args.host, args.port)
    except (InvalidManifest, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    sys.stdout.flush()
    os.execve(argv[0], argv, {**os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main())
