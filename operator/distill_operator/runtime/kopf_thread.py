"""One life of kopf: a thread and a loop of its own, on which it hands the events of owners and children on.

Only on.event handlers are used: they write no finalizer and no annotation, and what they miss the resync makes good.
The loop is its own since at its end kopf waits for every task that is younger than itself, and so would wait for ours.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any

import kopf

# Where kopf keeps the namespaces that it watches. It has no public way to change them but a pattern of their names.
from kopf._cogs.structs.references import Insights

from distill_operator.kinds import Kind
from distill_operator.runtime.ownership import Key, Ownership
from distill_operator.settings import Settings

OnEvent = Callable[[Kind, dict[str, Any], bool, Key], None]
"""Called on kopf's thread with an event's kind, its object, whether that is gone, and its owner."""
REPORT_SECONDS = 1.0
"""Between two looks at kopf's own tasks."""
WATCH = "watcher for "
"""How kopf begins the name of the task of each watch."""


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
    # By default kopf kills the process ten minutes after it has failed.
    found.process.ultimate_exiting_timeout = None
    # Without cluster-wide rights there is nothing to scan; KubeRay installed later is found by the resync then.
    found.scanning.disabled = bool(settings.watch_namespaces or settings.watch_namespace_selector)
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


def watch_name(kind: Kind, namespace: str) -> str:
    """Return the name of the watch of a kind in a namespace; empty is every namespace."""
    group, version, plural = gvr(kind)
    return f"{plural}.{version}.{group}".strip(".") + f"@{namespace or None}"


class KopfThread:
    """A kopf operator that runs once, until it is stopped or fails."""

    def __init__(
        self,
        settings: Settings,
        ownership: Ownership,
        on_event: OnEvent,
        namespaces: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.ended: Future[str] = Future()
        """Done when kopf has ended; its result says why."""
        self.watching: frozenset[str] = frozenset()
        """Names of the watches that are there, as of `alive_at`; one that tries again and again counts as there."""
        self.alive_at = time.monotonic()
        """When kopf's loop last ran."""
        self._settings = settings
        self._ownership = ownership
        self._on_event = on_event
        self._namespaces = namespaces
        """Return the namespaces to watch, where a selector changes them; called on kopf's thread."""
        self._loop = asyncio.new_event_loop()
        # An Event of the loop: kopf would wait for one of threads on another thread, which it could not end.
        self._stop = asyncio.Event()
        self._operator: asyncio.Future[None] | None = None
        self._thread = Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ask kopf to end."""
        self._call(self._stop.set)

    def cancel(self) -> None:
        """End kopf, which did not when it was asked to."""
        self._call(lambda: self._operator and self._operator.cancel())

    def _call(self, function: Callable[[], Any]) -> None:
        # The loop may have ended by itself.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        # From here on who waits for it cannot cancel it.
        self.ended.set_running_or_notify_cancel()
        why = "kopf ended"
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._operate())
        except BaseException as error:
            why = f"kopf failed: {error!r}"
        finally:
            self.ended.set_result(why)

    async def _operate(self) -> None:
        selected, insights = bool(self._settings.watch_namespace_selector), Insights()
        # With scanning disabled a pattern stands for no namespace: kopf begins with none.
        namespaces = ("*",) if selected else self._settings.watch_namespaces
        self._operator = asyncio.ensure_future(
            kopf.operator(
                registry=registry(self._ownership, self._on_event),
                settings=kopf_settings(self._settings, self._ownership),
                standalone=True,
                clusterwide=not namespaces,
                namespaces=namespaces,
                insights=insights,
                stop_flag=self._stop,
            )
        )
        while not self._operator.done():
            # Later than kopf's own beginning, which would not notice.
            if selected and insights.ready_namespaces.is_set() and insights.ready_resources.is_set():
                await self._turn_to_namespaces(insights)
            names = [task.get_name() for task in asyncio.all_tasks()]
            self.watching = frozenset(name.removeprefix(WATCH) for name in names if name.startswith(WATCH))
            self.alive_at = time.monotonic()
            await asyncio.wait({self._operator}, timeout=REPORT_SECONDS)
        self._operator.result()

    async def _turn_to_namespaces(self, insights: Any) -> None:
        wanted = set(self._namespaces())
        if wanted != insights.namespaces:
            async with insights.revised:
                insights.namespaces.clear()
                insights.namespaces.update(wanted)
                insights.revised.notify_all()
