"""The end of a run with spec.output.publish: what is published, what is reported, and how a stop is gone on from.

The real loop over stages that sleep for milliseconds (bench/stages.py); a process publishes to a folder.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import manifest_of
from test_loop import FELL, SMALL, Told, Weights
from test_loop import stages_module as stages

from distill_api.job import DistillationJob
from distill_api.protocol import ExitCode, ExitReason, ExitReport, Phase, ProgressReport, Publication
from distill_api.status import Progress
from distill_cli.main import main
from distill_workers.failures import Failure, Stopped, VolumeFull
from distill_workers.results.manifest import NAME, Manifest
from distill_workers.results.publisher import Publisher
from distill_workers.run.exit_report import classify_error
from distill_workers.run.loop import Loop
from distill_workers.run.publication import StoppedPublishing
from distill_workers.run.run_end import DamagedEnd
from distill_workers.run_folder.checkpoints import DamagedCheckpoints
from distill_workers.run_folder.run_folder import RunFolder

SHORT = stages.Stages(0.004, 0.001, 0.002)


class Exports(Weights):
    """Writes the step of its weights as the model, as a rank does."""

    async def export(self, folder: Path, card: str | None) -> None:
        self.note("export", self.steps)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_text(str(self.steps))


@pytest.fixture(autouse=True)
def passed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any, **__: Any) -> None: ...

    monkeypatch.setattr("distill_workers.run.loop.preflight", nothing)


def loop_of(
    folder: Path, trainer: Weights, *places: dict[str, Any], best: int = 2, keep_best: bool = True, **fields: Any
) -> Loop:
    """Four steps, of which that of `best` has the lowest reverse KL."""
    (folder / "output").mkdir(exist_ok=True)
    return stages.staged(
        SHORT,
        folder / "output",
        trainer=trainer,
        evaluators=[Told({best: 0.5}, 0.001)],
        rollout=SMALL,
        schedule={"steps": 4, "evaluateEverySteps": 2, "keepBest": keep_best, **fields.pop("schedule", {})},
        evaluation=stages.heldout(folder / "output"),
        output={"path": str(folder / "output"), "publish": list(places)},
        **fields,
    )[0]


def report_of(folder: Path) -> ProgressReport:
    return ProgressReport.model_validate_json((folder / "output" / "stages" / "state.json").read_text())


def published(folder: Path) -> tuple[int, str]:
    """Step and weights of what is at a place."""
    manifest = Manifest.read((folder / NAME).read_text())
    assert manifest is not None
    return manifest.step, (folder / "model.safetensors").read_text()


def test_the_exported_model_is_published_and_the_report_says_where(tmp_path: Path) -> None:
    asyncio.run(loop_of(tmp_path, Exports(), {"to": f"file://{tmp_path}/claim"}).run())
    assert published(tmp_path / "claim") == (4, "4")
    report = report_of(tmp_path)
    assert report.phase is Phase.DONE and report.result is not None and report.result.step == 4
    assert [(p.to, p.step, p.done) for p in report.publications] == [(f"file://{tmp_path}/claim", 4, True)]


def test_the_model_of_the_best_step_is_published_beside_the_exported_one(tmp_path: Path) -> None:
    trainer = Exports()
    places = ({"to": f"file://{tmp_path}/last"}, {"to": f"file://{tmp_path}/best", "step": "best"})
    asyncio.run(loop_of(tmp_path, trainer, *places).run())
    assert (published(tmp_path / "last"), published(tmp_path / "best")) == ((4, "4"), (2, "2"))
    assert trainer.of("export") == [4, 2] and trainer.of("load") == [2]
    assert (tmp_path / "output" / "stages" / "model" / "model.safetensors").read_text() == "4"
    assert [p.step for p in report_of(tmp_path).publications] == [4, 2]


def test_a_best_step_that_is_the_exported_one_is_exported_once(tmp_path: Path) -> None:
    trainer = Exports()
    asyncio.run(loop_of(tmp_path, trainer, {"to": f"file://{tmp_path}/best", "step": "best"}, best=4).run())
    assert published(tmp_path / "best") == (4, "4") and trainer.of("export") == [4]


def test_a_best_model_that_cannot_be_exported_fails_its_publication_and_not_the_run(tmp_path: Path) -> None:
    class Full(Exports):
        async def export(self, folder: Path, card: str | None) -> None:
            if self.steps == 2:
                raise VolumeFull("no room")
            await super().export(folder, card)

    asyncio.run(loop_of(tmp_path, Full(), {"to": f"file://{tmp_path}/best", "step": "best"}).run())
    [missed] = report_of(tmp_path).publications
    assert (missed.done, missed.message) == (False, "the model of step 2 was not exported: no room")


def test_a_place_that_refuses_at_the_end_leaves_the_run_complete(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "thesis.tex").write_text("years")
    said = asyncio.run(loop_of(tmp_path, Exports(), {"to": f"file://{tmp_path}/claim"}).run())
    assert said == "all steps are done and the model is exported"
    [missed] = report_of(tmp_path).publications
    assert not missed.done and missed.message.startswith("the folder is not empty")
    assert [path.name for path in (tmp_path / "claim").iterdir()] == ["thesis.tex"]


def stopped_while_publishing(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> StoppedPublishing:
    async def stopped(self: Publisher, models: Any) -> None:
        loop.stop()
        await asyncio.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "publish", stopped)
        with pytest.raises(StoppedPublishing, match="stopped by SIGTERM while the model was published") as raised:
            asyncio.run(loop.run())
    return raised.value


def test_a_stop_while_the_model_is_published_is_gone_on_from_by_publishing_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, place = Exports(), {"to": f"file://{tmp_path}/claim"}
    loop = loop_of(tmp_path, trainer, place)

    raised = stopped_while_publishing(loop, monkeypatch)
    assert isinstance(raised, Failure) and raised.reason is ExitReason.STOPPED
    resumed = Exports()
    asyncio.run(loop_of(tmp_path, resumed, place).run())
    assert published(tmp_path / "claim") == (4, "4") and resumed.of("update") == []


STOPS: dict[str, Any] = {"schedule": {"steps": 8}, "guards": [{**FELL, "drop": 0.4, "action": "stop"}]}
"""Of eight steps four are done: the reverse KL of the fourth is twice that of the second, the best."""


@pytest.mark.parametrize(("keep_best", "exported"), [(True, 2), (False, 4)], ids=["best kept", "none kept"])
def test_a_run_that_a_guard_has_stopped_is_trained_no_further_by_the_next_attempt(
    keep_best: bool, exported: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"to": f"file://{tmp_path}/claim"}
    stopped_while_publishing(loop_of(tmp_path, Exports(), place, keep_best=keep_best, **STOPS), monkeypatch)
    lines = (tmp_path / "output" / "stages" / "metrics.jsonl").read_text()
    events = report_of(tmp_path).progress.guard_events
    for _ in range(2):  # however often it is stopped again
        resumed = Exports()
        told = asyncio.run(loop_of(tmp_path, resumed, place, keep_best=keep_best, **STOPS).run())
        assert told.startswith("guard fell stopped the run after step 4: ")
        assert told.endswith(f"; the model of step {exported} is exported")
        assert published(tmp_path / "claim") == (exported, str(exported)) and resumed.of("update") == []
    report = report_of(tmp_path)
    assert report.phase is Phase.DONE and report.result is not None and report.preflight_passed
    assert (report.result.step, report.result.best_step, report.result.stopped_by) == (exported, 2, "fell")
    assert report.progress.step == 4 and report.progress.guard_events == events and len(events) == 1
    assert (tmp_path / "output" / "stages" / "metrics.jsonl").read_text() == lines


def test_a_run_goes_on_once_the_guard_that_stopped_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"to": f"file://{tmp_path}/claim"}
    stopped_while_publishing(loop_of(tmp_path, Exports(), place, **STOPS), monkeypatch)
    resumed = Exports()
    told = asyncio.run(
        loop_of(tmp_path, resumed, place, **{**STOPS, "guards": [{**STOPS["guards"][0], "drop": 9}]}).run()
    )
    assert told == "all steps are done and the model is exported" and published(tmp_path / "claim") == (8, "8")
    assert not (tmp_path / "output" / "stages" / "ended.json").exists()


def test_an_end_whose_checkpoint_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"to": f"file://{tmp_path}/claim"}
    stopped_while_publishing(loop_of(tmp_path, Exports(), place, **STOPS), monkeypatch)
    (tmp_path / "output" / "stages" / "checkpoints" / "step-000002" / "rank").unlink()
    for _ in range(2):
        with pytest.raises(
            DamagedCheckpoints, match=r"fell stopped the run, and its checkpoint of step 2 .*ended\.json"
        ):
            asyncio.run(loop_of(tmp_path, Exports(), place, **STOPS).run())


ENDS: dict[str, Any] = {**STOPS, "schedule": {"steps": 8, "checkpointEverySteps": 3}, "keep_best": False}
"""The run is stopped at step 4, whose weights are exported; step 3 was saved by the schedule."""


class Killed(Exception):
    """Stands for SIGKILL."""


def killed(loop: Loop, monkeypatch: pytest.MonkeyPatch, published: bool) -> None:
    """Run until the checkpoint of the end is published, but for what follows; or until it would be."""
    publish = RunFolder.publish_checkpoint

    def until(self: RunFolder, aside: Path, state: dict[str, Any], schedule: Any) -> Path:
        if state["step"] != 4:
            return publish(self, aside, state, schedule)
        if published:
            publish(self, aside, state, schedule)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "publish_checkpoint", until)
        with pytest.raises(Killed):
            asyncio.run(loop.run())


def test_a_run_that_was_killed_once_the_checkpoint_of_its_end_was_whole_is_trained_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint replaces is removed meanwhile, which takes minutes on a slow volume."""
    killed(loop_of(tmp_path, Exports(), **ENDS), monkeypatch, published=True)
    resumed = Exports()
    told = asyncio.run(loop_of(tmp_path, resumed, **ENDS).run())
    assert told.startswith("guard fell stopped the run after step 4: ")
    assert resumed.of("update") == [] and resumed.of("export") == [4]


