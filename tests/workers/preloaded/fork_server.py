"""`fork_server.py SOCKET MODULE PARENT`: imports what MODULE imports, and forks a process for each request.

A child is what `python -W ignore -m MODULE ARGUMENTS` would be: its variables, its folder, its streams, a session of
its own. Its exit code is sent to whoever asked; a connection that is closed ends its session.
"""

import contextlib
import ctypes
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from forked_popen import LENGTH_BYTES, STREAMS, note_of, read_on_import, send

PR_SET_PDEATHSIG = 1
IMPORTS = {"distill_workers.cpu.sglang_launch": "import_sglang", "distill_workers.trainer_on_cpu": "import_trainer"}
"""For each module the function in it that imports the rest."""


def main() -> None:
    path, module, parent = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    end_with_parent()
    if os.getppid() != parent:
        sys.exit("who started it is gone already")
    before = read_on_import(os.environ)  # the imports themselves set some
    imported = __import__(module, fromlist=["main"])
    getattr(imported, IMPORTS[module])()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(16)
    Path(f"{path}.new").rename(path)  # who sees it can connect
    arguments = ForkServer(listener, before).serve()
    # This is a child now.
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class ForkServer:
    """The parent of all that is forked. It ends with its own parent, and with nobody else."""

    def __init__(self, listener: socket.socket, imported_with: dict[str, str]) -> None:
        self._listener, self._imported_with = listener, imported_with
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, ("listener", 0))
        self._children: dict[int, tuple[socket.socket, Path]] = {}
        """By the pid of each child that runs, the connection to who asked, and the file that says whose child it is."""

    def serve(self) -> list[str]:
        """Serve for ever; return, in a child, its arguments."""
        while True:
            for key, _ in self._selector.select():
                kind, pid = key.data
                if kind == "listener":
                    if (arguments := self._accept()) is not None:
                        return arguments
                elif kind == "child":
                    self._reap(pid, key.fd)
                elif pid in self._children:
                    # Nobody sends anything more: who asked is gone, or has closed it.
                    self._selector.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)

    def _reap(self, pid: int, pidfd: int) -> None:
        connection, note = self._children.pop(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        note.unlink()
        self._selector.unregister(pidfd)
        os.close(pidfd)
        if connection in self._selector.get_map():
            self._selector.unregister(connection)
        with contextlib.suppress(OSError):  # who asked is gone
            send(connection, {"code": code})
        connection.close()

    def _accept(self) -> list[str] | None:
        connection, _ = self._listener.accept()
        streams: list[int] = []
        try:
            with connection.dup() as reading, reading.makefile("rb") as stream:
                head, streams, _, _ = socket.recv_fds(connection, LENGTH_BYTES, len(STREAMS))
                request = json.loads(stream.read(int.from_bytes(head, "big")))
            return self._fork(connection, streams, request)
        except (OSError, ValueError, LookupError) as error:
            print("a request that was not whole:", error, file=sys.stderr, flush=True)
            connection.close()
        finally:
            for number in streams:
                os.close(number)
        return None

    def _fork(self, connection: socket.socket, streams: list[int], request: dict[str, Any]) -> list[str] | None:
        wanted = read_on_import(request["environment"])
        if wanted != self._imported_with:
            send(connection, {"differs": sorted(wanted.items() ^ self._imported_with.items())})
            connection.close()
            return None
        note = note_of(Path(self._listener.getsockname()).parent, peer_of(connection))
        note.touch()
        parent = os.getpid()
        if pid := os.fork():
            self._children[pid] = connection, note
            self._selector.register(connection, selectors.EVENT_READ, ("connection", pid))
            self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, ("child", pid))
            return None
        self._become_child(streams, request)
        if os.getppid() != parent:
            os._exit(1)
        # It says so itself: before, nobody could end its session.
        send(connection, {"pid": os.getpid()})
        for other in (connection, self._listener, *(known for known, _ in self._children.values())):
            other.close()
        return list(request["arguments"])

    def _become_child(self, streams: list[int], request: dict[str, Any]) -> None:
        os.setsid()
        end_with_parent()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        self._selector.close()
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[0] = request["folder"]
        random.seed()
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:  # as child_processes.py has it
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def peer_of(connection: socket.socket) -> int:
    """Return the pid of the process at the other end."""
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
