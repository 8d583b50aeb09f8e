"""A run is known by what its data and its models hold; where they lie does not matter."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_tokenizer
from runs import REPO

from distill_api.job import DistillationJob, parse_job
from distill_api.spec.job_spec import Prompts, Schedule
from distill_workers.data.cursor import Cursor
from distill_workers.data.identity import changed, content_of
from distill_workers.data.prompts import load_prompts
from distill_workers.data.sample import Prompt
from distill_workers.failures import PromptError
from distill_workers.run.checkpoint_manager import CheckpointManager
from distill_workers.run_folder.run_folder import ForeignRun, RunFolder

PROMPTS = [
    Prompt(i, [i, 7], f"{i}?", answer=str(i), metadata={"level": i}, response=f"It is {i}.", teacher="math")
    for i in range(5)
]


def cursor(prompts: list[Prompt]) -> Cursor:
    return Cursor(prompts, seed=1, shuffle=True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"text": "other"}, "prompts"),
        ({"ids": [9]}, "prompts"),
        ({"answer": "other"}, "answers"),
        ({"answer": None}, "answers"),
        ({"response": "other"}, "responses"),
        ({"teacher": "code"}, "teachers"),
        ({"metadata": {"level": 9}}, "other fields"),
    ],
    ids=str,
)
def test_a_state_of_as_many_other_rows_is_refused_with_what_differs(changes: dict[str, Any], field: str) -> None:
    other = [*PROMPTS[:3], dataclasses.replace(PROMPTS[3], **changes), PROMPTS[4]]
    state = json.loads(json.dumps(cursor(PROMPTS).state()))
    with pytest.raises(PromptError, match=rf"made with 5 prompts and there are 5 now; their {field} differ; restore"):
        cursor(other).restore(state)


def test_fields_that_json_does_not_have_are_the_same_in_every_process() -> None:
    """Two objects stand for one that two processes made: each is printed with its own address."""
    first, second = (
        [Prompt(0, [1], "a", metadata={"made": object(), "names": {"b", "a"}, "when": datetime.date(2026, 1, day)})]
        for day in (1, 1)
    )
    assert content_of(first) == content_of(second)
    other = [Prompt(0, [1], "a", metadata={**first[0].metadata, "when": datetime.date(2026, 1, 2)})]
    assert changed(content_of(first), content_of(other)) == ["other fields"]


def test_order_and_nulls_of_other_fields_are_those_of_a_form() -> None:
    """Parquet gives every row all fields, those of objects in them too, in one order."""
    lines = [{"b": 1, "a": {"x": [{"y": 2}]}}, {"a": {}}, {}]
    table = [{"a": {"x": [{"y": 2, "z": None}], "w": None}, "b": 1}, {"a": {}, "b": None}, {"a": None, "b": None}]
    there, here = ([Prompt(0, [1], "a", metadata=fields) for fields in rows] for rows in (lines, table))
    assert changed(content_of(there), content_of(here)) == []
    assert changed(content_of(there), content_of([here[0], here[2], here[1]])) == ["other fields"]
    mixed: Any = {1: "a", "b": 2}
    assert content_of([Prompt(0, [1], "a", metadata=mixed)])


class OneCheckpoint:
    """A run folder whose only checkpoint has this state."""

    def __init__(self, **state: Any) -> None:
        self._state = state

    def latest_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        return Path("step-000001"), self._state


async def test_other_prompts_of_an_evaluation_are_refused_on_resume_with_its_name() -> None:
    """Its curve would go on with another measure."""
    saved: Any = OneCheckpoint(heldOut={"sums": content_of(PROMPTS)})
    others = [dataclasses.replace(p, answer="0") for p in PROMPTS]
    parts: Any = (None,) * 5
    manager = CheckpointManager(Schedule(steps=1), saved, *parts, {"sums": content_of(others)})
    with pytest.raises(PromptError, match="other data of evaluation sums: its answers differ; restore the data"):
        await manager.resume()


def test_rows_in_another_order_are_other_rows() -> None:
    assert changed(content_of(PROMPTS), content_of(PROMPTS[::-1])) != []
    assert changed(content_of(PROMPTS), content_of(list(PROMPTS))) == []


def test_texts_that_run_together_are_told_apart() -> None:
    first = [Prompt(0, [], "ab"), Prompt(1, [], "c")]
    assert changed(content_of(first), content_of([Prompt(0, [], "a"), Prompt(1, [], "bc")])) == ["prompts"]


def test_a_state_of_an_earlier_release_is_known_by_its_number_of_rows() -> None:
    earlier = {"epoch": 0, "position": 2, "prompts": 5}
    cursor(PROMPTS).restore(earlier)
    with pytest.raises(PromptError, match="made with 5 prompts and there are 4 now"):
        cursor(PROMPTS[:4]).restore(earlier)


def test_the_same_rows_elsewhere_and_in_another_form_are_the_same_data(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": n} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    tokenizer = tiny_tokenizer()
    a, b = (
        load_prompts(Prompts(path=str(tmp_path / name), answer_field="answer"), tokenizer, 200, None)[0]
        for name in ("a.jsonl", "b.json")
    )
    assert content_of(a) == content_of(b)


def job(tmp_path: Path, **changes: Any) -> DistillationJob:
    manifest = yaml.safe_load((REPO / "tests" / "manifests" / "good" / "minimal.yaml").read_text())
    return parse_job(manifest | {"spec": manifest["spec"] | {"output": {"path": str(tmp_path)}} | changes})


def model(folder: Path, weights: bytes) -> str:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def test_moving_models_and_data_is_no_other_run(tmp_path: Path) -> None:
    RunFolder(job(tmp_path, student={"model": model(tmp_path / "a" / "student", b"1")})).claim()
    moved = {"student": {"model": model(tmp_path / "b" / "renamed", b"1")}, "teacher": {"model": "/mnt/models/teacher"}}
    RunFolder(job(tmp_path, **moved, data={"prompts": {"path": "/mnt/other.jsonl", "promptField": "q"}})).claim()


def test_other_pods_are_no_other_run(tmp_path: Path) -> None:
    RunFolder(job(tmp_path)).claim()
    pods = {"spec": {"nodeSelector": {"pool": "gpu"}}}
    teacher = {"model": "/models/teacher", "template": pods}
    roles = {"trainer": {"template": pods}, "rollout": {"template": pods, "headTemplate": pods}, "teacher": teacher}
    RunFolder(job(tmp_path, podTemplate=pods, **roles)).claim()


def test_other_weights_are_another_run_wherever_they_lie(tmp_path: Path) -> None:
    RunFolder(job(tmp_path, student={"model": model(tmp_path / "a" / "student", b"1")})).claim()
    with pytest.raises(ForeignRun, match=r"spec\.student\.model: the weights in .*/b/student are not those"):
        RunFolder(job(tmp_path, student={"model": model(tmp_path / "b" / "student", b"2")})).claim()


def test_a_model_that_is_not_here_is_known_by_its_name(tmp_path: Path) -> None:
    RunFolder(job(tmp_path)).claim()
    with pytest.raises(ForeignRun, match=r"\(spec\.teacher\.model is /models/teacher there and /models/x here"):
        RunFolder(job(tmp_path, teacher={"model": "/models/x"})).claim()


def test_another_run_is_refused_with_the_fields_and_both_values(tmp_path: Path) -> None:
    RunFolder(job(tmp_path)).claim()
    other = job(tmp_path, seed=7, rollout={"maxResponseTokens": 99})
    with pytest.raises(ForeignRun) as refused:
        RunFolder(other).claim()
    assert "spec.rollout.maxResponseTokens is " in str(refused.value) and " there and 99 here" in str(refused.value)
    assert "spec.seed is 0 there and 7 here" in str(refused.value)


def test_an_environment_elsewhere_is_the_same_run_and_another_environment_is_another(tmp_path: Path) -> None:
    environment = {"function": "my_envs:Calculator", "tools": "/a/tools.json"}
    RunFolder(job(tmp_path, rollout={"environment": environment})).claim()
    moved = {**environment, "tools": "/b/tools.json", "timeoutSeconds": 5}
    RunFolder(job(tmp_path, rollout={"environment": moved})).claim()
    with pytest.raises(ForeignRun, match=r"spec\.rollout\.environment\.function is my_envs:Calculator there"):
        RunFolder(job(tmp_path, rollout={"environment": {**environment, "function": "my_envs:Other"}})).claim()


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def tools(file: Path, *found: dict[str, Any], **style: Any) -> dict[str, Any]:
    """The field rollout of a job with an environment whose tools are in a file."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, **style))
    return {"environment": {"function": "my_envs:Calculator", "tools": str(file)}}


