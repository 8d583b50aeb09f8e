"""The entry point of trainer pods: `python -m distill_workers.launch` starts the ranks of one pod.

The pod ends with the exit code of its ranks, by which the operator decides on a retry; torchrun would turn every code
into 1. This process stays while they run: as the first of its container it receives a signal also while they still
import (child_processes.py). Whatever is not of the standard library is imported after the signal handler is set.
"""

import argparse
import os
import sys
from pathlib import Path

from distill_workers.child_processes import ChildProcesses, exit_on_signal

TRAINER, CPU_TRAINER = "distill_workers.trainer", "distill_workers.trainer_on_cpu"


def rank_environment(nodes: int, ranks_per_node: int, node: int, local_rank: int) -> dict[str, str]:
    """Return the variables of one rank for torch.distributed's env:// rendezvous."""
    from distill_api.protocol import MASTER_PORT, Variable

    return {
        "RANK": str(node * ranks_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(nodes * ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        Variable.MASTER_ADDR.value: os.environ.get(Variable.MASTER_ADDR, "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(MASTER_PORT)),
    }


def exit_code(returncode: int) -> int:
    """Return the exit code that stands for a child's; a death by signal (out of memory, a node that goes) is worth
    another try."""
    from distill_api.protocol import ExitCode

    return ExitCode.TEMPORARY if returncode < 0 else returncode


def report(reason: str, message: str) -> None:
    """Write the exit report of a pod whose trainer wrote none."""
    from distill_api.protocol import ExitReason, ExitReport, Variable

    path = Path(os.environ.get(Variable.TERMINATION_LOG, ""))
    if path.name and not (path.exists() and path.read_text(encoding="utf-8").strip()):
        said = ExitReport(reason=ExitReason(reason), message=message[:3500])
        path.write_text(said.model_dump_json(by_alias=True), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    exit_on_signal()
    from distill_api.job import InvalidManifest, load_job
    from distill_api.protocol import JOB_FILE, ExitCode, ExitReason, Variable

    parser = argparse.ArgumentParser(prog="distill_workers.launch", description="Start the ranks of one trainer pod.")
    parser.add_argument("--job", type=Path, help=f"the job; by default ${Variable.JOB_FILE.value} or {JOB_FILE}")
    args = parser.parse_args(arguments)
    if args.job is not None:
        os.environ[Variable.JOB_FILE] = str(args.job)
    try:
        spec = load_job(Path(os.environ.get(Variable.JOB_FILE, JOB_FILE))).spec
    except InvalidManifest as error:
        print(error, file=sys.stderr)
        report(ExitReason.CONFIGURATION_ERROR, str(error))
        return ExitCode.CONFIGURATION
    node = int(os.environ.get(Variable.NODE_RANK, "0"))
    nodes, ranks = spec.trainer.nodes, spec.trainer.gpus_per_node
    command = [sys.executable, "-m", CPU_TRAINER if spec.on_cpu else TRAINER]
    children = ChildProcesses([(command, rank_environment(nodes, ranks, node, local)) for local in range(ranks)])
    code = exit_code(children.run())
    if children.stopping and code == ExitCode.TEMPORARY:
        report(ExitReason.STOPPED, "stopped by SIGTERM while it was starting")
    return code


if __name__ == "__main__":
    sys.exit(main())
