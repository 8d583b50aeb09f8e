"""The API server, as far as the commands need it: raw dicts in and out, one request at a time.

Rights and address are those of the user's kubeconfig, as for kubectl.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import urllib3
from kubernetes import client, config

from distill_api.base import API_VERSION, PLURAL
from distill_cli.failure import CommandFailed

Json = dict[str, Any]
SECONDS = 30.0
"""That a request may take."""
MANAGER = "distill"
"""Field manager of what `submit`, `suspend` and `resume` write."""
APPLY, MERGE, BODY = "application/apply-patch+yaml", "application/merge-patch+json", "application/json"


class ApiError(CommandFailed):
    """What the API server answered; `status` is 0 where it did not."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Cluster:
    """One API server, and the namespace that a command is about."""

    def __init__(self, api: client.ApiClient, namespace: str, seconds: float = SECONDS) -> None:
        self._api, self.namespace, self._seconds = api, namespace, seconds
        self.server: str = api.configuration.host

    def jobs(self, *, everywhere: bool = False) -> list[Json]:
        scope = "" if everywhere else f"/namespaces/{quote(self.namespace)}"
        try:
            return list(self.get(f"/apis/{API_VERSION}{scope}/{PLURAL}")["items"])
        except ApiError as error:
            raise _not_installed(error) from None

    def job(self, name: str) -> Json:
        """Raises CommandFailed with the namespace where there is no such job."""
        try:
            return self.get(self.job_path(name))
        except ApiError as error:
            raise self._no_job(error, name) from None

    def patch_job(self, name: str, patch: Json) -> Json:
        try:
            return self.request("PATCH", self.job_path(name), {"fieldManager": MANAGER}, patch, MERGE)
        except ApiError as error:
            raise self._no_job(error, name) from None

    def apply_job(self, manifest: Json, *, dry_run: bool) -> Json:
        """Server-side apply. A field that another program set is not taken from it: that raises ApiError 409."""
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict", "dryRun": "All" if dry_run else ""}
        try:
            return self.request("PATCH", self.job_path(manifest["metadata"]["name"]), query, manifest, APPLY)
        except ApiError as error:
            raise _not_installed(error) from None

    def job_path(self, name: str) -> str:
        return f"/apis/{API_VERSION}/namespaces/{quote(self.namespace)}/{PLURAL}/{quote(name, safe='')}"

    def core(self, plural: str, **query: str) -> list[Json]:
        """Objects of the namespace of the core API: pods, events."""
        return list(self.get(f"/api/v1/namespaces/{quote(self.namespace)}/{plural}", query)["items"])

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Json:
        return self.request("GET", path, query)

    def text(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """An answer that is no JSON, whole."""
        return self._send("GET", path, query).data.decode(errors="replace")

    def lines(self, path: str, query: Mapping[str, str]) -> Iterator[str]:
        """An answer without an end, line by line as it comes."""
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
        response = self._send(method, path, query, body, content_type)
        return dict(json.loads(response.data))

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
        asked = urlencode({key: value for key, value in (query or {}).items() if value})
        timeout = self._seconds if seconds == -1.0 else seconds
        try:
            response: urllib3.BaseHTTPResponse = self._api.rest_client.pool_manager.request(
                method,
                self.server + path + (f"?{asked}" if asked else ""),
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
    """By the kubeconfig; without one by the pod's service account. Raises CommandFailed."""
    made = client.Configuration()
    own = "default"
    try:
        # The client reads KUBECONFIG when it is imported, which may have been long ago.
        file = kubeconfig or os.environ.get("KUBECONFIG")
        config.load_kube_config(config_file=file, context=context, client_configuration=made)
        contexts, current = config.list_kube_config_contexts(config_file=file)
        chosen = next((c for c in contexts if c["name"] == context), current)
        own = chosen["context"].get("namespace") or own
    except config.ConfigException as error:
        if kubeconfig or context:
            raise CommandFailed(f"the kubeconfig cannot be used: {error}") from None
        try:
            config.load_incluster_config(client_configuration=made)
        except config.ConfigException:
            raise CommandFailed(
                f"no cluster to speak to ({error}): set KUBECONFIG or --kubeconfig, or run where kubectl works"
            ) from None
    return Cluster(client.ApiClient(made), namespace or own, seconds)
