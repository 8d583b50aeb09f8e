"""Whatever the API server answers for a while, the operator is right within seconds once it is well again."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import OUTAGE_SECONDS, WATCHED, Proxy, notice
from operator_world import World

from distill_operator.rbac import NAMESPACED_RULES

pytest_plugins = ["operator_fixtures", "fault_proxy"]


@pytest.mark.usefixtures("kuberay")
@pytest.mark.parametrize("code", [503, 403])
def test_watches_outlive_an_outage(code: int, world: World, proxy: Proxy) -> None:
    operator = world.operator(DISTILL_RESYNC_SECONDS="600")
    world.submit("before")
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    proxy.fault = code
    time.sleep(OUTAGE_SECONDS)
    proxy.fault = 0
    notice(world, "after")
    assert operator.process.poll() is None


@pytest.mark.usefixtures("kuberay")
def test_a_leader_outlives_an_outage_that_costs_it_the_lease(world: World, proxy: Proxy) -> None:
    election = {"DISTILL_LEADER_ELECTION": "true", "DISTILL_LEASE_NAMESPACE": world.namespace}
    operator = world.operator(DISTILL_RESYNC_SECONDS="600", **election)
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    proxy.fault = 503
    world.until("the lease is lost", lambda: "standing for election again" in operator.log())
    proxy.fault = 0
    world.until("every kind is watched again", lambda: proxy.watching >= WATCHED)
    notice(world, "after")
    assert operator.process.poll() is None


@pytest.mark.usefixtures("kuberay")
def test_an_error_within_a_watch_ends_no_watch_for_good(world: World, proxy: Proxy) -> None:
    operator = world.operator(DISTILL_RESYNC_SECONDS="600")
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    proxy.errors = WATCHED
    world.until("every watch has ended", lambda: not proxy.errors)
    world.until("every kind is watched again", lambda: proxy.watching >= WATCHED)
    notice(world, "after")
    assert operator.process.poll() is None
    restarts = re.search(r"distill_operator_watch_restarts_total (\d+)", operator.get("/metrics"))
    assert restarts and int(restarts[1]) >= 1


@pytest.fixture
def neighbour(crds_installed: Any, world: World, namespaced_kubeconfig: Path) -> Iterator[World]:
    """A second namespace in which the same operator has the same rights, until it is forbidden."""
    found = replace(world, namespace=f"{world.namespace}-b", operators=[])
    crds_installed.kubectl("create", "namespace", found.namespace)
    meta = {"name": "operator", "namespace": found.namespace}
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": meta,
        "rules": [*NAMESPACED_RULES],
    }
    crds_installed.kubectl("apply", "-f", "-", stdin=json.dumps(role))
    world.kubeconfig = namespaced_kubeconfig
    yield found


def set_allowed(server: Any, world: World, neighbour: World, *, allowed: bool) -> None:
    account = f"--serviceaccount=default:only-{world.namespace}"
    binding = ("rolebinding", "operator", "-n", neighbour.namespace)
    server.kubectl(*(("create", *binding, "--role=operator", account) if allowed else ("delete", *binding)))


@pytest.mark.usefixtures("kuberay")
def test_a_namespace_that_is_forbidden_touches_no_other_and_is_watched_again(
    crds_installed: Any, world: World, neighbour: World
) -> None:
    """What is left of a namespace that is deleted is the answer 403: its RoleBinding is gone with it."""
    names = {"DISTILL_WATCH_NAMESPACES": f"{world.namespace},{neighbour.namespace}"}
    operator = world.operator(DISTILL_RESYNC_SECONDS="2", **names)
    notice(world, "while-it-never-was")
    set_allowed(crds_installed, world, neighbour, allowed=True)
    notice(neighbour, "first")
    set_allowed(crds_installed, world, neighbour, allowed=False)
    world.until("it is noticed", lambda: "distill_operator_namespaces_failing 1.0" in operator.get("/metrics"))
    notice(world, "while-it-is-forbidden")
    set_allowed(crds_installed, world, neighbour, allowed=True)
    notice(neighbour, "second")
    assert "distill_operator_watch_restarts_total 0.0" in operator.get("/metrics")
    assert operator.process.poll() is None
