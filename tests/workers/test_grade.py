"""`distill grade` shows what a reward makes of responses before a run is graded so."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

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


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"reference": "1"}], [], "rows.jsonl:1: must be a JSON object with response and reference"),
        (["text"], [], "rows.jsonl:1: must be a JSON object"),
        (ROWS, ["--reward", "python"], "function"),
    ],
    ids=["no response", "no object", "a function that is not named"],
)
def test_what_cannot_be_graded_is_one_sentence(
    rows: list[Any], options: list[str], message: str, tmp_path: Path
) -> None:
    done = graded(tmp_path, rows, *options)
    assert done.exception is not None
    assert message in str(done.exception)
    assert "pydantic" not in str(done.exception)
