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
from operator_fixtures import grant
from operator_world import World

from distill_operator.rbac import NAMESPACE_RULES, NAMESPACED_RULES

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
    found.clear()


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


@pytest.mark.usefixtures("kuberay")
def test_a_namespace_is_taken_up_and_let_go_with_its_label_and_one_that_is_deleted_touches_no_other(
    crds_installed: Any, world: World, neighbour: World
) -> None:
    """By watches, as nothing is listed for ten minutes but a namespace that is taken up."""
    name, account = f"namespaces-of-{world.namespace}", f"--serviceaccount=default:only-{world.namespace}"
    role = {"kind": "ClusterRole", "metadata": {"name": name}, "rules": [*NAMESPACE_RULES]}
    grant(crds_installed, role)
    crds_installed.kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", account)
    set_allowed(crds_installed, world, neighbour, allowed=True)
    labelled = f"team={world.namespace}"
    operator = world.operator(DISTILL_WATCH_NAMESPACE_SELECTOR=labelled, DISTILL_RESYNC_SECONDS="600")
    notice(world, "of-the-list")
    neighbour.submit("before")

    def label(what: str) -> None:
        crds_installed.kubectl("label", "namespace", neighbour.namespace, what)

    label(labelled)
    neighbour.until("a job from before is noticed", lambda: neighbour.job("before").get("status", {}).get("conditions"))
    notice(neighbour, "with-the-label")
    label("team-")
    world.until("the namespace is let go", lambda: "namespaces let go" in operator.log())
    neighbour.submit("without-the-label")
    notice(world, "meanwhile")
    time.sleep(2)
    assert "status" not in neighbour.job("without-the-label")
    assert neighbour.job("with-the-label")["status"]["conditions"], "it is left as it is"
    label(labelled)
    neighbour.until("it is noticed", lambda: neighbour.job("without-the-label").get("status", {}).get("conditions"))
    crds_installed.kubectl("delete", "namespace", neighbour.namespace, "--wait=false")
    set_allowed(crds_installed, world, neighbour, allowed=False)
    notice(world, "after-the-end")
    assert "distill_operator_watch_restarts_total 0.0" in operator.get("/metrics")
    assert operator.process.poll() is None