def test_a_run_that_was_killed_before_the_checkpoint_of_its_end_was_whole_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(loop_of(tmp_path, Exports(), **ENDS), monkeypatch, published=False)
    resumed = Exports()
    told = asyncio.run(loop_of(tmp_path, resumed, **ENDS).run())
    assert told.startswith("guard fell stopped the run after step 4: ")
    assert resumed.of("load") == [3] and resumed.of("export") == [4]


def test_an_end_without_its_checkpoint_is_no_end_of_what_is_trained_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a checkpoint of that step, or of a later one, would take the end up again."""
    killed(loop_of(tmp_path, Exports(), **ENDS), monkeypatch, published=False)
    loop = loop_of(tmp_path, Exports(), **ENDS)
    assert asyncio.run(loop._guard_actions.resume_end()) is None
    assert not (tmp_path / "output" / "stages" / "ended.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda end: "",
        lambda end: "[]",
        lambda end: json.dumps({**end, "decision": {}}),
        lambda end: json.dumps({**end, "decision": {**end["decision"], "action": "pause"}}),
        lambda end: json.dumps({**end, "step": "two"}),
        lambda end: json.dumps({**end, "progress": {}}),
        lambda end: json.dumps({**end, "progress": {"progress": {"step": "?"}}}),
        lambda end: json.dumps({key: value for key, value in end.items() if key != "rule"}),
    ],
)
def test_an_end_that_cannot_be_read_is_named_with_what_to_do_and_needs_no_other_attempt(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"to": f"file://{tmp_path}/claim"}
    stopped_while_publishing(loop_of(tmp_path, Exports(), place, **STOPS), monkeypatch)
    path = tmp_path / "output" / "stages" / "ended.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DamagedEnd, match=rf"^{path} is damaged, or of a newer release .* remove it to train on") as it:
        asyncio.run(loop_of(tmp_path, Exports(), place, **STOPS).run())
    assert classify_error(it.value, None)[0] == ExitCode.CONFIGURATION


def test_what_a_newer_release_adds_to_an_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"to": f"file://{tmp_path}/claim"}
    stopped_while_publishing(loop_of(tmp_path, Exports(), place, **STOPS), monkeypatch)
    path = tmp_path / "output" / "stages" / "ended.json"
    end = json.loads(path.read_text())
    path.write_text(json.dumps({**end, "new": 1, "decision": {**end["decision"], "new": 1}}))
    assert asyncio.run(loop_of(tmp_path, Exports(), place, **STOPS).run()).startswith("guard fell stopped the run")


class PatientExports(Exports):
    """Takes no step while a checkpoint is being published, so that none is left out."""

    loop: Loop

    async def update(self, *arguments: Any, **fields: Any) -> Any:
        if (publishing := self.loop._publishing._publishing) is not None:
            await asyncio.wait([publishing])
        return await super().update(*arguments, **fields)


class Published:
    """Counts what is handed to the publisher, which goes on with it after `then`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Any = None) -> None:
        self.steps: list[int] = []
        self.checkpoints: list[list[str]] = []
        publish = Publisher.publish

        async def counted(publisher: Publisher, models: Any, places: Any = None) -> Any:
            [model] = models.values()
            self.steps.append(model.step)
            assert (model.folder / "model.safetensors").read_text() == str(model.step)
            self.checkpoints.append(sorted(p.name for p in publisher._folder.checkpoints.glob("step-??????")))
            if then is not None:
                await then(model)
            return await publish(publisher, models, places)

        monkeypatch.setattr(Publisher, "publish", counted)


