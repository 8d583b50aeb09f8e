"""Pages as a reader sees them: opened in headless Chromium, of which dev/setup.sh installs Debian's."""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

WINDOW = "1000,2400"
"""Pixels: the reports of the tests from top to bottom."""


@dataclass(frozen=True)
class Opened:
    """What the browser made of a page."""

    dom: str
    """After its scripts have run."""
    console: list[str]
    """Errors and everything else that was written to the console."""
    picture: bytes
    """PNG of the window."""


def opened(page: Path) -> Opened:
    """Without Chromium the test fails: skipping would look like passing."""
    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium-headless-shell is not on the PATH; run `make setup`", pytrace=False)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        # No sandbox: it cannot be had by root. No network: a page that asks for it shows an error.
        common = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile"]
        common += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={WINDOW}"]
        found = [
            subprocess.run(
                [chromium, "--headless", *common, action, page.resolve().as_uri()],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
            for action in ("--dump-dom", f"--screenshot={picture}")
        ]
        console = [line for line in found[0].stderr.splitlines() if ":CONSOLE:" in line]
        return Opened(found[0].stdout, console, picture.read_bytes())
