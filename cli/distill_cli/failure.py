"""How a command fails: a sentence with the remedy, and an exit code."""

from distill_api.protocol import ExitCode

FAILED = 1
USAGE = 2
INTERRUPTED = 130
EXIT_CODES = {
    int(ExitCode.DONE): "done; for `watch`, the job is complete",
    FAILED: "failed, or the manifest is invalid, or `doctor` found what keeps jobs from running",
    USAGE: "the command line is wrong",
    int(
        ExitCode.TEMPORARY
    ): "a run was stopped, or lost a part for now: try again, with `--resume` where there is a run",
    int(ExitCode.CONFIGURATION): "the job as written cannot run; trying again does not help",
    INTERRUPTED: "ended by Ctrl-C",
}
"""The exit codes of every command, with their meaning; they are shown by --help and in docs/cli.md."""

_KUBERNETES = {"kubernetes", "urllib3", "websocket"}
_WORKERS = {"distill_workers", "torch", "sglang", "megatron", "ray", "transformers", "numpy", "matplotlib", "aiohttp"}


class CommandFailed(Exception):
    """Raised where a command cannot do what was asked: one sentence with what is wrong, where, and what to do."""

    def __init__(self, sentence: str, code: int = FAILED) -> None:
        super().__init__(sentence)
        self.code = code


def missing(error: ModuleNotFoundError, command: str) -> str:
    """Return the sentence that says what to install for a Python module that is missing."""
    package = (error.name or "").split(".")[0]
    if package in _KUBERNETES:
        return (
            f"{command} speaks to a cluster, and {package} is missing here: "
            "pip install 'distillation-operator[cli]' (in this repository: operator/.venv/bin/distill)"
        )
    if package in _WORKERS:
        return (
            f"{command} needs the workers' packages, and {package} is missing here: "
            "pip install 'distillation-operator[workers]' (in this repository: workers/.venv/bin/distill)"
        )
    return f"{command} needs the Python package {package}, which is missing here: pip install {package}"
