"""Go modules whose files the tests read: CRDs, roles, types."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

PAUSES = (5, 20)
"""Seconds before another try: the go command tries no download again itself."""


def downloaded(module: str, folder: Path) -> dict[str, Any]:
    """Return what `go mod download -json` says of a module, `Dir` and `Sum` among it.

    Without a version it is the one that go.mod in the folder pins. Raises AssertionError with what go said last.
    """
    command = ["go", "mod", "download", "-json", module]
    for pause in (*PAUSES, None):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0:
            return dict(json.loads(done.stdout))
        if pause is not None:
            time.sleep(pause)
    raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
