"""`distill export`: the model of a run, from what its folder holds."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step
from safetensors.torch import load_file

from distill_api.job import DistillationJob, parse_job
from distill_api.spec.job_spec import Schedule
from distill_cli.main import main
from distill_workers.run_folder.run_folder import RunFolder

SPLIT = make_trainer(tensor=2, ranks=2)
CASES: dict[str, dict[str, Any]] = {
    "whole": {"precision": "bfloat16", "trainer": SPLIT},
    "adapters": {"precision": "float32", "trainer": SPLIT | {"lora": {"rank": 4, "alpha": 8.0}}},
}


def job_of(output: Path, name: str, **changes: Any) -> DistillationJob:
    spec = make_spec(student={"model": "/models/qwen2"}, output={"path": str(output)}, **changes)
    manifest = {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": name},
        "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    return parse_job(manifest)


def trained(folder: Path) -> None:
    """On each rank, in each case: one step, a checkpoint of it, and the model as the run would export it."""
    import torch.distributed as dist

    from distill_workers.megatron.student import MegatronStudent

    for case, changes in CASES.items():
        run = RunFolder(job_of(folder, case, **changes))
        student = MegatronStudent(make_spec(**changes), folder / "qwen2")
        train_step(student, make_samples(8), 1e-2)
        if dist.get_rank() == 0:
            run.claim()
            run.checkpoint_aside(3)
        dist.barrier()
        student.save(run.checkpoints / "step-000003.tmp")
        dist.barrier()
        if dist.get_rank() == 0:
            run.publish_checkpoint(run.checkpoints / "step-000003.tmp", {"step": 3}, Schedule(steps=3))
        student.export(folder / "expected" / case, "# A card")


def converted(folder: Path) -> tuple[list[int], str]:
    """Exit codes and output of the command."""
    said, volume = io.StringIO(), f"/models={folder}"
    with contextlib.redirect_stdout(said):
        codes = [main(["export", f"{folder}/{case}", f"{folder}/made/{case}", "--volume", volume]) for case in CASES]
    return codes, said.getvalue()


def test_a_checkpoint_of_several_ranks_becomes_the_model_that_the_run_would_have_exported(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "qwen2", "qwen2")
    (tmp_path / "qwen2" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The student\n")
    run_ranks(2, trained, folder=tmp_path)
    [(codes, said)] = run_ranks(1, converted, folder=tmp_path)
    assert codes == [0, 0] and f"{tmp_path}/made/whole: the model of step 3\n" in said
    for case in CASES:
        made, expected = tmp_path / "made" / case, tmp_path / "expected" / case
        found, wanted = (load_file(folder / "model.safetensors") for folder in (made, expected))
        assert found.keys() == wanted.keys()
        assert all(found[name].dtype == tensor.dtype and found[name].equal(tensor) for name, tensor in wanted.items())
        assert {path.name for path in made.iterdir()} == {path.name for path in expected.iterdir()}
        card = ModelCard.load(made / "README.md")
        assert (
            card.data.license == "apache-2.0" and "`qwen2`, distilled from" in card.text and "3 of 3 steps" in card.text
        )
        assert "model: /models/qwen2" in card.text, "the job as the run had it, not as its volumes are here"
        assert (expected / "README.md").read_text() == "# A card"
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(CASES), "nothing half is left"


def exported(folder: Path) -> Path:
    """The folder of a run that is done."""
    run = RunFolder(job_of(folder, "done"))
    run.claim()
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    for step in (2, 4):
        state = {"step": step, "progress": {"evaluations": [{"bestStep": 3}]}}
        run.publish_checkpoint(run.checkpoint_aside(step), state, Schedule(steps=4, keep_last=2))
    return run.root


def test_a_run_that_is_done_has_its_model_copied_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(exported(tmp_path)), str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    assert capsys.readouterr().out.endswith("mine: the model that the run exported\n")
    assert main(["export", str(tmp_path / "done"), str(tmp_path / "mine")]) == 78
    assert "mine is not empty: choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--step", "3"], "has no complete checkpoint of step 3: there are those of 2, 4"),
        (["--best"], "keeps no best checkpoint"),
        (["--step", "4"], "spec.student.model: /models/qwen2 is no Hugging Face checkpoint"),
    ],
)
def test_what_cannot_be_exported_is_told_with_what_can(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(exported(tmp_path)), str(tmp_path / "mine"), *options]) == 78
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_a_run_without_a_checkpoint_has_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(job_of(tmp_path, "young")).claim()
    assert main(["export", str(tmp_path / "young"), str(tmp_path / "mine")]) == 78
    assert "no model and no complete checkpoint yet" in capsys.readouterr().err
    assert json.loads((tmp_path / "young" / "run.json").read_text())["job"]["kind"] == "DistillationJob"