EACH = {"checkpointEverySteps": 1, "evaluateEverySteps": 4}
TWO = {"checkpointEverySteps": 2, "evaluateEverySteps": 4}


def at_checkpoints(tmp_path: Path) -> dict[str, Any]:
    return {"to": f"file://{tmp_path}/claim", "when": "checkpoint"}


def test_the_model_of_each_checkpoint_is_published_once_and_the_last_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, handed = PatientExports(), Published(monkeypatch)
    trainer.loop = loop_of(tmp_path, trainer, at_checkpoints(tmp_path), keep_best=False, schedule=EACH)
    asyncio.run(trainer.loop.run())
    assert handed.steps == [1, 2, 3, 4] and trainer.of("export") == [1, 2, 3, 4]
    assert all(f"step-{step:06}" in there for step, there in zip(handed.steps, handed.checkpoints, strict=True))
    assert published(tmp_path / "claim") == (4, "4")
    assert [(p.step, p.done) for p in report_of(tmp_path).publications] == [(4, True)]


def test_training_does_not_wait_for_a_slow_place_and_leaves_out_checkpoints_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Exports()

    async def until_trained(model: Any) -> None:
        while trainer.steps < 4:  # for ever, if the steps waited for this
            await asyncio.sleep(0.001)

    handed = Published(monkeypatch, until_trained)
    loop = loop_of(tmp_path, trainer, at_checkpoints(tmp_path), keep_best=False, schedule=EACH)
    asyncio.run(asyncio.wait_for(loop.run(), 120))
    assert handed.steps == [1, 4] and published(tmp_path / "claim") == (4, "4")


