"""`python -m distill_workers.serve teacher [NAME]`: the SGLang server of the job's teacher, or of one of several;
`... serve shared-teacher`: of a Teacher.

Reads the job, or the Teacher, at DISTILL_JOB_FILE; listens on 0.0.0.0:30000 (--host and --port change that). This
process stays while the server runs: as the first of its container it hears a signal also while the server still imports
(child_processes.py). What it needs beyond the standard library is imported once its own handler is there.
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
    parser.add_argument("name", nargs="?", default=ONLY_TEACHER, help="the one of spec.teachers")
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
