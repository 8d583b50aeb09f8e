"""`distill compare`: what it shows of two runs, on a terminal, for programs and on a page."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folders import manifest_of, run_of
from test_report import Loads

from distill_cli.main import main
from distill_cli.views.comparison import curve_rows
from distill_workers.evaluation.estimates import Estimate
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.results.comparison import differences, flat, read_runs, sections

HELDOUT = {
    "name": "heldout",
    "prompts": {"path": "/inputs/test.jsonl", "answerField": "answer"},
    "reward": {"source": "exact-match"},
}


def measured(step: int, score: float) -> Measurement:
    passed = {1: Estimate(score, score - 0.1, score + 0.1)}
    known = {"score": score, "score_low": score - 0.1, "score_high": score + 0.1, "reverse_kl": 1 - score}
    return Measurement("heldout", step, pass_at=passed, **known)


def two(tmp_path: Path, **spec: Any) -> list[str]:
    """The folders of a run of 20 steps, and of one of 10 slower ones with another objective."""
    plain = manifest_of(tmp_path, "plain", evaluation=[HELDOUT], **spec)
    _, first = run_of(plain, measured=[measured(0, 0.25), measured(20, 0.75)])
    other = manifest_of(
        tmp_path,
        "top-k",
        evaluation=[HELDOUT | {"maxPrompts": 8}],
        objective={"support": "top-k", "topK": 32},
        rollout={"replicas": 3},
        **spec,
    )
    _, second = run_of(other, steps=10, kl=2.0, seconds=4.0, measured=[measured(0, 0.25), measured(10, 0.5)])
    return [str(first.root), str(second.root)]


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The cells after the first, by the first cell, of everything that the command printed."""
    lines = [line.split("   ") for line in capsys.readouterr().out.splitlines()]
    return {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}


def test_a_pipe_gets_evaluations_stages_cost_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *two(tmp_path)]) == 0
    rows = shown(capsys)
    assert rows["steps"] == ["20 of 20", "10 of 20"]
    assert rows["seconds of a step, median"] == ["2", "4"]
    assert rows["response tokens"] == ["40", "20"]
    assert rows["accelerators"] == ["3 processes", "5 processes"]
    assert rows["accelerator hours"] == [f"{n * 40 / 3600:.4g} of processes" for n in (3, 5)], "a CPU has none"
    assert rows["heldout, score"] == ["0.25 → 0.75 (0.65 to 0.85)", "0.25 → 0.5 (0.4 to 0.6)"]
    assert rows["heldout, pass@1"] == ["0.25 → 0.75 (0.65 to 0.85)", "0.25 → 0.5 (0.4 to 0.6)"]
    assert rows["heldout, reverse KL"] == ["0.75 → 0.25", "0.75 → 0.5"]
    assert rows["heldout, step"] == ["0 → 20", "0 → 10"]
    assert rows["rollout"] == ["1 (50%)", "1 (50%)"]
    assert rows["spec.objective.support"] == ["sampled-token", "top-k"]
    assert rows["spec.evaluation[heldout].maxPrompts"] == ["256", "8"]
    assert rows["spec.rollout.replicas"] == ["1", "3"]
    assert not any(name.startswith("spec.student") for name in rows), "what is equal is not shown"


def test_the_curves_of_all_runs_have_one_scale(tmp_path: Path) -> None:
    runs = read_runs([Path(folder) for folder in two(tmp_path)])
    kl = {run: (curve, low, high) for name, run, curve, low, high in curve_rows(runs) if name == "reverse KL"}
    assert kl["plain"][1:] == ("0.05", "1") and kl["top-k"][1:] == ("0.2", "2")
    assert len(kl["plain"][0]) == 20 and len(kl["top-k"][0]) == 10
    assert kl["top-k"][0][0] == "█" and kl["plain"][0][0] == "▄", "2 and 1 nats"


def test_programs_get_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *two(tmp_path), "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["runs"]
    assert (first["name"], first["steps"], first["plannedSteps"], first["seconds"]) == ("plain", 20, 20, 40.0)
    assert second["stageSeconds"]["train"] == 2.5 and second["accelerators"] == 5
    assert first["evaluations"]["heldout"]["score"] == 0.75
    assert first["evaluations"]["heldout"]["passAt"]["1"]["low"] == pytest.approx(0.65)
    assert found["differences"]["spec.objective.topK"] == {"plain": "16", "top-k": "32"}


