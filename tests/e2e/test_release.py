"""`make images REGISTRY=...`: the image that is pushed to a real registry is the one of the Dockerfile."""

import json
import os
import re
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import CACHE, DEV, REPO, run

from distill_workers.serving.ports import reserve_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def registry_config(folder: Path, port: int) -> str:
    return json.dumps(
        {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
            "http": {"addr": f"127.0.0.1:{port}"},
        }
    )


def test_the_operators_image_is_built_and_pushed(tmp_path: Path) -> None:
    run("env", "REGISTRY=localhost", DEV / "images.sh", "base")  # without a cluster
    store = ["buildah", "--root", str(CACHE / "images/buildah"), "--runroot", str(CACHE / "images/buildah-run")]
    listed = run(*store, "--storage-driver", "overlay", "images", "--format", "{{.Name}}:{{.Tag}}").split()
    [base] = [name for name in listed if "python-base" in name]
    port = reserve_port()
    (tmp_path / "config.yml").write_text(registry_config(tmp_path, port))
    # The registry of this test speaks plain HTTP.
    insecure = f'[[registry]]\nlocation = "127.0.0.1:{port}"\ninsecure = true\n'
    (tmp_path / "registries.conf").write_text(insecure)
    registry = subprocess.Popen(
        ["docker-registry", "serve", str(tmp_path / "config.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}/v2/"
        wait_for(url)
        done = subprocess.run(
            [str(DEV / "images.sh"), "operator"],
            env={
                **os.environ,
                "REGISTRY": f"127.0.0.1:{port}/team",
                "OPERATOR_BASE_IMAGE": base,
                "CONTAINERS_REGISTRIES_CONF": str(tmp_path / "registries.conf"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r'^version = "(.*)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
        assert found
        with urllib.request.urlopen(f"{url}team/distillation-operator/tags/list", timeout=10) as answer:
            assert json.load(answer)["tags"] == [found.group(1)]
    finally:
        registry.terminate()
        registry.wait(10)


def wait_for(url: str) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer at {url}")
