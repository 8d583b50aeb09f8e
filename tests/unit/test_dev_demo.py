"""What `make demo` and the scripts under dev/ say while they work."""

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from distill_api.job import DistillationJob, parse_job

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The script, which is in no package."""
    spec = importlib.util.spec_from_file_location("dev_demo", ROOT / "dev" / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def job() -> DistillationJob:
    return parse_job(yaml.safe_load((ROOT / "examples" / "smollm2-cpu.yaml").read_text()))


def running(*, preflight: str = "True", step: int = 0, evaluated: int | None = 0) -> Json:
    """The status of a running job; `evaluated` is the step of its newest evaluation."""
    evaluations = [] if evaluated is None else [{"name": "heldout", "step": evaluated}]
    return {
        "conditions": [
            {"type": "Succeeded", "status": "Unknown", "reason": "Running"},
            {"type": "Preflight", "status": preflight, "reason": "x"},
        ],
        "progress": {"step": step, "reverseKL": "0.5", "evaluations": evaluations},
    }


def test_the_demo_names_what_runs_before_the_first_step(demo: ModuleType, job: DistillationJob) -> None:
    said = [
        demo.doing(job, status, demo.Pace())
        for status in (
            {"roles": [{"name": "teacher", "ready": 0, "desired": 1}]},
            running(preflight="Unknown", evaluated=None),
            running(evaluated=None),
            running(),
        )
    ]
    assert said[0] == "Pending teacher 0/1"
    assert [line.split(":")[0].split(",")[0] for line in said[1:]] == ["preflight", "first evaluation", "first step"]


def test_the_demo_names_what_runs_after_the_last_step(demo: ModuleType, job: DistillationJob) -> None:
    last = job.spec.schedule.steps
    assert demo.doing(job, running(step=last, evaluated=6), demo.Pace()).endswith("; last evaluation")
    assert demo.doing(job, running(step=last, evaluated=last), demo.Pace()).endswith(
        "; export of the Hugging Face model"
    )
    assert ";" not in demo.doing(job, running(step=last - 1, evaluated=6), demo.Pace())


def test_the_time_to_go_is_said_from_the_third_step_on_and_leaves_the_slow_first_one_out(demo: ModuleType) -> None:
    pace = demo.Pace()
    said = []
    for step, second in ((0, 0.0), (1, 77.0), (2, 97.0), (2, 98.0), (3, 117.0)):
        pace.see(step, second)
        said.append(pace.remaining_seconds(12))
    assert said == [None, None, None, None, pytest.approx(9 * 20.0)]


def test_every_figure_of_the_result_is_explained(demo: ModuleType, job: DistillationJob) -> None:
    both = [{"reverseKL": "0.6", "score": "0.2"}]
    assert [text.split(":")[0] for text in demo.meanings(job, both)] == ["Reverse KL", "Score"]
    assert [text.split(":")[0] for text in demo.meanings(job, [{"reverseKL": "0.6"}])] == ["Reverse KL"]


def script(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs bash with the helpers of dev/ at hand."""
    return subprocess.run(
        ["bash", "-c", f'. "{ROOT}/dev/lib.sh"\n{text}'],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_step_says_what_is_usual_before_it_begins_and_its_seconds_when_it_ends(tmp_path: Path) -> None:
    done = script('USUAL="a blink" step "say it" echo hidden', TMPDIR=str(tmp_path))
    first, last = done.stdout.splitlines()
    assert first.startswith(f"say it: usually a blink; its output: {tmp_path}/")
    assert last.startswith("say it ... ") and last.endswith(" s")
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_ends_the_script_and_shows_its_output_and_where_all_of_it_is(tmp_path: Path) -> None:
    done = script("bad() { echo the reason; false; }\nstep 'do it' bad\necho never", TMPDIR=str(tmp_path))
    [kept] = tmp_path.iterdir()
    assert done.returncode != 0 and "never" not in done.stdout
    assert done.stdout.startswith("do it failed after ")
    assert done.stderr == f"the reason\nall of its output: {kept}\n"


def test_a_long_step_shows_its_time_what_is_usual_and_the_last_line_of_its_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\ncompiling\n")
    # Unset, SECONDS no longer counts.
    done = script(f'unset SECONDS\nSECONDS=100 from=65 STEP_LOG={log}\ngrowing "build it" "a minute"\nSTEP_LOG=')
    assert done.stdout == "build it ... 35 s of a minute, compiling\n"


def test_a_build_of_go_shows_how_many_packages_are_compiled(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("go: downloading example.com v1\npackages: 3115\nunicode/utf8\nruntime\n")
    detail = f"eval \"$(sed -n '/^step_detail()/,/^}}/p' '{ROOT}/dev/tools.sh')\""
    done = script(f"{detail}\nSTEP_LOG={log}\nstep_detail\nSTEP_LOG=")
    assert done.stdout == "2 of at most 3115 packages"


def test_one_clock_runs_from_the_first_second_of_the_demo() -> None:
    done = script("step 'say it' true", DISTILL_STARTED="0")
    seconds = float(done.stdout.removeprefix("[").split(" s]")[0])
    assert seconds > 1.7e9
