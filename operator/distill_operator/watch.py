"""kopf's watches: each event of a job, or of an object made for one, wakes that job. They decide nothing.

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

from distill_api import names
from distill_api.base import GROUP, PLURAL, VERSION
from distill_operator.queue import Key
from distill_operator.settings import Settings

logger = logging.getLogger(__name__)

MANAGED = f"{names.LABEL_MANAGED_BY}={names.FIELD_MANAGER}"
CHILDREN = (("apps", "v1", "deployments"), ("batch", "v1", "jobs"), ("ray.io", "v1", "rayclusters"), ("", "v1", "pods"))
Wake = Callable[[Key], None]


def job_key(body: Any, **_: Any) -> Key:
    return Key(body["metadata"]["namespace"], body["metadata"]["name"])


def owner_key(body: Any, **_: Any) -> Key | None:
    """The job that an object was made for; pods have it on their label alone, as other controllers own them."""
    job = body["metadata"].get("labels", {}).get(names.LABEL_JOB)
    return Key(body["metadata"]["namespace"], job) if job else None


def registry(wake: Wake) -> Any:
    """Handlers that pass keys on."""
    found = kopf.OperatorRegistry()

    async def on_job(**event: Any) -> None:
        wake(job_key(**event))

    async def on_child(**event: Any) -> None:
        if key := owner_key(**event):
            wake(key)

    kopf.on.event(GROUP, VERSION, PLURAL, registry=found)(on_job)
    for index, (group, version, plural) in enumerate(CHILDREN):
        kopf.on.event(group, version, plural, id=f"child-{index}", registry=found)(on_child)
    kopf.on.login(registry=found)(kopf.login_with_service_account)
    kopf.on.login(registry=found)(kopf.login_with_kubeconfig)
    return found


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
    found.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    found.execution.max_workers = 2
    # Without cluster-wide rights there is nothing to scan; KubeRay installed later is found by the resync then.
    found.scanning.disabled = bool(settings.watch_namespaces)
    for _, version, plural in CHILDREN:
        # On the server, or every pod of the cluster would come by.
        found.watching.label_selectors[lambda r, v=version, p=plural: (r.version, r.plural) == (v, p)] = MANAGED
    return found


class Watches:
    """kopf on its thread."""

    def __init__(self, settings: Settings, wake: Wake) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._registry = registry(lambda key: self._call(wake, key))
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    async def run(self) -> None:
        """Until stop(); raises what ended kopf otherwise."""
        self._thread.start()
        await self._ended
        if not self._stop.is_set():
            raise RuntimeError("the watches ended by themselves")

    def stop(self) -> None:
        self._stop.set()

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
