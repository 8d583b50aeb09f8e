"""The card of an exported model: what the hub's own library reads in it, and what never stands there."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.utils import validate_repo_id
from run_folders import manifest_of, run_of

from distill_api.job import parse_job
from distill_cli.main import main
from distill_workers.evaluation.estimates import Estimate
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.model_folder import model_folder
from distill_workers.results.method import PAPERS
from distill_workers.results.model_card import card_of_run, hub_id

GSM8K = {
    "name": "gsm8k",
    "prompts": {
        "dataset": {"name": "openai/gsm8k", "config": "main", "split": "test"},
        "promptField": "question",
        "answerField": "answer",
    },
    "reward": {"source": "math"},
}
LOCAL = {"name": "sums", "prompts": {"path": "/inputs/test.jsonl"}}


def measured(name: str, step: int, score: float | None, kl: float) -> Measurement:
    found = Measurement(name, step, score=score, reverse_kl=kl, prompts=64)
    if score is not None:
        found.score_low, found.score_high = score - 0.05, score + 0.05
        found.pass_at = {1: Estimate(score, score - 0.05, score + 0.05)}
    return found


MEASURED = [
    measured("gsm8k", 0, 0.25, 2.0),
    measured("sums", 0, None, 3.0),
    measured("gsm8k", 20, 0.75, 0.5),
    measured("sums", 20, None, 0.25),
]


def card_of(tmp_path: Path, *, step: int = 20, **spec: Any) -> ModelCard:
    """The student's own folder is tmp_path/student."""
    job, folder = run_of(manifest_of(tmp_path, evaluation=[GSM8K, LOCAL], **spec), measured=MEASURED)
    return ModelCard(card_of_run(job, folder.root, tmp_path / "student", step))


def test_the_hubs_library_finds_models_data_and_the_last_evaluation_in_the_card(tmp_path: Path) -> None:
    data = {"prompts": {"dataset": {"name": "openai/gsm8k", "config": "main", "split": "train"}}}
    card = card_of(tmp_path, data=data)
    assert (card.data.base_model, card.data.base_model_relation) == ("Qwen/Qwen3-0.6B", "finetune")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.datasets == ["openai/gsm8k"]
    assert card.data.model_name == "sums"
    found = {(r.dataset_type, r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("openai/gsm8k", "test", "accuracy"): 0.75,
        ("openai/gsm8k", "test", "pass@1"): 0.75,
        ("openai/gsm8k", "test", "reverse_kl"): 0.5,
        ("sums", None, "reverse_kl"): 0.25,
    }
    assert {r.metric_name.split(":")[0] for r in card.data.eval_results} == {"gsm8k", "sums"}
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text


def test_a_reader_sees_teacher_evaluations_curve_versions_and_job(tmp_path: Path) -> None:
    text = card_of(tmp_path).text
    assert "`Qwen/Qwen3-0.6B`, distilled from `Qwen/Qwen3-8B` on its own samples, 20 of 20 steps." in text
    assert "| gsm8k | score | 0.25 | 0.75 | 0.7 to 0.8 | – | 0 → 20 |" in text
    assert "| sums | reverse KL, nats per token | 3 | 0.25 |  |  | 0 → 20 |" in text
    rows = text.split("## Curve")[1].split("##")[0].strip().splitlines()
    assert len(rows) == 2 + 10
    assert rows[2] == "| 1 – 2 | 0.75 | 0.5 | 2 |", "the mean of 1 and 1/2 nats, and of rewards and lengths"
    assert "Prompts: `train.jsonl`." in text
    assert "transformers 5" in text.split("## Versions")[1]


@pytest.mark.parametrize(("exported", "last"), [(10, "10"), (15, "14 – 15")])
def test_a_step_that_was_not_measured_has_no_results_of_another(exported: int, last: str, tmp_path: Path) -> None:
    """The tables say of which step they are; metadata of a model must be of its own weights."""
    card = card_of(tmp_path, step=exported)
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
    assert f"{exported} of 20 steps" in card.text
    assert "| 0 → 0 |" in card.text and "0.75 | 0.7" not in card.text
    rows = card.text.split("## Curve")[1].split("##")[0].strip().splitlines()
    assert rows[-1].startswith(f"| {last} |")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: en",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("language: en", {}),
        ("license: {a: 1}", {}),
        ("- a list", {}),
        ("a: [", {}),
    ],
)
def test_the_licence_is_that_of_the_students_card_or_none(given: str, expected: dict[str, str], tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "README.md").write_text(f"---\n{given}\n---\n# The student\n")
    card = card_of(tmp_path)
    found = {name: value for name, value in card.data.to_dict().items() if name.startswith("licen")}
    assert found == expected
    assert ("no card with a licence" in card.text) is (not expected)


