"""Options that several commands have, and how a command writes what it found."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

NAMES_SECONDS = 3.0
"""A shell waits for the names of jobs no longer than this."""
Command = TypeVar("Command", bound=Callable[..., Any])

SET_HELP = "Another value than the file's, such as spec.schedule.steps=10 or spec.evaluation.math500.maxPrompts=8."
FOLDER = click.Path(path_type=Path, file_okay=False)


def job_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Jobs of the namespace; none where the cluster cannot be asked, as a shell has no place for an error."""
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


def output(*formats: str) -> Callable[[Command], Command]:
    """--output; the first of the formats is the default."""
    help_text = "What is written: " + ", or ".join(
        {"table": "text", "lines": "text", "json": "JSON for programs"}[name] for name in formats
    )
    return click.option(
        "-o", "--output", type=click.Choice(formats), default=formats[0], show_default=True, help=f"{help_text}."
    )


def reaches(command: Callable[..., Any]) -> Callable[..., Any]:
    """-n, --context and --kubeconfig: the command gets them as `connect`, which connects when it is called."""

    @click.option("-n", "--namespace", help="Namespace; by default that of the kubeconfig's context.")
    @click.option("--context", help="Context of the kubeconfig; by default the current one.")
    @click.option("--kubeconfig", help="File; by default $KUBECONFIG, or ~/.kube/config, or the pod's own account.")
    @wraps(command)
    def wrapped(namespace: str | None, context: str | None, kubeconfig: str | None, **options: Any) -> Any:
        def connected() -> Any:
            from distill_cli.cluster import connect

            return connect(namespace, context, kubeconfig)

        return command(connect=connected, **options)

    return wrapped


def cluster(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `reaches`; the command gets a connected Cluster as `cluster`."""

    @reaches
    @wraps(command)
    def wrapped(connect: Callable[[], Any], **options: Any) -> Any:
        return command(cluster=connect(), **options)

    return wrapped


class Volume(click.ParamType[tuple[str, str]]):
    """/MOUNT=FOLDER."""

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
    help="Where a mounted volume of the job is on this machine; may be repeated.",
)


def write_json(found: Any) -> None:
    """Indented, for programs and for people who pipe it into less."""
    json.dump(found, sys.stdout, indent=1, ensure_ascii=False)
    print()
