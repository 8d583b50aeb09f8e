"""The processes from which a layer's servers and trainers are forked (preloaded/), one for each module."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from distill_workers.serving.server import ARCHITECTURES

FOLDER = Path(__file__).parent / "preloaded"
SERVER, TRAINER = "distill_workers.cpu.sglang_launch", "distill_workers.trainer_on_cpu"
VARIABLES = {SERVER: {"SGLANG_USE_CPU_ENGINE": "1", ARCHITECTURES[0]: ARCHITECTURES[1]}, TRAINER: {}}
"""For each module what its processes have in their environment beside ours when they import."""


sys.path.insert(0, str(FOLDER))

import forked_popen  # noqa: E402
from forked_popen import VARIABLE, install, wait_for_children_of  # noqa: E402

__all__ = ["start_in_a_layer", "wait_for_children_of", "wait_until_preloaded"]


def start_in_a_layer() -> None:
    """Have this process and those that it starts fork servers and trainers, if it is one of a layer (dev/test.sh).

    A single file is run without: there what starts is what users start.
    """
    if "DISTILL_TEST_PARALLEL" not in os.environ or VARIABLE in os.environ:
        return  # or one that it starts, which forks from the same (sitecustomize.py)
    sockets = tempfile.mkdtemp(prefix="preloaded-")
    atexit.register(shutil.rmtree, sockets, ignore_errors=True)
    os.environ[VARIABLE] = sockets
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = [sys.executable, "-W", "ignore", FOLDER / "fork_server.py"]
    for module, variables in VARIABLES.items():
        with Path(sockets, f"{module}.log").open("wb") as log:
            subprocess.Popen(
                [*server, Path(sockets, module), module, str(os.getpid())],
                env=os.environ | variables,
                stdout=log,
                stderr=log,
            )
    install()


def wait_until_preloaded() -> None:
    """Wait until the fork servers have imported their modules, which takes both cores; at once where there are none."""
    for module in VARIABLES if os.environ.get(VARIABLE) else ():
        forked_popen.wait_until_preloaded(Path(os.environ[VARIABLE], module))
