"""The entry point of teacher pods: an SGLang server of a teacher.

`python -m distill_workers.serve teacher [NAME]` serves the job's teacher, or one of several; `... serve shared-teacher`
serves an object of kind Teacher. The job, or the Teacher, is read from DISTILL_JOB_FILE; the server listens on
0.0.0.0:30000 unless --host and --port change that. This process stays while the server runs: as the first of its
container it receives a signal also while the server still imports (child_processes.py). Whatever is not of the standard
library is imported after the signal handler is set.
"""

import argparse
import os
import sys
from pathlib import Path

from distill_workers.child_processes import ChildProcesses, exit_on_signal


def main(arguments: list[str] | None = None) -> int:
    exit_on_signal()
    from distill_api.job import InvalidManifest
    from distill_api.names import ONLY_TEACHER
    from distill_api.protocol import JOB_FILE, SGLANG_PORT, ExitCode, Variable
    from distill_workers.failures import ConfigurationError
    from distill_workers.serving.teacher_command import of_job, of_shared_teacher

    parser = argparse.ArgumentParser(prog="distill_workers.serve", description="Serve the teacher of a job.")
    parser.add_argument("role", choices=["teacher", "shared-teacher"])
    parser.add_argument("name", nargs="?", default=ONLY_TEACHER, help="its name in spec.teachers")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=SGLANG_PORT)
    args = parser.parse_args(arguments)
    file = Path(os.environ.get(Variable.JOB_FILE, JOB_FILE))
    try:
        if args.role == "teacher":
            command = of_job(file, args.name, args.host, args.port)
        else:
            command = of_shared_teacher(file, args.host, args.port)
    except (InvalidManifest, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    code = ChildProcesses([command]).run()
    # As a shell says it: a server that a signal ended.
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
