"""`python -m distill_workers.serve teacher [NAME]`: becomes an SGLang server of the job's teacher, or one of several.

Reads the job at DISTILL_JOB_FILE; listens on 0.0.0.0:30000 (--host and --port change that).
"""

import argparse
import os
import sys
from pathlib import Path

from distill_api.job import InvalidManifest, load_job
from distill_api.names import ONLY_TEACHER
from distill_api.wire import JOB_FILE, SGLANG_PORT, ExitCode, Variable
from distill_workers.failures import ConfigurationError
from distill_workers.model_folder import model_folder
from distill_workers.server import sglang_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distill_workers.serve", description="Serve the teacher of a job.")
    parser.add_argument("role", choices=["teacher"])
    parser.add_argument("name", nargs="?", default=ONLY_TEACHER, help="the one of spec.teachers")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=SGLANG_PORT)
    args = parser.parse_args(arguments)
    try:
        spec = load_job(Path(os.environ.get(Variable.JOB_FILE, JOB_FILE))).spec
        teacher = next((t for t in spec.served_teachers if t.name == args.name), None)
        if teacher is None or teacher.model is None:
            served = ", ".join(t.name for t in spec.served_teachers) or "none"
            raise ConfigurationError(f"the job serves no teacher {args.name}; it serves {served}")
        model = model_folder(teacher.model, f"{teacher.path}.model")
    except (InvalidManifest, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    argv, environment = sglang_command(str(model), spec, "teacher", args.host, args.port, teacher)
    sys.stdout.flush()
    os.execve(argv[0], argv, {**os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main())
