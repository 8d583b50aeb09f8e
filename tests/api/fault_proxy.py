"""The operator behind a proxy that plays the API server's faults."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_world import World

from api_server_proxy import CUT, REFUSED, Proxy

__all__ = ["CUT", "OUTAGE_SECONDS", "REFUSED", "WATCHED", "Proxy", "notice", "proxy"]

WATCHED = 6
"""Kinds that the operator watches."""
OUTAGE_SECONDS = 25.0
"""Longer than kopf's own patience, which the watches died of after 18 s."""


@pytest.fixture
def proxy(world: World, operator_kubeconfig: Path, tmp_path: Path) -> Iterator[Proxy]:
    found = Proxy(operator_kubeconfig)
    config = json.loads(operator_kubeconfig.read_text())
    config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{found.port}"}
    world.kubeconfig = tmp_path / "through-the-proxy"
    world.kubeconfig.write_text(json.dumps(config))
    yield found
    found.stop()


def notice(world: World, name: str) -> None:
    """A new job gets a status although nothing is listed for ten minutes: a watch has told of it."""
    world.submit(name)
    world.until(f"{name} is noticed", lambda: world.job(name).get("status", {}).get("conditions"))
