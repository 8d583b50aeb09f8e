"""The command line itself: exit codes, errors of one sentence, completion, and the reference that is made from it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.shell_completion import ShellComplete

from distill_api.job import InvalidManifest, load_job, parse_job
from distill_api.learning import obstacles
from distill_api.manifest import read_manifest
from distill_cli.commands.completion import VARIABLE
from distill_cli.failure import EXIT_CODES
from distill_cli.kubectl_completion import for_kubectl
from distill_cli.main import cli, main
from distill_cli.reference import reference

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "arithmetic-cpu.yaml"
BAD = ROOT / "tests" / "manifests" / "bad" / "steps-missing.yaml"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_is_that_of_the_commands() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == reference(), "run `make crds`"


def called(text: str) -> list[list[str]]:
    """Every `distill …` of a page, in code blocks and in the text, as words."""
    blocks = re.sub(r"\\\n\s*", " ", "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)))
    lines = re.findall(r"^\s*(?:\$ )?(?:\S*/|kubectl )?distill (.+)$", blocks, re.MULTILINE)
    lines += re.findall(r"`(?:kubectl )?distill ([^`\n]+)`", text)
    return [shlex.split(line, comments=True) for line in lines if "[" not in line and "COMMAND" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_the_documentation_is_one(page: Path) -> None:
    """In the text an option may be left out, and a value be …; in what is written out, names have to be right."""
    for words in called(page.read_text()):
        name, *arguments = words
        assert name in cli.commands, f"distill {' '.join(words)}"
        known = {option for parameter in cli.commands[name].params for option in parameter.opts} | {"--help"}
        assert {word.split("=")[0] for word in arguments if word.startswith("-")} <= known, words


def test_every_command_has_a_help_that_begins_with_a_sentence() -> None:
    for name, command in cli.commands.items():
        assert command.help and command.help.strip().split("\n\n")[0].endswith((".", "age.", "trainer.")), name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or (parameter.help or "").endswith("."), parameter.name


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for code, text in EXIT_CODES.items():
        assert f"{code}  {text}" in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonsense"], 2, "No such command"),
        (["validate"], 2, "Missing option '-f'"),
        (["run", "-f", str(EXAMPLE), "--volume", "models"], 2, "must be /MOUNT=FOLDER, such as /models=./models"),
        (["validate", "-f", "/nowhere.yaml"], 1, "/nowhere.yaml: cannot be read: No such file or directory"),
        (["submit", "-f", str(BAD), "--kubeconfig", "/nowhere"], 1, "spec.schedule.steps"),
        (["samples", "/nowhere"], 1, "is no run folder (no run.json there): give spec.output.path/metadata.name"),
        (["watch", "./nowhere"], 1, "is no run folder"),
        (["list", "--context", "none", "--kubeconfig", "/nowhere"], 1, "the kubeconfig cannot be used"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_a_documented_code(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and not shown.out
    assert code in EXIT_CODES


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}
    config = {"clusters": [cluster], "users": [{"name": "u", "user": {}}], "current-context": "x"}
    config["contexts"] = [{"name": "x", "context": {"cluster": "c", "user": "u"}}]
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    assert main(["list", "--kubeconfig", str(path)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("distill: http://127.0.0.1:9 does not answer") and shown.count("\n") == 1
    assert main(["doctor", "-o", "json", "--kubeconfig", str(path)]) == 1
    [found] = json.loads(capsys.readouterr().out)
    assert (found["check"], found["level"]) == ("api", "fail") and "--context" in found["remedy"]


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("distill_cli.commands.manifests.load_job", lambda path: 1 / 0)
    assert main(["validate", "-f", str(EXAMPLE)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("distill: unexpected ZeroDivisionError: division by zero; `--debug` before the command")
    assert main(["--debug", "validate", "-f", str(EXAMPLE)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_command_whose_packages_are_missing_says_which_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "distill report needs the workers' packages, and matplotlib is missing here" in shown
    assert "pip install 'distillation-operator[workers]'" in shown and shown.count("\n") == 1
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.delitem(sys.modules, "distill_cli.cluster", raising=False)
    assert main(["list"]) == 1
    shown = capsys.readouterr().err
    assert "distill list speaks to a cluster, and kubernetes is missing here" in shown
    assert "pip install 'distillation-operator[cli]'" in shown and shown.count("\n") == 1


def test_validate_writes_every_problem_of_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "-f", str(EXAMPLE)]) == 0
    assert "DistillationJob arithmetic is valid" in capsys.readouterr().out
    assert main(["validate", "-f", str(EXAMPLE), "-f", str(BAD), "-o", "json"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["valid"], good["problems"], bad["valid"]) == (True, [], False)
    assert "spec.schedule.steps" in bad["problems"][0]
    assert main(["validate", "-f", str(BAD)]) == 1
    assert capsys.readouterr().err.startswith(f"{BAD}: spec.schedule.steps")


def documents(folder: Path, *manifests: Any) -> Path:
    path = folder / "all.yaml"
    path.write_text("---\n" + "\n---\n".join(yaml.safe_dump(m) if m else "# nothing\n" for m in manifests))
    return path


def test_validate_takes_several_documents_of_a_file_as_kubectl_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, bad = (yaml.safe_load(path.read_text()) for path in (EXAMPLE, BAD))
    teacher = yaml.safe_load((EXAMPLE.parent / "teacher-cpu.yaml").read_text())
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    path = documents(tmp_path, config, teacher, None, {"apiVersion": "v1", "kind": "List", "items": [job]})
    assert main(["validate", "-f", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{path}: object ") for line in said] == [
        "1: ConfigMap is not checked",
        f"2: Teacher {teacher['metadata']['name']} is valid",
        "3: DistillationJob arithmetic is valid",
    ]

    path = documents(tmp_path, job, bad)
    assert main(["validate", "-f", str(path), "-o", "json"]) == 1
    assert [(one["object"], one["valid"]) for one in json.loads(capsys.readouterr().out)] == [(1, True), (2, False)]
    assert main(["validate", "-f", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"{path}: object 2: spec.schedule.steps")


def test_a_file_with_one_job_among_empty_documents_is_that_job_and_several_are_too_many(tmp_path: Path) -> None:
    job = yaml.safe_load(EXAMPLE.read_text())
    alone = documents(tmp_path, None, job, None)
    assert load_job(alone).metadata.name == read_manifest(alone.read_text())["metadata"]["name"] == "arithmetic"
    with pytest.raises(InvalidManifest, match="has 2 objects, and one job is needed here"):
        load_job(documents(tmp_path, job, job))


def test_validate_says_that_a_file_has_no_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = documents(tmp_path, None, None)
    assert main(["validate", "-f", str(path)]) == 1
    assert "has no object" in capsys.readouterr().err


REWARD = {"reward": {"source": "math"}}
SAMPLED = {"support": "sampled-token", "topK": 16}


@pytest.mark.parametrize(
    ("rollout", "objective", "evaluation", "problem"),
    [
        (1, REWARD, {}, "spec.rollout.samplesPerPrompt: is 1, and objective.advantage group compares"),
        (1, {**REWARD, "advantage": "leave-one-out"}, {}, "advantage leave-one-out compares"),
        (1, {**REWARD, "advantage": "none"}, {}, None),
        (1, {**REWARD, "rewardCoefficient": 0}, {}, None),
        (
            1,
            {**SAMPLED, "baseline": "leave-one-out"},
            {},
            "is 1, and objective.baseline leave-one-out",
        ),
        (1, {**SAMPLED, "baseline": "top-k"}, {}, None),
        (1, {**SAMPLED, "baseline": "batch-mean"}, {}, None),
        (2, {**SAMPLED, "baseline": "leave-one-out"}, {}, None),
        (1, {}, {}, None),
        (2, REWARD, {}, None),
        (2, {}, {"samplesPerPrompt": 8}, "spec.evaluation[heldout].samplesPerPrompt: is 8, and with sampling.temp"),
        (2, {}, {"samplesPerPrompt": 8, "sampling": {"temperature": 0.6}}, None),
        (2, {}, {"samplesPerPrompt": 8, "reward": {"source": "none"}}, None),
    ],
)
def test_validate_refuses_what_cannot_learn_or_measure(
    rollout: int,
    objective: dict[str, Any],
    evaluation: dict[str, Any],
    problem: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = yaml.safe_load(EXAMPLE.read_text())
    job["spec"]["rollout"]["samplesPerPrompt"] = rollout
    job["spec"]["objective"] |= objective
    job["spec"]["data"]["prompts"]["answerField"] = "answer"
    job["spec"]["evaluation"][0] |= evaluation
    path = documents(tmp_path, job)
    assert main(["validate", "-f", str(path)]) == (0 if problem is None else 1)
    assert (problem or "") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"rollout": {"promptsPerStep": 1, "samplesPerPrompt": 1}}, "is 1, as samplesPerPrompt is, and objective.base"),
        ({"rollout": {"promptsPerStep": 1, "samplesPerPrompt": 2}}, None),
    ],
)
def test_a_mean_over_a_step_of_one_response_is_refused(spec: dict[str, Any], problem: str | None) -> None:
    assert_obstacle({**spec, "objective": {**SAMPLED, "baseline": "batch-mean"}}, problem)


@pytest.mark.parametrize(
    ("reference", "fields", "prompts", "problem"),
    [
        (
            "/m/expert",
            {"extrapolation": 1.5},
            {},
            "base is the model of teacher expert, /m/expert, so that there is no",
        ),
        ("/m/base", {"extrapolation": 1.5}, {}, None),
        ("/m/expert", {"referenceCoefficient": 0.1}, {}, None),
        # What scales is then the hint.
        ("/m/expert", {"extrapolation": 1.5}, {"teacherPrompt": "{prompt} {answer}", "answerField": "answer"}, None),
    ],
)
def test_an_extrapolation_of_no_difference_is_refused(
    reference: str, fields: dict[str, Any], prompts: dict[str, Any], problem: str | None
) -> None:
    teachers = [{"name": "expert", "model": "/m/expert"}, {"name": "base", "model": reference}]
    data = {"defaultTeacher": "expert", "prompts": {"path": "/p.jsonl", **prompts}}
    objective = {**SAMPLED, "reference": "base", **fields}
    spec = {"teacher": None, "teachers": teachers, "data": data, "objective": objective, "evaluation": []}
    assert_obstacle(spec, problem)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"coefficient": 0}, "the teacher teaches nothing in the job as it is, and objective.control changes nothing"),
        ({"coefficient": 0, "coefficientSchedule": {"decay": "linear", "steps": 5, "endValue": 1}}, None),
        ({}, None),
    ],
)
def test_a_control_of_a_job_whose_teacher_teaches_nothing_is_refused(
    fields: dict[str, Any], problem: str | None
) -> None:
    assert_obstacle({"objective": {**SAMPLED, "control": "fixed-advantage", **fields}}, problem)


WARM_START = {"name": "warm-start", "objective": {"divergence": "forward-kl", "support": "target", "datasetShare": 1}}


@pytest.mark.parametrize(
    ("coefficient", "phases", "problem"),
    [
        (0, [{"name": "distil", "objective": {"coefficient": 1}}], None),
        (1, [WARM_START, {"name": "distil"}], None),
        # The warm start has a coefficient, and no teacher.
        (1, [WARM_START, {"name": "reward", "objective": {"coefficient": 0}}], "is 0 in each of spec.phases that a t"),
    ],
)
def test_a_control_of_a_job_in_whose_phases_no_teacher_teaches_is_refused(
    coefficient: float, phases: list[dict[str, Any]], problem: str | None
) -> None:
    phases = [{**phase, "untilStep": 2} for phase in phases[:-1]] + phases[-1:]
    objective = {**SAMPLED, "reward": {"source": "exact-match"}, "control": "fixed-advantage"}
    prompts = {"path": "/p.jsonl", "answerField": "answer", "responseField": "answer"}
    spec = {"objective": {**objective, "coefficient": coefficient}, "data": {"prompts": prompts}, "phases": phases}
    assert_obstacle(spec, problem)


@pytest.mark.parametrize(
    ("tokenizer", "evaluation", "problem"),
    [
        ({"tokenizer": "/m/teacher"}, {}, "true for data source prompts and false for evaluation texts, and beside a"),
        ({"tokenizer": "/m/teacher"}, {"measureReverseKL": False}, None),
        ({}, {}, None),
    ],
)
def test_conversations_and_plain_texts_beside_a_tokenizer_of_the_teachers_are_refused(
    tokenizer: dict[str, Any], evaluation: dict[str, Any], problem: str | None
) -> None:
    prompts = {"path": "/e.jsonl", "applyChatTemplate": False, "answerField": "answer"}
    texts = {"name": "texts", "prompts": prompts, "reward": {"source": "exact-match"}, **evaluation}
    teacher = {"model": "/m/teacher", **tokenizer}
    spec = {"teacher": teacher, "data": {"prompts": {"path": "/p.jsonl"}}, "objective": SAMPLED, "evaluation": [texts]}
    assert_obstacle(spec, problem)


def assert_obstacle(spec: dict[str, Any], problem: str | None) -> None:
    """That the example with other parts has one obstacle, with these words, or none."""
    job = yaml.safe_load(EXAMPLE.read_text())
    job["spec"] |= spec
    found = obstacles(parse_job(job).spec)
    assert len(found) == (problem is not None) and all(problem in sentence for sentence in found if problem)


def test_a_reader_of_a_pipe_may_go_before_the_end() -> None:
    files = [part for _ in range(3000) for part in ("-f", "/nowhere.yaml")]
    command = [sys.executable, "-m", "distill_cli", "validate", *files, "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert f"_DISTILL_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_a_shell_completes_commands_options_and_roles() -> None:
    def completed(*words: str) -> list[str]:
        found = ShellComplete(cli, {}, "distill", VARIABLE).get_completions(list(words[:-1]), words[-1])
        return [item.value for item in found]

    assert completed("su") == ["submit", "suspend"]
    assert completed("logs", "sums", "tr") == ["trainer"]
    assert "--namespace" in completed("list", "--")


def test_kubectl_gets_completions_and_a_directive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kubectl_complete-distill", "res"])
    assert for_kubectl() == 0
    first, directive = capsys.readouterr().out.splitlines()
    assert (first.split("\t")[0], directive) == ("resume", ":4")


def test_a_kubectl_plugin_calls_itself_what_the_user_wrote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kubectl-distill"])
    assert main(["list", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: kubectl distill list")
