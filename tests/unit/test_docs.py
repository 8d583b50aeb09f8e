"""The documentation: its site builds with strict links, its YAML is valid, its Python runs, its files exist."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from browser import opened
from distill_api.job import parse_job
from distill_api.spec.job_spec import Spec
from distill_api.teacher.kind import parse_teacher

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FIELDS = {field.alias for field in Spec.model_fields.values()}


def _blocks(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, (indent, found, text) in enumerate(FENCE.findall(page.read_text())):
            if found == language:
                code = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
                yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")


def test_the_example_trains_with_the_flags_of_slimes_run() -> None:
    """Those of the script that a table maps to a field of the trainer or of the rollout (docs/guides/from-slime.md)."""
    spec = parse_job(yaml.safe_load((ROOT / "examples" / "qwen3-8b-opd.yaml").read_text())).spec
    optimizer, rollout = spec.trainer.optimizer, spec.rollout
    assert (spec.trainer.parallelism.tensor, spec.trainer.parallelism.sequence) == (2, True)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.beta2) == (1e-6, 0.1, 0.98)
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.max_response_tokens) == (16, 4, 16384)
    assert (rollout.replicas, rollout.tensor_parallel_size, rollout.max_policy_lag) == (4, 1, 1)
    assert (spec.schedule.steps, spec.schedule.checkpoint_every_steps) == (300, 20)


def merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`; lists are replaced whole."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: merged(base.get(key), value) for key, value in over.items()}
    return over


@pytest.mark.parametrize("text", list(_blocks("yaml")))
def test_every_yaml_of_the_documentation_is_valid(text: str) -> None:
    """Whole manifests as they are; pieces of a spec on the least job that there is."""
    for found in yaml.safe_load_all(text):
        if found.get("kind") == "DistillationJob":
            parse_job(found)
        elif found.get("kind") == "Teacher":
            parse_teacher(found)
        elif not {"apiVersion", "kind"} <= set(found) and set(found) <= FIELDS | {"spec"}:
            minimal = yaml.safe_load((ROOT / "tests/manifests/good/minimal.yaml").read_text())
            spec = found.get("spec", found)
            # A piece that says where data or a teacher comes from says all of it.
            said = {*spec, *(["teacher"] if "teachers" in spec else [])}
            kept = {k: v for k, v in minimal["spec"].items() if k not in said or k not in ("data", "teacher")}
            parse_job(minimal | {"spec": merged(kept, spec)})
        else:
            # Of another tool: it has to be YAML, and to say what it is.
            assert {"apiVersion", "kind"} <= set(found) or "scrape_configs" in found, f"what is this? {set(found)}"


def test_the_reward_of_the_guide_gives_what_the_guide_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/guides/rewards.md").read_text()
    [code] = [text for _, language, text in FENCE.findall(page) if language == "python"]
    module = tmp_path / "short.py"
    module.write_text(code)
    spec = importlib.util.spec_from_file_location("short", module)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    scores = [loaded.short_and_right(text, "12", {}) for text in ("12", "it is 12", "it is 13", "")]
    assert scores == [1.0, pytest.approx(1 / 3), 0.0, 0.0]


def test_the_site_builds_with_strict_links(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    seen = opened(tmp_path / "site" / "index.html")
    assert seen.console == [] and "Your first job" in seen.dom


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_the_documentation_names_exists(page: Path) -> None:
    text = page.read_text()
    linked = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    missing = {target for target in linked if target and not (page.parent / target).exists()}
    named = set(re.findall(r"`((?:examples|dev|crds|operator|workers|charts|tests|bench)/[\w./-]+\.\w+)`", text))
    missing |= {path for path in named if not (ROOT / path).exists()}
    assert not missing


EXAMPLES = [path for path in sorted((ROOT / "examples").rglob("*.yaml")) if "distill run -f" in path.read_text()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_command_of_an_example_has_each_folder_that_the_example_names(example: Path) -> None:
    text = example.read_text()
    manifest = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    needed = {"/output", *re.findall(r"(?:model|path|tools|python)[:,] (/\w+)/", manifest)}
    for program, file, options in re.findall(r"([\w./]+) run -f (\S+)([^`\n]*)", text):
        assert (program, file) == ("workers/.venv/bin/distill", str(example.relative_to(ROOT)))
        assert needed <= set(re.findall(r"--volume (/\w+)=", options))


SOURCES = [
    "crds",
    "examples",
    "operator/distill_operator",
    "cli",
    "workers/distill_workers",
    "charts",
    "docs",
    "dev",
    "bench",
    "tests",
]
OWN_MODULES = [
    page
    for page in (*PAGES, *sorted((ROOT / "dev").glob("*.md")))
    # These name modules of slime, and of the reader.
    if page.name not in ("from-slime.md", "rewards.md")
]


def _sources() -> list[str]:
    """Every file of this repository's own, relative to it."""
    found = (path for top in SOURCES for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts)
    return [str(path.relative_to(ROOT)) for path in found if path.is_file()]


