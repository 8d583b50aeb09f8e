"""An exported model has all that belonged to the student, and what would keep it from being written is said before."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distill_api.job import parse_job
from distill_workers.failures import ConfigurationError, Failure, VolumeFull
from distill_workers.megatron.checkpoint import companions
from distill_workers.run.preflight.export import check_export
from distill_workers.run_folder.run_folder import RunFolder

BELONGS = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "spiece.model",
    "generation_config.json", "additional_chat_templates/tool_use.jinja", "chat_templates/default.jinja",
    "qwen.tiktoken", "LICENSE",
}  # fmt: skip
OTHERS = {"config.json", "model.safetensors", "optimizer.pt", ".git/HEAD", "logs/run.txt", "README.md.swp"}
CODE = {"modeling_mine.py", "tokenizer_mine.py"}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    for name in BELONGS | OTHERS | CODE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    save_file({"w": torch.zeros(1000, 1024)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("trusted", [False, True])
def test_an_export_takes_over_files_and_folders_and_code_only_if_it_is_trusted(
    trusted: bool, student: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    companions.copy(student, made, trust_remote_code=trusted)
    found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert found == (BELONGS | CODE if trusted else BELONGS)
    assert (made / "chat_templates" / "default.jinja").read_text() == "chat_templates/default.jinja"


def run_of(tmp_path: Path, student: Path, **spec: Any) -> tuple[Any, RunFolder]:
    job = parse_job(
        {
            "apiVersion": "distillation-operator.io/v1alpha1",
            "kind": "DistillationJob",
            "metadata": {"name": "run"},
            "spec": {
                "student": {"model": str(student)},
                "teacher": {"model": "/models/teacher"},
                "data": {"prompts": {"path": "/data"}},
                "schedule": {"steps": 1},
                "output": {"path": str(tmp_path / "output")},
                **spec,
            },
        }
    )
    folder = RunFolder(job)
    folder.root.mkdir(parents=True)
    return job.spec, folder


def test_a_student_that_can_be_exported_passes(student: Path, tmp_path: Path) -> None:
    spec, folder = run_of(tmp_path, student)
    check_export(spec, student, folder)


def test_a_file_that_cannot_be_read_is_named_before_the_first_step(student: Path, tmp_path: Path) -> None:
    spec, folder = run_of(tmp_path, student)
    (student / "tokenizer.model").symlink_to(tmp_path / "moved-away")
    with pytest.raises(ConfigurationError, match=r"Export: .*/student/tokenizer.model cannot be read \(No such file"):
        check_export(spec, student, folder)


def test_a_model_in_the_place_of_the_export_is_not_replaced(student: Path, tmp_path: Path) -> None:
    place = tmp_path / "output" / "run" / "model"
    spec, folder = run_of(tmp_path, place)
    shutil.copytree(student, place)
    with pytest.raises(ConfigurationError, match=r"spec\.student\.model: .* is where the run writes its own model"):
        check_export(spec, place, folder)


def test_a_file_in_the_place_of_the_export_is_named(student: Path, tmp_path: Path) -> None:
    spec, folder = run_of(tmp_path, student)
    folder.model.write_text("")
    with pytest.raises(ConfigurationError, match="output/run/model is no folder"):
        check_export(spec, student, folder)


def test_the_model_of_the_best_step_needs_room_as_well(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = [{"name": "e", "prompts": {"path": "/data"}}]
    output = {"path": str(tmp_path / "output"), "publish": [{"to": "hf://team/sums", "step": "best"}]}
    spec, folder = run_of(tmp_path, student, precision="bfloat16", output=output, evaluation=evaluation)
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**6)
    monkeypatch.setattr("distill_workers.run.preflight.export.shutil.disk_usage", lambda path: usage)
    with pytest.raises(VolumeFull, match="Export: the exported model takes 4 MiB, and 3 MiB of the volume"):
        check_export(spec, student, folder)


@pytest.mark.parametrize(("free", "failure"), [(3 * 10**6, None), (10**6, VolumeFull)])
def test_room_for_the_export_is_looked_for_at_the_start(
    free: int, failure: type[Failure] | None, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,024,000 weights in bfloat16 are 2 MB, and 4 MB in the student's own float32."""
    spec, folder = run_of(tmp_path, student, precision="bfloat16")
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr("distill_workers.run.preflight.export.shutil.disk_usage", lambda path: usage)
    if failure is None:
        check_export(spec, student, folder)
        return
    with pytest.raises(failure, match="Export: the exported model takes 2 MiB, and 1 MiB of the volume"):
        check_export(spec, student, folder)