def test_the_page_has_every_run_and_needs_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "comparison.html"
    assert main(["compare", *two(tmp_path, student={"model": "/models/<b>"}), "--html", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text = page.read_text()
    for panel in ("Reverse KL, nats per token", "Held-out reverse KL", "Score, with its 95 % interval", "Seconds of a"):
        assert panel in text
    for label in (">plain<", ">top-k<", ">plain, heldout<", ">top-k, heldout<"):
        assert label in text
    assert "<td>spec.objective.support</td><td>sampled-token</td><td>top-k</td>" in text
    assert Loads(text).found == [] and not (tmp_path / "comparison.html.tmp").exists()


def test_a_difference_is_escaped_on_the_page(tmp_path: Path) -> None:
    folders = [run_of(manifest_of(tmp_path, n, student={"model": f"/<{n}>"}), steps=1)[1].root for n in ("a", "b")]
    assert main(["compare", *map(str, folders), "--html", str(tmp_path / "page.html")]) == 0
    assert "<td>/&lt;a&gt;</td><td>/&lt;b&gt;</td>" in (tmp_path / "page.html").read_text()


def test_what_may_hold_a_credential_differs_without_being_shown(tmp_path: Path) -> None:
    def run(name: str, key: str) -> Path:
        environment = {"containers": [{"name": "main", "env": [{"name": "HF_TOKEN", "value": f"hf_{key}"}]}]}
        manifest = manifest_of(
            tmp_path,
            name,
            podTemplate={"spec": environment},
            rollout={"engineArgs": [f"--api-key={key}"]},
            objective={"reward": {"source": "http", "url": f"http://reward/score?key={key}"}},
        )
        return run_of(manifest)[1].root

    rows = differences(read_runs([run("one", "secret"), run("two", "hidden"), run("three", "secret")]))
    found = {path: values for path, *values in rows}
    assert found.keys() == {
        "spec.podTemplate",
        "spec.rollout.engineArgs",
        "spec.objective.reward.query of url",
    }
    for values in found.values():
        assert values[0] == values[2] != values[1] and all(value.startswith("not shown, ") for value in values)


def test_equal_specs_are_said_to_be_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [one, _] = [run_of(manifest_of(tmp_path, name), steps=3)[1].root for name in ("a", "b")]
    one.rename(tmp_path / "seed-0")
    assert main(["compare", str(tmp_path / "seed-0"), str(tmp_path / "b")]) == 0
    assert "The specs and the versions are equal." in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [run_of(manifest_of(tmp_path / at, "sums"), steps=1)[1].root for at in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_before_its_first_step_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = run_of(manifest_of(tmp_path, "young"), steps=0)[1].root
    assert main(["compare", str(young), *two(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    rows = shown(capsys)
    assert rows["steps"] == ["0 of 20", "20 of 20", "10 of 20"]
    assert rows["heldout, score"][0] == "–" and rows["train"][0] == "–"


def test_another_version_of_a_package_is_a_difference(tmp_path: Path) -> None:
    folders = [Path(folder) for folder in two(tmp_path)]
    mark = json.loads((folders[0] / "run.json").read_text())
    mark["versions"]["torch"] = "9.9.9"
    (folders[0] / "run.json").write_text(json.dumps(mark))
    found = {row[0]: row[1] for row in differences(read_runs(folders))}
    assert found["version of torch"] == "9.9.9" and "version of ray" not in found


def test_items_with_a_name_are_told_by_it_and_others_by_their_values() -> None:
    tree = {"a": [{"name": "x", "b": 1}], "c": [1, 2], "d": None, "e": {}, "f": {"g": True}}
    assert flat(tree) == {"a[x].name": "x", "a[x].b": "1", "c": "[1, 2]", "f.g": "true"}


@pytest.mark.parametrize(
    ("make", "code", "sentence"),
    [
        (lambda tmp, found: found[:1], 2, "give two jobs or run folders, or more"),
        (lambda tmp, found: [found[0], found[0] + "/../plain"], 2, "two of them are the same one"),
        (lambda tmp, found: [found[0], str(tmp)], 1, "is no run folder (no run.json there)"),
        (lambda tmp, found: [*found, "--html", f"{tmp}/none/page.html"], 1, "there is no folder"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(
    make: Any, code: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *make(tmp_path, two(tmp_path))]) == code
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mark", "why"), [("{", "it is damaged"), ("[]", "it is damaged"), ('{"job": {"kind": "Other"}}', "kind: must be")]
)
def test_a_folder_whose_job_cannot_be_read_is_named(
    mark: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = two(tmp_path)
    Path(folders[1], "run.json").write_text(mark)
    assert main(["compare", *folders]) == 78
    said = capsys.readouterr().err
    assert f"{folders[1]}/run.json cannot be read" in said and why in said and said.count("\n") == 1


def test_a_section_without_rows_is_left_out(tmp_path: Path) -> None:
    folders = [run_of(manifest_of(tmp_path, name), steps=0)[1].root for name in ("a", "b")]
    assert [section.title for section in sections(read_runs(folders))] == ["Runs"]


def test_a_run_folder_without_its_checkpoints_can_be_reported_compared_and_exported(tmp_path: Path) -> None:
    """As docs/guides/results.md takes it out of a cluster."""
    one, two_ = (Path(folder) for folder in two(tmp_path))
    (one / "model").mkdir()
    (one / "model" / "config.json").write_text("{}")
    shutil.rmtree(one / "checkpoints")
    folder = str(one)
    for command in (["report", folder], ["samples", folder], ["compare", folder, str(two_)]):
        assert main(command) == 0
    assert main(["export", folder, str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "README.md").exists()


def test_a_terminal_shows_names_in_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be markup to rich, and be left out."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", *two(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "spec.evaluation[heldout].maxPrompts" in out and "\x1b[" in out
