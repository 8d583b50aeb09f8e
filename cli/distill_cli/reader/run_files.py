"""Reads the run folder of a job on a cluster, running or finished: makes the reader pod, streams, removes the pod."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from distill_api.names import LABEL_ATTEMPT, LABEL_JOB, Role
from distill_api.protocol import READER_MODULE
from distill_cli.failure import CommandFailed
from distill_cli.pods import pods_of_role
from distill_cli.reader.claim import node_for
from distill_cli.reader.exec_stream import ExecStream
from distill_cli.reader.pod import CONTAINER, reader_pod, selector
from distill_cli.reader.unpack import Incomplete, unpack

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

Json = dict[str, Any]
SECONDS = 900
"""The longest life of a pod that reads what tells of a run, whatever becomes of this process."""
MODEL_SECONDS = 6 * 3600
"""That of a pod that reads a model."""
START_SECONDS = 300.0
"""How long a pod may take to start: a node that has the image needs seconds, any other pulls 10 GB."""
POLL_SECONDS = 0.5
FINAL = (
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
"""What a container waits for in vain."""


def read_run_files(
    cluster: Cluster,
    name: str,
    folder: Path,
    what: str,
    *options: str,
    image: str | None = None,
    seconds: int = SECONDS,
) -> None:
    """Write files of the run folder of a job into an empty folder; `what` and `options` are those of READER_MODULE.

    The pod is removed also where this is interrupted. Raises CommandFailed.
    """
    job = cluster.job(name)
    output = job["spec"].get("output") or {}
    if not (output.get("volume") or {}).get("claimName"):
        raise CommandFailed(f"job {name} has no spec.output.volume, so no claim holds its run folder")
    _remove_ended(cluster, name)
    trainer = _trainer(cluster, job)
    pod = reader_pod(
        job,
        trainer,
        name=f"{name}-reader-{secrets.token_hex(3)}",
        image=image or _image(trainer, name),
        seconds=seconds,
        node=_node(cluster, output["volume"]["claimName"]),
    )
    path = output.get("path", "/output")
    command = ["python3", "-m", READER_MODULE, what, f"{path}/{name}", *options]
    with _pod(cluster, pod) as made, ExecStream(cluster, made, CONTAINER, command) as stream:
        _receive(stream, folder)


def _receive(stream: ExecStream, folder: Path) -> None:
    """Unpack the stream. Raises CommandFailed, with what the command itself said where it failed."""
    try:
        unpack(cast(Any, stream), folder)
    except Incomplete:
        if said := stream.failure():
            raise CommandFailed(_sentence(said)) from None
        raise
    if said := stream.failure():
        raise CommandFailed(_sentence(said))


def _sentence(said: str) -> str:
    if "No module named" in said or "executable file not found" in said:
        return f"the image has no reader ({said}): name one of this release with --image"
    return said


@contextmanager
def _pod(cluster: Cluster, pod: Json) -> Iterator[str]:
    """Yield the name of the pod once it runs; it is deleted afterwards, also by SIGINT, SIGTERM and SIGHUP."""
    pods, name = f"/api/v1/namespaces/{cluster.namespace}/pods", str(pod["metadata"]["name"])
    with _signals(_interrupt):
        try:
            cluster.request("POST", pods, {"fieldManager": "distill"}, pod)
            _wait_until_running(cluster, f"{pods}/{name}", name)
            yield name
        finally:
            # A second Ctrl-C would leave the pod, and a claim attached, until its deadline.
            with _signals(signal.SIG_IGN), suppress(CommandFailed):  # the pod may not have come to be
                cluster.request("DELETE", f"{pods}/{name}")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP so for a while."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _wait_until_running(cluster: Cluster, path: str, name: str, clock: Callable[[], float] = time.monotonic) -> None:
    """Return once the pod runs. Raises CommandFailed, with what keeps it from that."""
    end = clock() + START_SECONDS
    while True:
        pod = cluster.get(path)
        status = pod.get("status", {})
        if status.get("phase") == "Running":
            return
        reason, message = _problem(status)
        if status.get("phase") in ("Failed", "Succeeded") or reason in FINAL:
            raise CommandFailed(f"pod {name} does not start: {reason} {message}".rstrip())
        if clock() > end:
            why = f"{reason} {message}".strip() or _last_warning(cluster, name) or "nothing says why"
            raise CommandFailed(f"pod {name} has not started within {START_SECONDS:.0f} s: {why}")
        if multi := _attached_elsewhere(cluster, name):
            raise CommandFailed(
                f"the claim is ReadWriteOnce and attached to another node: wait until its pods have ended ({multi})"
            )
        time.sleep(POLL_SECONDS)


def _problem(status: Json) -> tuple[str, str]:
    """Return reason and message of what a pod waits for, or failed from; two empty texts for nothing."""
    for container in status.get("containerStatuses", []):
        if waiting := container.get("state", {}).get("waiting"):
            return str(waiting.get("reason", "")), " ".join(str(waiting.get("message", "")).split())
    unscheduled = (c for c in status.get("conditions", []) if c["type"] == "PodScheduled" and c["status"] == "False")
    found = next(unscheduled, status)
    return str(found.get("reason") or ""), str(found.get("message") or "")


def _warnings(cluster: Cluster, pod: str) -> list[Json]:
    try:
        return cluster.core("events", fieldSelector=f"involvedObject.name={pod},type=Warning")
    except CommandFailed:
        return []  # events are for the sentence alone, and may not be the user's to read


def _last_warning(cluster: Cluster, pod: str) -> str:
    found = _warnings(cluster, pod)
    return f"{found[-1].get('reason')} {found[-1].get('message')}" if found else ""


def _attached_elsewhere(cluster: Cluster, pod: str) -> str | None:
    """Return what the attach controller says of a volume that is attached to another node."""
    messages = (str(event.get("message", "")) for event in _warnings(cluster, pod))
    return next((message for message in messages if "Multi-Attach" in message), None)


def _trainer(cluster: Cluster, job: Json) -> Json:
    """Return the spec of the newest trainer's pods; empty where there is no trainer any more, or not yet."""
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    path = f"/apis/batch/v1/namespaces/{cluster.namespace}/jobs"
    found = cluster.get(path, {"labelSelector": f"{LABEL_JOB}={name}"})["items"]
    mine = [each for each in found if any(o["uid"] == uid for o in each["metadata"].get("ownerReferences", []))]
    if mine:
        newest = max(mine, key=lambda each: int(each["metadata"]["labels"].get(LABEL_ATTEMPT, 0)))
        return dict(newest["spec"]["template"]["spec"])
    pods = pods_of_role(cluster, name, Role.TRAINER, uid=uid)
    return dict(pods[-1]["spec"]) if pods else {}


def _image(trainer: Json, job: str) -> str:
    if not trainer:
        raise CommandFailed(
            f"job {job} has no trainer to take the image from: name the workers' image of its cluster with --image"
        )
    return str(trainer["containers"][0]["image"])


def _node(cluster: Cluster, claim: str) -> str | None:
    from distill_cli.cluster import ApiError

    path = f"/api/v1/namespaces/{cluster.namespace}/persistentvolumeclaims/{claim}"
    try:
        found = cluster.get(path)
    except ApiError as error:
        if error.status != 404:
            raise
        raise CommandFailed(f"claim {claim}, which holds the run folder, does not exist any more") from None
    return node_for(found, cluster.core("pods"))


def _remove_ended(cluster: Cluster, job: str) -> None:
    """Delete reader pods that came to their deadline, as their commands were killed."""
    for pod in cluster.core("pods", labelSelector=selector(job)):
        if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            with suppress(CommandFailed):
                cluster.request("DELETE", f"/api/v1/namespaces/{cluster.namespace}/pods/{pod['metadata']['name']}")
