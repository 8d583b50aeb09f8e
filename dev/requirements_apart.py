"""Prints what an extra needs (the workers', unless one is named), from pyproject.toml, without the overrides of its
[tool.uv], for lock.sh."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
extra = sys.argv[2] if len(sys.argv) > 2 else "workers"
shared = project["dependencies"] if extra == "workers" else []
print(*shared, *project["optional-dependencies"][extra], sep="\n")
