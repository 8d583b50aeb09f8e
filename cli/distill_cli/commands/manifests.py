"""`distill validate` and `distill submit`: manifests, checked offline and submitted to a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.job import InvalidManifest, load_job, parse_job
from distill_api.manifest import read_manifest
from distill_cli.failure import CommandFailed
from distill_cli.options import one_file, output, settings, with_connect, write_json
from distill_cli.overrides import with_overrides

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster


@click.command()
@click.option(
    "-f",
    "--file",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="A manifest, YAML or JSON; may be repeated.",
)
@output("lines", "json")
def validate(files: tuple[Path, ...], output: str) -> int:
    """Check manifests offline, by the rules of the API server."""
    problems: dict[Path, list[str]] = {}
    for path in files:
        try:
            job = load_job(path)
            problems[path] = []
            if output == "lines":
                print(f"{path}: DistillationJob {job.metadata.name} is valid")
        except InvalidManifest as error:
            problems[path] = error.problems
            if output == "lines":
                for problem in error.problems:
                    click.echo(f"{path}: {problem}", err=True)
    if output == "json":
        write_json([{"file": str(path), "valid": not found, "problems": found} for path, found in problems.items()])
    return 1 if any(problems.values()) else 0


@click.command()
@one_file
@settings
@click.option("--watch", "follow", is_flag=True, help="Then watch the job to its end.")
@with_connect
def submit(file: Path, settings: tuple[str, ...], follow: bool, connect: Callable[[], Cluster]) -> int:
    """Create a job on a cluster, or change one.

    The manifest is checked here, then by a dry-run of the API server; it is written where both accept it.
    """
    load_job(file)
    manifest = with_overrides(read_manifest(file.read_text(encoding="utf-8")), list(settings))
    name, namespace = parse_job(manifest).metadata.name, manifest["metadata"].get("namespace")
    cluster = connect()
    cluster.namespace = namespace or cluster.namespace
    manifest["metadata"] = {**manifest["metadata"], "namespace": cluster.namespace}
    print(apply_job(cluster, name, manifest), flush=True)
    if follow:
        from distill_cli.commands.watch import show_to_end, snapshots_of_job

        return show_to_end(snapshots_of_job(cluster, name), "lines")
    print(f"`distill watch {name} -n {cluster.namespace}` follows it, `distill logs {name} trainer` tells more")
    return 0


def apply_job(cluster: Cluster, name: str, manifest: dict[str, Any]) -> str:
    """Apply the manifest. Return a sentence that says whether the job was created or changed."""
    from distill_cli.cluster import ApiError

    try:
        before = cluster.apply_job(manifest, dry_run=True)
        now = cluster.apply_job(manifest, dry_run=False)
    except ApiError as error:
        if error.status == 409:
            raise CommandFailed(
                f"job {name} has fields that another program set ({error}): change them there, or leave them out here"
            ) from None
        raise
    # A dry-run returns an invented uid for an object that is new.
    if before["metadata"]["uid"] != now["metadata"]["uid"]:
        return f"job {name} created in namespace {cluster.namespace}"
    return f"job {name} in namespace {cluster.namespace}: its spec is of generation {now['metadata']['generation']}"