def test_a_student_without_a_card_gives_no_licence(tmp_path: Path) -> None:
    assert not any(name.startswith("licen") for name in card_of(tmp_path).data.to_dict())


def test_nothing_that_may_be_a_secret_is_in_the_card(tmp_path: Path) -> None:
    secret, env = "hunter2", [{"name": "HF_TOKEN", "value": "hunter2"}]
    template = {"spec": {"containers": [{"name": "main", "env": env}]}}
    reward = {"source": "http", "url": f"https://rewards.example.com/score?key={secret}#{secret}"}
    card = card_of(
        tmp_path,
        teacher={"model": "Qwen/Qwen3-8B", "engineArgs": [f"--api-key={secret}"], "template": template},
        rollout={"template": template, "headTemplate": template, "promptsPerStep": 8},
        trainer={"template": template},
        podTemplate=template,
        objective={"reward": reward},
        tracking={"wandb": {"project": secret, "entity": secret, "keySecret": secret}},
    )
    assert secret not in str(card)
    assert "url: https://rewards.example.com/score\n" in card.text and "promptsPerStep: 8" in card.text


def test_the_secret_of_an_endpoint_is_not_named(tmp_path: Path) -> None:
    endpoint = {"url": "https://teacher.example.com", "keySecret": {"name": "hunter2", "key": "hunter2"}}
    card = card_of(tmp_path, teacher={"endpoint": endpoint})
    assert "hunter2" not in str(card) and "distilled from `https://teacher.example.com`" in card.text


def test_the_job_of_the_card_is_one_that_the_api_takes(tmp_path: Path) -> None:
    options = {"template": "{a} + {b}", "url": "x?y"}
    card = card_of(tmp_path, data={"prompts": {"reasoningGym": {"task": "chain_sum", "options": options}}})
    text = card.text.split("```yaml\n")[1].split("```")[0]
    job = parse_job(yaml.safe_load(text))
    assert job.spec.schedule.steps == 20 and job.spec.data.all_sources[0].prompts.reasoning_gym is not None
    assert job.spec.data.all_sources[0].prompts.reasoning_gym.options == options


def test_what_a_user_writes_does_not_break_the_card(tmp_path: Path) -> None:
    prompts = {"path": "/inputs/```.jsonl", "systemPrompt": "---\n```yaml\nlicense: mit\n```\n---"}
    card = card_of(tmp_path, data={"prompts": prompts}, student={"model": "/inputs/a`b"})
    assert "license" not in card.data.to_dict()
    [block] = [part for part in card.text.split("````yaml\n")[1:]]
    assert yaml.safe_load(block.split("````")[0])["spec"]["data"]["prompts"] == prompts


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/abc", "Qwen/Qwen3-0.6B"),
        ("/inputs/Qwen3-0.6B", None),
        ("./mine", None),
    ],
)
def test_a_base_model_is_named_where_the_hub_knows_it(model: str, name: str | None) -> None:
    assert hub_id(model) == name
    if name is not None:
        validate_repo_id(name)


