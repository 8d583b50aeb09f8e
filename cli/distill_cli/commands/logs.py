"""`distill logs`: what the pods of a role say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from distill_api.names import LABEL_ATTEMPT, LABEL_JOB, LABEL_ROLE, Role
from distill_cli.failure import CommandFailed
from distill_cli.options import cluster, job_name
from distill_cli.snapshot import job_state, now_utc

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

Json = dict[str, Any]


@click.command()
@job_name
@click.argument("role", type=click.Choice([role.value for role in Role]))
@click.option("-f", "--follow", is_flag=True, help="Go on with what they will say, until Ctrl-C.")
@click.option("-p", "--previous", is_flag=True, help="Of the containers before their last restart.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last lines, this many of each pod.")
@cluster
def logs(job: str, role: str, follow: bool, previous: bool, tail: int | None, cluster: Cluster) -> int:
    """Show what the pods of a role say: teacher, rollout or trainer.

    Of several pods each line begins with the name of its pod. What the trainer's rank 0 said over all attempts is in
    the run folder as well, logs/rank-0.log, and outlives the pods.
    """
    pods = newest(cluster.core("pods", labelSelector=f"{LABEL_JOB}={job},{LABEL_ROLE}={role}"))
    if not pods:
        state = job_state(cluster.job(job), now_utc())
        said = f": {state.message}" if state.message else ""
        raise CommandFailed(
            f"job {job} has no {role} pod now; it is {state.state}{said}. "
            "What its trainer has said is in the run folder, logs/rank-0.log"
        )
    query = {
        "follow": "true" if follow else "",
        "previous": "true" if previous else "",
        "tailLines": "" if tail is None else str(tail),
    }
    return shown(cluster, pods, query)


def newest(pods: Sequence[Json]) -> list[Json]:
    """Of the trainer's pods those of the newest attempt; the others have no attempt."""

    def attempt(pod: Json) -> int:
        return int(pod["metadata"]["labels"].get(LABEL_ATTEMPT, 0))

    last = max((attempt(pod) for pod in pods), default=0)
    return sorted((pod for pod in pods if attempt(pod) == last), key=lambda pod: str(pod["metadata"]["name"]))


def shown(cluster: Cluster, pods: Sequence[Json], query: dict[str, str]) -> int:
    """Side by side when they are followed. 1 if a pod's log could not be had."""
    failed: list[str] = []
    lock = threading.Lock()

    def copy(pod: Json) -> None:
        name = pod["metadata"]["name"]
        prefix = f"{name}: " if len(pods) > 1 else ""
        path = f"/api/v1/namespaces/{cluster.namespace}/pods/{name}/log"
        try:
            for line in cluster.lines(path, {**query, "container": main_container(pod)}):
                with lock:
                    print(prefix + line, flush=True)
        except CommandFailed as error:
            failed.append(f"{name}: {error}")

    if query["follow"] and len(pods) > 1:
        _side_by_side([partial(copy, pod) for pod in pods])
    else:
        for pod in pods:
            copy(pod)
    for sentence in failed:
        click.echo(f"distill: {sentence}", err=True)
    return 1 if failed else 0


def main_container(pod: Json) -> str:
    """The role's own is the first; others are the user's."""
    return str(pod["spec"]["containers"][0]["name"])


def _side_by_side(calls: Sequence[Callable[[], None]]) -> None:
    """Raises what the first of them raises: a pipe whose reader has gone."""
    errors: list[OSError] = []

    def kept(call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            errors.append(error)

    # Daemons, so that Ctrl-C ends the program and not the wait for lines that may never come.
    threads = [threading.Thread(target=kept, args=[call], daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not errors:
        time.sleep(0.2)
    if errors:
        raise errors[0]
