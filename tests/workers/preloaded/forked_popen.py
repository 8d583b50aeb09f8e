"""subprocess.Popen whose `python -m MODULE` is forked from a process that has imported MODULE (fork_server.py).

The imports of SGLang and of the trainer take 16 and 12 seconds of a processor, and the layer starts about a hundred of
them. Whatever does not fit, another module or other values of variables that libraries read as they are imported, is
started as ever.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "DISTILL_TEST_PRELOADED"
"""Environment variable: the folder that has a socket for each preloaded module; empty where nothing is forked."""
READ_ON_IMPORT = (
    "ATEN_", "CUDA_", "HF_", "LD_", "MKL_", "OMP_", "ONEDNN_", "PYTHON", "RAY_", "SGLANG_", "TORCH", "TRANSFORMERS_",
)  # fmt: skip
"""Beginnings of the names of variables that a library may read while it is imported."""
NOT_READ = {
    "CUDA_CACHE_PATH", "PYTHONBREAKPOINT", "PYTHONUNBUFFERED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_USAGE_STATS_ENABLED", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_CACHE_DIR",
}  # fmt: skip
"""Others that begin so, which libraries, Ray and ray_connection.py set themselves: of the compiler, which no process of
a CPU has, of the debugger, of the buffer of a stream that a fork has already, and what a Ray reads as it starts."""
LENGTH_BYTES = 4
PRELOAD_SECONDS = 300
STREAMS = ("stdin", "stdout", "stderr")

_Popen = subprocess.Popen


def install() -> None:
    """Have this process fork what it can."""
    subprocess.Popen = PreloadedPopen  # type: ignore[misc]


class PreloadedPopen(_Popen):  # type: ignore[type-arg]
    """Popen itself, but for what can be forked."""

    def __new__(cls, args: Any, *more: Any, **options: Any) -> Any:
        if cls is PreloadedPopen and not more and (forked := ForkedPopen.start(args, options)):
            return forked
        return super().__new__(cls)


class ForkedPopen:
    """What a caller of Popen uses of it, for a process that is somebody else's child.

    It ends with the process that started it: the fork server kills its session when the connection is closed.
    """

    stdin = stdout = stderr = None

    def __init__(self, args: Any, pid: int, connection: socket.socket) -> None:
        self.args, self.pid, self.returncode, self._connection = args, pid, None, connection
        self._reading = threading.Lock()
        """Held while the exit code is read: a signal's handler may ask for it in the middle of that."""

    @classmethod
    def start(cls, args: Any, options: Mapping[str, Any]) -> "ForkedPopen | None":
        """Return the forked process; None if it cannot be forked."""
        command = module_of(args)
        folder = os.environ.get(VARIABLE)
        if command is None or not folder or subprocess.PIPE in options.values():
            return None
        module, arguments = command
        environment = dict(os.environ if options.get("env") is None else options["env"])
        path = Path(folder, module)
        if not environment.get(VARIABLE) or not path.parent.joinpath(f"{module}.log").exists():
            return None
        wait_until_preloaded(path)
        request = {"arguments": arguments, "environment": environment, "folder": str(options.get("cwd") or os.getcwd())}
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.ExitStack() as files:
            given = [descriptor(options.get(name), number, files) for number, name in enumerate(STREAMS)]
            given[2] = given[1] if options.get("stderr") == subprocess.STDOUT else given[2]
            text = json.dumps(request).encode()
            connection.connect(str(path))
            socket.send_fds(connection, [len(text).to_bytes(LENGTH_BYTES, "big")], given)
            connection.sendall(text)
        answer = json.loads(receive(connection))
        if "pid" not in answer:
            connection.close()
            return None
        return cls(args, answer["pid"], connection)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._reading.acquire(blocking=False):
                raise subprocess.TimeoutExpired(self.args, 0.0)
            try:
                self._read_exit_code(timeout)
            finally:
                self._reading.release()
        assert self.returncode is not None
        return self.returncode

    def _read_exit_code(self, timeout: float | None) -> None:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            with contextlib.closing(self._connection):
                answer = receive(self._connection)
            # Nothing: the fork server itself was killed, and its children with it.
            self.returncode = json.loads(answer)["code"] if answer else -signal.SIGKILL

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and that is on its way here
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def wait_until_preloaded(path: Path) -> None:
    """Wait until the fork server has imported its module. Raises RuntimeError if it does not."""
    end = time.monotonic() + PRELOAD_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            log = path.with_name(f"{path.name}.log").read_text()
            raise RuntimeError(f"{path.name} was not imported within {PRELOAD_SECONDS} s: {log}")
        time.sleep(0.1)


def module_of(args: Any) -> tuple[str, list[str]] | None:
    """Return module and arguments of the command line `python [-W ignore] -m MODULE ARGUMENTS`."""
    if not isinstance(args, (list, tuple)) or not args or args[0] != sys.executable:
        return None
    rest = list(map(str, args[1:]))
    if rest[:2] == ["-W", "ignore"]:
        rest = rest[2:]
    return (rest[1], rest[2:]) if len(rest) > 1 and rest[0] == "-m" else None


def note_of(folder: Path, pid: int) -> Path:
    """Return a new path of a file that is there while a process that `pid` has started runs."""
    return folder / f"child-{pid}-{uuid.uuid4().hex}"


def wait_for_children_of(pid: int) -> None:
    """Wait until nothing runs that a process, which has ended, had started here."""
    folder = os.environ.get(VARIABLE)
    while folder and any(Path(folder).glob(f"child-{pid}-*")):
        time.sleep(0.01)


def descriptor(stream: Any, number: int, files: contextlib.ExitStack) -> int:
    """Return the file descriptor that stands for an argument of Popen."""
    if stream is None or stream == subprocess.STDOUT:
        return number
    if stream == subprocess.DEVNULL:
        return files.enter_context(open(os.devnull, "r+b")).fileno()
    return stream if isinstance(stream, int) else int(stream.fileno())


def receive(connection: socket.socket) -> bytes:
    """Return what is sent, after its length; nothing if the other end is gone."""
    found = b""
    wanted = LENGTH_BYTES
    while len(found) < wanted:
        try:
            part = connection.recv(wanted - len(found))
        except ConnectionError:
            return b""
        if not part:
            return b""
        found += part
        if wanted == LENGTH_BYTES and len(found) == LENGTH_BYTES:
            wanted += int.from_bytes(found, "big")
    return found[LENGTH_BYTES:]


def send(connection: socket.socket, answer: Any) -> None:
    """Send a value as JSON, after its length."""
    text = json.dumps(answer).encode()
    connection.sendall(len(text).to_bytes(LENGTH_BYTES, "big") + text)


def read_on_import(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those variables whose values a forked process has from the fork server's imports."""
    return {
        name: value for name, value in environment.items() if name.startswith(READ_ON_IMPORT) and name not in NOT_READ
    }