def test_a_checkpoint_that_is_not_of_the_schedule_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keepBest keeps those of step 0, the untrained student, and of step 1."""
    trainer, handed = PatientExports(), Published(monkeypatch)
    schedule = {"checkpointEverySteps": 2, "evaluateEverySteps": 1, "keepLast": 9}
    trainer.loop = loop_of(tmp_path, trainer, at_checkpoints(tmp_path), best=1, schedule=schedule)
    asyncio.run(trainer.loop.run())
    assert (tmp_path / "output" / "stages" / "checkpoints" / "step-000001").exists()
    assert handed.steps == [2, 4]


@pytest.mark.timeout(60)
def test_a_checkpoint_that_is_on_its_way_at_the_end_is_given_up_for_the_exported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the run would wait for two uploads to one place, and each may take half of the stall timeout."""
    begun, given_up = asyncio.Event(), list[int]()

    async def forever(model: Any) -> None:
        if model.step == 4:
            return
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            given_up.append(model.step)
            raise

    class Begun(Exports):
        async def update(self, *arguments: Any, **fields: Any) -> Any:
            if self.steps == 2:
                await begun.wait()
            return await super().update(*arguments, **fields)

    handed = Published(monkeypatch, forever)
    asyncio.run(loop_of(tmp_path, Begun(), at_checkpoints(tmp_path), keep_best=False, schedule=TWO).run())
    assert (handed.steps, given_up) == ([2, 4], [2]) and published(tmp_path / "claim") == (4, "4")


