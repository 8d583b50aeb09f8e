"""The connection to Ray: connect, disconnect, reconnect.

On a cluster the trainer is a Ray Client of the RayCluster's head: half the memory of a joined node, one port, Python
exceptions instead of aborts, and seconds to reconnect; only small lists pass through it. On one machine it starts a
private Ray of its own.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator

import ray
from ray._private import auto_init_hook
from ray._private.node import Node
from ray.exceptions import RayError

log = logging.getLogger(__name__)

# RAY_ENABLE_AUTO_CONNECT=0, even where Ray was imported before. Otherwise the first call after a lost head starts a Ray
# in the trainer's own pod, where the engines' new actors wait for ever to be placed.
auto_init_hook.enable_auto_connect = False

CONNECT_SECONDS = 300.0
RETRY_SECONDS = 2.0
PRIVATE_TRIES = 2
"""On a busy machine the first may fail: Ray gives its own processes 30 s to start (ray._private.node)."""

UNUSED_SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's node that start what a run on one machine has no use for: the dashboard's server, of which ray.init
leaves a part even with include_dashboard=False and waits for it, the autoscaler, and what forwards logs. Each is an
interpreter of its own, and the first engine waits for them on a small machine."""

_private_folders: list[str] = []


class RayUnreachable(Exception):
    """Raised when no Ray can be connected to within the time allowed."""


def connect(address: str | None, timeout_seconds: float = CONNECT_SECONDS) -> None:
    """Connect to `ray://HOST:PORT`, with retries until the timeout; None starts a private Ray on this machine.

    Does nothing where Ray is connected already. Raises RayUnreachable.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An engine takes the accelerators of its pod, whatever Ray has counted.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        _start_private()
        return
    deadline, tries = time.monotonic() + timeout_seconds, 0
    while True:
        tries += 1
        try:
            # Half of the first connects fail under load: the proxy in the head gives its server 30 s to start.
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            return
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]
            with contextlib.suppress(Exception):
                ray.shutdown()
            if time.monotonic() > deadline:
                raise RayUnreachable(
                    f"no Ray at {address} within {timeout_seconds:.0f} s and {tries} tries (last: {why}); "
                    "see the log of the RayCluster's head pod"
                ) from None
            log.warning("Ray at %s, try %d: %s", address, tries, why)
            time.sleep(RETRY_SECONDS)


def _start_private() -> None:
    """Start a Ray of this process alone. Raises RayUnreachable."""
    for tries in range(1, PRIVATE_TRIES + 1):
        # The paths of Unix sockets have a small limit, so the folder has a short one.
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        _private_folders.append(folder)
        try:
            with _without_unused_services():
                ray.init(
                    address="local",
                    num_cpus=1,
                    include_dashboard=False,
                    object_store_memory=100_000_000,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _temp_dir=folder,
                )
            return
        except Exception as error:  # Ray raises whatever its parts do
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            with contextlib.suppress(Exception):
                ray.shutdown()
            if tries == PRIVATE_TRIES:
                raise RayUnreachable(
                    f"no Ray could be started on this machine ({why}); its logs are in {folder}/session_latest/logs"
                ) from None
            log.warning("Ray on this machine, try %d: %s", tries, why)


@contextlib.contextmanager
def _without_unused_services() -> Iterator[None]:
    started = {name: getattr(Node, name) for name in UNUSED_SERVICES}
    for name in UNUSED_SERVICES:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, method in started.items():
            setattr(Node, name, method)


def disconnect() -> None:
    """Disconnect: the actors of this process end, and so does a private Ray, whose files are removed."""
    with contextlib.suppress(Exception):
        ray.shutdown()
    while _private_folders:
        shutil.rmtree(_private_folders.pop(), ignore_errors=True)


class RayConnection:
    """The connection of this process to the Ray at `ray://HOST:PORT`, or to a private one."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._thread: threading.Thread | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def private(self) -> bool:
        return self._address is None

    async def open(self) -> None:
        """Connect. Raises RayUnreachable."""
        self._opening = asyncio.create_task(asyncio.to_thread(connect, self._address))
        await asyncio.shield(self._opening)

    async def reconnect(self) -> None:
        """Connect anew, since the head may be lost, and every actor with it: each RayEngine must then be started again.

        A failure is logged and not raised.
        """
        if self._address is None or self._is_trying():
            return
        # A daemon thread: it may try for minutes, and the trainer may have to end meanwhile.
        self._thread = threading.Thread(target=self._reconnect, daemon=True)
        self._thread.start()
        while self._is_trying():
            await asyncio.sleep(0.2)

    async def close(self) -> None:
        """Disconnect, unless a reconnection is under way."""
        if self.private and self._opening is not None and not self._opening.done():
            # Ray would abort this process if its raylet were ended while it starts.
            await asyncio.wait({self._opening})
        if not self._is_trying():
            await asyncio.to_thread(disconnect)

    def _is_trying(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _reconnect(self) -> None:
        disconnect()
        try:
            connect(self._address)
        except RayUnreachable as error:
            log.warning("%s", error)
