"""What a machine without a cache runs: the tools are built from nothing, and a download that fails is tried again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "dev/tools.sh"

# Stands for the compiler: the first download of each folder fails, as a proxy that is busy does.
GO = """#!/bin/bash
case $1 in
  env) echo go1.26.0 ;;
  list) echo one; echo two ;;
  build)
    while [ "$1" != -o ]; do shift; done
    if mkdir "$TRIED/$(echo "$2" | tr / _)" 2>/dev/null; then echo "503" >&2; exit 1; fi
    case $2 in
      */) for name in $TOOL_NAMES; do echo built > "$2$name"; chmod +x "$2$name"; done ;;
      *) echo built > "$2"; chmod +x "$2" ;;
    esac ;;
esac
"""
NAMES = "kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl helm kube-score"


def build(cache: Path) -> subprocess.CompletedProcess[str]:
    """A run of the script over a compiler, and a `sleep`, that stand in the cache's own folder of programs."""
    tried = cache / "tried"
    tried.mkdir(parents=True, exist_ok=True)
    for name, text in {"go": GO, "sleep": "#!/bin/bash\n"}.items():
        program = cache / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    environment = {**os.environ, "DISTILL_CACHE": str(cache), "TRIED": str(tried), "TOOL_NAMES": NAMES}
    return subprocess.run([str(TOOLS)], env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_tools_are_built_from_an_empty_cache_and_once(tmp_path: Path) -> None:
    first = build(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "command not found" not in first.stdout + first.stderr
    for name in [*NAMES.split(), "coredns", "kuberay-operator"]:
        assert (tmp_path / "bin" / name).read_text() == "built\n", name
    assert build(tmp_path).stdout == "", "nothing has changed"