def test_steps_that_are_trained_again_after_a_roll_back_are_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = list[bool]()

    class Led(PatientExports):
        async def load(self, folder: Path) -> None:
            await super().load(folder)
            remembered.append(self.loop._publishing._publisher.is_published(self.loop._publishing._places[0], 3))
            self.loop.evaluation._evaluators[0].found[4] = 0.4  # type: ignore[attr-defined]

    trainer, handed = Led(), Published(monkeypatch)
    schedule = {"checkpointEverySteps": 1}
    back = [{**FELL, "drop": 0.4, "action": "roll-back"}]
    trainer.loop = loop_of(tmp_path, trainer, at_checkpoints(tmp_path), schedule=schedule, guards=back)
    asyncio.run(trainer.loop.run())
    # Step 4 is led back to step 2 before its checkpoint is made.
    assert handed.steps == [1, 2, 3, 2, 3, 4] and published(tmp_path / "claim") == (4, "4")
    assert remembered == [False], "an attempt that goes on from the new step 3 must not take the old one for it"


@pytest.mark.parametrize("done", [False, True])
def test_an_attempt_publishes_the_checkpoint_that_it_goes_on_from_unless_that_is_done(
    done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = PatientExports() if done else Exports()
    publish = Publisher.publish

    async def stopped(publisher: Publisher, models: Any, places: Any = None) -> Any:
        if done:
            await publish(publisher, models, places)
        loop.stop()
        return [] if done else await asyncio.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "publish", stopped)
        loop = loop_of(tmp_path, trainer, at_checkpoints(tmp_path), keep_best=False, schedule=TWO)
        if isinstance(trainer, PatientExports):
            trainer.loop = loop
        with pytest.raises(Stopped):
            asyncio.run(loop.run())
    assert (tmp_path / "claim").exists() is done
    resumed, handed = PatientExports(), Published(monkeypatch)
    resumed.loop = loop_of(tmp_path, resumed, at_checkpoints(tmp_path), keep_best=False, schedule=TWO)
    asyncio.run(resumed.loop.run())
    assert handed.steps == resumed.of("export") == ([4] if done else [2, 4])
    assert published(tmp_path / "claim") == (4, "4")


def test_a_checkpoint_whose_model_cannot_be_exported_is_left_out_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(PatientExports):
        async def export(self, folder: Path, card: str | None) -> None:
            if self.steps == 2:
                raise VolumeFull("no room")
            await super().export(folder, card)

    trainer, handed = Full(), Published(monkeypatch)
    trainer.loop = loop_of(tmp_path, trainer, at_checkpoints(tmp_path), keep_best=False, schedule=EACH)
    asyncio.run(trainer.loop.run())
    assert handed.steps == [1, 3, 4]
    assert "publish: the model of step 2 was not exported: no room" in caplog.text


def test_a_run_without_a_place_writes_and_reports_nothing_of_it(tmp_path: Path) -> None:
    asyncio.run(loop_of(tmp_path, Exports()).run())
    assert not (tmp_path / "output" / "stages" / "published.json").exists()
    assert "publications" not in json.loads((tmp_path / "output" / "stages" / "state.json").read_text())


class Done:
    """A run on this machine that is done, and was published to one of two places."""

    interrupts = 0

    def __init__(self, job: DistillationJob) -> None:
        self.job, self.folder = job, RunFolder(job)

    def claim(self, resume: bool) -> None: ...

    def run(self, show: Any, say: Any) -> int:
        return 0

    def exit_report(self) -> ExitReport:
        told = [
            Publication(to="hf://team/sums", step=20, done=True, message="commit 1a2b3c"),
            Publication(to="s3://models/sums", step=20, done=False, message="503 busy"),
        ]
        final = ProgressReport(phase=Phase.DONE, publications=told, progress=Progress(step=20))
        return ExitReport(reason=ExitReason.COMPLETED, message="done", final=final)


def test_a_run_on_this_machine_says_where_its_model_is_and_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "job.yaml"
    manifest.write_text(json.dumps(manifest_of(tmp_path / "output")))
    monkeypatch.setattr("distill_workers.local.run.LocalRun", Done)
    assert main(["run", "-f", str(manifest)]) == 0
    said = capsys.readouterr()
    assert "published: hf://team/sums, step 20: commit 1a2b3c\n" in said.out
    assert said.err.endswith("not published: s3://models/sums, step 20: 503 busy\n")
