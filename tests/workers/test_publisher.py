"""What a run does about the places of spec.output.publish: nothing twice, nothing for ever, and no end of the run."""

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import manifest_of

from distill_api.job import parse_job
from distill_api.protocol import ExitReason, ExitReport, Phase, ProgressReport, Publication
from distill_api.spec.output import PublishedStep
from distill_api.status import Progress
from distill_workers.failures import PreflightFailed, Superseded
from distill_workers.local.run import with_volumes
from distill_workers.results.manifest import NAME, Manifest
from distill_workers.results.publisher import CHILD, FILE, Model, Publisher
from distill_workers.run.exit_report import exit_report
from distill_workers.run_folder.run_folder import RunFolder

SCRIPT = """
import json, os, sys, time
request = json.load(sys.stdin)
if request["manifest"] is None and not {probes}:
    print(json.dumps(dict(outcome="done", message="")))
    sys.exit()
with open({log!r}, "a") as log:
    print(json.dumps(dict(request, environment=dict(os.environ))), file=log)
{body}
"""
DONE = "print(json.dumps(dict(outcome='done', message='7 files')))"
REFUSED = "print(json.dumps(dict(outcome='refused', message='401 wrong token')))"
FAILED = "print(json.dumps(dict(outcome='failed', message='503 busy')))"


class Child:
    """A process in place of the one that publishes: a script for every try, the last one for those that follow.

    It answers a probe well, and counts it only with `probes`.
    """

    def __init__(self, folder: Path, *bodies: str, probes: bool = False) -> None:
        self._log = folder / "requests"
        numbered = "".join(f"{'el' if n else ''}if tries == {n + 1}:\n    {b}\n" for n, b in enumerate(bodies[:-1]))
        last = f"else:\n    {bodies[-1]}" if numbered else bodies[-1]
        body = f"tries = sum(1 for _ in open({str(self._log)!r}))\n{numbered}{last}"
        self.command = (sys.executable, "-c", SCRIPT.format(log=str(self._log), body=body, probes=probes))

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []


class Setting:
    """A run that has exported its model."""

    def __init__(self, folder: Path, *places: dict[str, Any], **spec: Any) -> None:
        manifest = manifest_of(folder, **spec)
        manifest["spec"]["output"]["publish"] = list(places)
        self.job = parse_job(manifest)
        self.folder = RunFolder(self.job)
        self.folder.claim()
        self.folder.model.mkdir(exist_ok=True)
        (self.folder.model / "config.json").write_text("{}")
        self.models = {PublishedStep.LAST: Model(self.folder.model, 20)}

    def publisher(self, command: Sequence[str] = CHILD, delays: Sequence[float] = (0.0, 0.0)) -> Publisher:
        return Publisher(self.job, self.folder, delays=delays, command=command)

    def published(self, command: Sequence[str] = CHILD, delays: Sequence[float] = (0.0, 0.0)) -> list[Publication]:
        return asyncio.run(self.publisher(command, delays).publish(self.models))


HUB = {"to": "hf://team/sums"}


def test_a_model_is_at_its_place_by_a_process_of_its_own(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "output", {"to": f"file://{tmp_path}/claim"})
    assert asyncio.run(setting.publisher().probe()) == []
    assert setting.published() == [
        Publication(to=f"file://{tmp_path}/claim", step=20, done=True, message="1 files, 0.0 MiB")
    ]
    assert sorted(path.name for path in (tmp_path / "claim").iterdir()) == ["config.json", NAME]


def test_nothing_is_published_twice_after_a_resume(tmp_path: Path) -> None:
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, DONE)
    first = setting.published(child.command)
    assert first == [Publication(to="hf://team/sums", step=20, done=True, message="7 files")]
    assert setting.published(child.command) == first
    assert len(child.requests) == 1