@pytest.mark.parametrize(
    ("objective", "papers", "sentence"),
    [
        ({}, {"GKD", "MiniLLM", "PPO"}, "reverse KL divergence, at the sampled token"),
        ({"support": "top-k", "topK": 32}, {"GKD"}, "over the 32 likeliest tokens of the teacher"),
        (
            {"support": "top-k", "divergence": "jsd", "jsdBeta": 0.25},
            {"GKD"},
            "Jensen-Shannon divergence with beta 0.25",
        ),
        ({"reward": {"source": "math"}}, {"GKD", "MiniLLM", "PPO", "GRPO"}, "A task reward, `math`,"),
        (
            {"reward": {"source": "math"}, "advantage": "leave-one-out", "correction": {"importanceWeight": "gated"}},
            {"GKD", "MiniLLM", "PPO", "RLOO", "IcePop"},
            "gated to 0 … 2",
        ),
        (
            {"baseline": "top-k", "discount": 1, "discountedReturn": "sum"},
            {"GKD", "MiniLLM", "PPO", "vOPD"},
            "the discounted sum of the divergence of later ones, discount 1",
        ),
        (
            {"support": "top-k", "divergence": "forward-kl", "entryClip": 0.5},
            {"GKD", "OPSD"},
            "What one token of the vocabulary adds is at most 0.5 nats",
        ),
        (
            {"baseline": "leave-one-out", "forwardKlAboveEntropy": 0.5},
            {"GKD", "MiniLLM", "PPO", "EOPD"},
            "Its mean over the other responses to the prompt is subtracted",
        ),
        (
            {"baseline": "batch-mean"},
            {"GKD", "MiniLLM", "PPO"},
            "Its mean over the other responses of the step is subtracted",
        ),
        (
            {
                "support": "top-k",
                "reward": {"source": "math"},
                "weighting": {"share": 0.5, "prefix": 2, "correct": 1, "wrong": 0.25},
            },
            {"GKD", "PPO", "GRPO", "TIP", "IW-OPD"},
            "Correct responses have the weight 1, others 0.25.",
        ),
        (
            {"support": "top-k", "weighting": {"share": 0.5}, "coefficient": 2, "control": "fixed-advantage"},
            {"control", "PPO"},
            "In its place stands the advantage -0.5 at those 20% of a response's tokens that the student finds least "
            "likely; its coefficient is 2.",
        ),
    ],
)
def test_the_objective_is_told_with_the_papers_it_is_from_and_no_others(
    objective: dict[str, Any], papers: set[str], sentence: str, tmp_path: Path
) -> None:
    text = card_of(
        tmp_path, objective=objective, data={"prompts": {"path": "/inputs/train.jsonl", "answerField": "answer"}}
    ).text
    assert sentence in text
    assert {name for name, (_, number) in PAPERS.items() if f"https://arxiv.org/abs/{number}" in text} == papers


def test_a_control_is_not_told_as_a_distillation(tmp_path: Path) -> None:
    text = card_of(tmp_path, objective={"control": "fixed-advantage"}).text
    assert "trained as the control of a distillation from" in text and "distilled from" not in text


def test_the_reference_is_told_as_what_it_is_and_not_as_a_teacher(tmp_path: Path) -> None:
    teachers = [{"name": "expert", "model": "research/expert"}, {"name": "base", "model": "research/base"}]
    objective = {"reference": "base", "extrapolation": 1.25, "referenceCoefficient": 0.05}
    data = {"prompts": {"path": "/inputs/train.jsonl", "answerField": "answer"}, "defaultTeacher": "expert"}
    text = card_of(tmp_path, teacher=None, teachers=teachers, objective=objective, data=data).text
    assert "distilled from `research/expert` on its own samples" in text
    assert "less those of the reference, `base`, are a reward of weight 1.25" in text
    assert "The reverse KL to the reference, `base`, is added; its coefficient is 0.05" in text
    assert all(f"https://arxiv.org/abs/{number}" in text for number in ("2602.12125", "2604.08527"))


