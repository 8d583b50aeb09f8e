"""The output of a command in a container, as a stream, by an exec through the API server.

The Kubernetes client's own class keeps what it has not been asked for in memory, and reads on while anything comes: a
model would be held there whole.
"""

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill_cli.failure import CommandFailed

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

STDOUT, STDERR, STATUS = 1, 2, 3
"""Channels of the protocol v4.channel.k8s.io: the first byte of each message."""
SILENT_SECONDS = 300.0
"""How long nothing may come before the stream counts as cut off."""
STDERR_BYTES = 8192


class ExecStream(io.RawIOBase):
    """What a command writes to stdout, with a memory of one message."""

    def __init__(self, cluster: "Cluster", pod: str, container: str, command: Sequence[str]) -> None:
        """Start the command. Raises ApiError."""
        path = f"/api/v1/namespaces/{cluster.namespace}/pods/{pod}/exec"
        query = [("container", container), ("stdout", "true"), ("stderr", "true")]
        self._socket = cluster.websocket(path, [*query, *(("command", word) for word in command)])
        self._socket.settimeout(SILENT_SECONDS)
        self._rest = memoryview(b"")
        self._stderr, self._status = b"", b""
        self._over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has come, or wait for it; 0 at the end. Raises CommandFailed where the connection is cut."""
        while not self._rest and not self._over:
            self._receive()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def failure(self) -> str | None:
        """Return why the command failed, as it said itself; None where it did not. What is unread is dropped."""
        while not self._over:
            self._receive()
        try:
            status = json.loads(self._status)
        except ValueError:
            return "the connection ended before the command did"
        if status.get("status") == "Success":
            return None
        said = self._stderr.decode(errors="replace").strip().splitlines()
        return said[-1] if said else str(status.get("message"))

    def close(self) -> None:
        if not self.closed:
            self._socket.close()
        super().close()

    def _receive(self) -> None:
        from websocket import ABNF, WebSocketException

        try:
            kind, frame = self._socket.recv_data_frame(True)
        except (WebSocketException, OSError) as error:
            self._over = True
            if not self._status:
                raise CommandFailed(f"the stream from the pod was cut off ({error}): try again") from error
            return
        if kind == ABNF.OPCODE_CLOSE:
            self._over = True
        elif kind in (ABNF.OPCODE_TEXT, ABNF.OPCODE_BINARY) and frame.data:
            channel, content = frame.data[0], frame.data[1:]
            if channel == STDOUT:
                self._rest = memoryview(content)
            elif channel == STDERR:
                self._stderr = (self._stderr + content)[-STDERR_BYTES:]
            elif channel == STATUS:
                self._status += content
