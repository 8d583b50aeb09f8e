"""The control of a job: what it is, that `distill run --control` runs it beside the job, and what is said of both."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import manifest_of, run_of
from runs import REPO
from test_compare import HELDOUT
from test_local_run import NoTeacher, command, lines

from distill_api.job import parse_job
from distill_api.protocol import ExitCode
from distill_api.training_phases import objectives
from distill_cli.main import main
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.failures import ConfigurationError
from distill_workers.local.control import control_of
from distill_workers.local.run import LocalRun
from distill_workers.results.comparison import read_runs
from distill_workers.results.control import pairs
from distill_workers.run_folder.identity import fingerprint

CONTROL = {"objective": {"control": "fixed-advantage"}}


def scored(step: int, score: float, half: float = 0.1) -> Measurement:
    return Measurement("heldout", step, score=score, score_low=score - half, score_high=score + half, reverse_kl=0.5)


def run_and_control(
    tmp_path: Path, taught: list[Measurement], untaught: list[Measurement], **of_control: Any
) -> list[str]:
    """The folders of a run and of its control; `of_control` are other fields of the control's spec."""
    spec = CONTROL | of_control
    jobs = [(manifest_of(tmp_path, "sums", evaluation=[HELDOUT]), taught)]
    jobs.append((manifest_of(tmp_path, "sums-control", evaluation=[HELDOUT], **spec), untaught))
    return [str(run_of(manifest, measured=measured)[1].root) for manifest, measured in jobs]