def test_every_path_of_where_things_are_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "where.md").read_text().splitlines() if line.startswith("| ")][1:]
    files = _sources()
    for row in rows:
        paths = [text for text in re.findall(r"`([^`]+)`", row.split(" | ")[1]) if "/" in text]
        assert paths, f"names no path: {row}"
        for path in paths:
            found = path in files or (path.endswith("/") and any(file.startswith(path) for file in files))
            assert found, f"{path} does not exist"


def test_where_things_are_leads_into_every_package() -> None:
    text = (ROOT / "docs" / "where.md").read_text()
    package = re.compile(r"((?:operator|workers)/\w+/\w+/)__init__\.py")
    packages = {found[1] for found in map(package.fullmatch, _sources()) if found}
    assert packages and not {name for name in packages if name not in text} - {"workers/distill_workers/cpu/"}


@pytest.mark.parametrize("page", OWN_MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_that_the_documentation_names_exists(page: Path) -> None:
    """By the end of its path, as in `run/loop.py`."""
    files = [f"/{file}" for file in _sources()]
    named = set(re.findall(r"(?<![\w./{}-])([\w./-]*\w\.(?:py|sh))\b", page.read_text()))
    assert not {name for name in named if not any(file.endswith(f"/{name}") for file in files)}


def test_every_module_in_the_drawing_of_the_data_flow_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawing = re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    named = set(re.findall(r"\b([a-z_]+/[a-z_]*)", drawing))
    workers = ROOT / "workers" / "distill_workers"
    assert "rollout/pipeline" in named
    assert not {name for name in named if not (workers / f"{name}.py").is_file() and not (workers / name).is_dir()}


def test_the_readme_has_what_a_newcomer_looks_for() -> None:
    text = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures == ["docs/pictures/architecture.svg", "docs/pictures/dashboard-job.png"]
    for part in ("## Two commands", "## A GPU cluster in five steps", "## Beside others"):
        assert part in text
    assert len([line for line in text.split("![")[0].splitlines() if line.strip()]) <= 20, "what and why"
    found = text.split("## Beside others")[1].split("\n## ")[0].splitlines()
    rows = [line for line in found if line.startswith("|")]
    compared = (ROOT / "docs" / "comparison.md").read_text().splitlines()
    assert len(rows) > 20 and [row for row in rows if row not in compared] == [], "each is a row of docs/comparison.md"
    assert rows[:2] == [line for line in compared if line.startswith("|")][:2], "of the same columns"
    assert [row for row in rows[2:] if row.split("|")[2].strip() == "–"], "also rows that we lose"


def test_the_picture_of_the_architecture_needs_no_other_file_and_has_a_dark_side() -> None:
    picture = (ROOT / "docs" / "pictures" / "architecture.svg").read_text()
    ElementTree.fromstring(picture)
    assert "prefers-color-scheme: dark" in picture
    assert not re.search(r"url\((?!#)|href|@import|@font-face|<script", picture)
