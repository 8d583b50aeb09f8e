"""The client of the API server that the commands use: plain dicts in and out, one request at a time.

Rights and address are those of the user's kubeconfig, as for kubectl. The operator has a client of its own
(distill_operator.runtime.client): asynchronous, with watches, and for a service account.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import urllib3
from kubernetes import client, config

from distill_api.base import API_VERSION, PLURAL
from distill_cli.failure import CommandFailed

Json = dict[str, Any]
SECONDS = 30.0
"""The timeout of a request."""
MANAGER = "distill"
"""The field manager of what the commands write."""
APPLY, MERGE, BODY = "application/apply-patch+yaml", "application/merge-patch+json", "application/json"


class ApiError(CommandFailed):
    """Raised for an answer of the API server that is an error; `status` is its HTTP code, 0 where none came."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Cluster:
    """An API server, and the namespace that a command is about."""

    def __init__(self, api: client.ApiClient, namespace: str, seconds: float = SECONDS) -> None:
        self._api, self.namespace, self._seconds = api, namespace, seconds
        self.server: str = api.configuration.host

    def jobs(self, *, everywhere: bool = False) -> list[Json]:
        """Return the DistillationJobs of the namespace, or of all. Raises CommandFailed where the CRD is missing."""
        scope = "" if everywhere else f"/namespaces/{quote(self.namespace)}"
        try:
            return list(self.get(f"/apis/{API_VERSION}{scope}/{PLURAL}")["items"])
        except ApiError as error:
            raise _not_installed(error) from None

    def job(self, name: str) -> Json:
        """Return one job. Raises CommandFailed, with the jobs that there are, where there is none of that name."""
        try:
            return self.get(self.job_path(name))
        except ApiError as error:
            raise self._no_job(error, name) from None

    def patch_job(self, name: str, patch: Json) -> Json:
        """Merge the patch into a job, and return it. Raises CommandFailed where there is none of that name."""
        try:
            return self.request("PATCH", self.job_path(name), {"fieldManager": MANAGER}, patch, MERGE)
        except ApiError as error:
            raise self._no_job(error, name) from None

    def apply_job(self, manifest: Json, *, dry_run: bool) -> Json:
        """Apply a job on the server, and return it. Raises ApiError 409 for a field that another manager owns."""
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict", "dryRun": "All" if dry_run else ""}
        try:
            return self.request("PATCH", self.job_path(manifest["metadata"]["name"]), query, manifest, APPLY)
        except ApiError as error:
            raise _not_installed(error) from None

    def job_path(self, name: str) -> str:
        """Return the path of a job of the namespace."""
        return f"/apis/{API_VERSION}/namespaces/{quote(self.namespace)}/{PLURAL}/{quote(name, safe='')}"

    def core(self, plural: str, **query: str) -> list[Json]:
        """Return objects of the core API in the namespace: pods, events."""
        return list(self.get(f"/api/v1/namespaces/{quote(self.namespace)}/{plural}", query)["items"])

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Json:
        """Return the JSON of a GET. Raises ApiError."""
        return self.request("GET", path, query)

    def text(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """Return the text of a GET. Raises ApiError."""
        return self._send("GET", path, query).data.decode(errors="replace")

    def lines(self, path: str, query: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of a GET as they come, without a timeout. Raises ApiError."""
        response = self._send("GET", path, query, seconds=None)
        rest = b""
        for part in response.stream(4096):
            *whole, rest = (rest + part).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if rest:
            yield rest.decode(errors="replace")

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = BODY,
    ) -> Json:
        """Return the JSON of any request; empty values of the query are left out. Raises ApiError."""
        response = self._send(method, path, query, body, content_type)
        return dict(json.loads(response.data))

    def websocket(self, path: str, query: Sequence[tuple[str, str]]) -> Any:
        """Return the WebSocket of a path, such as that of an exec, with the channels of v4.channel.k8s.io.

        Raises ApiError.
        """
        import websocket
        from kubernetes.stream import ws_client

        headers = {"sec-websocket-protocol": ws_client.V4_CHANNEL_PROTOCOL}
        self._api.update_params_for_auth(headers, [], ["BearerToken"], path, "GET", None)
        url = ws_client.get_websocket_url(self.server + path, query)
        try:
            return ws_client.create_websocket(self._api.configuration, url, headers)
        except websocket.WebSocketBadStatusException as error:
            text = (error.resp_body or b"").decode(errors="replace")
            raise ApiError(error.status_code, self._sentence(error.status_code, text)) from None
        except (websocket.WebSocketException, OSError) as error:
            raise ApiError(0, f"{self.server} does not stream ({error}): check what is between here and it") from None

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = BODY,
        seconds: float | None = -1.0,
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "application/json, */*", "Content-Type": content_type}
        self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        parameters = urlencode({key: value for key, value in (query or {}).items() if value})
        timeout = self._seconds if seconds == -1.0 else seconds
        try:
            response: urllib3.BaseHTTPResponse = self._api.rest_client.pool_manager.request(
                method,
                self.server + path + (f"?{parameters}" if parameters else ""),
                headers=headers,
                body=None if body is None else json.dumps(body).encode(),
                timeout=urllib3.Timeout(connect=self._seconds, read=timeout),
                retries=False,
                preload_content=False,
            )
            if response.status < 300:
                return response
            text = response.data.decode(errors="replace")
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(
                0, f"{self.server} does not answer ({error}): check --context and --kubeconfig, and the network"
            ) from None
        raise ApiError(response.status, self._sentence(response.status, text))

    def _sentence(self, status: int, text: str) -> str:
        try:
            message = str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            message = text.strip()[:500] or f"HTTP {status}"
        if status == 401:
            return f"{self.server} does not know who you are ({message}): log in again, or choose another --context"
        if status == 403:
            return f"not allowed: {message}; ask for the chart's editor role in namespace {self.namespace}"
        return message

    def _no_job(self, error: ApiError, name: str) -> CommandFailed:
        if error.status != 404:
            return error
        try:
            names = [job["metadata"]["name"] for job in self.jobs()]
        except CommandFailed as unserved:
            return unserved
        there = f"it has {', '.join(names[:8])}" if names else "it has none; --namespace names another"
        return CommandFailed(f"namespace {self.namespace} has no DistillationJob {name}: {there}")


def _not_installed(error: ApiError) -> CommandFailed:
    if error.status != 404:
        return error
    return CommandFailed(
        "this cluster knows no DistillationJob: install the chart; `distill doctor` says what is there"
    )


def connect(namespace: str | None, context: str | None, kubeconfig: str | None, seconds: float = SECONDS) -> Cluster:
    """Return the cluster of the kubeconfig or, without one, of the pod's service account.

    The namespace is the one given, else that of the context, else `default`. Raises CommandFailed.
    """
    settings = client.Configuration()
    own_namespace = "default"
    try:
        # The client reads KUBECONFIG when it is imported, which may have been long ago.
        file = kubeconfig or os.environ.get("KUBECONFIG")
        config.load_kube_config(config_file=file, context=context, client_configuration=settings)
        contexts, current = config.list_kube_config_contexts(config_file=file)
        chosen = next((c for c in contexts if c["name"] == context), current)
        own_namespace = chosen["context"].get("namespace") or own_namespace
    except config.ConfigException as error:
        if kubeconfig or context:
            raise CommandFailed(f"the kubeconfig cannot be used: {error}") from None
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            raise CommandFailed(
                f"no cluster is configured ({error}): set KUBECONFIG or --kubeconfig, or run where kubectl works"
            ) from None
    return Cluster(client.ApiClient(settings), namespace or own_namespace, seconds)