def verdicts_of(folders: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["compare", *folders, "-o", "json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["controls"]
    return found


@pytest.mark.parametrize(
    ("taught", "untaught", "outside", "sentence"),
    [
        (0.8, 0.3, True, "The teacher teaches: the difference is outside both intervals."),
        (0.3, 0.8, True, "The control is better than the teacher: the difference is outside both intervals."),
        (0.6, 0.45, False, "The difference is inside the intervals: that the teacher teaches is not shown."),
        # Each score is outside the other's interval, and the intervals still overlap.
        (0.65, 0.5, False, "The difference is inside the intervals"),
        (0.5, 0.5, False, "The difference is inside the intervals"),
    ],
)
def test_a_difference_is_outside_where_the_intervals_are_apart(
    taught: float, untaught: float, outside: bool, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = run_and_control(tmp_path, [scored(0, 0.2), scored(20, taught)], [scored(0, 0.2), scored(20, untaught)])
    (found,) = verdicts_of(folders, capsys)
    assert (found["evaluation"], found["step"], found["run"], found["control"]) == (
        "heldout", 20, "sums", "sums-control",
    )  # fmt: skip
    assert found["outsideBothIntervals"] is outside
    assert found["difference"] == pytest.approx(taught - untaught)

    assert main(["compare", *reversed(folders)]) == 0
    out = capsys.readouterr().out
    assert sentence in out and out.count(f", {'outside' if outside else 'inside'}") == 1
    assert f"{taught:.4g} ({taught - 0.1:.4g} to {taught + 0.1:.4g}) with the teacher" in out


def test_the_page_has_both_curves_and_the_verdict(tmp_path: Path) -> None:
    folders = run_and_control(tmp_path, [scored(20, 0.9)], [scored(20, 0.2)])
    assert main(["compare", *folders, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert ">sums<" in page and ">sums-control<" in page
    assert "With its teacher and with the control" in page and "<td>+0.7, outside</td>" in page


def test_runs_are_judged_at_the_last_step_that_both_were_measured_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guard may have ended one of them."""
    folders = run_and_control(tmp_path, [scored(10, 0.5), scored(20, 0.9)], [scored(0, 0.4), scored(10, 0.45)])
    (found,) = verdicts_of(folders, capsys)
    assert (found["step"], found["outsideBothIntervals"]) == (10, False)


def test_without_a_score_in_both_nothing_is_said_of_the_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = run_and_control(tmp_path, [scored(20, 0.9)], [Measurement("heldout", 20, reverse_kl=0.5)])
    assert verdicts_of(folders, capsys) == []
    assert main(["compare", *folders]) == 0
    assert "nothing can be said of the teacher; give the job an evaluation with a reward" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other", [{"objective": {"control": "fixed-advantage", "advantageClip": 1}}, {"seed": 5}, {"objective": {}}]
)
def test_the_control_of_another_job_is_no_control_of_this_one(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = run_and_control(tmp_path, [scored(20, 0.9)], [scored(20, 0.2)], **other)
    assert pairs(read_runs([Path(folder) for folder in folders])) == []
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert "with the control" not in out and "nothing can be said of the teacher" not in out


def test_a_control_is_another_run_of_a_sibling_folder_and_publishes_nothing(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, objective={"support": "top-k", "topK": 8})
    manifest["spec"]["output"]["publish"] = [{"to": "file:///published/sums"}]
    job, control = parse_job(manifest), parse_job(control_of(manifest))
    assert control.metadata.name == "sums-control" and control.spec.output.path == str(tmp_path)
    assert control.spec.objective == job.spec.objective.model_copy(update={"control": "fixed-advantage"})
    assert fingerprint(control) != fingerprint(job)
    assert job.spec.output.publish and not control.spec.output.publish
    assert "control" not in manifest["spec"]["objective"], "the job itself is as it was"


def test_a_job_with_a_warm_start_has_a_control_with_the_same_warm_start(tmp_path: Path) -> None:
    warm = {"divergence": "forward-kl", "support": "target", "datasetShare": 1}
    phases = [{"name": "warm-start", "objective": warm, "untilStep": 5}, {"name": "distil"}]
    data = {"prompts": {"path": "/inputs/train.jsonl", "responseField": "response"}}
    manifest = manifest_of(tmp_path, data=data, phases=phases)
    job, control = parse_job(manifest), parse_job(control_of(manifest))
    (first, taught), (same, untaught) = objectives(job.spec), objectives(control.spec)
    assert first == same, "no teacher is in it"
    assert untaught == taught.model_copy(update={"control": "fixed-advantage"})
    assert fingerprint(control) != fingerprint(job)


def test_the_example_is_the_control_of_the_example() -> None:
    job, control = (
        yaml.safe_load((REPO / "examples" / f"{n}-cpu.yaml").read_text()) for n in ("arithmetic", "control")
    )
    assert control == control_of(job)


def test_a_control_that_cannot_be_made_is_refused_before_the_job_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match="at most 40 characters; choose one of at most 32"):
        control_of(manifest_of(tmp_path, "a" * 33))
    settings = ("spec.objective.control=fixed-advantage",)
    assert main(command(tmp_path, "sums", "--control", settings=settings)) == ExitCode.CONFIGURATION
    err = capsys.readouterr().err
    assert "is fixed-advantage, so that the job is a control itself" in err and err.count("\n") == 1
    mixed = ("spec.objective.datasetShare=0.5", "spec.data.prompts.responseField=answer")
    assert main(command(tmp_path, "sums", "--control", settings=mixed)) == 1
    assert "control goes with datasetShare 0 only" in capsys.readouterr().err
    assert not (tmp_path / "sums").exists()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A trainer that writes the run folder of a run whose score is 0.9 with a teacher and 0.2 without, and one that
    fails where the job is named so."""
    script = f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from run_folders import run_of
from distill_workers.evaluation.evaluator import Measurement
manifest = json.load(open(os.environ["DISTILL_JOB_FILE"]))
if manifest["metadata"]["name"] == "fails":
    sys.exit({int(ExitCode.CONFIGURATION)})
score = 0.2 if manifest["spec"]["objective"]["control"] == "fixed-advantage" else 0.9
last = Measurement("heldout", 3, score=score, score_low=score - 0.1, score_high=score + 0.1)
run_of(manifest, steps=3, measured=[last])
"""
    monkeypatch.setattr("distill_workers.local.run.TRAINER", (sys.executable, "-c", script))
    monkeypatch.setattr("distill_workers.local.run.POLL_SECONDS", 0.05)
    monkeypatch.setattr("distill_workers.teacher.local_servers.SGLangServer", NoTeacher)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("played")
def test_run_control_runs_the_job_then_its_control_and_says_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "spec.schedule.steps=3",
        "spec.objective.topK=16",
        "spec.data.prompts.responseField=answer",
        "spec.phases=[{name: warm-start, objective: {divergence: forward-kl, support: target, datasetShare: 1}, "
        "untilStep: 1}, {name: distil}]",
    )
    assert main(command(tmp_path, "sums", "--control", settings=settings)) == ExitCode.DONE
    out = capsys.readouterr().out
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("sums", "sums-control"))
    assert first["fingerprint"] != second["fingerprint"]
    assert second["job"]["spec"]["objective"]["control"] == "fixed-advantage"
    assert (
        "control: heldout, step 3: 0.9 (0.8 to 1) with the teacher, 0.2 (0.1 to 0.3) with the control. The teacher"
        in out
    )
    assert "outside both intervals" in out and f"{tmp_path}/sums/control.html" in out
    page = (tmp_path / "sums" / "control.html").read_text()
    assert ">sums<" in page and ">sums-control<" in page


@pytest.mark.timeout(120)
def test_a_job_that_is_done_is_not_run_again_for_its_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def play(self: LocalRun, show: Any, say: Any) -> int:
        begun.append(self.job.metadata.name)
        if len(begun) == 2:
            return int(ExitCode.TEMPORARY)
        run_of(self.job.model_dump(mode="json", by_alias=True, exclude_none=True), steps=3, measured=[scored(3, 0.5)])
        return int(ExitCode.DONE)

    monkeypatch.setattr(LocalRun, "run", play)
    settings = ("spec.schedule.steps=3",)
    assert main(command(tmp_path, "sums", "--control", settings=settings)) == ExitCode.TEMPORARY
    capsys.readouterr()
    assert main(command(tmp_path, "sums", "--control", "--resume", settings=settings)) == ExitCode.DONE
    assert begun == ["sums", "sums-control", "sums-control"]
    out = capsys.readouterr().out
    assert f"distill run: sums is done, and is not run again: {tmp_path}/sums\n" in out
    assert "control: heldout, step 3: " in out
    more = ("spec.schedule.steps=4",)
    assert main(command(tmp_path, "sums", "--control", "--resume", settings=more)) == ExitCode.DONE
    assert begun[3:] == ["sums", "sums-control"], "of another length it is not done"


@pytest.mark.usefixtures("played")
def test_no_control_is_run_where_the_job_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "fails", "--control")) == ExitCode.CONFIGURATION
    assert not (tmp_path / "fails-control" / "run.json").exists()
    assert "control:" not in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_a_real_control_is_measured_against_its_teacher_and_trains_a_part_of_its_tokens(tmp_path: Path) -> None:
    settings = (
        "spec.objective.control=fixed-advantage",
        "spec.schedule={steps: 2, checkpointEverySteps: 2, evaluateEverySteps: 2}",
        "spec.evaluation.heldout.maxPrompts=8",
        "spec.evaluation.heldout.scoreTeacher=false",
    )
    assert main(command(tmp_path, "tiny", settings=settings)) == ExitCode.DONE
    for step in lines(tmp_path / "tiny" / "metrics.jsonl", "step"):
        # Of a response of n tokens ceil(n / 5): of one of 8, the longest here, a quarter, and of one of 2 a half.
        assert 0.2 <= step["selected_ratio"] <= 0.5 and step["divergence_weight"] == step["selected_ratio"]
        assert step["grad_norm"] > 0 and step["reverse_kl"] is not None and step["forward_kl"] > 0
    last = lines(tmp_path / "tiny" / "metrics.jsonl", "evaluation")[-1]
    assert last["step"] == 2 and last["score"] is not None and last["reverse_kl"] is not None


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_real_job_and_its_control_begin_with_the_same_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "spec.schedule={steps: 2, checkpointEverySteps: 2, evaluateEverySteps: 2}",
        "spec.evaluation.heldout.maxPrompts=8",
        "spec.evaluation.heldout.scoreTeacher=false",
        "spec.deterministic=true",
    )
    assert main(command(tmp_path, "tiny", "--control", settings=settings)) == ExitCode.DONE
    assert "control: heldout, step 2: " in capsys.readouterr().out
    runs = [tmp_path / name for name in ("tiny", "tiny-control")]
    rollouts = [lines(run / "samples.jsonl", "rollout") for run in runs]
    prompts = [[one["prompt"] for one in found if one["picked"] == "first"] for found in rollouts]
    assert len(prompts[0]) == 2 and prompts[0] == prompts[1]
    begun = [[(one["tokens"], one["kl"]) for one in found if one["step"] == 1] for found in rollouts]
    assert begun[0] == begun[1], "until the first update they are one run"
    taught, control = (lines(run / "metrics.jsonl", "step")[0] for run in runs)
    assert taught["reverse_kl"] == control["reverse_kl"] and taught["loss"] != control["loss"]
