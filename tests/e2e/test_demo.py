"""`make demo CONTEXT=…`: the demo on a cluster that somebody else made. The embedded one plays that part here."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import CACHE, DEV, REPO, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800, func_only=True)]

NAMESPACE = "somebodys"


def test_the_demo_runs_on_a_cluster_that_is_named_to_it(cluster: None, tmp_path: Path) -> None:
    found = re.search(r'^version = "(.*)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    for name in ("operator", "workers"):  # as if they had been pushed to a registry of that cluster
        image = f"local.test/distillation-{name}"
        tag = f'. "{DEV}/cluster/lib.sh" && ctrk images tag --force {image}:dev {image}:{found.group(1)}'
        run("bash", "-c", tag)
    # The demo's own example, two steps of it.
    manifest = yaml.safe_load((REPO / "examples" / "smollm2-cpu.yaml").read_text())
    manifest["spec"]["schedule"] = {"steps": 2}
    manifest["spec"]["evaluation"][0]["maxPrompts"] = 4
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(manifest))
    output = CACHE / "e2e-somebodys"
    shutil.rmtree(output, ignore_errors=True)
    run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    run("kubectl", "create", "namespace", NAMESPACE)
    run(DEV / "cluster" / "volume.sh", NAMESPACE, "models", CACHE / "models")
    run(DEV / "cluster" / "volume.sh", NAMESPACE, "smollm2-output", output)
    named = {
        "CONTEXT": run("kubectl", "config", "current-context").strip(),
        "REGISTRY": "local.test",
        "NAMESPACE": NAMESPACE,
        "JOB": str(job),
    }
    try:
        done = subprocess.run(
            [REPO / "operator/.venv/bin/python", DEV / "demo.py"],
            env={**os.environ, **named},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"heldout +reverse KL [\d.]+ -> [\d.]+ nats per token", done.stdout)
        assert f"claim smollm2-output of namespace {NAMESPACE}" in done.stdout
        assert json.loads((output / "smollm2" / "state.json").read_text())["phase"] == "Done"
    finally:
        run("kubectl", "delete", "namespace", NAMESPACE, "--wait")
        run(DEV / "install.sh")  # the operator of the tests again
        shutil.rmtree(output, ignore_errors=True)
