"""`distill doctor`: check a cluster, and say what keeps jobs from running there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from distill_cli.diagnosis.checks import findings
from distill_cli.diagnosis.findings import Finding, Level
from distill_cli.failure import FAILED
from distill_cli.options import output, with_connect, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distill_cli.cluster import Cluster

STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


@click.command()
@output("lines", "json")
@with_connect
def doctor(output: str, connect: Callable[[], Cluster]) -> int:
    """Check a cluster: API, CRD, operator, KubeRay, accelerators, storage, monitoring, namespace, permissions.

    Each finding is ok, warn or fail, with what to do about it. The exit code is 1 if one is fail. Whether images can be
    pulled and claims be mounted shows only when pods start: `distill watch` reports it.
    """
    from distill_cli.cluster import ApiError
    from distill_cli.diagnosis.collection import observe

    cluster = connect()
    try:
        found = findings(observe(cluster))
    except ApiError as error:
        if error.status:
            raise
        found = [Finding("api", Level.FAIL, str(error), "check --context and --kubeconfig, and the network")]
    if output == "json":
        write_json([dataclasses.asdict(finding) for finding in found])
    else:
        write_findings(found)
    return FAILED if any(finding.level is Level.FAIL for finding in found) else 0


def write_findings(found: Sequence[Finding]) -> None:
    """Print a line for each finding, coloured by its level on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for finding in found:
        line = Text.assemble(
            (f"{finding.level.value:<5}", STYLES[finding.level]), f"{finding.check:<13} {finding.message}"
        )
        if finding.remedy:
            line.append(f"; {finding.remedy}", style="" if finding.level is Level.OK else "italic")
        console.print(line)
