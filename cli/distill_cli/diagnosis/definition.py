"""The check of `distill doctor` that compares the CRD of a cluster with the one of this program."""

from typing import Any

from distill_api.base import GROUP, VERSION
from distill_api.generate.crd import crd
from distill_cli.diagnosis.findings import INSTALL_CHART, Finding, Level
from distill_cli.diagnosis.observed import CRD_NAME, Observed


def definition(observed: Observed) -> Finding:
    if not observed.crd_readable:
        served = VERSION in observed.groups.get(GROUP, ())
        if served:
            return Finding("crd", Level.OK, f"{CRD_NAME} is served; its schema may not be read by you")
        return Finding("crd", Level.FAIL, f"{CRD_NAME} is not served", INSTALL_CHART)
    if observed.crd is None:
        return Finding("crd", Level.FAIL, f"{CRD_NAME} is not installed", INSTALL_CHART)
    versions = {version["name"]: version for version in observed.crd["spec"]["versions"]}
    if VERSION not in versions:
        there = ", ".join(versions)
        return Finding(
            "crd",
            Level.FAIL,
            f"{CRD_NAME} has {there}, this program {VERSION}",
            "use a `distill` as old as the CRD, or upgrade the chart",
        )
    wanted = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    differing = differences(wanted, versions[VERSION]["schema"]["openAPIV3Schema"])
    if differing:
        some = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        return Finding(
            "crd",
            Level.WARN,
            f"{CRD_NAME} is of another version than this program: they differ in {some}",
            "upgrade the chart, or use the `distill` of its version; `distill validate` may say other than the server",
        )
    return Finding("crd", Level.OK, f"{CRD_NAME} {VERSION} is the one of this program")


def differences(wanted: Any, there: Any, path: str = "") -> list[str]:
    """Return the paths of the fields in which two schemas differ; descriptions are not compared."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        found: list[str] = []
        for key in {**wanted, **there}:
            if key == "description":
                continue
            inner = path if key in ("properties", "items", "additionalProperties") else f"{path}.{key}".lstrip(".")
            found += differences(wanted.get(key), there.get(key), inner)
        return list(dict.fromkeys(found))
    return [] if wanted == there else [path or "everything"]
