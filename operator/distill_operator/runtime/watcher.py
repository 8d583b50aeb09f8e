"""kopf's watches: each event of an owner, or of a child, goes into the cache, and wakes the owner if it is new there.

Only on.event handlers are used: they write no finalizer and no annotation, and what they miss the resync makes good.
kopf runs on a thread and a loop of its own, since at its end it waits for every task of its loop that is younger than
itself, and so would wait for ours.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kopf

from distill_operator.kinds import Kind
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.ownership import Key, Ownership
from distill_operator.settings import Settings

logger = logging.getLogger(__name__)

Wake = Callable[[Key], None]
OnEvent = Callable[[Kind, dict[str, Any], bool, Key], None]
"""Called with an event's kind, its object, whether that is gone, and its owner."""


def registry(ownership: Ownership, on_event: OnEvent) -> Any:
    """Return kopf's handlers, which pass on the events of owners and their children."""
    found = kopf.OperatorRegistry()

    def handler(kind: Kind) -> Callable[..., Any]:
        async def handle(event: Any, **_: Any) -> None:
            if owner := ownership.owner_of(kind, event["object"]["metadata"]):
                on_event(kind, event["object"], event["type"] == "DELETED", owner)

        return handle

    for kind in (*ownership.owner_labels, *ownership.watched):
        group, version, plural = gvr(kind)
        kopf.on.event(group, version, plural, id=plural, registry=found)(handler(kind))
    kopf.on.login(registry=found)(kopf.login_with_service_account)
    kopf.on.login(registry=found)(kopf.login_with_kubeconfig)
    return found


def gvr(kind: Kind) -> tuple[str, str, str]:
    """Return group, version and plural of a kind."""
    *group, version = kind.value.api_version.split("/")
    return "".join(group), version, kind.value.plural


class NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]  # to mypy, kopf is Any
    """A kopf storage that finds no changes: kopf's own would copy each object deeply, twice an event, to find them."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> Any:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        pass


def kopf_settings(settings: Settings, ownership: Ownership) -> Any:
    """Return kopf's settings: each whose default would hurt, with its reason."""
    found = kopf.OperatorSettings()
    found.peering.standalone = True
    # Events are posted by events.py, which does not repeat them.
    found.posting.enabled = False
    # A watch that went silent without an error is the classic end of an operator: renew each one every five minutes.
    found.watching.server_timeout = 300
    found.watching.client_timeout = 330
    found.watching.connect_timeout = 10
    found.networking.request_timeout = 30
    found.networking.error_backoffs = EndlessBackoffs()
    # Nothing is stored on objects; should anything ever be, it must not share the names of other kopf operators.
    found.persistence.finalizer = f"{ownership.group}/kopf"
    found.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=ownership.group)
    found.persistence.diffbase_storage = NoDiffBase()
    found.execution.max_workers = 2
    # Without cluster-wide rights there is nothing to scan; KubeRay installed later is found by the resync then.
    found.scanning.disabled = bool(settings.watch_namespaces)
    selector = ownership.managed_selector
    for _, version, plural in map(gvr, ownership.watched):
        # Selected by the server, or every pod of the cluster would come by.
        found.watching.label_selectors[lambda r, v=version, p=plural: (r.version, r.plural) == (v, p)] = selector
    return found


class EndlessBackoffs:
    """Delays in seconds before each further try of a request: they grow to three, and never end.

    kopf retries an answer of 5xx, 403 or 429 as often as there are delays, and then lets the watch die for good, while
    the process lives on.
    """

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1.0, 2.0), itertools.repeat(3.0))


class Watches:
    """kopf on a thread of its own."""

    def __init__(self, settings: Settings, cache: Cache, wake: Wake) -> None:
        self._settings = settings
        self._cache = cache
        self._wake = wake
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._registry = registry(cache.ownership, lambda *event: self._call(self._handle, *event))
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    async def run(self) -> None:
        """Watch until stop(). Raises what ended kopf otherwise."""
        self._thread.start()
        await self._ended
        if not self._stop.is_set():
            raise RuntimeError("the watches ended by themselves")

    def stop(self) -> None:
        """Ask kopf to end."""
        self._stop.set()

    def _handle(self, kind: Kind, raw: dict[str, Any], gone: bool, owner: Key) -> None:
        # The echo of our own write tells nothing new.
        if self._cache.observe(kind, raw, gone=gone):
            self._wake(owner)

    def _run(self) -> None:
        namespaces = self._settings.watch_namespaces
        try:
            asyncio.run(
                kopf.operator(
                    registry=self._registry,
                    settings=kopf_settings(self._settings, self._cache.ownership),
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
        """Call a function on our loop; at the very end there may be none left."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.debug("an event came after the end")