def test_another_content_is_published_again(tmp_path: Path) -> None:
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, DONE)
    setting.published(child.command)
    (setting.folder.model / "config.json").write_text("[]")
    setting.published(child.command)
    assert [request["begun"] for request in child.requests] == [True, True]
    assert len({request["run"] for request in child.requests}) == 1, "it is the same run"


def test_a_step_that_is_trained_again_is_not_published_by_what_was_made_of_it_before(tmp_path: Path) -> None:
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, DONE)
    setting.published(child.command)
    publisher, [place] = setting.publisher(), setting.job.spec.output.publish
    publisher.forget_after(20)
    assert publisher.is_published(place, 20), "the run goes on from that very step"
    publisher.forget_after(10)
    assert not publisher.is_published(place, 20)
    setting.published(child.command)
    assert publisher.is_published(place, 20) and len(child.requests) == 2


def test_what_was_not_published_is_tried_by_the_next_attempt(tmp_path: Path) -> None:
    setting = Setting(tmp_path, HUB)
    [missed] = setting.published(Child(tmp_path, FAILED).command)
    assert (missed.done, missed.message) == (False, "503 busy")
    [made] = setting.published(Child(tmp_path, DONE).command)
    assert made.done


def test_a_place_that_fails_is_tried_again_after_a_delay_and_one_that_refuses_is_not(tmp_path: Path) -> None:
    setting = Setting(tmp_path, HUB)
    again = Child(tmp_path, FAILED, "os.kill(os.getpid(), 9)", DONE)
    begin = time.monotonic()
    [made] = setting.published(again.command, delays=(0.2, 0.2))
    assert made.done and len(again.requests) == 3 and time.monotonic() - begin >= 0.4
    (tmp_path / "requests").unlink()
    (setting.folder.root / FILE).unlink()
    refused = Child(tmp_path, REFUSED)
    [missed] = setting.published(refused.command)
    assert (missed.done, missed.message) == (False, "401 wrong token") and len(refused.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), 9)", "the process that publishes ended with -9: see the log"),
        ("print('no answer')", "the process that publishes ended with 0: see the log"),
    ],
)
def test_a_process_that_says_nothing_is_given_up_after_the_last_try(body: str, message: str, tmp_path: Path) -> None:
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, body)
    assert setting.published(child.command)[0].message == message
    assert len(child.requests) == 3


def test_a_folder_of_somebody_else_is_no_more_ours_at_the_next_attempt(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "config.json").write_text("theirs")
    setting = Setting(tmp_path / "output", {"to": f"file://{tmp_path}/claim"})
    for _ in range(2):
        [missed] = setting.published()
        assert not missed.done and missed.message.startswith("the folder is not empty")
    assert (tmp_path / "claim" / "config.json").read_text() == "theirs"


def test_a_slow_place_is_given_up_after_half_of_the_stall_timeout_and_holds_up_no_other(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "output", HUB, {"to": "hf://team/other"}, stallTimeoutSeconds=12)
    slow = f"time.sleep(60) if request['to'] == 'hf://team/sums' else {DONE}"
    begin = time.monotonic()
    missed, made = setting.published(Child(tmp_path, slow).command)
    assert 5.5 < time.monotonic() - begin < 30
    assert re.fullmatch("it had not ended after [1-6] s", missed.message) and not missed.done and made.done


