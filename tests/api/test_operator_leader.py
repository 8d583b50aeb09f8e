"""Two operators, one lease: one works, the other takes over, and nothing is done twice."""

import time
from collections import Counter

import pytest
from operator_world import Kubelet, Operator, World

pytest_plugins = ["operator_fixtures"]
pytestmark = pytest.mark.usefixtures("kuberay")

LEASES = "/apis/coordination.k8s.io/v1/namespaces/{ns}/leases/operator"


def start(world: World) -> Operator:
    """One replica of the operator's Deployment."""
    election = {"DISTILL_LEADER_ELECTION": "true", "DISTILL_LEASE_NAME": "operator"}
    found = world.operator(**election, DISTILL_LEASE_NAMESPACE=world.namespace, DISTILL_RESYNC_SECONDS="1")
    world.until("it answers", lambda: healthy(found))
    return found


def healthy(operator: Operator) -> bool:
    try:
        return "last success" in operator.get("/healthz")
    except OSError:
        return False


def leads(operator: Operator) -> bool:
    return "leading: holds the lease" in operator.log()


def trainers(world: World) -> list[str]:
    return sorted(name for kind, name in world.children() if kind == "Job")


def test_a_killed_leader_is_replaced_when_its_lease_ends_and_one_that_goes_before_that(
    world: World, kubelet: Kubelet
) -> None:
    world.claim()
    first = start(world)
    world.until("the first leads", lambda: leads(first))
    second = start(world)
    world.submit()
    world.until_condition("Succeeded", "Running")
    assert not leads(second) and "apply" not in second.log(), "one that stands by does nothing"
    assert "standing by" in second.log()
    before = world.until_quiet()["status"]

    first.kill()
    # Changed by hand while nobody leads.
    world.api.call("DELETE", world.path("/api/v1/namespaces/{ns}/services/job-teacher"))
    world.until("the second leads", lambda: leads(second))
    lease_seconds = world.api.call("GET", world.path(LEASES))["spec"]["leaseDurationSeconds"]
    assert lease_seconds <= 15
    world.until("what was changed is put right", lambda: ("Service", "job-teacher") in world.children())
    assert world.job()["status"] == before, "the job goes on untouched"

    third = start(world)
    assert world.api.call("GET", world.path(LEASES))["spec"]["leaseTransitions"] == 1
    asked = time.monotonic()
    code, _ = second.terminate()
    world.until("the third leads", lambda: leads(third))
    took = time.monotonic() - asked
    assert code == 0 and took < lease_seconds, f"handed over after {took:.1f} s: not given back, but run out"
    assert healthy(third)

    world.api.call("DELETE", world.path("/api/v1/namespaces/{ns}/services/job-teacher"))
    world.until("the third works", lambda: ("Service", "job-teacher") in world.children())
    assert trainers(world) == ["job-trainer-1"]
    assert {name for name, _ in kubelet.seen_trainer_jobs} == {"job-trainer-1"}
    assert len(kubelet.seen_trainer_jobs) == 1
    assert world.job()["status"] == before
    found = world.api.items(world.path("/apis/events.k8s.io/v1/namespaces/{ns}/events"))
    assert Counter(e["reason"] for e in found) == {"Running": 1}


def test_an_operator_that_loses_its_lease_ends_with_an_error(world: World, kubelet: Kubelet) -> None:
    operator = start(world)
    world.until("it leads", lambda: leads(operator))
    world.api.merge(world.path(LEASES), {"spec": {"holderIdentity": "somebody-else"}})
    assert operator.process.wait(240) == 1
    assert "somebody-else took the lease" in operator.log()
    assert world.api.call("GET", world.path(LEASES))["spec"]["holderIdentity"] == "somebody-else"
