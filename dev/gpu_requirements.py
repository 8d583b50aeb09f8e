"""Prints what the workers need, from pyproject.toml, without the overrides of its [tool.uv], for lock.sh."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["workers"], sep="\n")
