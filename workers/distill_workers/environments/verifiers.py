"""Environments of the package verifiers: agents that a program of ours plays, in a Python that has the package.

verifiers needs other versions of packages than SGLang does, so it has a Python of its own
(`workers/requirements-verifiers.lock`), which knows nothing of the trainer but the endpoint of agents.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from distill_api.spec.environment import Verifiers
from distill_workers.environments.agent_process import check_command, last_line
from distill_workers.failures import ConfigurationError
from distill_workers.isolated_process import kill_group

SETTING = "rollout.environment.verifiers"
PROGRAM = Path(__file__).with_name("verifiers_program.py")
CHECK_SECONDS = 60.0
"""The longest time that a job waits, before it begins, to hear whether the environment can be loaded."""


def command_of(chosen: Verifiers) -> list[str]:
    """Return the command of the agent that plays an environment."""
    return _command(chosen, "play")


def check_verifiers(chosen: Verifiers) -> None:
    """Raise ConfigurationError for an environment that cannot be loaded. One that loads slowly is left to its
    conversations."""
    check_command([chosen.python], f"{SETTING}.python")
    # Its errors go to a file: what the environment has started may hold a pipe for as long as it likes.
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                _command(chosen, "check"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigurationError(f"{SETTING}.python: {chosen.python} cannot be started: {error}") from None
        try:
            code = process.wait(CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            return
        finally:
            kill_group(process.pid, was_waited_for=process.returncode is not None)
            process.wait()
        if code:
            errors.seek(0)
            said = last_line(errors.read().decode(errors="replace"))[:1000] or f"its process ended with code {code}"
            raise ConfigurationError(f"{SETTING} {chosen.name}: {said}")


def _command(chosen: Verifiers, what: str) -> list[str]:
    # -P: the folder of the program, whose modules have names such as tools, is not where it imports from.
    return [chosen.python, "-P", str(PROGRAM), what, chosen.name, "--arguments", json.dumps(chosen.arguments or {})]