def test_it_is_told_that_a_teacher_scored_text_in_tokens_of_its_own(tmp_path: Path) -> None:
    said = "Responses were scored as text in the tokens of"
    assert said not in card_of(tmp_path / "plain").text
    text = card_of(tmp_path / "alone", teacher={"model": "/m/big", "tokenizer": "/m/big"}).text
    assert f"{said} the teacher, whose tokenizer is not the student's: the divergence is over spans" in text
    teachers = [{"name": "near", "model": "/m/a"}, {"name": "far", "model": "/m/b", "tokenizer": "/m/b"}]
    data = {"prompts": {"path": "/inputs/train.jsonl"}, "defaultTeacher": "near"}
    assert f"{said} `far`, whose" in card_of(tmp_path / "two", teacher=None, teachers=teachers, data=data).text


def test_it_is_told_that_the_teacher_was_asked_another_question(tmp_path: Path) -> None:
    prompts = {"path": "/inputs/train.jsonl", "answerField": "answer"}
    said = "The teacher was asked with what the student does not see"
    assert said not in card_of(tmp_path / "plain", data={"prompts": prompts}).text
    text = card_of(tmp_path / "told", data={"prompts": {**prompts, "teacherPrompt": "{prompt} {answer}"}}).text
    assert said in text and "https://arxiv.org/abs/2601.18734" in text and "teacherPrompt:" in text


@pytest.mark.parametrize("damaged", ["run.json", "metrics.jsonl", "state.json"])
def test_a_model_is_copied_also_where_no_card_can_be_made(
    damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = run_of(manifest_of(tmp_path, evaluation=[GSM8K]), measured=[m for m in MEASURED if m.name == "gsm8k"])
    folder.model.mkdir()
    (folder.model / "config.json").write_text("{}")
    (folder.root / damaged).write_text('{"kind": "evaluation"}\n' * 2)
    assert main(["export", str(folder.root), str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "config.json").exists() and not (tmp_path / "mine" / "README.md").exists()
    assert "without a card" in caplog.text


def test_a_model_that_was_exported_without_a_card_is_copied_with_one(tmp_path: Path) -> None:
    """By a release before cards. A card that somebody has written stays."""
    _, folder = run_of(manifest_of(tmp_path, evaluation=[GSM8K]), measured=[m for m in MEASURED if m.name == "gsm8k"])
    folder.model.mkdir()
    (folder.model / "config.json").write_text("{}")
    assert main(["export", str(folder.root), str(tmp_path / "mine")]) == 0
    assert ModelCard.load(tmp_path / "mine" / "README.md").data.eval_results[0].metric_value == 0.75
    assert not (folder.model / "README.md").exists()
    (folder.model / "README.md").write_text("# Mine")
    assert main(["export", str(folder.root), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_text() == "# Mine"


def test_the_terms_of_a_student_are_downloaded_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(f"huggingface_hub.{snapshot_download.__name__}", download)
    assert model_folder("Qwen/Qwen3-0.6B", "spec.student.model") == tmp_path
    assert {"README.md", "LICENSE*", "NOTICE*", "*.safetensors"} <= set(patterns)
    exported = ["qwen.tiktoken", "spiece.spm", "modeling_own.py", "additional_chat_templates/tool.jinja", "merges.txt"]
    assert [name for name in exported if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_a_run_without_a_step_has_a_card(tmp_path: Path) -> None:
    job, folder = run_of(manifest_of(tmp_path), steps=0)
    assert json.loads((folder.root / "run.json").read_text())["versions"]
    card = ModelCard(card_of_run(job, folder.root, tmp_path, 0))
    assert "0 of 20 steps" in card.text and "## Curve" not in card.text and "## Evaluation" not in card.text