def test_a_publication_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    setting = Setting(tmp_path, HUB)
    child = Child(tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    async def work() -> None:
        task = asyncio.create_task(setting.publisher(child.command).publish(setting.models))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_the_process_has_the_environment_of_the_trainer_with_the_hub_within_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store")
    child = Child(tmp_path, DONE)
    Setting(tmp_path, HUB).published(child.command)
    [request] = child.requests
    assert request["environment"]["HF_HUB_OFFLINE"] == "0"
    assert request["environment"]["AWS_ENDPOINT_URL"] == "http://store"


def test_a_secret_is_named_by_its_folder_and_on_one_machine_the_environment_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(tmp_path, DONE)
    setting = Setting(tmp_path, {**HUB, "secret": "hub-token"})
    monkeypatch.setattr("distill_workers.results.publisher.SECRETS_FOLDER", str(tmp_path / "secrets"))
    setting.published(child.command)
    (tmp_path / "secrets" / "hub-token").mkdir(parents=True)
    (tmp_path / "secrets" / "hub-token" / "HF_TOKEN").write_text("hf_hidden_token")
    (setting.folder.root / FILE).unlink()
    setting.published(child.command)
    assert [request["secrets"] for request in child.requests] == [None, str(tmp_path / "secrets" / "hub-token")]
    written = "".join(p.read_text() for p in setting.folder.root.rglob("*") if p.is_file())
    assert "hf_hidden_token" not in written + json.dumps(child.requests)


def test_a_place_that_refuses_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    publisher = Setting(tmp_path, HUB).publisher(Child(tmp_path, REFUSED, probes=True).command)
    with pytest.raises(PreflightFailed, match=re.escape("Publish: spec.output.publish to hf://team/sums: 401 wrong")):
        asyncio.run(publisher.probe())


def test_a_place_that_refuses_ends_no_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, REFUSED, probes=True)
    aside = setting.folder.checkpoint_aside(20)
    setting.folder.publish_checkpoint(aside, {"step": 20}, setting.job.spec.schedule)
    assert asyncio.run(setting.publisher(child.command).probe()) == [] and child.requests == []


@pytest.mark.parametrize("body", [FAILED, "os.kill(os.getpid(), 9)"])
def test_a_place_that_is_not_reached_before_the_first_step_is_a_note(body: str, tmp_path: Path) -> None:
    child = Child(tmp_path, body, probes=True)
    [note] = asyncio.run(Setting(tmp_path, HUB).publisher(child.command).probe())
    assert note.startswith("Publish: hf://team/sums is not reached, and is tried again at the end: ")


def test_a_probe_has_no_model_with_it(tmp_path: Path) -> None:
    child = Child(tmp_path, DONE, probes=True)
    assert asyncio.run(Setting(tmp_path, HUB).publisher(child.command).probe()) == []
    assert (child.requests[0]["manifest"], child.requests[0]["folder"]) == (None, None)


def test_a_model_that_is_not_there_is_said_and_nothing_is_tried(tmp_path: Path) -> None:
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, DONE)
    setting.models = {PublishedStep.LAST: Model(setting.folder.model, 10, problem="it is not kept")}
    assert setting.published(child.command) == [
        Publication(to="hf://team/sums", step=10, done=False, message="it is not kept")
    ]
    assert child.requests == []


def test_a_trainer_whose_folder_a_newer_one_has_publishes_nothing(tmp_path: Path) -> None:
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, DONE)
    RunFolder(setting.job).claim()
    with pytest.raises(Superseded):
        setting.published(child.command)
    assert child.requests == []


def test_what_a_client_prints_is_no_part_of_the_answer(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "output", {"to": f"file://{tmp_path}/claim"})
    printing = "import fsspec; url_to_fs = fsspec.url_to_fs; "
    printing += "fsspec.url_to_fs = lambda *a, **k: (print('hello'), url_to_fs(*a, **k))[1]; "
    run = "import runpy; runpy.run_module('distill_workers.results.publish', run_name='__main__')"
    [made] = setting.published((sys.executable, "-c", printing + run))
    assert made.done


def test_a_folder_of_a_claim_is_one_of_this_machine_in_distill_run() -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "published-cpu.yaml"
    manifest = with_volumes(yaml.safe_load(example.read_text()), {"/published": "/home/me/published"})
    places = parse_job(manifest).spec.output.publish
    assert [(place.to, place.step.value) for place in places] == [
        ("file:///home/me/published/arithmetic", "last"),
        ("file:///home/me/published/arithmetic-best", "best"),
    ]