def test_other_tools_are_another_run_which_names_the_field(tmp_path: Path) -> None:
    RunFolder(job(tmp_path / "runs", rollout=tools(tmp_path / "a" / "tools.json", TOOL))).claim()
    moved = tools(tmp_path / "b" / "tools.json", TOOL, indent=2)
    RunFolder(job(tmp_path / "runs", rollout=moved)).claim()
    other = tools(tmp_path / "b" / "tools.json", TOOL, {**TOOL, "function": {"name": "multiply"}})
    with pytest.raises(ForeignRun, match=r"spec\.rollout\.environment\.tools: the tools in .*/b/tools\.json are not"):
        RunFolder(job(tmp_path / "runs", rollout=other)).claim()


@pytest.mark.parametrize("first", [True, False], ids=["taken away", "added"])
def test_tools_that_were_added_or_taken_away_are_another_run(first: bool, tmp_path: Path) -> None:
    with_tools = tools(tmp_path / "a" / "tools.json", TOOL)
    without = {"environment": {"function": with_tools["environment"]["function"]}}
    RunFolder(job(tmp_path / "runs", rollout=with_tools if first else without)).claim()
    with pytest.raises(ForeignRun, match=r"spec\.rollout\.environment\.tools is .* there and .* here"):
        RunFolder(job(tmp_path / "runs", rollout=without if first else with_tools)).claim()


