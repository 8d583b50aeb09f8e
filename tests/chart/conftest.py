"""The chart as helm renders it. Helm and promtool must be there: a skipped test would look like a passed one."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "distillation-operator"
CACHE = Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distillation-operator")
MONITORING = ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
ALL_ON = tuple(f"metrics.{name}.enabled=true" for name in MONITORING)

JSON_VALUE = re.compile(r"=[0-9]+\.[0-9]+$")
"""--set would make a string of a decimal."""

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]
Tool = Callable[..., subprocess.CompletedProcess[str]]


def _tool(name: str, advice: str) -> Tool:
    cached = CACHE / "bin" / name
    binary = str(cached) if cached.exists() else shutil.which(name)
    if binary is None:
        pytest.fail(f"{name} is neither in {cached.parent} nor on the PATH; {advice}", pytrace=False)

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=60)

    return call


@pytest.fixture(scope="session")
def helm() -> Tool:
    return _tool("helm", "run `make tools`")


@pytest.fixture(scope="session")
def promtool() -> Tool:
    return _tool("promtool", "install the Debian package prometheus (`make setup`)")


@pytest.fixture(scope="session")
def render(helm: Tool) -> Render:
    """render("key=value", ...) is every manifest of the chart with these values set."""
    rendered: dict[tuple[str, ...], list[Manifest]] = {}

    def manifests(*values: str) -> list[Manifest]:
        if values not in rendered:
            sets = [part for value in values for part in ("--set-json" if JSON_VALUE.search(value) else "--set", value)]
            done = helm("template", "distillation-operator", CHART, "--namespace", "distillation-system", *sets)
            assert done.returncode == 0, done.stderr
            rendered[values] = [m for m in yaml.safe_load_all(done.stdout) if m]
        return rendered[values]

    return manifests


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only manifest of this kind (and name)."""
    [found] = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return found
