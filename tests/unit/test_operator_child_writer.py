"""What is applied to children, and when that is of no use."""

from collections.abc import Mapping
from typing import Any

from operator_fakes import FakeCluster, Json, Simulation

from distill_operator.kinds import Kind


class Webhooks(FakeCluster):
    """A cluster whose webhook sets the pull policy of each Deployment, and that counts generations."""

    async def apply(self, body: Mapping[str, Any], *, uid: str = "", dry_run: bool = False) -> Json:
        found = await super().apply(body, uid=uid, dry_run=dry_run)
        if body["kind"] != "Deployment" or dry_run:
            return found
        spec = found["spec"]["template"]["spec"]
        containers = [{**c, "imagePullPolicy": "Always"} for c in spec["containers"]]
        template = {**found["spec"]["template"], "spec": {**spec, "containers": containers}}
        changed = {**found, "metadata": {**found["metadata"], "generation": 1}}
        changed["spec"] = {**found["spec"], "template": template}
        self.objects[Kind.DEPLOYMENT, body["metadata"]["name"]] = changed
        return changed


def applies(sim: Simulation) -> int:
    return sim.cluster.writes.count("apply Deployment/job-teacher")


async def test_what_a_webhook_undoes_each_time_is_applied_once() -> None:
    sim = Simulation(cluster=Webhooks())
    await sim.run_until_quiet(seconds=60)
    for _ in range(5):
        await sim.reconcile()
    assert (applies(sim), sim.condition("Succeeded")[1]) == (1, "Running")


async def test_what_somebody_changes_after_a_webhook_is_put_right() -> None:
    sim = Simulation(cluster=Webhooks())
    await sim.run_until_quiet(seconds=60)
    found = sim.cluster.objects[Kind.DEPLOYMENT, "job-teacher"]
    changed = {**found, "metadata": {**found["metadata"], "generation": 2}, "spec": {**found["spec"], "replicas": 7}}
    sim.cluster.put(Kind.DEPLOYMENT, "job-teacher", changed)
    await sim.run_until_quiet(seconds=60)
    assert (applies(sim), sim.cluster.objects[Kind.DEPLOYMENT, "job-teacher"]["spec"]["replicas"]) == (2, 1)


async def test_a_child_that_is_made_again_under_its_name_is_another_child() -> None:
    sim = Simulation(cluster=Webhooks())
    await sim.run_until_quiet(seconds=60)
    sim.cluster.remove(Kind.DEPLOYMENT, "job-teacher")
    await sim.run_until_quiet(seconds=60)
    assert (applies(sim), sim.condition("TeacherReady")[0]) == (2, "True")
