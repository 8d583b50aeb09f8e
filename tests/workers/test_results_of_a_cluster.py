"""`distill report`, `compare` and `export` of a job on a cluster: what they make of the files that its pod sends.

The pod and the stream themselves: tests/unit/test_cli_reader.py, tests/api/test_cli_results.py.
"""

import io
import os
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from run_folders import manifest_of, run_of

from distill_api.spec.job_spec import Schedule
from distill_cli.failure import CommandFailed
from distill_cli.main import main
from distill_cli.reader.unpack import unpack
from distill_workers.local import reader


def connects(monkeypatch: pytest.MonkeyPatch, connect: Callable[..., None]) -> None:
    """Have the commands connect so: the workers' packages have no client of a cluster."""
    module = ModuleType("distill_cli.cluster")
    module.connect = connect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distill_cli.cluster", module)


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output volume of a cluster with the jobs `sums` and `top-k`, and an empty working folder."""
    volume = tmp_path / "volume"
    volume.mkdir()
    for name in ("sums", "top-k"):
        _, folder = run_of(manifest_of(volume, name, student={"model": "/models/student"}), steps=3)
        folder.publish_checkpoint(folder.checkpoint_aside(2), {"step": 2}, Schedule(steps=3))

    def read(cluster: Any, name: str, folder: Path, what: str, *options: str, **_: Any) -> None:
        sink = io.BytesIO()
        if reader.main([what, str(volume / name), *options], sink):
            raise CommandFailed("as the pod said")
        unpack(io.BytesIO(sink.getvalue()), folder)

    connects(monkeypatch, lambda *_: None)
    monkeypatch.setattr("distill_cli.reader.run_files.read_run_files", read)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return volume


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_report_of_a_job_is_a_page_here_and_its_folder_is_as_it_was(
    volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(volume / "sums")
    assert main(["report", "sums"]) == 0
    assert capsys.readouterr().out == "sums.html\n" and names(Path()) == ["sums.html"]
    page = Path("sums.html").read_text()
    assert "<title>Distillation sums</title>" in page and "3 of 20 steps" in page and "<svg" in page
    assert names(volume / "sums") == before


def test_a_page_is_shown_in_the_browser_where_there_is_one(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    class Browser:
        def open(self, address: str) -> bool:
            shown.append(address)
            return True

    monkeypatch.setattr(webbrowser, "get", Browser)
    assert main(["report", "sums", "--html", "page.html", "--open"]) == 0
    assert main(["report", str(volume / "top-k"), "--open"]) == 0
    assert shown == [Path("page.html").resolve().as_uri(), (volume / "top-k" / "report.html").as_uri()]
    assert capsys.readouterr().err == ""

    def none() -> Browser:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", none)
    assert main(["report", "sums", "--open"]) == 0
    assert capsys.readouterr().err == "distill: no browser is known here: open sums.html in one\n"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["report", "sums", "--html", "nowhere/page.html"], 1, "there is no folder nowhere; make it"),
        (["report", "./sums", "--html", "page.html"], 2, "--html is for a job on a cluster"),
        (["report", "./sums"], 1, "is no run folder"),
        (["report", "absent"], 1, "as the pod said"),
        (["compare", "sums", "sums"], 2, "two of them are the same one"),
        (["export", "sums", "model", "--step", "7"], 1, "as the pod said"),
    ],
)
def test_what_cannot_be_had_is_one_sentence_and_leaves_nothing(
    arguments: list[str], code: int, sentence: str, volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert sentence in capsys.readouterr().err and names(Path()) == []


def test_without_a_cluster_the_folder_of_that_name_is_told(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: Any) -> None:
        raise CommandFailed("no cluster is configured")

    connects(monkeypatch, absent)
    monkeypatch.chdir(volume)
    for command in (["report", "sums"], ["export", "sums", "model"], ["samples", "sums"], ["compare", "sums", "top-k"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "sums is taken for a job's name; for the folder write ./sums (no cluster is configured)" in said
    assert main(["report", "other"]) == 1
    assert capsys.readouterr().err == "distill: no cluster is configured\n"


def test_jobs_and_folders_are_compared(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "sums", str(volume / "top-k")]) == 0
    said = capsys.readouterr().out
    assert "sums" in said and "top-k" in said and "3 of 20" in said
    assert names(Path()) == []


def test_a_checkpoint_is_converted_here_with_the_student_of_this_machine(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[tuple[list[str], Any]] = []

    def convert(job: Any, student: Path, checkpoint: Path, destination: Path, card: str | None) -> None:
        found.append((names(checkpoint.parent), student))
        destination.mkdir()

    monkeypatch.setattr("distill_workers.local.export.convert", convert)
    assert main(["export", "sums", "model", "--step", "2", "--volume", f"/models={os.getcwd()}"]) == 78
    assert "student is no Hugging Face checkpoint" in capsys.readouterr().err and names(Path()) == []
    Path("student").mkdir()
    Path("student/config.json").write_text("{}")
    assert main(["export", "sums", "model", "--step", "2", "--volume", f"/models={os.getcwd()}"]) == 0
    assert capsys.readouterr().out == "model: the model of step 2\n"
    assert found == [(["step-000002"], Path("student").resolve())]
    assert names(Path()) == ["model", "student"], "nothing is left aside"
