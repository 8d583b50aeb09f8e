"""The API server, as far as the operator needs it: raw dicts in and out, paths built by hand.

Typed lists of the client are slow and drop fields they do not know; its discovery wants a cache on disk. Neither is
needed for ten kinds whose paths never change.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import client, config

from distill_api.names import FIELD_MANAGER
from distill_operator.kinds import Kind, kind_of
from distill_operator.readiness import QUOTA

Json = dict[str, Any]
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=30)


class ApiError(Exception):
    """The API server, or the way to it, failed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class NotServed(ApiError):
    """The API server does not know the kind."""


class Refused(ApiError):
    """The object as we sent it is not acceptable; sending it again is of no use."""


class QuotaExceeded(ApiError):
    """The namespace may not hold the object now; later it may."""


class NamespaceEnding(ApiError):
    """Nothing can be made in a namespace that is being deleted."""


class Conflict(ApiError):
    """What we decided rests on an old version; look again."""


class AlreadyExists(ApiError):
    """An object of this name was made before."""


class Cluster(Protocol):
    """What reconcile() asks of the API server."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """None when it does not exist, or, for a cluster-wide kind, may not be read."""

    async def list(self, kind: Kind, namespace: str, *, labels: str = "", name: str = "") -> list[Json]:
        """With kind and apiVersion in each. Raises NotServed."""

    async def apply(self, body: Mapping[str, Any], *, dry_run: bool = False) -> None:
        """Server-side apply with our one field manager. Raises Refused, QuotaExceeded, NamespaceEnding."""

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """An object that is gone, or another by now, is as good as deleted."""

    async def patch_status(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Merge patch with the resourceVersion that it rests on. Raises Conflict."""

    async def create_event(self, body: Mapping[str, Any]) -> None:
        """Raises AlreadyExists."""

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Merge patch."""


class KubernetesCluster:
    """The real one."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api
        self.requests: Counter[tuple[str, str]] = Counter()
        """By verb and HTTP code, for the metrics."""

    async def close(self) -> None:
        await self._api.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        try:
            return await self._request("get", "GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404 or (error.status == 403 and not namespace):
                return None
            raise

    async def list(self, kind: Kind, namespace: str, *, labels: str = "", name: str = "") -> list[Json]:
        query = {"labelSelector": labels, "fieldSelector": f"metadata.name={name}" if name else ""}
        try:
            found = await self._request("list", "GET", _path(kind, namespace), query)
        except ApiError as error:
            if error.status == 404:
                raise NotServed(404, f"{kind.value.api_version} {kind.value.kind} is not served") from None
            raise
        types = {"apiVersion": kind.value.api_version, "kind": kind.value.kind}
        return [{**item, **types} for item in found.get("items", [])]

    async def apply(self, body: Mapping[str, Any], *, dry_run: bool = False) -> None:
        meta = body["metadata"]
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "dryRun": "All" if dry_run else ""}
        path = _path(kind_of(body), meta["namespace"], meta["name"])
        await self._request("apply", "PATCH", path, query, body, "application/apply-patch+yaml")

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._request("delete", "DELETE", _path(kind, namespace, name), body=options)
        except Conflict:
            return
        except ApiError as error:
            if error.status != 404:
                raise

    async def patch_status(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        path = f"{_path(Kind.DISTILLATION_JOB, namespace, name)}/status"
        await self._merge(path, patch)

    async def create(self, body: Mapping[str, Any]) -> None:
        """Raises AlreadyExists."""
        path = _path(kind_of(body), body["metadata"]["namespace"])
        try:
            await self._request("create", "POST", path, {"fieldManager": FIELD_MANAGER}, body)
        except Conflict as error:
            raise AlreadyExists(error.status, error.message) from None

    async def replace(self, body: Mapping[str, Any]) -> None:
        """The whole object, of the resourceVersion in it. Raises Conflict."""
        path = _path(kind_of(body), body["metadata"]["namespace"], body["metadata"]["name"])
        await self._request("update", "PUT", path, {"fieldManager": FIELD_MANAGER}, body)

    async def create_event(self, body: Mapping[str, Any]) -> None:
        namespace = body["metadata"]["namespace"]
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        try:
            await self._request("create", "POST", path, {"fieldManager": FIELD_MANAGER}, body)
        except Conflict as error:
            raise AlreadyExists(error.status, error.message) from None

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        await self._merge(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events/{name}", patch)

    async def _merge(self, path: str, patch: Mapping[str, Any]) -> None:
        query = {"fieldManager": FIELD_MANAGER}
        await self._request("patch", "PATCH", path, query, patch, "application/merge-patch+json")

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
        arguments = await self._api.param_serialize(
            method,
            path,
            query_params=parameters,
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = await self._api.call_api(*arguments, _request_timeout=REQUEST_TIMEOUT)
            text = (await response.read()).decode(errors="replace")
        except (TimeoutError, aiohttp.ClientError) as error:
            self.requests[verb, "error"] += 1
            raise ApiError(0, f"{verb} {path}: {error or type(error).__name__}") from error
        self.requests[verb, str(response.status)] += 1
        if 200 <= response.status < 300:
            return dict(json.loads(text))
        raise _error(verb, response.status, text)


async def connect() -> KubernetesCluster:
    """By the pod's service account, whose token the client reads again as it ages; else by KUBECONFIG."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)
    return KubernetesCluster(client.ApiClient(configuration))


def _path(kind: Kind, namespace: str, name: str = "") -> str:
    """Without a namespace: all of them, or a cluster-wide kind."""
    resource = kind.value
    scope = f"/namespaces/{namespace}" if namespace else ""
    return f"{resource.path}{scope}/{resource.plural}" + (f"/{name}" if name else "")


def _error(verb: str, status: int, text: str) -> ApiError:
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:500]
    if status == 409:
        return Conflict(status, message)
    if status == 403 and "because it is being terminated" in message:
        return NamespaceEnding(status, message)
    if verb in ("apply", "create") and status == 403 and QUOTA in message:
        return QuotaExceeded(status, message)
    # Another 403 of an apply: an admission policy, which the author of the job has to hear of.
    if verb == "apply" and status in (400, 403, 422):
        return Refused(status, message)
    return ApiError(status, message)
