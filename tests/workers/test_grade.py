"""`distill grade` shows what a reward makes of responses before a run is graded so."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import tiny_tokenizer
from runs import REPO

from distill_cli.main import cli

ROWS = [
    {"prompt": "What is 5 - 9?", "response": r"So the answer is $\boxed{-4}$.", "reference": "-4"},
    {"prompt": "What is 5 - 9?", "response": "The answer to the 5 - 9 is 5.", "reference": "-4"},
    {"prompt": "Halve it.", "response": "<think>1/3?</think> The answer is 1/2.", "answer": r"\frac{1}{2}"},
]


def graded(tmp_path: Path, rows: list[Any], *options: str) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CliRunner().invoke(cli, ["grade", str(path), *options], catch_exceptions=True, standalone_mode=False)


def test_each_row_has_its_score_what_was_extracted_and_where_it_stood(tmp_path: Path) -> None:
    done = graded(tmp_path, ROWS, "-o", "json")
    assert done.return_value == 0
    found = json.loads(done.stdout)
    assert [row["score"] for row in found] == [1.0, 0.0, 1.0]
    assert [row["extracted"] for row in found] == ["-4", "5", "1/2"]
    assert found[0]["origin"] != found[2]["origin"]


def test_the_table_says_the_same(tmp_path: Path) -> None:
    done = graded(tmp_path, ROWS)
    assert done.return_value == 0
    assert "extracted" in done.stdout and "-4" in done.stdout


def test_another_reward_grades_otherwise(tmp_path: Path) -> None:
    done = graded(tmp_path, ROWS[:1], "--reward", "exact-match", "-o", "json")
    assert [row["score"] for row in json.loads(done.stdout)] == [0.0]


def test_a_function_of_ones_own_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def near(response, answer, metadata):\n    return metadata.get('scale', 1) / (1 + len(response))\n"
    (tmp_path / "own_grades.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"response": "a", "reference": "1"}, {"response": "abc", "reference": "1", "metadata": {"scale": 2}}]
    done = graded(tmp_path, rows, "--reward", "python", "--function", "own_grades:near", "-o", "json")
    assert done.return_value == 0, done.exception
    assert [row["score"] for row in json.loads(done.stdout)] == [0.5, 0.5]


class Judge(BaseHTTPRequestHandler):
    """A service that rewards responses that hold the answer."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"reward": float(asked["answer"] in asked["response"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


def test_a_service_grades(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{service.server_port}/score"
        rows = [{"response": "It is 12.", "reference": "12"}, {"response": "No.", "reference": "12"}]
        done = graded(tmp_path, rows, "--reward", "http", "--url", url, "-o", "json")
        service.shutdown()
    assert done.return_value == 0, done.exception
    assert [row["score"] for row in json.loads(done.stdout)] == [1.0, 0.0]


def test_a_task_of_reasoning_gym_grades_responses_to_its_own_prompts(job: Path) -> None:
    manifest = yaml.safe_load(job.read_text())
    manifest["spec"] |= {
        "data": {"prompts": {"reasoningGym": {"task": "chain_sum", "size": 2, "seed": 1}}},
        "objective": {"reward": {"source": "reasoning-gym"}},
    }
    job.write_text(yaml.safe_dump(manifest))
    wrong = graded_by(job, [{"response": "<answer>x</answer>"}, {"response": "x"}])
    assert wrong.return_value == 0, wrong.exception
    references = [row["reference"] for row in json.loads(wrong.stdout)]
    done = graded_by(job, [{"response": f"I add. <answer>{answer}</answer>"} for answer in references])
    found = json.loads(done.stdout)
    assert [row["score"] for row in found] == [1.0, 1.0] and found[0]["origin"] == "<answer> tag"
    assert all(row["score"] < 0.1 for row in json.loads(wrong.stdout))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"reference": "1"}], [], "rows.jsonl:1: must have response and reference, as texts"),
        (["text"], [], "rows.jsonl:1: is a string; each line must be one JSON object"),
        ([{"response": "1"}], [], "rows.jsonl:1: has no reference; name the job that has it with -f"),
        (ROWS, ["--reward", "python"], "function"),
    ],
    ids=["no response", "no object", "no reference", "a function that is not named"],
)
def test_what_cannot_be_graded_is_one_sentence(
    rows: list[Any], options: list[str], message: str, tmp_path: Path
) -> None:
    done = graded(tmp_path, rows, *options)
    assert done.exception is not None
    assert message in str(done.exception)
    assert "pydantic" not in str(done.exception)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job whose data is four sums, the second too long, with one evaluation of products."""
    folder = tmp_path / "models" / "student"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    tiny_tokenizer().save_pretrained(folder)
    sums = [{"prompt": f"{n} + 1?", "answer": n + 1} for n in range(4)]
    sums[1]["prompt"] = "long " * 200
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "2 * 3?", "answer": r"\frac{12}{2}"}) + "\n")
    manifest = yaml.safe_load((REPO / "tests" / "manifests" / "good" / "minimal.yaml").read_text())
    prompts = {"path": "/data/test.jsonl", "answerField": "answer"}
    manifest["spec"] |= {
        "data": {"prompts": {"path": "/data/train.jsonl", "answerField": "answer"}},
        "rollout": {"maxPromptTokens": 100},
        "objective": {"reward": {"source": "exact-match"}},
        "evaluation": [{"name": "products", "prompts": prompts, "reward": {"source": "math"}}],
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(manifest))
    return file


def graded_by(job: Path, rows: list[Any], *options: str) -> Any:
    where = ["--volume", f"/models={job.parent / 'models'}", "--volume", f"/data={job.parent}"]
    return graded(job.parent, rows, "-f", str(job), *where, "-o", "json", *options)


def test_a_response_without_a_reference_answers_the_jobs_prompts_in_order_or_by_index(job: Path) -> None:
    in_order = [{"response": "1"}, {"response": "3"}]
    done = graded_by(job, [*in_order, {"response": "4", "index": 3}, {"response": "5", "reference": "6"}])
    assert done.return_value == 0, done.exception
    found = json.loads(done.stdout)
    assert [row["reference"] for row in found] == ["1", "3", "4", "6"], "without the prompt that is too long"
    assert [row["score"] for row in found] == [1.0, 1.0, 1.0, 0.0]


def test_an_evaluation_of_the_job_grades_by_its_own_prompts_and_reward(job: Path) -> None:
    done = graded_by(job, [{"response": "It is 6."}], "--evaluation", "products")
    assert [row["score"] for row in json.loads(done.stdout)] == [1.0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"response": "1", "index": 1}], [], "rows.jsonl:1: index 1 is no prompt of the job; the first is 0"),
        ([{"response": "1"}] * 4, [], "rows.jsonl:4: has no reference; the job has 3 prompts"),
        ([{"response": "1"}], ["--evaluation", "sums"], "has no evaluation sums; it has products"),
    ],
    ids=["an index that is left out", "more responses than prompts", "no such evaluation"],
)
def test_a_response_to_no_prompt_of_the_job_is_one_sentence(
    rows: list[Any], options: list[str], message: str, job: Path
) -> None:
    done = graded_by(job, rows, *options)
    assert done.exception is not None and message in str(done.exception)


def test_a_job_without_a_reward_is_told_of_the_evaluations(job: Path) -> None:
    manifest = yaml.safe_load(job.read_text())
    manifest["spec"]["objective"]["reward"]["source"] = "none"
    job.write_text(yaml.safe_dump(manifest))
    done = graded_by(job, [{"response": "1"}])
    assert "the source prompts of the job has no reward" in str(done.exception) and "--evaluation" in str(
        done.exception
    )
