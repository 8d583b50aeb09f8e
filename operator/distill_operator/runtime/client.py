"""The API server, as far as an operator needs it: raw dicts in and out, paths built by hand.

Typed lists of the client are slow and drop fields they do not know; its discovery wants a cache on disk. Neither is
needed for ten kinds whose paths never change.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import client, config

from distill_operator.kinds import Kind, kind_of
from distill_operator.runtime.errors import (
    QUOTA,
    AlreadyExists,
    ApiError,
    Conflict,
    NamespaceEnding,
    NotServed,
    QuotaExceeded,
    Refused,
)

Json = dict[str, Any]
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=30)
PAGE = 200
"""Objects in one page of a list of everything."""
NEVER = "1"
"""A resourceVersion that no object has: an apply that carries it creates, and refuses what exists (tests/api)."""


class Cluster(Protocol):
    """What an operator asks of the API server."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """Return an object; None when it does not exist or, of a cluster-wide kind, may not be read."""

    def pages(self, kind: Kind, namespace: str, *, labels: str = "") -> AsyncIterator[tuple[list[Json], int]]:
        """Yield all objects of a kind, in pages of one snapshot whose resourceVersion comes with each.

        Raises NotServed.
        """

    async def list(
        self, kind: Kind, namespace: str, *, labels: str = "", name: str = "", fields: str = ""
    ) -> list[Json]:
        """Return objects, with kind and apiVersion in each. `fields` is a field selector. Raises NotServed."""

    async def apply(self, body: Mapping[str, Any], *, uid: str = "", dry_run: bool = False) -> Json:
        """Apply by server-side apply to the object of this uid, or create it without one. Return what is stored then.

        Raises Conflict when another object of this name exists, or this one no longer; Refused, QuotaExceeded,
        NamespaceEnding.
        """

    async def create(self, body: Mapping[str, Any]) -> None:
        """Create an object. Raises AlreadyExists, Refused, QuotaExceeded, NamespaceEnding."""

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> Json | None:
        """Delete the object of this uid. Return it while finalizers keep it, and None when it is gone or another."""

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Json:
        """Write a status by merge patch with the resourceVersion in it. Return what is stored then. Raises Conflict."""

    async def create_event(self, body: Mapping[str, Any]) -> None:
        """Create an Event. Raises AlreadyExists."""

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Change an Event by merge patch."""


