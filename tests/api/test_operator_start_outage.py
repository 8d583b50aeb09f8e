"""An outage of the API server while the operator starts."""

import time

import pytest
from fault_proxy import CUT, OUTAGE_SECONDS, REFUSED, WATCHED, Proxy, notice
from operator_world import World

pytest_plugins = ["operator_fixtures", "fault_proxy"]


@pytest.mark.usefixtures("kuberay")
@pytest.mark.parametrize(("fault", "everywhere"), [(503, True), (REFUSED, False), (CUT, True)])
def test_an_outage_while_the_operator_starts_is_outlived(
    fault: int, everywhere: bool, world: World, proxy: Proxy
) -> None:
    proxy.fault = fault
    scope = {"DISTILL_WATCH_NAMESPACES": ""} if everywhere else {}
    operator = world.operator(DISTILL_RESYNC_SECONDS="600", **scope)
    if fault == CUT:
        world.until("kopf has failed", lambda: "all watches begin anew" in operator.log())
    else:
        time.sleep(OUTAGE_SECONDS)
    proxy.fault = 0
    world.until("every kind is watched", lambda: proxy.watching >= WATCHED)
    notice(world, "after")
    assert operator.process.poll() is None
