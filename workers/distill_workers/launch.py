"""The entry point of trainer pods: `python -m distill_workers.launch` starts the ranks of one pod.

The pod ends with the exit code of its ranks, by which the operator decides on a retry; torchrun would turn every code
into 1. A single rank replaces this process; of several, the first that fails ends the others, and its code is returned.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from distill_api.job import InvalidManifest, load_job
from distill_api.protocol import JOB_FILE, MASTER_PORT, ExitCode, ExitReason, ExitReport, Variable

TRAINER = ("-m", "distill_workers.trainer")
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.2


def rank_environment(nodes: int, ranks_per_node: int, node: int, local_rank: int) -> dict[str, str]:
    """Return the variables of one rank for torch.distributed's env:// rendezvous."""
    return {
        "RANK": str(node * ranks_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(nodes * ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        Variable.MASTER_ADDR.value: os.environ.get(Variable.MASTER_ADDR, "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(MASTER_PORT)),
    }


def exit_code(returncode: int) -> int:
    """Return the exit code for a child's return code: death by a signal (out of memory, a lost node) is temporary."""
    return ExitCode.TEMPORARY if returncode < 0 else returncode


class Ranks:
    """The ranks of this pod as child processes."""

    def __init__(self, command: list[str], environments: list[dict[str, str]]) -> None:
        self._command, self._environments = command, environments
        self._children: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def run(self) -> int:
        """Start all ranks, wait for them, and return the exit code of the pod."""
        signal.signal(signal.SIGTERM, self._forward)
        signal.signal(signal.SIGINT, self._forward)
        for environment in self._environments:
            if not self._stopping:
                self._children.append(subprocess.Popen(self._command, env={**os.environ, **environment}))
        while True:
            codes = [child.poll() for child in self._children]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                break
            time.sleep(POLL_SECONDS)
        self._end()
        if failed:
            return exit_code(failed[0])
        return ExitCode.TEMPORARY if self._stopping and len(self._children) < len(self._environments) else ExitCode.DONE

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def _end(self) -> None:
        """End the children that are left, by SIGTERM and then by SIGKILL."""
        for child in self._children:
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for child in self._children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def refuse(message: str) -> int:
    """Report a job that cannot be read, since no trainer will, and return the exit code."""
    print(message, file=sys.stderr)
    if path := os.environ.get(Variable.TERMINATION_LOG):
        report = ExitReport(reason=ExitReason.CONFIGURATION_ERROR, message=message[:3500])
        Path(path).write_text(report.model_dump_json(by_alias=True), encoding="utf-8")
    return ExitCode.CONFIGURATION


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distill_workers.launch", description="Start the ranks of one trainer pod.")
    parser.add_argument("--job", type=Path, help=f"the job; by default ${Variable.JOB_FILE.value} or {JOB_FILE}")
    args = parser.parse_args(arguments)
    if args.job is not None:
        os.environ[Variable.JOB_FILE] = str(args.job)
    try:
        trainer = load_job(Path(os.environ.get(Variable.JOB_FILE, JOB_FILE))).spec.trainer
    except InvalidManifest as error:
        return refuse(str(error))
    node = int(os.environ.get(Variable.NODE_RANK, "0"))
    ranks = trainer.gpus_per_node
    environments = [rank_environment(trainer.nodes, ranks, node, local) for local in range(ranks)]
    command = [sys.executable, *TRAINER]
    if ranks == 1:
        sys.stdout.flush()
        os.execve(sys.executable, command, {**os.environ, **environments[0]})
    return Ranks(command, environments).run()


if __name__ == "__main__":
    sys.exit(main())