def test_a_report_without_publications_is_one_that_a_former_operator_reads() -> None:
    report = ProgressReport(phase=Phase.DONE, progress=Progress())
    assert "publications" not in report.model_dump_json(by_alias=True)
    told = report.model_copy(update={"publications": [Publication(to="hf://a/b", step=1, done=True, message="m")]})
    assert ProgressReport.model_validate_json(told.model_dump_json(by_alias=True)) == told


def test_what_became_of_four_places_is_in_the_exit_report_whatever_the_preflight_noted(tmp_path: Path) -> None:
    """It is the last that the operator hears, and longer than 4,096 bytes it would be cut off."""
    setting = Setting(tmp_path)
    told = [Publication(to=f"s3://{n}".ljust(253, "x"), step=20, done=False, message="y" * 253) for n in range(4)]
    report = ProgressReport(phase=Phase.DONE, notes=["z" * 5000], publications=told, progress=Progress(step=20))
    setting.folder.replace("state.json", report.model_dump_json(by_alias=True))
    text = exit_report(setting.job, ExitReason.COMPLETED, "all steps are done")
    final = ExitReport.model_validate_json(text).final
    assert len(text.encode()) <= 4096 and final is not None and final.publications == told


def test_the_manifest_in_the_store_names_the_job_and_the_step(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "output", {"to": f"file://{tmp_path}/claim"})
    setting.published()
    found = Manifest.read((tmp_path / "claim" / NAME).read_text())
    assert found is not None and (found.job, found.step) == ("sums", 20)
    assert os.stat(tmp_path / "claim" / "config.json").st_size == found.bytes


def test_a_stop_while_a_large_model_is_hashed_ends_that_within_a_second(tmp_path: Path) -> None:
    """Python waits for its threads before it ends: one that hashes 140 GB would outlast the pod's grace period."""
    setting, child = Setting(tmp_path, HUB), Child(tmp_path, DONE)
    os.truncate(setting.folder.model / "config.json", 1 << 34)

    async def work() -> None:
        publishing = asyncio.create_task(setting.publisher(child.command).publish(setting.models))
        await asyncio.sleep(0.3)
        publishing.cancel()
        await asyncio.wait([publishing])

    begin = time.monotonic()
    asyncio.run(work())
    assert time.monotonic() - begin < 5  # 16 GiB take longer
    assert child.requests == [] and json.loads((setting.folder.root / FILE).read_text())["places"] == {}


@pytest.mark.parametrize("files_written", [0, 1, 3])
def test_a_trainer_that_is_replaced_while_it_uploads_writes_no_further_file_and_no_manifest(
    files_written: int, tmp_path: Path
) -> None:
    place = tmp_path / "claim"
    setting = Setting(tmp_path / "output", {"to": f"file://{place}"})
    for name in ("model-00001.safetensors", "model-00002.safetensors"):
        (setting.folder.model / name).write_text(name)
    newer = (
        "import fsspec, pathlib, runpy; from fsspec.implementations.local import LocalFileSystem as Local; "
        f"owner = pathlib.Path({str(setting.folder.root / 'owner.json')!r}); put, done = Local.put_file, []\n"
        "def put_file(self, *a, **k):\n"
        "    put(self, *a, **k); done.append(1); take(len(done))\n"
        "def take(count):\n"
        "    if count == {count} : owner.write_text(owner.read_text().replace('instance\": \"', 'instance\": \"x'))\n"
        "Local.put_file = put_file; take(0)\n"
        "runpy.run_module('distill_workers.results.publish', run_name='__main__')"
    )
    with pytest.raises(Superseded, match=r"another trainer has taken over .*; this trainer publishes nothing more"):
        setting.published((sys.executable, "-c", newer.replace("{count}", str(files_written))))
    there = sorted(p.name for p in place.iterdir()) if place.exists() else []
    assert there == ["config.json", "model-00001.safetensors", "model-00002.safetensors"][:files_written]
