"""`distill validate` and `distill submit`: manifests, checked offline and submitted to a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.job import InvalidManifest, load_job, load_objects, parse_job
from distill_api.learning import obstacles
from distill_api.manifest import read_manifest
from distill_api.pods import former_template
from distill_api.teacher.kind import parse_teacher
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
    """Check manifests offline, by the rules of the API server, and for what no job could learn from.

    A file may have several documents, as for kubectl; DistillationJobs and Teachers are checked, other kinds are named.
    """
    found = [one for path in files for one in checked_file(path)]
    if output == "json":
        write_json([one.as_json() for one in found])
    else:
        for one in found:
            if one.problems:
                for problem in one.problems:
                    click.echo(f"{one.where}: {problem}", err=True)
            else:
                print(f"{one.where}: {one.title}")
            for note in one.notes:
                click.echo(f"{one.where}: {note}", err=True)
    return 1 if any(one.problems for one in found) else 0


@dataclass(frozen=True)
class Checked:
    """One object of a file, and what is wrong with it."""

    path: Path
    number: int | None
    """Of the object in a file with several."""
    title: str
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    """What is valid and will not always be."""

    @property
    def where(self) -> str:
        return str(self.path) if self.number is None else f"{self.path}: object {self.number}"

    def as_json(self) -> dict[str, Any]:
        number = {} if self.number is None else {"object": self.number}
        notes = {"notes": self.notes} if self.notes else {}
        return {"file": str(self.path), **number, "valid": not self.problems, "problems": self.problems, **notes}


def checked_file(path: Path) -> list[Checked]:
    """Check each object of a file."""
    try:
        objects = load_objects(path)
    except InvalidManifest as error:
        return [Checked(path, None, "", error.problems)]
    if len(objects) == 1:
        [only] = objects
        found = [checked_teacher(path, None, only) if kind_of(only) == "Teacher" else checked_job(path, None)]
    else:
        found = [checked_object(path, number, manifest) for number, manifest in enumerate(objects, 1)]
    return [replace(one, notes=former_shapes(manifest)) for one, manifest in zip(found, objects, strict=True)]


def former_shapes(manifest: Any) -> list[str]:
    """Return a sentence for each template that is written as in release 0.2.0."""
    return [
        f"{path} is written as in release 0.2.0: `distill migrate` rewrites it as pods"
        for path, _ in former_template.templates(manifest)
    ]


def checked_object(path: Path, number: int, manifest: Any) -> Checked:
    """Check one of several objects; those of other groups are for kubectl alone."""
    fields = manifest if isinstance(manifest, dict) else {}
    kind, ours = kind_of(manifest), str(fields.get("apiVersion", "")).startswith("distillation-operator.io/")
    if kind == "Teacher":
        return checked_teacher(path, number, manifest)
    return checked_job(path, number) if ours or not kind else Checked(path, number, f"{kind} is not checked", [])


def checked_teacher(path: Path, number: int | None, manifest: Any) -> Checked:
    """Check a Teacher."""
    try:
        return Checked(path, number, f"Teacher {parse_teacher(manifest).metadata.name} is valid", [])
    except InvalidManifest as error:
        return Checked(path, number, "", error.problems)


def checked_job(path: Path, number: int | None) -> Checked:
    """Check the job of a file, or the one of a number."""
    try:
        job = load_job(path) if number is None else load_job(path, number)
    except InvalidManifest as error:
        return Checked(path, number, "", error.problems)
    return Checked(path, number, f"DistillationJob {job.metadata.name} is valid", obstacles(job.spec))


def kind_of(manifest: Any) -> str:
    """Return an object's kind; empty for what is no object."""
    return str(manifest.get("kind", "")) if isinstance(manifest, dict) else ""


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