@pytest.mark.parametrize("earlier", ["a release that knew no tools", "not in the pod"])
def test_tools_of_which_nothing_is_known_are_no_other_run(earlier: str, tmp_path: Path) -> None:
    file = tmp_path / "a" / "tools.json"
    rollout = tools(file, TOOL)
    if earlier == "not in the pod":
        file.unlink()
    folder = RunFolder(job(tmp_path / "runs", rollout=rollout))
    folder.claim()
    if earlier != "not in the pod":
        mark = folder.root / "run.json"
        mark.write_text(json.dumps({k: v for k, v in json.loads(mark.read_text()).items() if k != "tools"}))
    RunFolder(job(tmp_path / "runs", rollout=tools(file, TOOL, TOOL))).claim()
    with pytest.raises(ForeignRun):
        RunFolder(job(tmp_path / "runs", rollout=tools(file, TOOL))).claim()


def test_code_of_the_user_that_is_another_is_noted_once_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    (package / "envs.py").write_text("raise SystemExit  # 1")
    (package / "scores.py").write_text("raise SystemExit  # 1")
    monkeypatch.syspath_prepend(tmp_path)
    environment = {"function": "my_package.envs:Calculator"}
    reward = {"source": "python", "function": "my_package.scores:score"}
    evaluation = [{"name": "sums", "prompts": {"path": "/data/sums.jsonl"}, "reward": reward}]
    of = job(tmp_path / "runs", rollout={"environment": environment}, evaluation=evaluation)
    assert RunFolder(of).claim() == RunFolder(of).claim() == []
    (package / "envs.py").write_text("raise SystemExit  # 2")
    assert RunFolder(of).claim() == [
        "UserCode: spec.rollout.environment.function: its file is not the one that the attempt before ran with; "
        "the run goes on with it"
    ]
    (package / "scores.py").write_text("raise SystemExit  # 2")
    [note] = RunFolder(of).claim()
    assert note.startswith("UserCode: spec.evaluation[sums].reward.function: ")
    assert RunFolder(of).claim() == []


def test_an_agents_script_that_is_another_is_noted(tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.write_text("raise SystemExit  # 1")
    of = job(tmp_path / "runs", rollout={"environment": {"agent": {"command": ["python", str(script), "--fast"]}}})
    assert RunFolder(of).claim() == RunFolder(of).claim() == []
    script.write_text("raise SystemExit  # 2")
    [note] = RunFolder(of).claim()
    assert note.startswith("UserCode: spec.rollout.environment.agent.command: its file is not the one that")
    assert RunFolder(of).claim() == []


@pytest.mark.parametrize("command", [["my-agent"], ["python", "-m", "my_agent"], ["python", "/absent/agent.py"]])
def test_an_agent_without_a_script_that_can_be_read_is_taken_as_it_is(command: list[str], tmp_path: Path) -> None:
    of = job(tmp_path, rollout={"environment": {"agent": {"command": command}}})
    assert RunFolder(of).claim() == RunFolder(of).claim() == []


@pytest.mark.parametrize("folder", ["", "nested", "nested/deeper"])
@pytest.mark.parametrize("package", [False, True])
def test_code_in_folders_without_an_init_file_is_known_too(
    folder: str, package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "my_folder" / folder
    code.mkdir(parents=True)
    if package:
        (tmp_path / "my_folder" / "__init__.py").write_text("raise SystemExit")
    (code / "scores.py").write_text("raise SystemExit  # 1")
    monkeypatch.syspath_prepend(tmp_path)
    module = ".".join(["my_folder", *folder.split("/"), "scores"] if folder else ["my_folder", "scores"])
    reward = {"source": "python", "function": f"{module}:score"}
    evaluation = [{"name": "sums", "prompts": {"path": "/data/sums.jsonl"}, "reward": reward}]
    of = job(tmp_path / "runs", evaluation=evaluation)
    assert RunFolder(of).claim() == []
    (code / "scores.py").write_text("raise SystemExit  # 2")
    [note] = RunFolder(of).claim()
    assert note.startswith("UserCode: spec.evaluation[sums].reward.function: ")


@pytest.mark.parametrize("module", ["my_folder", "my_folder.nested", "my_folder.nested.gone", "my_folder.scores.gone"])
def test_code_that_is_no_source_file_does_not_keep_a_run_from_its_folder(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_folder" / "nested").mkdir(parents=True)
    (tmp_path / "my_folder" / "scores.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    reward = {"source": "python", "function": f"{module}:score"}
    evaluation = [{"name": "sums", "prompts": {"path": "/data/sums.jsonl"}, "reward": reward}]
    assert RunFolder(job(tmp_path / "runs", evaluation=evaluation)).claim() == []


def test_code_that_cannot_be_read_does_not_keep_a_run_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_scores.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def stale(path: Path) -> bytes:
        raise OSError("stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    reward = {"source": "python", "function": "my_scores:score"}
    evaluation = [{"name": "sums", "prompts": {"path": "/data/sums.jsonl"}, "reward": reward}]
    assert RunFolder(job(tmp_path / "runs", evaluation=evaluation)).claim() == []
