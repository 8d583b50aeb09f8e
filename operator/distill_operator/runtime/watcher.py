"""kopf's watches: each event of a job, or of an object made for one, is remembered, and wakes that job if it is news.

Only on.event handlers are used: they write no finalizer and no annotation, and what they miss the resync makes good.
kopf runs on a thread and a loop of its own, since at its end it waits for every task of its loop that is younger than
itself, and so would wait for ours.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import kopf

from distill_api.base import GROUP
from distill_operator.runtime.cache import MANAGED, WATCHED, Cache
from distill_operator.runtime.kinds import Kind
from distill_operator.runtime.store import OWNERS, job_of
from distill_operator.runtime.work_queue import Key
from distill_operator.settings import Settings

logger = logging.getLogger(__name__)

CHILDREN = tuple(kind for kind in WATCHED if kind not in OWNERS)
Wake = Callable[[Key], None]
Tell = Callable[[Kind, dict[str, Any], bool, Key], None]
"""Kind, object, whether it is gone, its job."""


def registry(tell: Tell) -> Any:
    """Handlers that pass on what they hear."""
    found = kopf.OperatorRegistry()

    def hear(kind: Kind) -> Callable[..., Any]:
        async def on_event(event: Any, **_: Any) -> None:
            key = job_of(kind, event["object"]["metadata"])
            if key.name:
                tell(kind, event["object"], event["type"] == "DELETED", key)

        return on_event

    for kind in WATCHED:
        group, version, plural = gvr(kind)
        kopf.on.event(group, version, plural, id=plural, registry=found)(hear(kind))
    kopf.on.login(registry=found)(kopf.login_with_service_account)
    kopf.on.login(registry=found)(kopf.login_with_kubeconfig)
    return found


def gvr(kind: Kind) -> tuple[str, str, str]:
    *group, version = kind.value.api_version.split("/")
    return "".join(group), version, kind.value.plural


class NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]  # to mypy, kopf is Any
    """Nobody asks what changed in an object. kopf's own would copy each one deeply, twice an event, to find out."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> Any:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        pass


def kopf_settings(settings: Settings) -> Any:
    """Every setting whose default would hurt, with its reason."""
    found = kopf.OperatorSettings()
    found.peering.standalone = True
    # Events are posted by events.py, which does not repeat them.
    found.posting.enabled = False
    # A watch that went silent without an error is the classic end of an operator: renew each one every five minutes.
    found.watching.server_timeout = 300
    found.watching.client_timeout = 330
    found.watching.connect_timeout = 10
    found.networking.request_timeout = 30
    found.networking.error_backoffs = (1, 2, 5, 10)
    # Nothing is stored on objects; should anything ever be, it must not share the names of other kopf operators.
    found.persistence.finalizer = f"{GROUP}/kopf"
    found.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    found.persistence.diffbase_storage = NoDiffBase()
    found.execution.max_workers = 2
    # Without cluster-wide rights there is nothing to scan; KubeRay installed later is found by the resync then.
    found.scanning.disabled = bool(settings.watch_namespaces)
    for _, version, plural in map(gvr, CHILDREN):
        # On the server, or every pod of the cluster would come by.
        found.watching.label_selectors[lambda r, v=version, p=plural: (r.version, r.plural) == (v, p)] = MANAGED
    return found


class Watches:
    """kopf on its thread."""

    def __init__(self, settings: Settings, cache: Cache, wake: Wake) -> None:
        self._settings = settings
        self._cache = cache
        self._wake = wake
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._registry = registry(lambda *heard: self._call(self._hear, *heard))
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    async def run(self) -> None:
        """Until stop(); raises what ended kopf otherwise."""
        self._thread.start()
        await self._ended
        if not self._stop.is_set():
            raise RuntimeError("the watches ended by themselves")

    def stop(self) -> None:
        self._stop.set()

    def _hear(self, kind: Kind, raw: dict[str, Any], gone: bool, key: Key) -> None:
        # The echo of our own write is no news.
        if self._cache.saw(kind, raw, gone=gone):
            self._wake(key)

    def _run(self) -> None:
        namespaces = self._settings.watch_namespaces
        try:
            asyncio.run(
                kopf.operator(
                    registry=self._registry,
                    settings=kopf_settings(self._settings),
                    standalone=True,
                    clusterwide=not namespaces,
                    namespaces=namespaces,
                    stop_flag=self._stop,
                )
            )
        except BaseException as error:
            self._call(self._finish, error)
        else:
            self._call(self._finish, None)

    def _finish(self, error: BaseException | None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(RuntimeError(f"the watches failed: {error!r}"))

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """On our loop; at the very end there may be none left."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.debug("an event came after the end")
