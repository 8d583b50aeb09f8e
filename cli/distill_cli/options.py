"""Options that several commands share, and JSON as every command writes it."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from distill_cli.failure import CommandFailed

NAMES_SECONDS = 3.0
"""How long a shell waits for the names of jobs."""
Command = TypeVar("Command", bound=Callable[..., Any])

SET_HELP = "Replace a value of the file, such as spec.schedule.steps=10 or spec.evaluation.math500.maxPrompts=8."
FOLDER = click.Path(path_type=Path, file_okay=False)


def job_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the namespace's jobs, for a shell to complete.

    There are none where the cluster does not answer: a shell has no place for an error.
    """
    try:
        from distill_cli.cluster import connect

        options: dict[str, Any] = ctx.params
        found = connect(
            options.get("namespace"), options.get("context"), options.get("kubeconfig"), seconds=NAMES_SECONDS
        )
        return [name for job in found.jobs() if (name := job["metadata"]["name"]).startswith(incomplete)]
    except Exception:
        return []


one_file = click.option(
    "-f", "--file", type=click.Path(path_type=Path), required=True, help="The manifest of the job, YAML or JSON."
)
settings = click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help=SET_HELP)
job_name = click.argument("job", shell_complete=job_names)
reader_image = click.option(
    "--image",
    help="Image of the pod that reads the run folder of a job on a cluster; by default that of its trainer.",
)


def is_folder(job: str) -> bool:
    """Return whether an argument names a run folder, and not a job: where it has a slash in it."""
    return "/" in job or job == "."


def cluster_of(job: str, connect: Callable[[], Any]) -> Any:
    """Return the connected Cluster of a job. Raises CommandFailed, which tells of a folder where one has that name."""
    try:
        return connect()
    except CommandFailed as error:
        if not Path(job).is_dir():
            raise
        raise CommandFailed(f"{job} is taken for a job's name; for the folder write ./{job} ({error})") from None


def output(*formats: str) -> Callable[[Command], Command]:
    """Return the decorator of the option --output; the first of the formats is the default."""
    help_text = "Format of the output: " + ", or ".join(
        {"table": "text", "lines": "text", "json": "JSON for programs"}[name] for name in formats
    )
    return click.option(
        "-o", "--output", type=click.Choice(formats), default=formats[0], show_default=True, help=f"{help_text}."
    )


def with_connect(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command -n, --context and --kubeconfig, and pass it `connect`, which connects when it is called."""

    @click.option("-n", "--namespace", help="Namespace of the job; by default that of the kubeconfig's context.")
    @click.option("--context", help="Context of the kubeconfig; by default the current one.")
    @click.option(
        "--kubeconfig",
        help="Path of the kubeconfig; by default $KUBECONFIG, ~/.kube/config, or the service account of the pod.",
    )
    @wraps(command)
    def wrapped(namespace: str | None, context: str | None, kubeconfig: str | None, **options: Any) -> Any:
        def connected() -> Any:
            from distill_cli.cluster import connect

            return connect(namespace, context, kubeconfig)

        return command(connect=connected, **options)

    return wrapped


def with_cluster(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `with_connect`, and pass it a connected Cluster as `cluster`."""

    @with_connect
    @wraps(command)
    def wrapped(connect: Callable[[], Any], **options: Any) -> Any:
        return command(cluster=connect(), **options)

    return wrapped


class Volume(click.ParamType[tuple[str, str]]):
    """The type of an option /MOUNT=FOLDER: a mount path of the job, and an absolute folder of this machine."""

    name = "volume"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        mount, _, folder = str(value).partition("=")
        if not mount.startswith("/") or not folder:
            self.fail(f"{value}: must be /MOUNT=FOLDER, such as /models=./models", param, ctx)
        return mount, str(Path(folder).expanduser().resolve())


volumes = click.option(
    "--volume",
    "volumes",
    type=Volume(),
    multiple=True,
    metavar="/MOUNT=FOLDER",
    help="Folder of this machine that stands for a mounted volume of the job; may be repeated.",
)


def write_json(found: Any) -> None:
    """Print a value as JSON, indented: for programs, and for people who pipe it into less."""
    json.dump(found, sys.stdout, indent=1, ensure_ascii=False)
    print()