class KubernetesCluster:
    """The API server of a real cluster."""

    def __init__(self, api: client.ApiClient, field_manager: str) -> None:
        self._api = api
        self._field_manager = field_manager
        self.requests: Counter[tuple[str, str]] = Counter()
        """Requests by verb and HTTP code, for the metrics."""

    async def close(self) -> None:
        await self._api.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        try:
            return await self._request("get", "GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404 or (error.status == 403 and not namespace):
                return None
            raise

    async def pages(self, kind: Kind, namespace: str, *, labels: str = "") -> AsyncIterator[tuple[list[Json], int]]:
        query = {"labelSelector": labels, "limit": str(PAGE)}
        while True:
            found = await self._list(kind, namespace, query)
            yield _items(kind, found), int(found["metadata"]["resourceVersion"])
            query["continue"] = found["metadata"].get("continue", "")
            if not query["continue"]:
                return

    async def list(
        self, kind: Kind, namespace: str, *, labels: str = "", name: str = "", fields: str = ""
    ) -> list[Json]:
        query = {"labelSelector": labels, "fieldSelector": f"metadata.name={name}" if name else fields}
        return _items(kind, await self._list(kind, namespace, query))

    async def apply(self, body: Mapping[str, Any], *, uid: str = "", dry_run: bool = False) -> Json:
        meta = {**body["metadata"], **({"uid": uid} if uid else {"resourceVersion": NEVER})}
        query = {"fieldManager": self._field_manager, "force": "true", "dryRun": "All" if dry_run else ""}
        path = _path(kind_of(body), meta["namespace"], meta["name"])
        return await self._request(
            "apply", "PATCH", path, query, {**body, "metadata": meta}, "application/apply-patch+yaml"
        )

    async def create(self, body: Mapping[str, Any]) -> None:
        path = _path(kind_of(body), body["metadata"]["namespace"])
        try:
            await self._request("create", "POST", path, {"fieldManager": self._field_manager}, body)
        except Conflict as error:
            raise AlreadyExists(error.status, error.message) from None
        except (NamespaceEnding, QuotaExceeded):
            raise
        except ApiError as error:
            if error.status in (400, 403, 422):
                raise Refused(error.status, error.message) from None
            raise

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> Json | None:
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            left = await self._request("delete", "DELETE", _path(kind, namespace, name), body=options)
        except Conflict:
            return None
        except ApiError as error:
            if error.status != 404:
                raise
            return None
        return left if left.get("kind") == kind.value.kind else None

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Json:
        path = f"{_path(kind, namespace, name)}/status"
        return await self._merge(path, patch)

    async def replace(self, body: Mapping[str, Any]) -> None:
        """Write a whole object with the resourceVersion in it. Raises Conflict."""
        path = _path(kind_of(body), body["metadata"]["namespace"], body["metadata"]["name"])
        await self._request("update", "PUT", path, {"fieldManager": self._field_manager}, body)

    async def create_event(self, body: Mapping[str, Any]) -> None:
        namespace = body["metadata"]["namespace"]
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        try:
            await self._request("create", "POST", path, {"fieldManager": self._field_manager}, body)
        except Conflict as error:
            raise AlreadyExists(error.status, error.message) from None

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        await self._merge(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events/{name}", patch)

    async def _list(self, kind: Kind, namespace: str, query: Mapping[str, str]) -> Json:
        try:
            return await self._request("list", "GET", _path(kind, namespace), query)
        except ApiError as error:
            if error.status == 404:
                raise NotServed(404, f"{kind.value.api_version} {kind.value.kind} is not served") from None
            raise

    async def _merge(self, path: str, patch: Mapping[str, Any]) -> Json:
        query = {"fieldManager": self._field_manager}
        return await self._request("patch", "PATCH", path, query, patch, "application/merge-patch+json")

    async def _request(
        self,
        verb: str,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        parameters = [(key, value) for key, value in (query or {}).items() if value]
        try:
            # Without the body, every value of which the client would inspect: it is plain JSON already.
            arguments = await self._api.param_serialize(
                method,
                path,
                query_params=parameters,
                header_params={"Accept": "application/json", "Content-Type": content_type},
                auth_settings=["BearerToken"],
            )
            _, url, headers, _, _ = arguments
            response = await self._api.call_api(method, url, headers, body, _request_timeout=REQUEST_TIMEOUT)
            text = (await response.read()).decode(errors="replace")
            # What stands between may answer 200 with a page of its own.
            answer = dict(json.loads(text)) if 200 <= response.status < 300 else None
        except (OSError, aiohttp.ClientError, ValueError, TypeError) as error:
            self.requests[verb, "error"] += 1
            raise ApiError(0, f"{verb} {path}: {error or type(error).__name__}") from error
        self.requests[verb, str(response.status)] += 1
        if answer is None:
            raise _error(verb, response.status, text)
        return answer


async def connect(field_manager: str) -> KubernetesCluster:
    """Return a connection by the pod's service account, whose token the client renews; else by KUBECONFIG."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)
    # Proxies and passwords of the environment would be looked for in files at each request; kopf does not either.
    configuration.client_session_kwargs = {"trust_env": False}
    return KubernetesCluster(client.ApiClient(configuration), field_manager)


def _path(kind: Kind, namespace: str, name: str = "") -> str:
    """Return the path of an object or of a list; without a namespace, of all namespaces or a cluster-wide kind."""
    resource = kind.value
    scope = f"/namespaces/{namespace}" if namespace else ""
    return f"{resource.path}{scope}/{resource.plural}" + (f"/{name}" if name else "")


def _items(kind: Kind, found: Json) -> list[Json]:
    types = {"apiVersion": kind.value.api_version, "kind": kind.value.kind}
    return [{**item, **types} for item in found.get("items") or []]


def _error(verb: str, status: int, text: str) -> ApiError:
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:500]
    # The second is what an apply with another object's uid gets.
    if status == 409 or (verb == "apply" and "metadata.uid: Invalid value" in message):
        return Conflict(status, message)
    if status == 403 and "because it is being terminated" in message:
        return NamespaceEnding(status, message)
    if verb in ("apply", "create") and status == 403 and QUOTA in message:
        return QuotaExceeded(status, message)
    # Another 403 of an apply: an admission policy, which the owner's author has to be told of. 500: a field that the
    # kind does not have, as a template may name one; the API server blames itself for it.
    unknown_field = status == 500 and "failed to create typed patch object" in message
    if verb == "apply" and (status in (400, 403, 422) or unknown_field):
        return Refused(status, message)
    return ApiError(status, message)
