"""`distill prompts` shows what the student will be asked, and what is left out and why."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import tiny_tokenizer
from runs import REPO

from distill_cli.failure import CommandFailed
from distill_cli.main import cli


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "models" / "student").mkdir(parents=True)
    (tmp_path / "models" / "student" / "config.json").write_text("{}")
    tiny_tokenizer().save_pretrained(tmp_path / "models" / "student")
    rows = [{"prompt": f"{n} + 1?", "answer": n + 1} for n in range(4)]
    rows[1]["prompt"] = "long " * 200
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.csv").write_text("q,a\n3 + 1?,4\n5 + 1?,6\n")
    manifest = yaml.safe_load((REPO / "tests" / "manifests" / "good" / "minimal.yaml").read_text())
    manifest["spec"] |= {
        "data": {"prompts": {"path": "/data/train.jsonl", "answerField": "answer"}},
        "rollout": {"maxPromptTokens": 100},
        "evaluation": [{"name": "sums", "prompts": {"path": "/data/test.csv", "promptField": "q"}}],
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(manifest))
    return file


def shown(job: Path, *options: str) -> Any:
    where = ["--volume", f"/models={job.parent / 'models'}", "--volume", f"/data={job.parent}"]
    command = ["prompts", "-f", str(job), *where, *options]
    return CliRunner().invoke(cli, command, standalone_mode=False)


def test_the_first_rows_are_shown_as_the_student_is_asked(job: Path) -> None:
    done = shown(job, "-n", "2", "-o", "json")
    assert done.return_value == 0, done.output
    training, held_out = json.loads(done.stdout)
    assert [training["name"], held_out["name"]] == ["prompts", "evaluation/sums"]
    first, long = training["rows"]
    assert first["text"] == "<|im_start|>user\n0 + 1?<|im_end|>\n<|im_start|>assistant\n" and first["answer"] == "1"
    assert first["tokens"] == len(tiny_tokenizer()(first["text"])["input_ids"]) and first["leftOut"] == ""
    assert long["where"].endswith("train.jsonl:2") and long["leftOut"] == "longer than rollout.maxPromptTokens 100"
    assert (training["read"], training["leftOut"]) == (2, 1)
    assert [row["where"].rpartition("/")[2] for row in held_out["rows"]] == ["test.csv:2", "test.csv:3"]


def test_what_a_privileged_teacher_is_asked_is_shown_beside(job: Path) -> None:
    manifest = yaml.safe_load(job.read_text())
    manifest["spec"]["data"]["prompts"]["teacherPrompt"] = "{prompt} It is {answer}." + " A hint." * 20
    job.write_text(yaml.safe_dump(manifest))
    training, held_out = json.loads(shown(job, "-n", "1", "-o", "json").stdout)
    [first] = training["rows"]
    assert "<|im_start|>user\n0 + 1? It is 1. A hint." in first["teacherText"] and "It is" not in first["text"]
    assert first["leftOut"] == "the teacher's prompt is longer than rollout.maxPromptTokens 100"
    assert held_out["rows"][0]["teacherText"] is None
    tokens = len(tiny_tokenizer()(first["teacherText"])["input_ids"])
    assert (
        f"--- the teacher is asked, {tokens} tokens\n<|im_start|>user\n0 + 1? It is 1." in shown(job, "-n", "1").stdout
    )


def test_the_lines_say_the_same(job: Path) -> None:
    done = shown(job, "-n", "2")
    assert "train.jsonl:1, " in done.stdout and ", answer '1'\n<|im_start|>user\n0 + 1?<|im_end|>" in done.stdout
    assert "left out: longer than rollout.maxPromptTokens 100" in done.stdout
    assert "--- 2 rows read, 1 left out\nnote: 1 of 2 prompts left out" in done.stdout


def test_all_rows_are_counted_where_that_is_wanted(job: Path) -> None:
    training, held_out = json.loads(shown(job, "-n", "1", "--all", "-o", "json").stdout)
    assert (training["read"], training["leftOut"], len(training["rows"])) == (4, 1, 1)
    [note] = held_out["notes"]
    assert note.startswith("1 of 2 prompts are training prompts too")


def test_prompts_that_two_sources_have_are_counted_where_every_row_is_read(job: Path) -> None:
    manifest = yaml.safe_load(job.read_text())
    prompts = manifest["spec"]["data"]["prompts"]
    manifest["spec"]["data"] = {"sources": [{"name": name, "prompts": prompts} for name in ("a", "b")]}
    job.write_text(yaml.safe_dump(manifest))
    first, second, _ = json.loads(shown(job, "--all", "-o", "json").stdout)
    sentence = "3 of 3 prompts are those of other sources too, and are asked as often"
    assert sentence not in first["notes"] and sentence in second["notes"]


def test_a_row_that_would_end_the_job_ends_the_command_with_78_and_its_place(job: Path) -> None:
    with (job.parent / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a", "answer": NaN}\n')
    done = shown(job, "--all")
    assert isinstance(done.exception, CommandFailed) and done.exception.code == 78
    assert "train.jsonl:5: field answer is nan" in str(done.exception)
    assert shown(job, "-n", "4").return_value == 0, "a row that is not read is not judged"
