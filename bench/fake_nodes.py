"""Nodes that exist in the API server alone, as kwok's: every pod that is bound to one runs and is ready at once.

python bench/fake_nodes.py KUBECONFIG ADDRESS: makes ten nodes, then answers until it is ended. All pods get ADDRESS,
where rank 0 of every trainer is played: it is at step 4 for ever.
"""

import asyncio
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

Json = dict[str, Any]
NODES = 10
AT_ONCE = 16
MERGE = "application/merge-patch+json"


class Api:
    """The API server, as an administrator."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url

    async def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Json:
        """Raises RuntimeError with what the server said."""
        headers = {"Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        async with self.session.request(method, self.url + path, data=data, headers=headers) as answer:
            text = await answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
            found: Json = json.loads(text)
            return found

    async def watch(self, path: str) -> AsyncIterator[tuple[str, Json]]:
        """Type and object of everything that is there (ADDED) and then happens, for ever."""
        separator = "&" if "?" in path else "?"
        listed = await self.call("GET", path)
        for item in listed.get("items") or []:
            yield "ADDED", item
        version, rest = listed["metadata"]["resourceVersion"], b""
        while True:
            query = f"{separator}watch=true&resourceVersion={version}&timeoutSeconds=600"
            async with self.session.get(self.url + path + query) as answer:
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        event = json.loads(line)
                        version = event["object"]["metadata"]["resourceVersion"]
                        yield event["type"], event["object"]


def connect(kubeconfig: Path) -> Api:
    config = json.loads(kubeconfig.read_text())
    cluster, token = config["clusters"][0]["cluster"], config["users"][0]["user"]["token"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {token}"},
        connector=aiohttp.TCPConnector(ssl=context, limit=64),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
    )
    return Api(session, cluster["server"])


async def make_nodes(api: Api) -> None:
    for index in range(NODES):
        name = f"node-{index}"
        await api.call(
            "POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}}
        )
        amounts = {"cpu": "100000", "memory": "1000Ti", "pods": "10000", "ephemeral-storage": "1000Ti"}
        ready = {"type": "Ready", "status": "True", "reason": "Fake", "message": ""}
        status = {"allocatable": amounts, "capacity": amounts, "conditions": [ready]}
        await api.call("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, MERGE)
        # Admission sets it on every new node, and the controller that would take it away is not started.
        await api.call("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": []}}, MERGE)


def running(pod: Json, address: str) -> Json:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    containers = [
        {
            "name": c["name"], "image": c["image"], "imageID": c["image"], "ready": True, "started": True,
            "restartCount": 0, "state": {"running": {"startedAt": now}},
        }
        for c in pod["spec"]["containers"]
    ]  # fmt: skip
    kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": now,
        "containerStatuses": containers,
        "conditions": [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in kinds],
    }


async def play(api: Api, address: str) -> None:
    """The kubelets."""
    slots = asyncio.Semaphore(AT_ONCE)
    tasks: set[asyncio.Task[None]] = set()

    async def act(pod: Json) -> None:
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
        async with slots:
            try:
                if "deletionTimestamp" in pod["metadata"]:
                    await api.call("DELETE", path, {"gracePeriodSeconds": 0})
                else:
                    await api.call("PATCH", f"{path}/status", {"status": running(pod, address)}, MERGE)
            except RuntimeError as error:
                if " 404 " not in str(error):
                    print(error, file=sys.stderr)

    async for kind, pod in api.watch("/api/v1/pods"):
        pending = pod["spec"].get("nodeName") and pod["status"].get("phase") == "Pending"
        if kind != "DELETED" and (pending or "deletionTimestamp" in pod["metadata"]):
            task = asyncio.create_task(act(pod))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


async def serve_progress(address: str) -> None:
    report = {"phase": "Training", "preflightPassed": True}
    report |= {"progress": {"step": 4, "totalSteps": 10, "percent": 40}}

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(report)

    app = web.Application()
    app.router.add_get("/progress", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, address, 8080).start()


async def main(kubeconfig: Path, address: str) -> None:
    api = connect(kubeconfig)
    await make_nodes(api)
    await serve_progress(address)
    print("ready", flush=True)
    await play(api, address)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
