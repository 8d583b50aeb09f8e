"""`distill logs`: the output of the pods of a role."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from distill_api.names import Role
from distill_cli.failure import CommandFailed
from distill_cli.job_state import job_state, now_utc
from distill_cli.options import job_name, with_cluster
from distill_cli.pods import main_container, newest_attempt, pods_of_role

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

Json = dict[str, Any]


@click.command()
@job_name
@click.argument("role", type=click.Choice([role.value for role in Role]))
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines as they are written, until Ctrl-C.")
@click.option("-p", "--previous", is_flag=True, help="The logs of the containers before their last restart.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines of each pod.")
@with_cluster
def logs(job: str, role: str, follow: bool, previous: bool, tail: int | None, cluster: Cluster) -> int:
    """Show the logs of the pods of a role: teacher, rollout or trainer.

    Of several pods each line begins with the name of its pod. The log of the trainer's rank 0 over all attempts is
    in the run folder as well, logs/rank-0.log, and outlives the pods.
    """
    pods = newest_attempt(pods_of_role(cluster, job, role))
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
    return write_logs(cluster, pods, query)


def write_logs(cluster: Cluster, pods: Sequence[Json], query: dict[str, str]) -> int:
    """Print the logs one after the other, or all at once where they are followed. Return 1 if one could not be read."""
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
        _in_threads([partial(copy, pod) for pod in pods])
    else:
        for pod in pods:
            copy(pod)
    for sentence in failed:
        click.echo(f"distill: {sentence}", err=True)
    return 1 if failed else 0


def _in_threads(calls: Sequence[Callable[[], None]]) -> None:
    """Run the calls at once, a thread each. Raises the first OSError of one: a pipe whose reader has gone."""
    errors: list[OSError] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            errors.append(error)

    # Daemons, so that Ctrl-C ends the program and not the wait for lines that may never come.
    threads = [threading.Thread(target=run, args=[call], daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not errors:
        time.sleep(0.2)
    if errors:
        raise errors[0]
