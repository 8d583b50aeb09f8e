"""Writes the README of the chart from its values.yaml: a table of every value, its default and the comment above it.

    python dev/chart_readme.py > charts/distillation-operator/README.md

A value without a comment, or one whose comment is not a sentence, ends it with an error.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "charts" / "distillation-operator"
HEAD = """# {name}

{description}. Version {version}, for Kubernetes {kubeVersion}.

    helm upgrade --install distillation-operator charts/distillation-operator \\
      --namespace distillation-system --create-namespace \\
      --set workersImage=REGISTRY/distillation-workers:{appVersion}

It needs KubeRay for the rollout engines. Values are checked against a closed schema: one that is not named below is
refused. What the installation closes, and how to open it: docs/security.md.

| value | default | what it is |
|---|---|---|
"""
KEY = re.compile(r"^( *)(\w+):(?: (.*))?$")


def values(text: str) -> Iterator[tuple[str, Any, str]]:
    """Path, default and comment of each value, in the order of the file."""
    path: list[str] = []
    comment: list[str] = []
    below = None
    for line in text.splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().lstrip("# "))
            continue
        match = KEY.match(line)
        if match is None:
            comment = []
            continue
        depth = len(match[1]) // 2
        path[depth:] = [match[2]]
        if below is not None and depth > below:
            continue  # the inside of a value that was told of as a whole
        below = depth if comment and match[3] is None else None
        if comment:
            yield ".".join(path), found(yaml.safe_load(text), path), " ".join(comment)
        elif match[3] is not None:
            raise SystemExit(f"values.yaml: {'.'.join(path)} has no comment above it")
        comment = []


def found(tree: Any, path: list[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def readme() -> str:
    rows = []
    for path, default, comment in values((CHART / "values.yaml").read_text()):
        if not comment.endswith("."):
            raise SystemExit(f"values.yaml: the comment above {path} is no sentence: {comment}")
        rows.append(f"| `{path}` | `{json.dumps(default)}` | {comment} |\n")
    return HEAD.format(**yaml.safe_load((CHART / "Chart.yaml").read_text())) + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(readme())
